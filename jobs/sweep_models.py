"""Whether the values of a sweep make models: asked of the task, which may import transformers."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import UserError
from jobs import parents, spec_sweep
from jobs.spec import JobSpec


def check(spec: JobSpec, base: Path) -> None:
    """Refuse values of `model.…` fields with which, all else being as the spec says, no model can be built.

    Combinations of them are for the trials. Any spec that is no sweep's passes.

    Args:
        base: where a task of the user's own lies.

    Raises:
        UserError: there are such values; each is named.
    """
    values, wrong = spec.resolved(), []
    for at, chosen in spec_sweep.probes(values) if spec.phase == "sweep" else ():
        (path, value), *_ = chosen.items()
        if path.startswith("model."):
            try:
                parents.check_architecture(JobSpec.model_validate(spec_sweep.of_trial(values, chosen)), base)
            except UserError as error:
                wrong.append(f"{'.'.join(map(str, at))}: {value!r} makes no model: {error}")
    if wrong:
        raise UserError("\n".join(wrong))
