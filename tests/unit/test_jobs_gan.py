"""Generated images: the reversal against two separate losses, the distance against its formula, seeds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import softplus

from jobs.tasks import TaskError, frechet, get
from jobs.tasks.gan import Gan
from jobs.tasks.gan_networks import NEARBY, GanCnn, GanCnnConfig, adversarial, penalty

CONFIG = {"width": 8}


def images(count: int, shape: tuple[int, ...] = (8, 8)) -> list[dict[str, object]]:
    draw = np.random.default_rng(0)
    return [{"image": draw.integers(0, 256, shape, dtype=np.uint8), "label": i} for i in range(count)]


def fitted(examples: list[dict[str, object]], **options: object) -> Gan:
    task = get("gan")(options)
    task.fit(task.observe(examples))
    return task  # type: ignore[return-value]


def batch_of(task: Gan, examples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    return task.collate({k: v for k, v in task.encode(examples).items() if k not in task.counted})


def pixels_of(answer: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(answer["image"]))).astype(int)


def test_one_loss_gives_both_the_gradients_of_their_own() -> None:
    """The discriminator's of its logistic loss, the generator's of the non-saturating one."""
    torch.manual_seed(0)
    model = GanCnn(GanCnnConfig(latent_size=6, **CONFIG)).double()
    pixels, latents = torch.randn(5, 1, 8, 8).double(), torch.randn(5, 6).double()
    of_images, of_made, *_ = model(pixel_values=pixels, latents=latents)
    adversarial(of_images, of_made).sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}

    generator = {"seed", "grown", "painted"}
    model.zero_grad()
    softplus(-model.discriminate(model.generate(latents))).sum().backward()
    expected = {name: w.grad.clone() for name, w in model.named_parameters() if name.split(".")[0] in generator}
    model.zero_grad()
    adversarial(model.discriminate(pixels), model.discriminate(model.generate(latents).detach())).sum().backward()
    expected |= {name: w.grad for name, w in model.named_parameters() if name.split(".")[0] not in generator}
    assert set(expected) == set(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)  # logits are fp32


def test_the_penalty_is_on_average_the_squared_gradient_at_each_image() -> None:
    torch.manual_seed(0)
    model = GanCnn(GanCnnConfig(**CONFIG))
    pixels = torch.randn(1, 1, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(model.discriminate(pixels).sum(), pixels)
    many = pixels.detach().expand(4000, -1, -1, -1)
    with torch.no_grad():
        found = penalty(model.discriminate(many), model.discriminate(many + NEARBY * torch.randn_like(many)))
    assert found.mean().item() == pytest.approx(gradient.square().sum().item(), rel=0.15)


@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (5, 6, 3), (33, 40, 3)])
def test_images_of_any_size_are_made_and_saved(shape: tuple[int, ...], tmp_path: Path) -> None:
    task = fitted(images(3, shape))
    task.check_model("gan-cnn", CONFIG)
    model = task.build("gan-cnn", CONFIG).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("gan").load(tmp_path)
    first, second, same = again.predict(again.load_model(tmp_path), [np.int64(4), 5, 4])
    made = [pixels_of(each) for each in (first, same, task.predict(model, [4])[0], second)]
    assert made[0].shape == shape
    assert max(np.abs(made[0] - each).max() for each in made[1:3]) <= 1  # rounding differs by the place in a batch
    assert np.abs(made[0] - made[3]).max() > 1


def test_the_distance_is_that_of_two_normal_distributions() -> None:
    draw = np.random.default_rng(0)
    one = draw.standard_normal((500, 4)) @ draw.standard_normal((4, 4)) + 2
    assert frechet.distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet.distance(one, one + np.array([3, 0, 4, 0])) == pytest.approx(25)
    # of distributions that vary along the axes alone, it is the sum of the squared differences of deviations
    axes, wider = np.eye(2)[[0, 0, 1, 1]] * [[1], [-1], [1], [-1]], np.diag([3.0, 1.0])
    assert frechet.distance(axes, axes @ wider) == pytest.approx((3 - 1) ** 2 / 2)


def test_the_embedding_is_the_same_everywhere_and_tells_images_apart() -> None:
    torch.manual_seed(0)
    smooth, noise = torch.linspace(-1, 1, 8).expand(20, 1, 8, 8), torch.rand(600, 1, 8, 8) * 2 - 1
    assert frechet.features(smooth).shape == (20, frechet.FEATURES)
    assert float(frechet.features(smooth)[0, :3].sum()) == pytest.approx(0.7728, abs=1e-3)
    apart = frechet.distance(frechet.features(smooth).numpy(), frechet.features(noise).numpy())
    halves = frechet.distance(*(frechet.features(half).numpy() for half in noise.chunk(2)))
    assert apart > 5 * halves


def test_what_is_measured_does_not_depend_on_chance_or_on_batches() -> None:
    task, examples = fitted(images(6)), images(6)
    model = task.build("gan-cnn", CONFIG).eval()
    with torch.no_grad():
        whole = task.measure(model, batch_of(task, examples))
        parts = [task.measure(model, batch_of(task, examples[start : start + 2])) for start in (0, 2, 4)]
    torch.testing.assert_close(whole["loss"], sum(part["loss"] for part in parts))
    torch.testing.assert_close(whole["made"], torch.cat([part["made"] for part in parts]))
    sums = {name: value.numpy() for name, value in whole.items()}
    assert task.summarise(sums)["loss"] == pytest.approx(
        float(task.loss(model, batch_of(task, examples))[0].detach()) / 6
    )
    drawn = Image.open(io.BytesIO(task.figures(sums)["samples.png"]))
    assert drawn.size == (3 * 9 * 8, 3 * 9 * 8)


def test_noise_is_drawn_anew_in_training_by_the_seed() -> None:
    task = fitted(images(6), flip=True)
    model, batch = task.build("gan-cnn", CONFIG).train(), batch_of(task, images(6))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(task.loss(model, batch)[0].detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("seed", [-1, True, 0.5, "1"])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    task = fitted(images(2))
    with pytest.raises(TaskError, match="a whole number of 0 or more"):
        task.predict(task.build("gan-cnn", CONFIG), [seed])


def test_another_latent_size_than_the_parents_is_refused(tmp_path: Path) -> None:
    fitted(images(2), latent_size=16).save(tmp_path)
    assert get("gan")().inherit(tmp_path)
    with pytest.raises(TaskError, match="latent_size is 32"):
        get("gan")({"latent_size": 32}).inherit(tmp_path)


def test_images_of_16_bits_become_8() -> None:
    task = get("gan")()
    deep = [{"image": np.full((4, 4), level, np.uint16)} for level in (0, 65535)]
    assert "rounded to 8" in task.fit(task.observe(deep))[-1]
    assert task.encode(deep)["pixels"].max() == 255


def test_one_image_has_no_distance() -> None:
    draw = np.random.default_rng(0)
    sums = {name: draw.standard_normal((3, 64)) for name in ("seen", "made")} | {"loss": 3.0, "targets": 3.0}
    task = get("gan")()
    whole = task.summarise(sums)
    assert whole["frechet_distance"] > 0
    one = task.summarise({**sums, "seen": sums["seen"][:1], "made": sums["made"][:1]})
    assert one == {"loss": 1.0}
    assert task.verdict(whole) == task.verdict({}) == []
    assert "two held-out images" in task.verdict(one)[0]
