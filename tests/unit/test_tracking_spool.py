"""The spool and its sender, against a sink that records what it gets and fails on demand."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.waiting import wait_for
from tracking.errors import Refused, ServerUnreachable
from tracking.records import Point, Record, metric_name, read_records
from tracking.spool import Spool, SpoolSender
from tracking.system import SystemSampler


class RecordingSink:
    """Keep what is logged, as a tracking server would; raise while `down`."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.batches: list[int] = []
        self.tags: dict[str, str] = {}
        self.down = False

    def log_points(self, points: Sequence[Point]) -> None:
        if self.down:
            raise ServerUnreachable("down")
        self.points.extend(points)
        self.batches.append(len(points))

    def set_tags(self, tags: dict[str, str]) -> None:
        self.tags.update(tags)

    def steps(self, key: str) -> list[int]:
        return [point.step for point in self.points if point.key == key]


def send_all(directory: Path, sink: RecordingSink) -> int:
    """Run a sender over what is spooled until it is drained, as a driver's whole life would."""
    return SpoolSender(directory, sink, interval_s=0.01, batch_s=0.01).start().stop(10)


def test_everything_spooled_arrives_with_step_value_and_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "rank-0.jsonl")
    spool.append(1, {"loss": 2.5, "lr": 1e-3}, time_ms=1000)
    spool.append(2, {"loss": 2.25}, time_ms=2000)
    sink = RecordingSink()
    assert send_all(tmp_path, sink) == 0
    assert sink.points == [Point("loss", 2.5, 1000, 1), Point("lr", 1e-3, 1000, 1), Point("loss", 2.25, 2000, 2)]


def test_a_partial_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    line = json.dumps({"step": 1, "time_ms": 1, "metrics": {"loss": 1.0}})
    path.write_text(line[:20])
    sink = RecordingSink()
    assert send_all(tmp_path, sink) == 0
    assert sink.points == []
    with path.open("a") as stream:
        stream.write(line[20:] + "\n")
    send_all(tmp_path, sink)
    assert sink.points == [Point("loss", 1.0, 1, 1)]


def test_a_writer_that_died_within_a_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    Spool(path).append(1, {"loss": 1.0})
    with path.open("a") as stream:
        stream.write('{"step": 2, "time_')
    Spool(path).append(3, {"loss": 3.0})
    sink = RecordingSink()
    send_all(tmp_path, sink)
    assert sink.steps("loss") == [1, 3]


def test_several_ranks_and_a_file_that_appears_late(tmp_path: Path) -> None:
    Spool(tmp_path / "rank-0.jsonl").append(1, {"rank0/wait": 1.0})
    sink = RecordingSink()
    sender = SpoolSender(tmp_path, sink, interval_s=0.01, batch_s=0.01).start()
    wait_for(lambda: sink.steps("rank0/wait") == [1])
    Spool(tmp_path / "rank-1.jsonl").append(1, {"rank1/wait": 2.0})
    wait_for(lambda: sink.steps("rank1/wait") == [1])
    assert sender.stop(10) == 0


def test_a_restarted_sender_sends_only_what_is_new(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "rank-0.jsonl")
    spool.append(1, {"loss": 1.0})
    first, second = RecordingSink(), RecordingSink()
    send_all(tmp_path, first)
    spool.append(2, {"loss": 2.0})
    send_all(tmp_path, second)
    assert (first.steps("loss"), second.steps("loss")) == ([1], [2])


def test_a_resumed_run_that_repeats_steps_logs_each_step_once(tmp_path: Path) -> None:
    before, sink = Spool(tmp_path / "rank-0.jsonl"), RecordingSink()
    for step in (1, 2, 3):
        before.append(step, {"loss": float(step)})
    send_all(tmp_path, sink)
    after = Spool(tmp_path / "attempt-2.jsonl")
    for step in (2, 3, 4):
        after.append(step, {"loss": float(step), "new": 0.0})
    send_all(tmp_path, sink)
    assert sink.steps("loss") == [1, 2, 3, 4]
    assert sink.steps("new") == [2, 3, 4]


def test_a_lost_cursor_chooses_the_same_points_again(tmp_path: Path) -> None:
    """Then the server, which keeps one row per (key, value, time, step), has nothing twice."""
    spool, first, second = Spool(tmp_path / "rank-0.jsonl"), RecordingSink(), RecordingSink()
    for step in (1, 2, 1, 2, 3):
        spool.append(step, {"loss": step + time.time()})
    send_all(tmp_path, first)
    (tmp_path / "cursor.json").write_text("")
    send_all(tmp_path, second)
    assert first.points == second.points
    assert len(first.points) == 3


def test_batches_stay_within_the_servers_limit(tmp_path: Path) -> None:
    spool, sink = Spool(tmp_path / "rank-0.jsonl"), RecordingSink()
    for step in range(30):
        spool.append(step, {f"m{i}": 1.0 for i in range(70)})
    spool.append(30, {f"wide{i}": 1.0 for i in range(2500)})
    assert send_all(tmp_path, sink) == 0
    assert sum(sink.batches) == 30 * 70 + 2500
    assert max(sink.batches) <= 1000


def test_numbers_that_are_not_finite_become_a_tag(tmp_path: Path) -> None:
    spool, sink = Spool(tmp_path / "rank-0.jsonl"), RecordingSink()
    spool.append(1, {"loss": math.nan, "norm": math.inf, "lr": 1.0})
    spool.append(2, {"loss": math.nan})
    spool.append(3, {"loss": 1.0})
    send_all(tmp_path, sink)
    assert sink.steps("loss") == [3]
    assert sink.steps("lr") == [1]
    assert sink.tags == {"tandem.not_finite.loss": "nan at step 1", "tandem.not_finite.norm": "inf at step 1"}


