"""What a Ray task returned, or the error for the user that it raised, as it was raised."""

from __future__ import annotations

from typing import Any

from cluster.errors import UserError


def result_of(reference: Any) -> Any:
    """Wait for a task and return its result.

    Raises:
        UserError: the task raised it; Ray's own wrapping is taken off.
        ray.exceptions.RayError: whatever else went wrong.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
