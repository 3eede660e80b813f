"""A port belongs to one endpoint: its gateways share it, those of another one are refused."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.front import claim
from serve.front.limits import Limits
from serve.front.server import Server
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
HOLDER = (
    "import sys, time; from serve.front import claim; print(claim.take('h', int(sys.argv[1]), 'a')); time.sleep(60)"
)


def test_processes_of_one_endpoint_share_and_another_is_refused_until_all_are_gone():
    port = free_port()
    first, second = claim.take("h", port, "a"), claim.take("h", port, "a")
    with pytest.raises(OSError, match="in use"):
        claim.take("h", port, "b")
    os.close(first)
    with pytest.raises(OSError, match="in use"):
        claim.take("h", port, "b")
    os.close(second)
    os.close(claim.take("h", port, "b"))


def test_another_address_is_another_claim():
    port = free_port()
    held = [claim.take("h", port, "a"), claim.take("other", port, "b")]
    for each in held:
        os.close(each)


def test_a_claim_ends_with_its_process():
    port = free_port()
    holder = subprocess.Popen([sys.executable, "-u", "-c", HOLDER, str(port)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip().isdigit()
    with pytest.raises(OSError, match="in use"):
        claim.take("h", port, "b")
    holder.kill()
    holder.communicate()
    os.close(claim.take("h", port, "b"))


def test_a_server_does_not_listen_where_another_endpoints_does():
    async def both() -> None:
        port = free_port()
        ours, beside, theirs = (Server(None, "127.0.0.1", port, Limits(), owner=owner) for owner in ("a", "a", "b"))
        await ours.start()
        await beside.start()
        with pytest.raises(OSError, match="in use"):
            await theirs.start()
        await ours.leave(0.1)
        await beside.leave(0.1)
        await theirs.start()
        await theirs.leave(0.1)

    asyncio.run(both())
