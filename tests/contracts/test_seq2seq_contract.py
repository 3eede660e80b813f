"""sacrebleu and transformers still have what translation relies on."""

from __future__ import annotations

import pytest
import torch

from jobs.tasks import sacrebleu_internals
from serve.engines.seq2seq import positions_internals
from tests.support.contracts import Contract

CHRF = Contract("jobs/tasks/sacrebleu_internals.py", sacrebleu_internals.ENTRIES)
POSITIONS = Contract("serve/engines/seq2seq/positions_internals.py", positions_internals.ENTRIES)


@CHRF.check("sacrebleu.metrics.CHRF._extract_corpus_statistics, _compute_score_from_stats")
def _chrf() -> None:
    from sacrebleu.metrics import CHRF as Metric

    said, meant = ["the cat sat", "a dog"], ["the cat sits", "the dog"]
    parts = [sacrebleu_internals.chrf_counts([one], [other]) for one, other in zip(said, meant, strict=True)]
    assert {len(part) for part in parts} == {sacrebleu_internals.CHRF_COUNTS}
    whole = sacrebleu_internals.chrf_of([sum(column) for column in zip(*parts, strict=True)])
    assert whole == pytest.approx(Metric().corpus_score(said, [meant]).score)


@POSITIONS.check("transformers' embed_positions of decoders (offset, weight)")
def _positions() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**sizes, **layers)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        own = model.get_decoder().embed_positions(ids)
        rows = positions_internals.placed(model)
        assert rows is not None
        rows.rows = torch.tensor([2, 0])
        moved = model.get_decoder().embed_positions(ids[:, :1])
    assert torch.equal(moved[:, 0], own.reshape(-1, 16)[[2, 0]])


@pytest.mark.parametrize("name", CHRF.entries)
def test_chrf(name: str) -> None:
    CHRF.verify(name)


@pytest.mark.parametrize("name", POSITIONS.entries)
def test_positions(name: str) -> None:
    POSITIONS.verify(name)
