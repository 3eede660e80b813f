"""The error a user can act on: `tandem` prints its message and exits, without a traceback."""


class UserError(Exception):
    """Say what was wrong, the value, and what to do about it."""

    exit_code = 2
