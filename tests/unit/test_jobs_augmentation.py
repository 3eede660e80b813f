"""Images that are changed at random in training: by how much, by what is drawn, and never where they are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.tasks import get
from jobs.tasks.augmentation import AugmentationOptions, augmented, mixed


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(64, 3, 12, 9, generator=torch.Generator().manual_seed(0))


def test_nothing_is_changed_unless_it_is_asked_for(pixels: torch.Tensor) -> None:
    assert torch.equal(augmented(pixels, AugmentationOptions()), pixels)


@pytest.mark.parametrize("options", [{"shift": 0.2}, {"rotate": 30}, {"zoom": 0.3}, {"flip": True}, {"erase": 1}])
def test_the_seed_decides_what_is_drawn(pixels: torch.Tensor, options: dict[str, float]) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(augmented(pixels, AugmentationOptions(**options)))
    assert made[0].shape == pixels.shape
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert not torch.equal(made[0], pixels)


def test_an_image_is_mirrored_or_left(pixels: torch.Tensor) -> None:
    made = augmented(pixels, AugmentationOptions(flip=True))
    mirrored = (made == pixels.flip(3)).flatten(1).all(1)
    left = (made == pixels).flatten(1).all(1)
    assert (mirrored ^ left).all()
    assert 15 < mirrored.sum() < 49


def test_a_shift_moves_by_its_share_at_most() -> None:
    """A bright column in the middle of a wide image stays within the share of the width."""
    image = torch.zeros(200, 1, 8, 41)
    image[:, :, :, 20] = 1
    places = augmented(image, AugmentationOptions(shift=0.1)).mean((1, 2)) @ torch.arange(41.0)
    assert (places - 20).abs().max() <= 4.1 + 1e-3
    assert (places - 20).abs().max() > 3


def test_turning_keeps_the_proportions_of_an_image_that_is_no_square() -> None:
    image = torch.zeros(1, 1, 20, 40)
    image[:, :, 10, 10:30] = 1  # a bar of 20 pixels
    torch.manual_seed(0)
    made = [augmented(image, AugmentationOptions(rotate=90)) for _ in range(20)]
    inertia = []
    for each in made:
        rows, columns = (each[0, 0] > 0.3).nonzero(as_tuple=True)
        spread = np.cov(np.stack([rows.numpy(), columns.numpy()]))
        inertia.append(np.sqrt(12 * np.linalg.eigvalsh(spread)[-1]))  # the length of a bar, whatever its direction
    assert min(inertia) > 16
    assert max(inertia) < 24


def test_what_is_erased_is_a_rectangle_of_up_to_a_fifth(pixels: torch.Tensor) -> None:
    ones = torch.ones(300, 1, 20, 20)
    gone = (augmented(ones, AugmentationOptions(erase=0.5)) == 0)[:, 0]
    shares = gone.flatten(1).float().mean(1)
    assert 100 < (shares > 0).sum() < 200
    assert shares.max() <= 0.3  # a fifth, and what rounding to whole pixels adds
    for piece in gone[shares > 0][:20]:
        rows, columns = piece.any(1), piece.any(0)
        assert torch.equal(piece, rows[:, None] & columns[None, :])


def test_images_are_mixed_with_the_others_of_the_batch(pixels: torch.Tensor) -> None:
    torch.manual_seed(3)
    made, others, share = mixed(pixels, 1.0)
    assert 0 < share < 1
    assert sorted(others.tolist()) == list(range(len(pixels)))
    torch.testing.assert_close(made, share * pixels + (1 - share) * pixels[others])


def test_a_classifier_changes_images_in_training_only() -> None:
    draw = np.random.default_rng(0)
    examples = [{"image": draw.integers(0, 255, (8, 8), dtype=np.uint8), "label": i % 7} for i in range(21)]
    task, plain = (get("image-classification")(options) for options in ({"shift": 0.3, "mixup": 0.5}, {}))
    for each in (task, plain):
        each.fit(each.observe(examples))
    torch.manual_seed(0)
    model = task.build("cnn", {})
    batch = task.collate({k: v for k, v in task.encode(examples).items() if k not in task.counted})
    model.train()
    assert task.loss(model, batch)[0] != plain.loss(model, batch)[0]
    model.eval()
    assert task.loss(model, batch)[0] == plain.loss(model, batch)[0]


def test_it_is_said_that_mixup_depends_on_the_micro_batch() -> None:
    examples = [{"image": np.zeros((8, 8), np.uint8), "label": label} for label in range(2)]
    for options, expected in (({"mixup": 0.5}, 1), ({}, 0)):
        task = get("image-classification")(options)
        said = [each for each in task.fit(task.observe(examples)) if "micro-batch" in each]
        assert len(said) == len(task.inherited()) == expected


def test_a_label_among_the_five_best_is_counted() -> None:
    task = get("image-classification")()
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3]])
    sums = task._guesses(logits, torch.tensor([0, 4, 5]))
    summary = task.summarise({"loss": 3.0, "targets": 3, **{name: float(value) for name, value in sums.items()}})
    assert summary == {"loss": 1.0, "accuracy": pytest.approx(1 / 3), "top5_accuracy": pytest.approx(2 / 3)}
