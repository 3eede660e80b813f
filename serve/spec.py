"""ServeSpec: what `tandem serve up` reads. Which models, under which names, how many replicas of each, and where.

Only pydantic and the standard library are imported, so a spec is checked without Ray, torch or a cluster.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from cluster.names import Name


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Replicas(_Spec):
    """How many replicas, between two bounds, and how much work one of them should have."""

    min: PositiveInt = 1
    """So many run also when it is quiet."""
    max: PositiveInt = 1
    """So many run at most; fewer where the cluster has no room."""
    target_ongoing: PositiveFloat | None = None
    """Requests in flight per replica to aim at; half of `max_batch` (16 for a gateway) when left out."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"`max` is {self.max}, less than `min`, which is {self.min}")
        return self


class Resources(_Spec):
    """What Ray reserves for one replica. Threads follow from it: one per CPU, at least one."""

    cpus_per_replica: float = Field(default=1, ge=0)
    """CPUs, also parts of one."""
    gpus_per_replica: float = Field(default=0, ge=0)
    """GPUs, also parts of one."""


class Scaled(_Spec):
    """The settings shared by everything that autoscales."""

    replicas: PositiveInt | Replicas = 1
    """A fixed number, or `{min, max, target_ongoing}`."""
    upscale_delay_s: float = Field(default=1.5, ge=0)
    """How long demand must last before replicas are added."""
    downscale_delay_s: float = Field(default=30, ge=0)
    """How long it must be quiet before they are removed."""

    @property
    def bounds(self) -> Replicas:
        """The replicas as bounds: a fixed number has min equal to max."""
        if isinstance(self.replicas, Replicas):
            return self.replicas
        return Replicas(min=self.replicas, max=self.replicas)


class ModelServeSpec(Scaled):
    """One served model."""

    model: str = Field(min_length=1)
    """`models:/name@alias`, `models:/name/3`, `models:/name` (the newest), or a model directory."""
    engine: Literal["auto", "torch", "vllm", "task"] = "auto"
    """`auto` takes `torch` for tasks that generate text and `task` for the others. `vllm` needs vLLM where the replica
    runs: on the node, or through `runtime_env`."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's runtime environment of this model's replicas: `{image_uri: …}`, `{pip: […]}`, `{env_vars: {…}}`."""
    precision: Literal["auto", "bf16", "fp32", "int8", "int4"] = "auto"
    """`int8` and `int4` keep the weights of linear layers in so many bits and compute in bf16."""
    runner: Literal["auto", "native", "torch"] = "auto"
    """What the `torch` engine computes with: `native` kernels on x86 CPUs (bf16, int8, int4), `torch` for the rest."""
    compile: bool = False
    """torch.compile the model of the `torch` runner. Its start takes a minute, which is logged, and on CPUs its steps
    were not faster."""
    cache_gib: PositiveFloat | None = None
    """Most memory for keys and values in one replica; half of what is free at most when left out."""
    max_context: PositiveInt | None = None
    """Most tokens of prompt and completion together; the model's own limit when left out."""
    max_batch: PositiveInt = 16
    """Sequences one replica works on at the same time."""
    resources: Resources = Resources()
    max_queued: PositiveInt = 256
    """Requests that may wait for a replica at one gateway; the next gets a 429 with Retry-After."""

    @property
    def target_ongoing(self) -> float:
        return self.bounds.target_ongoing or max(1.0, self.max_batch / 2)


class GatewaySpec(Scaled):
    """The HTTP front: no model, no tokenizer."""

    cpus_per_replica: float = Field(default=0, ge=0)
    """0 by default: a gateway mostly waits, and on a small machine each reserved CPU is one replica less."""
    max_body_bytes: PositiveInt = 8 * 1024 * 1024
    """Largest body of a request; a larger one gets a 413."""
    max_prompts: PositiveInt = 128
    """Most prompts in one completions request."""


class HttpSpec(_Spec):
    """Where the endpoint listens. One address for the whole cluster: Ray Serve has one HTTP setting."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Loopback unless named otherwise. The endpoint has no authentication of its own yet."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Exactly this port; when left out, 8000 or the next free one."""
    proxies: Literal["head", "every-node"] = "head"
    """Listen on the head node only, or on every node with a replica (behind a load balancer)."""


class ServeSpec(_Spec):
    """The whole of `tandem serve up`."""

    name: Name = "tandem"
    """The Ray Serve application; its models become `<name>.<model>`."""
    models: dict[Name, ModelServeSpec] = Field(min_length=1)
    """Public model name → what answers under it."""
    http: HttpSpec = HttpSpec()
    gateway: GatewaySpec = GatewaySpec()
    drain_s: float = Field(default=300, ge=1)
    """How long a leaving replica may go on with the streams it has before it is ended."""
    start_timeout_s: float = Field(default=600, gt=0)
    """How long `up` waits for every model to be ready."""
