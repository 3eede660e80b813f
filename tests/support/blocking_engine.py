"""An engine that blocks its replica's event loop when it is told to, once: what a fault test of serving serves."""

from __future__ import annotations

from pathlib import Path

BLOCKS = 255
"""An image whose first pixel has this value blocks whoever answers it."""
SOURCE = """
import os
import time
from pathlib import Path

from serve.engines.protocol import EngineLoad
from serve.engines.replica import PredictiveReplica
from serve.engines.table import EngineEntry


class Blocking:
    async def start(self): ...

    async def stop(self): ...

    def healthy(self):
        return True

    def load(self):
        return EngineLoad(0, 0, 0, 0, 0.0)

    async def predict(self, instance):
        if int(instance.flatten()[0]) == {blocks} and first_time():
            time.sleep(3600)
        return {{"sum": int(instance.sum())}}


def first_time():
    try:
        os.close(os.open("{marker}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def load(setup):
    from jobs import tasks

    inputs = tasks.get(setup.task).load(setup.directory).inputs()
    inputs[0].pop("parameters")
    return PredictiveReplica(Blocking(), inputs, setup.identity)


ENGINE = EngineEntry(name="blocking", serves=frozenset({{"predictive"}}), load="blocking_engine:load")
"""


def write(folder: Path) -> Path:
    """Write the engine to `folder` as blocking_engine.py; return the file that appears when it has blocked."""
    marker = folder / "blocked"
    (folder / "blocking_engine.py").write_text(SOURCE.format(blocks=BLOCKS, marker=marker), encoding="utf-8")
    return marker
