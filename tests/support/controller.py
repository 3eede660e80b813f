"""Ray Serve's controller, as a process."""

from __future__ import annotations

from tests.support.members import named


def controller_pid() -> int:
    """Return the pid of the controller of this test's cluster."""
    (controller,) = named("ray::ServeCont")
    pid: int = controller.pid
    return pid
