"""The gateway on one host, replicas on two others, and one of these is cut off while fifty answers stream."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import fifty_streams, hosts, hosts_cluster, tiny_models
from tests.support.fault_runs import wait_for
from tests.support.hosts import Host, Hosts
from tests.support.hosts_cluster import Cluster

HIDDEN = 192


@dataclass
class Served:
    """An endpoint over three hosts."""

    hosts: Hosts
    cluster: Cluster
    url: str

    def running(self) -> int:
        """Return how many replicas answer, as `tandem serve status` has it."""
        told = json.loads(self.cluster.tandem("serve", "status", "--json", check=False).stdout)
        return int(told["models"]["tiny"]["replicas"]["running"])

    def begin(self, name: str) -> tuple[subprocess.Popen[str], Path]:
        """Start all streams on the head's host; return the process, and the file that is there once all stream."""
        host = self.hosts[0]
        flag = f"/root/{name}"
        process = host.start(sys.executable, "-m", "tests.support.fifty_streams", self.url, flag)
        return process, host.path(flag)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    hosts.need()
    with hosts.up(3) as three:
        tiny_models.language_model(three.folder / "shared" / "model", 1, context=512, hidden=HIDDEN)
        cluster = hosts_cluster.start(three, head_cpus=0)
        three[0].path("/root/serve.yaml").write_text(yaml.safe_dump(spec()))
        told = json.loads(cluster.tandem("serve", "up", "/root/serve.yaml", "--json").stdout)
        yield Served(three, cluster, told["endpoint"])


def spec() -> dict[str, Any]:
    tiny = {"model": "/shared/model", "replicas": 2, "precision": "fp32", "max_batch": 32}
    return {"models": {"tiny": tiny}, "drain_s": 60, "start_timeout_s": 120}


def test_a_replicas_host_that_is_cut_off_cuts_no_stream(served: Served) -> None:
    undisturbed = ended(*served.begin("undisturbed"))
    assert [text.error for text in undisturbed if text.error] == []
    assert all(replicas_on(host) for host in served.hosts[1:]), "a replica on each of two hosts"
    victim = served.hosts[2]
    process, streaming = served.begin("cut")
    wait_for(streaming.exists, "streams")
    served.hosts.cut(victim)
    texts = ended(process, streaming)
    assert fifty_streams.wrong(texts, undisturbed) == []
    gaps = sorted(text.longest_gap_s for text in texts)
    print(f"longest gap of a stream: {gaps[-1]:.1f} s; streams with a gap above 5 s: {sum(gap > 5 for gap in gaps)}")
    before = replicas_on(victim)
    served.hosts.mend(victim)
    mended = time.monotonic()
    wait_for(lambda: served.running() == 2, "a second replica", 120)
    assert not before & replicas_on(victim), "what was cut off has ended"
    print(f"two replicas again {time.monotonic() - mended:.1f} s after the mend")


def replicas_on(host: Host) -> set[str]:
    return set(host.run("pgrep", "-f", "^ray::ServeReplica:tandem.tiny", check=False).stdout.split())


def ended(process: subprocess.Popen[str], streaming: Path) -> list[fifty_streams.Text]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert streaming.exists()
    return fifty_streams.read(out)
