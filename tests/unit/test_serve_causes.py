"""What a model's failure is called: the sentence that was raised, not Ray's way to it."""

import pytest

from serve.deploy.causes import plain

FAILED = (
    "The deployment failed to start 38 times in a row. This may be due to a problem with its constructor or initial "
    "health check failing. See controller logs for details. Error:\n"
    "\x1b[36mray::tiny:engine.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.2, repr=<ServeReplica object>)\n"
    '  File "/lib/concurrent/futures/_base.py", line 456, in result\n'
    "    return self.__get_result()\n"
    "           ^^^^^^^^^^^^^^^^^^^\n"
    "ValueError: the weights\n"
    "During handling of the above exception, another exception occurred:\n"
    '  File "/serve/deploy/model_replica.py", line 60, in __init__\n'
    "    load_replica(model)\n"
    "tracking.errors.TrackingError: no model directory at /models/lm\n"
)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (FAILED, "The deployment failed to start 38 times in a row. "
         "tracking.errors.TrackingError: no model directory at /models/lm"),
        ("The deployments ['engine'] are UNHEALTHY.", "The deployments ['engine'] are UNHEALTHY."),
        ("", ""),
        ('It failed.\n  File "/a.py", line 1\n    f()\n', "It failed."),
    ],
)  # fmt: skip
def test_a_failure_in_a_sentence(message, said):
    assert plain(message) == said
