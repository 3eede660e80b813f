"""Which precision is chosen, for machines of many kinds, and that oneDNN sees this one as we do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cluster import precision
from cluster.devices import with_silent
from cluster.precision import Device, cpu, decide, gpu, resolve

AVX2 = frozenset({"avx", "avx2", "fma"})
SKYLAKE = AVX2 | {"avx512f", "avx512bw", "avx512vl"}
COOPER_LAKE = SKYLAKE | {"avx512_vnni", "avx512_bf16"}
SAPPHIRE_RAPIDS = COOPER_LAKE | {"amx_tile", "amx_bf16", "amx_int8"}
GRAVITON_2 = frozenset({"asimd", "asimddp"})
GRAVITON_3 = GRAVITON_2 | {"sve", "bf16"}


@pytest.mark.parametrize(
    ("machine", "flags", "limit", "bf16"),
    [
        ("x86_64", AVX2, "", False),
        ("x86_64", SKYLAKE, "", False),  # torch's own check says yes: oneDNN emulates it
        ("x86_64", COOPER_LAKE, "", True),
        ("x86_64", SAPPHIRE_RAPIDS, "", True),
        ("x86_64", SAPPHIRE_RAPIDS, "AVX512_CORE_BF16", True),
        ("x86_64", SAPPHIRE_RAPIDS, "avx512_core", False),
        ("x86_64", COOPER_LAKE, "AVX512_CORE_VNNI", False),
        ("x86_64", COOPER_LAKE, "AVX2", False),
        ("x86_64", COOPER_LAKE, "AVX512_CORE_AMX", True),  # more than the CPU has
        ("x86_64", COOPER_LAKE, "no-such-limit", True),  # oneDNN ignores what it does not know
        ("x86_64", AVX2, "AVX512_CORE_BF16", False),
        ("x86_64", frozenset(), "", False),  # no /proc/cpuinfo
        ("aarch64", GRAVITON_2, "", False),
        ("aarch64", GRAVITON_3, "", True),
        ("arm64", frozenset(), "", False),  # macOS
    ],
)
def test_cpus(machine: str, flags: frozenset[str], limit: str, bf16: bool) -> None:
    assert cpu(machine, flags, limit).bf16 is bf16


def test_the_reason_names_what_is_missing_or_forbids_it() -> None:
    assert cpu("x86_64", AVX2).reason == "the CPU lacks avx512_bf16 and amx_bf16"
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in cpu("x86_64", COOPER_LAKE, "AVX2").reason


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_gpus(capability: tuple[int, int], bf16: bool) -> None:
    assert gpu(capability).bf16 is bf16


NATIVE, EMULATED = cpu("x86_64", COOPER_LAKE), cpu("x86_64", AVX2)


@pytest.mark.parametrize(
    ("wanted", "devices", "chosen", "warns"),
    [
        ("auto", [NATIVE, NATIVE], "bf16", False),
        ("auto", [EMULATED], "fp32", False),
        ("auto", [NATIVE, EMULATED], "fp32", False),
        ("auto", [], "fp32", False),
        ("bf16", [NATIVE], "bf16", False),
        ("bf16", [NATIVE, EMULATED], "bf16", True),
        ("bf16", [], "bf16", False),
        ("fp32", [NATIVE], "fp32", False),
    ],
)
def test_choice(wanted: precision.Wanted, devices: list[Device], chosen: str, warns: bool) -> None:
    decision = decide(wanted, devices)
    assert decision.precision == resolve(wanted, devices) == chosen
    assert (decision.warning is not None) is warns


def test_nodes_that_differ_are_counted() -> None:
    assert "the nodes differ: on 1 of 2 the CPU lacks" in decide("auto", [NATIVE, EMULATED]).reason


def test_the_first_limit_counts() -> None:
    assert precision.limit({"DNNL_MAX_CPU_ISA": "AVX2"}) == "AVX2"
    assert precision.limit({"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "DEFAULT"}) == "DEFAULT"
    assert precision.limit({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "AVX2"}) == "AVX2"
    assert precision.limit({}) == ""


LIMITS = ("", "AVX512_CORE_BF16", "avx512_core", "AVX2", "no-such-limit")
A_PRODUCT_UNDER_EACH = """
import os, sys, torch
for limit in sys.argv[1:]:
    print("limit:" + limit, flush=True)
    if os.fork() == 0:  # oneDNN reads its limit at the first product
        os.environ["ONEDNN_MAX_CPU_ISA"] = limit
        x = torch.ones(64, 64, dtype=torch.bfloat16)
        torch.nn.functional.linear(x, x)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What oneDNN says of itself under each limit."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    command = (sys.executable, "-c", A_PRODUCT_UNDER_EACH, *LIMITS)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(part.split("\n", 1) for part in done.stdout.split("limit:")[1:])


@pytest.mark.parametrize("limit", LIMITS)
def test_onednn_sees_this_cpu_as_we_do(said: dict[str, str], limit: str) -> None:
    """It names its instruction set at the first product; below AVX-512 torch does not even ask it for one in bf16."""
    named = [line for line in said[limit].splitlines() if ",isa:" in line]
    judged = cpu(platform.machine(), precision.cpu_flags(), limit)
    assert any("bfloat16" in line or "AMX" in line for line in named) is judged.bf16


def test_a_node_that_says_nothing_counts_as_emulating_and_is_named() -> None:
    found = with_silent(["a" * 20, "b" * 20], {"a" * 20: NATIVE})
    chosen = decide("auto", found)
    assert chosen.precision == "fp32"
    assert "1 of 2 node bbbbbbbb did not say what it computes in" in chosen.reason
    assert "node bbbbbbbb" in (decide("bf16", found).warning or "")
