"""Times by measured rates, replicas, and what is kept of a machine; each worked out by hand beside it."""

import dataclasses

import pytest

from cluster.errors import UserError
from jobs.plan import calibrate, rates, serving, speed
from jobs.plan.facts import Decoder, Facts
from jobs.plan.rates import Rates
from jobs.plan.setting import Setting

DECODER = Decoder(2, 64, 64, 32, 96, True, True, 300)
HEAD = 64 * 300
FACTS = Facts("X", 100_000, 100_000, HEAD, 320, HEAD, DECODER, small=100_000, tensors=21)
RATES = Rates(
    kind="a CPU",
    precision="fp32",
    threads=1,
    workers=2,
    process_bytes=300 << 20,
    engine_bytes=30 << 20,
    layers=[[64, 128, 1e9], [64, 512, 2e9], [256, 128, 3e9], [256, 512, 4e9]],
    products=[[64, 5e9], [256, 6e9]],
    attention=[[128, 1e9], [512, 2e9]],
    logits_per_s=1e8,
    updated_per_s=1e7,
    bandwidth=1e10,
    overhead_s=[0.0, 1e-5, 2e-5, 1e-3],
    reduced_per_s=1e9,
    gathered_per_s=2e9,
    collective_s=1e-4,
)


def setting(stage: int, **more) -> Setting:
    return Setting(stage, "none", "fp32", **{"world_size": 1, "on_gpu": False, "tokens": 256, **more})  # type: ignore[arg-type]


def test_a_rate_lies_on_a_line_between_the_measured_ones_and_is_the_last_beyond():
    assert rates.at([(1, 10.0), (100, 30.0)], 10) == pytest.approx(20)
    assert [rates.at([(1, 10.0), (100, 30.0)], x) for x in (0.5, 1, 100, 1e6)] == [10, 10, 30, 30]
    assert rates.of_layers(RATES, 128, 256) == pytest.approx((1.5e9 + 3.5e9) / 2)


def test_the_time_of_a_step_by_hand():
    found = speed.step(FACTS, setting(0, micro_batches=3), 128, RATES)
    layers = 6 * (100_000 - 2 * HEAD) * 256 / 1.5e9
    attention = 12 * 2 * 64 * 128 * 256 / 1e9
    head = 6 * HEAD * 256 / 5e9
    assert found.compute_s == pytest.approx(3 * (layers + attention + head + 256 * 300 / 1e8))
    assert found.optimizer_s == pytest.approx(0.01)
    assert found.communication_s == 0
    assert found.all_s == pytest.approx(sum(dataclasses.asdict(found).values()))


def test_two_ranks_halve_the_update_and_pay_for_it():
    alone, together = (speed.step(FACTS, setting(2, world_size=world), 128, RATES) for world in (1, 2))
    assert together.optimizer_s == alone.optimizer_s / 2
    assert together.communication_s == pytest.approx(400_000 / 1e9 + 400_000 / 2e9)
    eight = speed.communication_s(FACTS, setting(2, world_size=8), RATES)
    assert eight == pytest.approx(together.communication_s * 2 * 7 / 8)


def test_stage_3_gathers_twice_for_each_micro_batch():
    once, twice = (
        speed.communication_s(FACTS, setting(3, world_size=2, micro_batches=count), RATES) for count in (1, 2)
    )
    assert once == pytest.approx(800_000 / 2e9 + 200_000 / 1e9 + 3 * 21 * 1e-4)
    assert twice == 2 * once


def test_computing_again_costs_another_pass_of_the_layers_alone():
    plain, again = (speed.passes_s(FACTS, DECODER, setting(0, checkpointing=on), 128, RATES) for on in (False, True))
    layers = 6 * (100_000 - 2 * HEAD) * 256 / 1.5e9 + 12 * 2 * 64 * 128 * 256 / 1e9
    assert again - plain == pytest.approx(layers / 3)


def test_of_no_transformer_no_time_is_told():
    assert speed.step(dataclasses.replace(FACTS, decoder=None), setting(0), 128, RATES) is None


def test_the_nearest_number_of_workers_counts_and_no_other_kind():
    known = [dataclasses.replace(RATES, workers=workers) for workers in (1, 2)]
    assert rates.choose(known, "a CPU", "fp32", 1, 4).workers == 2
    assert rates.choose(known, "a CPU", "fp32", 1, 1).workers == 1
    for other in (("b", "fp32", 1), ("a CPU", "bf16", 1), ("a CPU", "fp32", 2)):
        assert rates.choose(known, *other, 2) is None


def test_what_is_kept_is_found_again_and_the_newest_counts(tmp_path):
    rates.keep(tmp_path / "new", RATES)
    rates.keep(tmp_path / "new", dataclasses.replace(RATES, workers=1))
    rates.keep(tmp_path / "new", dataclasses.replace(RATES, bandwidth=7.0))
    found = rates.kept(tmp_path / "new")
    assert [(each.workers, each.bandwidth) for each in found] == [(1, 1e10), (2, 7.0)]
    assert rates.of_layers(found[0], 128, 256) == rates.of_layers(RATES, 128, 256)


def test_a_damaged_calibration_is_refused_by_name(tmp_path):
    (tmp_path / rates.FILE).write_text('{"kinds": "none"}')
    with pytest.raises(UserError, match=r"calibration.json is damaged.*--calibrate"):
        rates.kept(tmp_path)


def test_two_workers_are_measured_where_there_are_cores_for_them():
    assert [calibrate.worlds(cores, threads) for cores, threads in ((1, 1), (2, 1), (2, 2), (8, 4))] == [
        [1], [1, 2], [1], [1, 2]
    ]  # fmt: skip


# -- replicas --------------------------------------------------------------------------------------------------------

SERVER = serving.Server(memory_bytes=10**9, bandwidth=1e9, flops=1e12, width=2)
CACHE = 2 * 2 * 2 * 32 * 1000  # of a user: keys and values, 2 bytes, 2 layers, 32 wide, 1,000 tokens


def test_replicas_by_bandwidth():
    """A step of 1/20 s reads 50 MB: 200 kB of weights and 194 times 256 kB of keys and values."""
    found = serving.replicas(FACTS, SERVER, serving.Demand(1000, 20, 1000))
    users = int((1e9 / 20 - 200_000) / CACHE)
    assert (found.users_of_each, found.limit) == (users, "bandwidth")
    assert found.count == -(-1000 // users)
    assert found.fastest == pytest.approx(1e9 / (200_000 + CACHE))


def test_replicas_by_memory_and_by_flops():
    small = dataclasses.replace(SERVER, memory_bytes=10**7)
    assert serving.replicas(FACTS, small, serving.Demand(1000, 20, 1000)).limit == "memory"
    slow = dataclasses.replace(SERVER, flops=1e7)
    found = serving.replicas(FACTS, slow, serving.Demand(1000, 1, 1000))
    flops = 2 * (100_000 - HEAD) + 4 * 2 * 64 * 1000
    assert (found.users_of_each, found.limit) == (int(1e7 / flops), "FLOP/s")


def test_a_rate_that_one_user_alone_does_not_get_has_no_number_of_replicas():
    found = serving.replicas(FACTS, SERVER, serving.Demand(10, 10_000, 1000))
    assert (found.count, found.users_of_each) == (None, 0)
    assert found.fastest < 10_000
