"""How a replica loads the `seq2seq` engine: what its entry in serve/engines/table.py names."""

from __future__ import annotations

from cluster.errors import UserError
from serve.engines import sampling_defaults
from serve.engines.precision import best_device, dtype_for
from serve.engines.seq2seq.engine import Seq2SeqEngine, Seq2SeqOptions
from serve.engines.seq2seq.replica import TranslatingReplica
from serve.engines.table import ReplicaSetup


def load(setup: ReplicaSetup) -> TranslatingReplica:
    """Load the model of `setup` through its task; `start` makes the replica ready.

    Answers are greedy unless the model's generation config or a request says otherwise.

    Raises:
        UserError: the task is none that reads one text and writes another.
    """
    from jobs import tasks
    from jobs.tasks import seq2seq_models
    from jobs.tasks.seq2seq import Seq2Seq

    task = tasks.get(setup.task).load(setup.directory)
    if not isinstance(task, Seq2Seq):
        raise UserError(f"engine seq2seq serves the task seq2seq and those that derive from it, not {setup.task}")
    device = best_device()
    model = task.load_model(setup.directory, dtype_for(setup.precision, device)).to(device)  # type: ignore[arg-type]  # the table says which it knows
    longest = setup.max_context
    options = Seq2SeqOptions(
        max_source=task.max_source_length if longest is None else longest,
        max_target=task.max_target_length if longest is None else longest,
        max_batch=setup.max_batch,
        threads=setup.threads,
    )
    start = seq2seq_models.start_token(model, task.tokenizer)
    engine = Seq2SeqEngine(model, task.tokenizer, start, seq2seq_models.end_tokens(model, task.tokenizer), options)
    defaults = {"temperature": 0.0, **sampling_defaults.read(setup.directory)}
    inputs = [{**each, "parameters": {"max_tokens": options.max_source}} for each in task.inputs()]
    return TranslatingReplica(engine, setup.identity, defaults, task.prefix, inputs, task.outputs())
