"""The exceptions that tracking shows to users."""

from __future__ import annotations

from cluster.errors import UserError


class TrackingError(UserError):
    """Say what was wrong with a run, a model or the tracking server, and what to do about it."""


class ServerUnreachable(TrackingError):
    """The tracking server gave no answer, or none that says the request is wrong: try again later."""


class UnknownName(ServerUnreachable):
    """The tracking server does not answer to the name that it was reached by, whatever is asked."""


class Refused(TrackingError):
    """The tracking server answered that the request is wrong; `code` is MLflow's error code."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        return type(self), (str(self), self.code)
