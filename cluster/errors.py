"""The one base class of errors that a user can act on: `tandem` prints their message and exits, without a traceback."""


class UserError(Exception):
    """Say what was wrong, the value, and what to do about it.

    Everything that is to reach the user as a sentence derives from this class; whatever else is raised is a defect or
    an accident, and is shown, retried or reported as one. What a class is called or which attributes it has says
    nothing: torch's ProcessExitedException has an `exit_code` too.
    """

    exit_code = 2
