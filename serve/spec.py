"""ServeSpec: what `tandem serve up` reads. Which models, under which names, how many replicas of each, and where.

Only pydantic, the standard library and the table of engines (which imports no more) are imported, so a spec is checked
without Ray, torch or a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.errors import UserError
from cluster.names import Name
from cluster.strict import Strict
from serve import runtime_env
from serve.engines import table
from serve.keys import place
from serve.scaling.settings import DAY_S, Scaled, detail

OLDER_PLACES = ("runner", "compile", "cache_gib")
"""Options of engines that are read beside `engine` too, where they were before engines had options of their own."""


LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Resources(Strict):
    """What Ray reserves for one replica. Threads follow from it: one per CPU, at least one."""

    cpus_per_replica: float = Field(default=1, ge=0, le=10_000)
    """CPUs, also parts of one."""
    gpus_per_replica: float = Field(default=0, ge=0, le=1_000)
    """GPUs: a whole number, or a part of one."""

    @field_validator("gpus_per_replica")
    @classmethod
    def _whole_or_part(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("more than one GPU must be a whole number: Ray shares no part of another one")
        return value


class EngineSpec(BaseModel):
    """What computes: an engine's name, or `{name: torch, cache_gib: 2}` with options of that engine."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = table.AUTO
    """`auto` takes `torch` for tasks that generate text and `task` for the others. `vllm` needs vLLM where the replica
    runs: on the node, or through `runtime_env`. `my_pkg.my_engine:ENGINE` is one of your own, beside the spec."""

    @property
    def options(self) -> dict[str, Any]:
        """The options as they were given."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, dict | EngineSpec):
            raise ValueError("must be an engine's name, or a mapping with `name` and options of that engine")
        return value

    @model_validator(mode="after")
    def _can_be(self) -> EngineSpec:
        try:
            table.check_name(self.name)
        except UserError as error:
            raise ValueError(str(error)) from None
        found = [table.wrong_options(engine, self.options) for engine in table.possible(self.name)]
        if wrong := min(found, key=len, default=[]):
            raise ValidationError.from_exception_data("EngineSpec", [detail(*each) for each in wrong])
        return self


class Wrong(NamedTuple):
    """Something a model's settings ask of an engine that it cannot give, with its place below the model."""

    place: tuple[str | int, ...]
    message: str
    value: Any


class ModelServeSpec(Scaled):
    """One served model."""

    counts_requests: ClassVar[bool] = False

    model: str = Field(min_length=1)
    """`models:/name@alias`, `models:/name/3`, `models:/name` (the newest), a model directory, or the URI of one in a
    store."""
    engine: EngineSpec = EngineSpec()
    """A name (`auto`, `torch`, `vllm`, `task`, `my_pkg.my_engine:ENGINE`), or a mapping of `name` and options."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's runtime environment of this model's replicas: `image_uri`, `pip`, `py_executable` and `env_vars`, but for
    variables that Tandem and Ray depend on. Replicas with one are started anew, not forked, so that all of it acts."""
    precision: Literal["auto", "bf16", "fp32", "int8", "int4"] = "auto"
    """`auto`: bf16 where the replica's CPU or GPU computes in it, else fp32. `int8` and `int4` keep the weights of
    linear layers in so many bits and compute in what `auto` chooses."""
    runner: Literal["auto", "native", "torch"] | None = None
    """The engine's option of this name, also read here."""
    compile: bool | None = None
    """The engine's option of this name, also read here."""
    cache_gib: Annotated[float, Field(gt=0, le=table.MOST_GIB)] | None = None
    """The engine's option of this name, also read here."""
    max_context: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Most tokens of prompt and completion together; the model's own limit when left out."""
    max_batch: int = Field(default=16, ge=1, le=65_536)
    """Sequences one replica works on at the same time."""
    resources: Resources = Resources()
    max_queued: int = Field(default=256, ge=1, le=1_000_000)
    """Requests that may wait for a replica at one gateway; the next gets a 429 with Retry-After."""
    max_queued_per_key: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Of those, how many may be of one key; half of `max_queued` when left out, so that no key fills the queue."""

    @property
    def engine_options(self) -> dict[str, Any]:
        """What the engine is told, from either place."""
        return {**self.engine.options, **self._beside_engine()}

    def wrong_for(self, engine: table.EngineEntry) -> list[Wrong]:
        """List what these settings ask of an engine that it cannot give."""
        beside = ("precision", *self._beside_engine())
        return [
            Wrong(place if place[0] in beside else ("engine", *place), message, value)
            for place, message, value in table.mistakes(engine, self.engine_options, self.precision)
        ]

    def _beside_engine(self) -> dict[str, Any]:
        given = {option: getattr(self, option) for option in OLDER_PLACES}
        return {option: value for option, value in given.items() if value is not None}

    @field_validator("runtime_env")
    @classmethod
    def _may_be_set(cls, value: dict[str, Any]) -> dict[str, Any]:
        wrong = [detail(*mistake) for mistake in runtime_env.mistakes(value)]
        if wrong:
            raise ValidationError.from_exception_data("ModelServeSpec", wrong)
        return value

    @model_validator(mode="after")
    def _suits_an_engine(self) -> ModelServeSpec:
        """Refuse what no engine that this may become can give; the engine itself is settled with the model's task."""
        twice = [Wrong((o,), "also given under `engine`; keep it there", v) for o, v in self._twice().items()]
        found = [self.wrong_for(engine) for engine in table.possible(self.engine.name)]
        wrong = twice or min(found, key=len, default=[])
        if wrong:
            raise ValidationError.from_exception_data("ModelServeSpec", [detail(*each) for each in wrong])
        return self

    def _twice(self) -> dict[str, Any]:
        return {option: value for option, value in self._beside_engine().items() if option in self.engine.options}


