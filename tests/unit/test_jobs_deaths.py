"""Who of a group is gone, and whether for memory."""

import os
import subprocess
import sys

from jobs import deaths
from jobs.run_notes import Attempt

ATTEMPT = Attempt("a", 4, 1, True, ("n1", "n1", "n2", "n3"), (11, 12, 21, 31), (5, 5, 0, 0))


def test_a_rank_is_gone_where_its_node_does_not_see_it_any_more():
    assert deaths.gone(ATTEMPT, {"n1": ([11, 12], 5), "n2": ([21], 0), "n3": ([31], 0)}) == {}
    assert deaths.gone(ATTEMPT, {"n1": ([11], 5), "n2": ([21], 0), "n3": ([31], 0)}) == {1: False}
    assert deaths.gone(ATTEMPT, {"n1": ([11], 6), "n2": ([], 0), "n3": ([31], 9)}) == {1: True, 2: False}


def test_of_a_node_that_does_not_answer_nothing_is_known():
    assert deaths.gone(ATTEMPT, {"n2": ([], 1)}) == {2: True}


def test_an_attempt_of_before_tells_no_processes():
    assert deaths.gone(Attempt("a", 1, 1, True, ("n1",)), {"n1": ([], 9)}) == {}


def test_a_process_that_has_ended_and_is_not_fetched_yet_is_gone():
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    ended.stdout.read()
    ended.stdout.close()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    alive, _ = deaths.look([os.getpid(), ended.pid])
    assert alive == [os.getpid()]
    ended.wait()
