"""What a followed job's end is called where its driver could not say so itself."""

import pytest

from jobs.submit import ending

LOG = ", last available logs (truncated to 20,000 chars):\nloss=1"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (f"Job entrypoint command failed with exit code 137{LOG}", "its driver was killed (SIGKILL): by somebody, or"),
        (f"Job entrypoint command failed with exit code 143{LOG}", "its driver was ended by SIGTERM"),
        (f"Job entrypoint command failed with exit code 1{LOG}", "Job entrypoint command failed with exit code 1"),
        ("runtime_env setup failed: no such package", "runtime_env setup failed: no such package"),
        ("Job was intentionally stopped.", "Job was intentionally stopped."),
        ("", ""),
    ],
)
def test_an_end_in_plain_words_without_the_log(message, said):
    assert ending(message).startswith(said)
    assert "loss=1" not in ending(message)