class GatewaySpec(Scaled):
    """The HTTP front: no model, no tokenizer."""

    cpus_per_replica: float = Field(default=0, ge=0, le=10_000)
    """0 by default: a gateway mostly waits, and on a small machine each reserved CPU is one replica less."""
    max_body_bytes: PositiveInt = 8 * 1024 * 1024
    """Largest body of a request; a larger one gets a 413."""
    max_prompts: PositiveInt = 128
    """Most prompts in one completions request."""
    max_wait_s: float = Field(default=60, gt=0, le=DAY_S)
    """How long a request may wait for its turn; one that would wait longer is refused at once, with Retry-After."""
    max_request_s: Annotated[float, Field(gt=0, le=DAY_S)] | None = None
    """How long a request may take in all, its stream too; without a limit when left out. Clients may ask for less
    (`x-tandem-timeout-s`)."""
    max_connections: int = Field(default=10_000, ge=1, le=1_000_000)
    """Open connections of one gateway; further ones get a 503 with Retry-After."""

    @model_validator(mode="after")
    def _one_at_least(self) -> GatewaySpec:
        if self.bounds.min == 0:
            nobody = "a gateway that is not there cannot be woken by a request: 1 is the least"
            raise ValidationError.from_exception_data("GatewaySpec", [detail(("replicas", "min"), nobody, 0)])
        return self


class TlsSpec(Strict):
    """Files in PEM form, on the nodes where gateways run."""

    certificate: str = Field(min_length=1)
    """The server's certificate, and behind it those that it was signed with."""
    key: str = Field(min_length=1)
    """Its key, without a password."""


class HttpSpec(Strict):
    """Where the endpoint listens: each gateway by itself, those of one node on the same port."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Loopback unless named otherwise; beyond it `keys` are required."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Exactly this port; when left out, 8000 or the next free one."""
    proxies: Literal["head", "every-node"] = "head"
    """Gateways run on the head node only, or on any node, each of which then listens (behind a load balancer)."""
    tls: TlsSpec | None = None
    """Serve https, with this certificate."""
    slow_reader_s: float = Field(default=60, gt=0, le=DAY_S)
    """A client that leaves an answer unread for so long is cut, and what works on its answer is freed."""


def _store(value: str) -> str:
    try:
        place.check_url(value)
    except UserError as error:
        raise ValueError(str(error).removeprefix("keys: ")) from None
    return value


def _origin(value: str) -> str:
    if value == "*" or re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?", value):
        return value
    raise ValueError('an origin is a scheme, a host in lower case and perhaps a port: "https://app.example", or "*"')


class CorsSpec(Strict):
    """Which web pages may call the endpoint from a browser: cross-origin resource sharing."""

    origins: list[Annotated[str, AfterValidator(_origin)]]
    """`https://app.example` (scheme, host, port; no path), or `"*"` for any. Without `cors`, none."""


class KeysSpec(Strict):
    """Who may call: `tandem serve keys` makes keys, and `tandem serve usage` shows what each has used."""

    required: Literal["auto", "always", "never"] = "auto"
    """`auto`: as soon as `http.host` is not loopback. `never` lets anyone who reaches the address call every model."""
    store: Annotated[str, AfterValidator(_store)] | None = None
    """`postgresql://USER@HOST/DATABASE`, without a password in it; a file in Tandem's home when left out, which one
    machine alone can read."""


class ServeSpec(Strict):
    """The whole of `tandem serve up`."""

    short_forms: ClassVar[Mapping[str, str]] = {"models.*.engine": "name"}
    """Sections that may be written as the value of one key."""

    name: Name = "tandem"
    """The Ray Serve application; its models become `<name>.<model>`."""
    models: dict[Name, ModelServeSpec] = Field(min_length=1)
    """Public model name → what answers under it."""
    http: HttpSpec = HttpSpec()
    cors: CorsSpec = CorsSpec(origins=[])
    keys: KeysSpec = KeysSpec()
    gateway: GatewaySpec = GatewaySpec()
    drain_s: float = Field(default=300, ge=1, le=DAY_S)
    """How long a leaving replica may go on with the streams it has before it is ended."""
    start_timeout_s: float = Field(default=600, gt=0, le=DAY_S)
    """How long `up` waits for every model to be ready."""

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers need a key."""
        loopback = self.http.host in LOOPBACK
        return self.keys.required == "always" or (self.keys.required == "auto" and not loopback)
