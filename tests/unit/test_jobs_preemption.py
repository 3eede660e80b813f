"""When an announcement is answered by a checkpoint: at once, and once more before the deadline."""

from jobs.driver.preemption import Notices

NOW = 1_000.0


def ms(seconds: float) -> int:
    return int(seconds * 1000)


def test_each_node_of_the_group_is_answered_once_and_called_once_more():
    notices = Notices()
    draining = {"aaaa": ms(NOW + 120), "other": ms(NOW + 5)}
    assert notices.due(draining, ("aaaa", "bbbb"), NOW) == ["node aaaa will be taken away in 120 s"]
    assert notices.due(draining, ("aaaa", "bbbb"), NOW + 60) == []
    assert notices.due(draining, ("aaaa", "bbbb"), NOW + 106) == ["node aaaa goes in 14 s"]
    assert notices.due(draining, ("aaaa", "bbbb"), NOW + 108) == []


def test_a_short_notice_and_one_without_a_deadline_are_answered_once():
    notices = Notices()
    draining = {"aaaa": ms(NOW + 20), "bbbb": 0}
    assert len(notices.due(draining, ("aaaa", "bbbb"), NOW)) == 2
    assert notices.due(draining, ("aaaa", "bbbb"), NOW + 12) == []
