"""An engine whose failures quote what it was asked, as those of people's own code do."""

from __future__ import annotations

from pathlib import Path

SOURCE = """
from serve.engines.protocol import EngineError, EngineLoad
from serve.engines.replica import PredictiveReplica
from serve.engines.table import EngineEntry


class Quoting:
    async def start(self): ...

    async def stop(self): ...

    def healthy(self):
        return True

    def load(self):
        return EngineLoad(0, 0, 0, 0, 0.0)

    async def predict(self, instance):
        if "mistake" in instance:
            raise ValueError(f"no number: {instance!r}")
        if "engine" in instance:
            raise EngineError(f"the engine cannot read {instance!r}")
        try:
            {}[instance]
        except KeyError as error:
            raise RuntimeError(f"there is no answer to {instance}") from error


def load(setup):
    text = [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    return PredictiveReplica(Quoting(), text, setup.identity, text)


ENGINE = EngineEntry(name="quoting", serves=frozenset({"predictive"}), load="quoting_engine:load")
"""


def write(folder: Path) -> None:
    """Write the engine to `folder` as quoting_engine.py."""
    (folder / "quoting_engine.py").write_text(SOURCE, encoding="utf-8")
