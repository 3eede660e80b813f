"""The one base class of errors that a user can act on: `tandem` prints their message and exits, without a traceback."""

from __future__ import annotations

from collections.abc import Callable


class UserError(Exception):
    """Say what was wrong, the value, and what to do about it.

    Everything that is to reach the user as a sentence derives from this class; whatever else is raised is a defect or
    an accident, and is shown, retried or reported as one. What a class is called or which attributes it has says
    nothing: torch's ProcessExitedException has an `exit_code` too.
    """

    exit_code = 2


def check_all(*checks: Callable[[], object]) -> None:
    """Call each of them, and raise what they found wrong as one error, each sentence once.

    Raises:
        UserError: at least one of them raised one.
    """
    found: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(error)
    if len({str(error) for error in found}) > 1:
        raise UserError("\n".join(dict.fromkeys(str(error) for error in found)))
    if found:
        raise found[0]
