"""ServeSpec: what `tandem serve up` reads. Which models, under which names, how many replicas of each, and where.

Only pydantic, the standard library and the table of engines (which imports no more) are imported, so a spec is checked
without Ray, torch or a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from cluster.errors import UserError
from cluster.names import Name
from serve import runtime_env
from serve.engines import table

OLDER_PLACES = ("runner", "compile", "cache_gib")
"""Options of engines that are read beside `engine` too, where they were before engines had options of their own."""


MAX_REPLICAS = 10_000
MAX_REQUESTS = 1_000_000
MAX_TOKENS = 100_000_000
MAX_BODY_BYTES = 2**30
MAX_SECONDS = 7 * 24 * 3600
MAX_UNITS = 4096
"""CPUs or GPUs of one replica. These bounds lie above what any machine has, and below what makes planning hang."""


def _no_bool(value: Any) -> Any:
    """Refuse `true` where a number belongs: pydantic would read it as 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


_Number = BeforeValidator(_no_bool)
Count = Annotated[int, Field(gt=0, le=MAX_REPLICAS), _Number]
Requests = Annotated[int, Field(gt=0, le=MAX_REQUESTS), _Number]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS), _Number]
Units = Annotated[float, Field(ge=0, le=MAX_UNITS), _Number]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Replicas(_Spec):
    """How many replicas, between two bounds, and how much work one of them should have."""

    min: Count = 1
    """So many run also when it is quiet."""
    max: Count = 1
    """So many run at most; fewer where the cluster has no room."""
    target_ongoing: Annotated[float, Field(gt=0, le=MAX_REQUESTS), _Number] | None = None
    """Requests in flight per replica to aim at; half of `max_batch` (16 for a gateway) when left out."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"`max` is {self.max}, less than `min`, which is {self.min}")
        return self


class Resources(_Spec):
    """What Ray reserves for one replica. Threads follow from it: one per CPU, at least one."""

    cpus_per_replica: Units = 1
    """CPUs, also parts of one."""
    gpus_per_replica: Units = 0
    """GPUs, also parts of one."""


def _kind_of_replicas(value: Any) -> str:
    return "Replicas" if isinstance(value, dict | Replicas) else "int"


class Scaled(_Spec):
    """The settings shared by everything that autoscales."""

    replicas: Annotated[
        Annotated[Count, Tag("int")] | Annotated[Replicas, Tag("Replicas")], Discriminator(_kind_of_replicas)
    ] = 1
    """A fixed number, or `{min, max, target_ongoing}`."""
    upscale_delay_s: Seconds = 1.5
    """How long demand must last before replicas are added."""
    downscale_delay_s: Seconds = 30
    """How long it must be quiet before they are removed."""

    @property
    def bounds(self) -> Replicas:
        """The replicas as bounds: a fixed number has min equal to max."""
        if isinstance(self.replicas, Replicas):
            return self.replicas
        return Replicas(min=self.replicas, max=self.replicas)


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
        return self


class Wrong(NamedTuple):
    """Something a model's settings ask of an engine that it cannot give, with its place below the model."""

    place: tuple[str | int, ...]
    message: str
    value: Any