def test_an_outage_delays_and_loses_nothing(tmp_path: Path) -> None:
    spool, sink = Spool(tmp_path / "rank-0.jsonl"), RecordingSink()
    seen: list[Record] = []
    sink.down = True
    sender = SpoolSender(tmp_path, sink, interval_s=0.01, batch_s=0.01).start(seen.extend)
    for step in range(5):
        spool.append(step, {"loss": 1.0})
    wait_for(lambda: len(seen) == 5 and sender.last_error is not None)
    assert sender.unsent() == 5
    sink.down = False
    wait_for(lambda: sender.unsent() == 0)
    assert sender.stop(10) == 0
    assert sink.steps("loss") == [0, 1, 2, 3, 4]
    assert [record.step for record in seen] == [0, 1, 2, 3, 4]


def test_stopping_during_an_outage_says_how_much_is_left(tmp_path: Path) -> None:
    sink = RecordingSink()
    sink.down = True
    for step in range(3):
        Spool(tmp_path / "rank-0.jsonl").append(step, {"loss": 1.0})
    assert SpoolSender(tmp_path, sink, interval_s=0.01, batch_s=0.01).start().stop(0.3) == 3
    sink.down = False
    assert send_all(tmp_path, sink) == 0


def test_a_run_that_opens_late_gets_everything(tmp_path: Path) -> None:
    sink, attempts = RecordingSink(), []

    def open_run() -> RecordingSink:
        attempts.append(1)
        if len(attempts) < 3:
            raise ServerUnreachable("not yet")
        return sink

    Spool(tmp_path / "rank-0.jsonl").append(1, {"loss": 1.0})
    sender = SpoolSender(tmp_path, open_run, interval_s=0.01, batch_s=0.01).start()
    wait_for(lambda: sink.steps("loss") == [1])
    assert sender.stop(10) == 0
    assert len(attempts) == 3


def test_batches_keep_their_distance_while_records_are_shown_at_once(tmp_path: Path) -> None:
    spool, sink, seen = Spool(tmp_path / "rank-0.jsonl"), RecordingSink(), list[Record]()
    spool.append(0, {"loss": 1.0})
    sender = SpoolSender(tmp_path, sink, interval_s=0.01, batch_s=3600).start(seen.extend)
    wait_for(lambda: sink.batches == [1])
    spool.append(1, {"loss": 1.0})
    spool.append(2, {"loss": 1.0})
    wait_for(lambda: len(seen) == 3)
    assert sink.batches == [1]
    assert sender.stop(10) == 0
    assert sink.batches == [1, 2]


def test_a_callback_that_raises_stops_nothing(tmp_path: Path) -> None:
    Spool(tmp_path / "rank-0.jsonl").append(1, {"loss": 1.0})
    sink = RecordingSink()
    sender = SpoolSender(tmp_path, sink, interval_s=0.01).start(lambda records: records[1])
    assert sender.stop(10) == 0
    assert sink.steps("loss") == [1]


def test_deferred_calls_are_made_in_order_once_the_server_answers(tmp_path: Path) -> None:
    sink = RecordingSink()

    def note(text: str) -> None:
        sink.log_points([])  # raises while the sink is down
        sink.tags[text] = str(len(sink.tags))

    def refused(_: RecordingSink) -> None:
        raise Refused("no such thing", "INVALID_PARAMETER_VALUE")

    sink.down = True
    sender = SpoolSender(tmp_path, sink, interval_s=0.01, batch_s=0.01).start()
    sender.defer(lambda run: note("first"))
    sender.defer(refused)
    sender.defer(lambda run: note("second"))
    wait_for(lambda: sender.last_error is not None)
    assert sender.unsent() == 3
    sink.down = False
    assert sender.stop(10) == 0
    assert sink.tags == {"first": "0", "second": "1"}


def test_a_full_disk_costs_metrics_and_not_the_run() -> None:
    spool = Spool(Path("/dev/full/nowhere/rank-0.jsonl"))
    spool.append(1, {"loss": 1.0})
    spool.append(2, {"loss": 1.0})
    assert spool.lost == 2


@pytest.mark.parametrize(
    ("given", "taken"),
    [("eval/loss", "eval/loss"), ("a[0]@x", "a_0__x"), ("/abs//x", "abs/x"), ("../up", "_/up"), ("x" * 300, "x" * 250)],
)
def test_metric_names_become_ones_that_the_server_takes(given: str, taken: str) -> None:
    assert metric_name(given) == taken


def test_system_metrics_land_in_the_spool_under_the_nodes_name(tmp_path: Path) -> None:
    sampler = SystemSampler(Spool(tmp_path / "system.jsonl"), node="n1", interval_s=0.05).start()
    wait_for(lambda: len(read_records(tmp_path, {}, 1000)[0]) >= 2)
    sampler.stop()
    record = read_records(tmp_path, {}, 1000)[0][-1]
    assert record.metrics["system/n1/system_memory_usage_megabytes"] > 1
    assert 0 <= record.metrics["system/n1/cpu_utilization_percentage"] <= 100
    assert abs(record.step - time.time()) < 60


@pytest.mark.parametrize(
    "cursor",
    ["{", '{"offsets": 5}', '{"offsets": {"rank-0.jsonl": -4}}', '{"last_step": {"loss": "one"}}', '{"offset": {}}'],
)
def test_a_damaged_cursor_has_everything_sent_again(tmp_path: Path, cursor: str) -> None:
    spool = Spool(tmp_path / "rank-0.jsonl")
    spool.append(1, {"loss": 2.5})
    (tmp_path / "cursor.json").write_text(cursor)
    sink = RecordingSink()
    assert send_all(tmp_path, sink) == 0
    assert sink.steps("loss") == [1]
