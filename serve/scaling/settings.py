"""How a spec says that something scales: `replicas`, and the two delays."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from cluster.strict import Strict

ReplicaCount = Annotated[int, Field(ge=1, le=10_000)]
DAY_S = 86_400.0
DOES_NOTHING = (
    "does nothing where the number of replicas is fixed: leave it out, or write `replicas: {min: 1, max: 2}` to scale"
)


NO_TARGET = (
    "does nothing for a model: its replicas are counted by the tokens that arrive and wait, against the speed that "
    "they have shown: leave it out; `max_batch` says how many sequences one replica works on at the same time"
)


class Replicas(Strict):
    """How many replicas, between two bounds."""

    min: Annotated[int, Field(ge=0, le=10_000)] = 1
    """So many run also when it is quiet. 0: a model without requests for `downscale_delay_s` has none, and the next
    request, which waits for it, starts one. A gateway has one at least."""
    max: ReplicaCount = 1
    """So many run at most; fewer where the cluster has no room."""
    target_ongoing: Annotated[float, Field(gt=0, le=65_536)] | None = None
    """Open requests per replica of a gateway to aim at; 64 when left out. Refused for a model."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"`max` is {self.max}, less than `min`, which is {self.min}")
        return self


class Scaled(Strict):
    """The settings shared by everything that autoscales."""

    counts_requests: ClassVar[bool] = True
    """Whether replicas are counted by requests, so that `target_ongoing` acts."""

    replicas: ReplicaCount | Replicas = 1
    """A fixed number, or `{min, max}`."""
    upscale_delay_s: float = Field(default=1.5, ge=0, le=DAY_S)
    """How long more replicas must be needed before they are added; the first one after none does not wait."""
    downscale_delay_s: float = Field(default=30, ge=0, le=DAY_S)
    """How long fewer must be enough before they are removed; longer by itself where load comes and goes."""

    @model_validator(mode="after")
    def _scaling_scales(self) -> Scaled:
        """Refuse what would do nothing: how to scale a fixed number, and requests to aim at where tokens count."""
        wrong = []
        delays = ("upscale_delay_s", "downscale_delay_s")  # a spec that was written out whole has the defaults
        if not self.scales:
            idle = [each for each in delays if getattr(self, each) != type(self).model_fields[each].default]
            wrong = [detail((each,), DOES_NOTHING, getattr(self, each)) for each in idle]
        if (aim := self.bounds.target_ongoing) is not None and not (self.scales and self.counts_requests):
            wrong.append(
                detail(("replicas", "target_ongoing"), DOES_NOTHING if self.counts_requests else NO_TARGET, aim)
            )
        if wrong:
            raise ValidationError.from_exception_data(type(self).__name__, wrong)
        return self

    @property
    def scales(self) -> bool:
        """Whether the number of replicas may change."""
        return self.bounds.min < self.bounds.max

    @property
    def at_start(self) -> int:
        """Replicas that `up` waits for: one also where there may be none, since only a replica shows that it can be."""
        return max(1, self.bounds.min)

    @property
    def bounds(self) -> Replicas:
        """The replicas as bounds: a fixed number has min equal to max."""
        if isinstance(self.replicas, Replicas):
            return self.replicas
        return Replicas(min=self.replicas, max=self.replicas)


def detail(place: tuple[str | int, ...], message: str, value: Any) -> InitErrorDetails:
    """Return a mistake of a spec at its place, as pydantic collects them."""
    problem = PydanticCustomError("engine_setting", "{message}", {"message": message})
    return InitErrorDetails(type=problem, loc=place, input=value)
