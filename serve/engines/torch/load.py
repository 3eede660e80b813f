"""How a replica loads the `torch` engine: what its entry in serve/engines/table.py names."""

from __future__ import annotations

from serve.engines import sampling_defaults
from serve.engines.replica import GenerativeReplica
from serve.engines.table import ReplicaSetup, TorchOptions
from serve.engines.torch.torch_engine import TorchEngine


def load(setup: ReplicaSetup) -> GenerativeReplica:
    """Load the model of `setup`; `start` makes the replica ready."""
    options = setup.options
    assert isinstance(options, TorchOptions)
    engine = TorchEngine.from_directory(
        setup.directory,
        precision=setup.precision,  # type: ignore[arg-type]  # the table says which it knows
        runner=options.runner,
        compile=options.compile,
        pooling=options.pooling,
        cache_memory_bytes=None if options.cache_gib is None else int(options.cache_gib * 2**30),
        max_context=setup.max_context,
        max_batch=setup.max_batch,
        threads=setup.threads,
    )
    return GenerativeReplica(engine, setup.identity, sampling_defaults.read(setup.directory), options.tool_format)