class ModelServeSpec(Scaled):
    """One served model."""

    model: str = Field(min_length=1)
    """`models:/name@alias`, `models:/name/3`, `models:/name` (the newest), or a model directory."""
    engine: EngineSpec = EngineSpec()
    """A name (`auto`, `torch`, `vllm`, `task`, `my_pkg.my_engine:ENGINE`), or a mapping of `name` and options."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's runtime environment of this model's replicas: `{image_uri: …}`, `{pip: […]}`, `{py_executable: …}`,
    `{env_vars: {…}}`. Variables that Ray and Tandem set themselves are refused."""
    precision: Literal["auto", "bf16", "fp32", "int8", "int4"] = "auto"
    """`auto`: bf16 where the replica's CPU or GPU computes in it, else fp32. `int8` and `int4` keep the weights of
    linear layers in so many bits and compute in what `auto` chooses."""
    runner: Literal["auto", "native", "torch"] | None = None
    """The engine's option of this name, also read here."""
    compile: bool | None = None
    """The engine's option of this name, also read here."""
    cache_gib: Annotated[float, Field(gt=0, le=65536), _Number] | None = None
    """The engine's option of this name, also read here."""
    max_context: Annotated[int, Field(gt=0, le=MAX_TOKENS), _Number] | None = None
    """Most tokens of prompt and completion together; the model's own limit when left out."""
    max_batch: Annotated[int, Field(gt=0, le=4096), _Number] = 16
    """Sequences one replica works on at the same time."""
    resources: Resources = Resources()
    max_queued: Requests = 256
    """Requests that may wait for a replica at one gateway; the next gets a 429 with Retry-After."""

    @property
    def target_ongoing(self) -> float:
        return self.bounds.target_ongoing or max(1.0, self.max_batch / 2)

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
        wrong = runtime_env.mistakes(value)
        if wrong:
            raise ValidationError.from_exception_data("ModelServeSpec", [_detail(*each) for each in wrong])
        return value

    @model_validator(mode="after")
    def _suits_an_engine(self) -> ModelServeSpec:
        """Refuse what no engine that this may become can give; the engine itself is settled with the model's task."""
        twice = [Wrong((o,), "also given under `engine`; keep it there", v) for o, v in self._twice().items()]
        found = [self.wrong_for(engine) for engine in table.possible(self.engine.name)]
        wrong = twice or min(found, key=len, default=[])
        if wrong:
            raise ValidationError.from_exception_data("ModelServeSpec", [_detail(*each) for each in wrong])
        return self

    def _twice(self) -> dict[str, Any]:
        return {option: value for option, value in self._beside_engine().items() if option in self.engine.options}


def _detail(place: tuple[str | int, ...], message: str, value: Any) -> InitErrorDetails:
    problem = PydanticCustomError("engine_setting", "{message}", {"message": message})
    return InitErrorDetails(type=problem, loc=place, input=value)


class GatewaySpec(Scaled):
    """The HTTP front: no model, no tokenizer."""

    cpus_per_replica: Units = 0
    """0 by default: a gateway mostly waits, and on a small machine each reserved CPU is one replica less."""
    max_body_bytes: Annotated[int, Field(gt=0, le=MAX_BODY_BYTES), _Number] = 8 * 1024 * 1024
    """Largest body of a request; a larger one gets a 413."""
    max_prompts: Requests = 128
    """Most prompts in one completions request."""


class HttpSpec(_Spec):
    """Where the endpoint listens. One address for the whole cluster: Ray Serve has one HTTP setting."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Loopback unless named otherwise. The endpoint has no authentication of its own yet."""
    port: Annotated[int, Field(ge=1, le=65535), _Number] | None = None
    """Exactly this port; when left out, 8000 or the next free one."""
    proxies: Literal["head", "every-node"] = "head"
    """Listen on the head node only, or on every node with a replica (behind a load balancer)."""


class ServeSpec(_Spec):
    """The whole of `tandem serve up`."""

    short_forms: ClassVar[Mapping[str, str]] = {"models.*.engine": "name"}
    """Sections that may be written as the value of one key."""

    name: Name = "tandem"
    """The Ray Serve application; its models become `<name>.<model>`."""
    models: dict[Name, ModelServeSpec] = Field(min_length=1)
    """Public model name → what answers under it."""
    http: HttpSpec = HttpSpec()
    gateway: GatewaySpec = GatewaySpec()
    drain_s: Annotated[float, Field(ge=1, le=MAX_SECONDS), _Number] = 300
    """How long a leaving replica may go on with the streams it has before it is ended."""
    start_timeout_s: Annotated[float, Field(gt=0, le=MAX_SECONDS), _Number] = 600
    """How long `up` waits for every model to be ready."""
