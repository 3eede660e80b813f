"""Vectors of images: their losses and metrics against their definitions, what is kept, who is recognised."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from cluster.errors import UserError
from jobs import enrol
from jobs.tasks import TaskError, get, verification
from jobs.tasks.image_embedding import ImageEmbedding
from jobs.tasks.metric_learning import arcface, to_centres, triplets
from tracking import manifest


def unit(count: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def faces(identities: int = 3, takes: int = 6, seed: int = 0) -> list[dict[str, object]]:
    """Each identity is a pattern, of which every take has some noise."""
    patterns = np.random.default_rng(7).integers(0, 2, (identities, 8, 8)) * 180
    draw = np.random.default_rng(seed)
    return [
        {"image": (patterns[i] + draw.integers(0, 60, (8, 8))).astype(np.uint8), "label": f"p{i}"}
        for _ in range(takes)
        for i in range(identities)
    ]


def fitted(examples: list[dict[str, object]], **options: object) -> ImageEmbedding:
    task = get("image-embedding")(options)
    task.fit(task.observe(examples))
    return task  # type: ignore[return-value]


def batch_of(task: ImageEmbedding, examples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    return task.collate({k: v for k, v in task.encode(examples).items() if k not in task.counted})


def test_arcface_is_the_cross_entropy_with_the_margin_added_to_the_own_angle() -> None:
    vectors, centres, labels = unit(5), unit(4, seed=1), torch.tensor([0, 3, 1, 1, -1])
    found = arcface(vectors, centres, labels, margin=0.5, scale=8)
    for row in range(4):
        angles = [math.acos(float(vectors[row] @ centre)) for centre in centres]
        logits = [8 * math.cos(angle + 0.5 * (index == labels[row])) for index, angle in enumerate(angles)]
        expected = math.log(sum(map(math.exp, logits))) - logits[labels[row]]
        assert float(found[row]) == pytest.approx(expected, rel=1e-4)
    assert found[4] == 0


def test_arcface_falls_with_the_cosine_also_beyond_a_half_turn() -> None:
    centres = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # the second is as far from all
    angles = torch.linspace(2.3, math.pi - 0.01, 50)
    vectors = torch.stack([angles.cos(), angles.sin(), 0 * angles], 1)
    losses = arcface(vectors, centres, torch.zeros(50, dtype=torch.long), 0.5, 8)
    assert (losses.diff() > 0).all()


def test_an_image_is_compared_with_its_own_centre_and_the_nearest_other() -> None:
    centres = torch.eye(3)
    vectors = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.6, 0.8]])
    found = to_centres(vectors, centres, torch.tensor([0, -1]))
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.6], [-2.0, 0.8]]))


def test_triplets_are_the_hardest_of_the_batch() -> None:
    vectors, identities = unit(12), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 1, 0])
    found = triplets(vectors, identities, margin=0.3)
    for row in range(12):
        distance = [float((vectors[row] - other).norm()) for other in vectors]
        own = [d for i, d in enumerate(distance) if i != row and identities[i] == identities[row]]
        others = [d for i, d in enumerate(distance) if identities[i] != identities[row]]
        expected = max(0.0, 0.3 + max(own) - min(others)) if own else 0.0
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)
    parts = [triplets(vectors, identities, 0.3, start, start + 5) for start in range(0, 12, 5)]
    torch.testing.assert_close(torch.cat(parts), found)


def test_pairs_give_the_auc_and_the_rates_of_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BLOCK", 7)  # several blocks of few rows
    identities = np.arange(40) % 6
    vectors = (unit(40) + 0.8 * unit(6, seed=3)[identities]).numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = verification.Pairs.of(vectors, identities)
    alike, same = zip(
        *((float(vectors[a] @ vectors[b]), identities[a] == identities[b])
          for a, b in itertools.combinations(range(40), 2)), strict=True
    )  # fmt: skip
    assert pairs.auc() == pytest.approx(roc_auc_score(same, alike), abs=1e-4)
    best = max(
        (np.mean(np.array(alike)[np.array(same)] >= t) + np.mean(np.array(alike)[~np.array(same)] < t)) / 2
        for t in alike
    )
    assert pairs.accuracy(pairs.threshold()) == pytest.approx(best, abs=1e-3)
    nearest = vectors @ vectors.T - 9 * np.eye(40)
    assert verification.recall_at_1(vectors, identities) == np.mean(identities[nearest.argmax(1)] == identities)


def test_a_threshold_that_nothing_was_measured_for_is_told() -> None:
    both = {"threshold": 0.3, "identity_threshold": 0.4}
    task, other = fitted(faces()), fitted(faces(), loss="triplet")
    assert task.verdict(both) == other.verdict({"threshold": 0.3}) == []
    (said,) = task.verdict({"identity_threshold": 0.4})
    assert said.startswith("threshold (of the answer `same`) could not be measured")
    assert "answers by a similarity of 0.5," in said
    assert "threshold (of the answer `same`) and identity_threshold (of the answer `identity`)" in task.verdict({})[0]


def test_verification_tries_the_threshold_on_rows_it_was_not_chosen_by() -> None:
    """Vectors that say nothing of identities: a threshold chosen on the pairs it is tried on would seem to."""
    rates = [verification.accuracy(unit(40, seed=seed).numpy(), np.arange(40) // 2 % 10) for seed in range(10)]
    assert 0.4 < np.mean(rates) < 0.56


def test_metrics_that_rows_have_no_pairs_for_are_left_out() -> None:
    task = fitted(faces())
    sums = {"loss": 2.0, "known": 1, "targets": 1, "margin": 0.5, "embedding": unit(1).numpy(), "identity": np.zeros(1)}
    sums["to_centres"] = np.array([[0.8, 0.2]])
    assert task.summarise(sums) == {"loss": 2.0, "identity_threshold": pytest.approx(0.5, abs=1e-3)}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("embedding-cnn", {"width": 8}), ("embedding-vit", {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1})],
)
def test_a_network_saves_loads_and_answers_the_same(architecture: str, config: dict, tmp_path: Path) -> None:
    task = fitted(faces())
    task.check_model(architecture, config)
    model = task.build(architecture, config).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("image-embedding").load(tmp_path)
    asked = [task.instance(each) for each in faces()[:4]]
    before, after = task.predict(model, asked), again.predict(again.load_model(tmp_path), asked)
    for one, other in zip(before, after, strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-6)
        assert np.linalg.norm(one["embedding"]) == pytest.approx(1, abs=1e-5)
        assert one["identity"] == other["identity"]


def test_it_learns_to_know_and_to_tell_apart_whom_it_has_seen() -> None:
    task = fitted(faces(), shift=0.05)
    torch.manual_seed(0)
    model = task.build("embedding-cnn", {"width": 8, "embedding_size": 16}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = batch_of(task, faces())
    for _ in range(40):
        optimizer.zero_grad()
        loss, count = task.loss(model, batch)
        (loss / count).backward()
        optimizer.step()
    model.eval()
    new = faces(takes=2, seed=9)
    answers = task.predict(model, [{"image": each["image"], "other": new[0]["image"]} for each in new])
    assert [answer["identity"] for answer in answers] == ["p0", "p1", "p2", "p0", "p1", "p2"]
    assert [answer["same"] for answer in answers] == [True, False, False, True, False, False]
    with torch.no_grad():
        measured = {k: v.numpy() for k, v in task.measure(model, batch_of(task, faces(4, 3, seed=5))).items()}
    summary = task.summarise(measured)
    assert summary["auc"] > 0.9  # with an identity that training has not seen
    assert set(task.figures(measured)) == {"roc.png", "similarity.png"}
    assert measured["known"] == 9


def test_identities_that_training_has_not_seen_are_counted_and_measured_without_arcface() -> None:
    task = fitted(faces())
    strangers = [{**each, "label": f"new {each['label']}"} for each in faces()]
    assert task.encode(strangers)["unseen"].sum() == len(strangers)
    model = task.build("embedding-cnn", {"width": 8}).eval()
    with torch.no_grad():
        sums = {k: v.numpy() for k, v in task.measure(model, batch_of(task, strangers)).items()}
    distances = triplets(torch.from_numpy(sums["embedding"]), torch.from_numpy(sums["identity"]), 0.5)
    assert task.summarise(sums)["loss"] == pytest.approx(float(distances.mean()), rel=1e-5)
    with pytest.raises(TaskError, match="none of the parent's 3"):
        task.loss(model.train(), batch_of(task, strangers))


def test_the_loss_of_the_parent_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    task = fitted(faces(), loss="triplet", margin=0.1)
    task.save(tmp_path)
    assert get("image-embedding").load(tmp_path).objective["loss"] == "triplet"
    assert get("image-embedding")({"margin": 0.2}).inherit(tmp_path)
    assert get("image-embedding").load(tmp_path, {"loss": "arcface"}).objective["margin"] is None


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([{"image": np.zeros((4, 4), np.uint8), "label": "a"}], "to tell identities apart takes two"),
        ([{"image": np.zeros((4, 4), np.uint8), "label": label} for label in ("a", "unknown")], "strangers"),
    ],
)
def test_identities_that_cannot_be_learned_are_refused(examples: list[dict[str, object]], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        fitted(examples)


def test_enrolled_people_are_named_and_others_are_unknown(tmp_path: Path) -> None:
    task = fitted(faces())
    (tmp_path / "model").mkdir()
    torch.manual_seed(0)
    task.build("embedding-cnn", {"width": 8}).save_pretrained(tmp_path / "model")
    task.save(tmp_path / "model")
    contract = manifest.ModelManifest(name="faces", task="image-embedding", architecture="embedding-cnn")
    manifest.write(
        tmp_path / "model", contract.model_copy(update={"evaluation": {"threshold": 0.25, "identity_threshold": 0.35}})
    )
    loaded = get("image-embedding").load(tmp_path / "model")
    assert (loaded.threshold, loaded.identity_threshold) == (0.25, 0.35)

    drawn = faces()
    for name, example in (("ann", drawn[0]), ("bob", drawn[1])):
        (tmp_path / "people" / name).mkdir(parents=True)
        Image.fromarray(example["image"]).save(tmp_path / "people" / name / "1.png")
    names = enrol.enrol(str(tmp_path / "model"), tmp_path / "people", tmp_path / "enrolled", threshold=0.99999)
    assert names == ["ann", "bob"]
    assert "gallery.json" in manifest.read(tmp_path / "enrolled", verify=True).files
    served = get("image-embedding").load(tmp_path / "enrolled")
    model = served.load_model(tmp_path / "enrolled")
    answers = served.predict(model, [{"image": drawn[i]["image"]} for i in (1, 0, 2)])
    assert [answer["identity"] for answer in answers] == ["bob", "ann", "unknown"]
    assert served.outputs()[1]["parameters"] == {"threshold": 0.99999}
    assert "gallery of 2 identities is left out" in served.inherited()[0]
    with pytest.raises(UserError, match="is there already"):
        enrol.enrol(str(tmp_path / "model"), tmp_path / "people", tmp_path / "enrolled")


def test_a_broken_gallery_is_named(tmp_path: Path) -> None:
    fitted(faces()).save(tmp_path)
    (tmp_path / "gallery.json").write_text(json.dumps({"ann": [1.0]}))
    with pytest.raises(TaskError, match="is no gallery"):
        get("image-embedding").load(tmp_path)
