"""Object detection: targets, boxes and scores against their definitions, and what a model keeps and answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.data.corpora_shapes import pictures
from jobs.tasks import TaskError, centre_points, get, set_prediction
from jobs.tasks.boxes import generalized_iou, iou_to_all, mirrored, objects_of, suppressed
from jobs.tasks.detection_scores import precision
from jobs.tasks.object_detection import ObjectDetection

SMALL = {"width": 16, "blocks": 1}


def shapes(count: int) -> list[dict[str, object]]:
    return [{"image": pixels, "objects": objects} for pixels, objects in pictures(count)]


def fitted(examples: list[dict[str, object]], **options: object) -> ObjectDetection:
    task = get("object-detection")(options)
    task.fit(task.observe(examples))
    return task  # type: ignore[return-value]


def batch_of(task: ObjectDetection, examples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    return task.collate({k: v for k, v in task.encode(examples).items() if k not in task.counted})


def perfect(boxes: list[list[float]], labels: list[int], cells: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (1, 3, 16, 16) and distances (1, 4, 16, 16) of a model that sees exactly these objects."""
    logits, distances = torch.full((1, 3, cells, cells), -20.0), torch.ones(1, 4, cells, cells)
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        column, row = int((x1 + x2) / 2 * cells), int((y1 + y2) / 2 * cells)
        logits[0, label, row, column] = 20.0
        for at_row in range(cells):  # every cell that could belong to it
            for at_column in range(cells):
                if abs(at_row - row) < 3 and abs(at_column - column) < 3:
                    sides = (at_column + 0.5 - x1 * cells, at_row + 0.5 - y1 * cells)
                    ends = (x2 * cells - at_column - 0.5, y2 * cells - at_row - 0.5)
                    distances[0, :, at_row, at_column] = torch.tensor([*sides, *ends])
    return logits, distances


BOXES, LABELS = [[0.1, 0.1, 0.4, 0.5], [0.55, 0.5, 0.95, 0.8]], [2, 0]


def test_boxes_come_back_from_what_is_learned_of_them() -> None:
    boxes, scores, labels = centre_points.found(*perfect(BOXES, LABELS), most=5)
    order = scores[0, :2].argsort()
    assert scores[0].tolist() == pytest.approx([1, 1, 0, 0, 0], abs=1e-6)
    found = {int(labels[0, i]): boxes[0, i].tolist() for i in order}
    assert found[2] == pytest.approx(BOXES[0], abs=1e-5)
    assert found[0] == pytest.approx(BOXES[1], abs=1e-5)


def test_the_loss_is_least_where_the_guess_is_right_and_of_each_image_alone() -> None:
    logits, distances = perfect(BOXES, LABELS)
    boxes, labels = torch.tensor([[*BOXES, [0.0] * 4]]), torch.tensor([[*LABELS, -1]])
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    right = centre_points.loss(logits, distances, boxes, labels, nobody)
    assert right.item() < 0.01
    wrong = centre_points.loss(logits.flip(1), distances, boxes, labels, nobody)
    larger = centre_points.loss(logits, distances * 2, boxes, labels, nobody)
    assert min(wrong.item(), larger.item()) > 1
    both = centre_points.loss(
        torch.cat([logits, logits.flip(1)]), distances.repeat(2, 1, 1, 1), boxes.repeat(2, 1, 1),
        labels.repeat(2, 1), nobody.repeat(2, 1),
    )  # fmt: skip
    torch.testing.assert_close(both, torch.cat([right, wrong]))


def test_nothing_is_learned_where_a_crowd_is() -> None:
    logits, distances = perfect(BOXES, LABELS)
    first = torch.tensor([[BOXES[1], BOXES[0]]]), torch.tensor([[LABELS[1], LABELS[0]]])
    crowd = torch.tensor([[False, True]])
    assert centre_points.loss(logits, distances, *first, crowd).item() < 0.01
    only = first[0][:, :1], first[1][:, :1], crowd[:, :1]
    assert centre_points.loss(logits, distances, *only).item() > 1  # without it, the second object is a wrong guess


def test_an_image_without_objects_has_a_loss_of_its_centres_alone() -> None:
    logits = torch.full((1, 3, 8, 8), -2.0, requires_grad=True)
    none = torch.zeros(1, 2, 4), torch.full((1, 2), -1), torch.zeros(1, 2, dtype=torch.bool)
    loss = centre_points.loss(logits, torch.ones(1, 4, 8, 8), *none)
    chance = torch.tensor(-2.0).sigmoid()
    assert loss.item() == pytest.approx(float(3 * 64 * -(1 - chance).log() * chance**2), rel=1e-5)
    loss.sum().backward()
    assert (logits.grad > 0).all()


def test_overlaps_of_boxes() -> None:
    one, beside = torch.tensor([0.0, 0, 2, 2]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6], [0, 0, 2, 2]])
    assert iou_to_all(one, beside).tolist() == pytest.approx([1 / 3, 0, 1])
    assert generalized_iou(one.expand(3, 4), beside).tolist() == pytest.approx([1 / 3, -31 / 36, 1])
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [0, 0, 2, 1.8], [5, 5, 6, 6]])
    scores, labels = torch.tensor([0.5, 0.9, 0.4, 0.1]), torch.tensor([1, 1, 0, 1])
    assert suppressed(boxes, scores, labels).tolist() == pytest.approx([0, 0.9, 0.4, 0.1])


def test_precision_is_that_of_coco() -> None:
    truths = np.array(
        [[[0, 0, 10, 10, 0, 0], [20, 20, 10, 10, 1, 0]], [[5, 5, 10, 10, 0, 0], [0, 0, 0, 0, -1, 0]]], float
    )
    exact = np.array([[[0, 0, 10, 10, 0.9, 0], [20, 20, 10, 10, 0.8, 1]], [[5, 5, 10, 10, 0.7, 0], [0, 0, 0, 0, 0, 0]]])
    assert precision(exact, truths) == {"mAP": pytest.approx(1), "mAP50": pytest.approx(1)}
    shifted = exact.copy()
    shifted[..., 0] += 2  # an overlap of 80 in 120: right up to 0.65, which are four of the ten
    assert precision(shifted, truths) == {"mAP": pytest.approx(0.4), "mAP50": pytest.approx(1)}
    swapped = exact.copy()
    swapped[0, :, 5] = [1, 0]
    assert precision(swapped, truths)["mAP50"] < 0.3
    assert precision(exact, np.full_like(truths, -1)) == {}
    assert precision(np.zeros_like(exact), truths) == {"mAP": 0.0, "mAP50": 0.0}


def test_a_guess_in_a_crowd_is_not_wrong() -> None:
    truths = np.array([[[0, 0, 10, 10, 0, 0], [20, 20, 30, 30, 0, 1]]], float)
    found = np.array([[[0, 0, 10, 10, 0.5, 0], [25, 25, 10, 10, 0.9, 0]]])
    assert precision(found, truths)["mAP50"] == pytest.approx(1)
    truths[0, 1, 4] = -1
    assert precision(found, truths)["mAP50"] < 0.6


def test_boxes_are_mirrored_with_their_images() -> None:
    pixels, boxes = torch.zeros(40, 1, 4, 10), torch.tensor([[[0.1, 0.25, 0.3, 0.75]]]).repeat(40, 1, 1)
    pixels[:, :, 1:3, 1:3] = 1
    torch.manual_seed(0)
    seen, moved = mirrored(pixels, boxes)
    flipped = 0
    for image, (left, top, right, bottom) in zip(seen[:, 0], moved[:, 0].tolist(), strict=True):
        inside = image[round(top * 4) : round(bottom * 4), round(left * 10) : round(right * 10)]
        assert inside.sum() == image.sum() == 4
        flipped += left > 0.5
    assert 10 < flipped < 30


class Seeing(torch.nn.Module):
    """A model that finds the same two objects in every image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, distances = perfect(BOXES, LABELS)
        count = len(pixel_values)
        return self.scale * logits.repeat(count, 1, 1, 1), distances.repeat(count, 1, 1, 1)


def test_answers_are_in_the_pixels_of_the_image_that_was_sent() -> None:
    task = fitted(shapes(4))
    one, other = task.predict(Seeing(), [np.zeros((64, 64, 3), np.uint8), np.zeros((100, 300), np.uint8)])
    assert one["count"] == other["count"] == 2
    boxes = {each["label"]: each["box"] for each in json.loads(other["detections"])}
    assert boxes == {
        "triangle": pytest.approx([30, 10, 90, 40], abs=0.02),
        "circle": pytest.approx([165, 50, 120, 30], abs=0.02),
    }
    assert json.loads(one["detections"])[0]["score"] == 1


def test_what_is_measured_is_in_the_pixels_of_each_image() -> None:
    width, height = 100, 50
    objects = [
        {"bbox": [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height], "category": "abc"[label]}
        for (x1, y1, x2, y2), label in zip(BOXES, LABELS, strict=True)
    ]
    other = {"image": np.zeros((50, 100, 3), np.uint8), "objects": [{"bbox": [0, 0, 9, 9], "category": "b"}]}
    task = fitted([{**other, "objects": objects}, other], image_size=64)
    sums = {
        name: value.detach().numpy()
        for name, value in task.measure(Seeing(), batch_of(task, [{**other, "objects": objects}])).items()
    }
    assert task.summarise(sums) == {
        "loss": pytest.approx(0, abs=0.01),
        "mAP": pytest.approx(1),
        "mAP50": pytest.approx(1),
    }
    assert task.figures(sums)["detections.png"].startswith(b"\x89PNG")


YOLOS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "num_detection_tokens": 8, "patch_size": 16, "use_mid_position_embeddings": False}  # fmt: skip


DETR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "num_queries": 8,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "backbone_config": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"},
}  # fmt: skip


def guessing(boxes: list[list[float]], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (1, 5, 4) and guesses (1, 5, 4) of a model that sees these objects, the last first."""
    logits, guesses = torch.zeros(1, 5, 4), torch.full((1, 5, 4), 0.5)
    logits[..., 3] = 20
    for row, ((x1, y1, x2, y2), label) in enumerate(zip(boxes[::-1], labels[::-1], strict=True)):
        logits[0, row, label], logits[0, row, 3] = 20, 0
        guesses[0, row] = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    return logits, guesses


def test_a_set_of_guesses_is_matched_with_the_objects() -> None:
    logits, guesses = guessing(BOXES, LABELS)
    objects = torch.tensor([[*BOXES, [0.0] * 4]]), torch.tensor([[*LABELS, -1]])
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    assert set_prediction.loss(logits, guesses, *objects, nobody).item() < 1e-3
    moved = set_prediction.loss(logits, guesses + torch.tensor([0.05, 0, 0, 0]), *objects, nobody).item()
    assert moved > 5 * 0.05
    swapped = set_prediction.loss(logits[..., [2, 1, 0, 3]], guesses, *objects, nobody).item()
    assert swapped > 5
    missed = set_prediction.loss(logits, guesses, objects[0][:, 1:], objects[1][:, 1:], nobody[:, 1:]).item()
    assert missed > 1  # a guess that is no object
    in_crowd = set_prediction.loss(logits, guesses, *objects, torch.tensor([[True, False, False]])).item()
    assert in_crowd < 1e-3
    boxes, scores, labels = set_prediction.found(logits, guesses, 3)
    assert scores[0].tolist() == pytest.approx([1, 1, 0], abs=1e-6)
    found = {int(label): box.tolist() for label, box in zip(labels[0, :2], boxes[0, :2], strict=True)}
    assert found[2] == pytest.approx(BOXES[0], abs=1e-5)


@pytest.mark.parametrize(("architecture", "config"), [("yolos", YOLOS), ("detr", DETR)])
def test_a_detector_of_transformers_learns_saves_and_answers(architecture: str, config: dict, tmp_path: Path) -> None:
    task, examples = fitted(shapes(4), score_threshold=0.0), shapes(4)
    task.check_model(architecture, config)
    torch.manual_seed(0)
    model = task.build(architecture, config).train()
    loss, count = task.loss(model, batch_of(task, examples))
    (loss / count).backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "class_labels" in name)
    model.eval().save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("object-detection").load(tmp_path)
    again.check_parent(tmp_path, {})
    answers = [each.predict(m, [examples[0]["image"]])[0]
               for each, m in ((task, model), (again, again.load_model(tmp_path)))]  # fmt: skip
    assert answers[0] == answers[1]
    assert 0 < answers[0]["count"] <= 8


@pytest.mark.parametrize(("architecture", "config", "said"), [
    ("deformable_detr", {}, "has detection-cnn"),
    ("yolos", {"hidden_sise": 3}, "hidden_sise"),
    ("yolos", {"num_labels": 3}, "follows from the data"),
    ("detr", {"backbone_config": {"depts": [1]}}, "did you mean 'depths'"),
])  # fmt: skip
def test_detectors_that_cannot_be_trained_are_refused(architecture: str, config: dict, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        get("object-detection")().check_model(architecture, config)


def test_a_network_saves_loads_and_answers_the_same(tmp_path: Path) -> None:
    examples = shapes(4)
    task = fitted(examples, score_threshold=0.001, max_detections=7)
    task.check_model("detection-cnn", SMALL)
    torch.manual_seed(0)
    model = task.build("detection-cnn", SMALL).eval()
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = get("object-detection").load(tmp_path)
    before = json.loads(task.predict(model, [examples[0]["image"]])[0]["detections"])
    after = json.loads(again.predict(again.load_model(tmp_path), [examples[0]["image"]])[0]["detections"])
    assert 0 < len(before) <= 7
    assert after == before  # no more of them than were asked for in training
    assert again.outputs()[0]["parameters"] == {
        "content_type": "json", "labels": ["circle", "square", "triangle"], "threshold": 0.001,
    }  # fmt: skip


def test_mistakes_in_training_become_less() -> None:
    task = fitted(shapes(2), flip=True)
    torch.manual_seed(0)
    model = task.build("detection-cnn", SMALL).train()
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=3e-3), batch_of(task, shapes(2))
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss, count = task.loss(model, batch)
        (loss / count).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


def test_objects_as_the_hub_has_them_read_the_same() -> None:
    lists = {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [0, 1]}
    entries = [{"bbox": box, "category": category} for box, category in zip(*lists.values(), strict=True)]
    assert objects_of(lists, "objects") == objects_of(entries, "objects")
    with pytest.raises(TaskError, match="several lengths"):
        objects_of({**lists, "category": [0]}, "objects")
    with pytest.raises(TaskError, match="no list of objects"):
        objects_of("boxes", "objects")


def test_what_an_image_has_too_much_of_is_refused() -> None:
    task = fitted(shapes(4), max_objects=1)
    crowded = next(each for each in shapes(4) if len(each["objects"]) > 1)
    with pytest.raises(TaskError, match="max_objects is 1"):
        task.encode([crowded])
    unknown = {**shapes(1)[0], "objects": [{"bbox": [1, 1, 5, 5], "category": "house"}]}
    with pytest.raises(TaskError, match=r"\['house'\] are not among the 3 categories"):
        task.encode([unknown])
    with pytest.raises(TaskError, match="nothing to be found"):
        fitted([{**shapes(1)[0], "objects": []}])


BLACK = np.zeros((50, 100, 3), np.uint8)


@pytest.mark.parametrize(("objects", "said"), [
    ([{"bbox": [0.5, 0.5, 0.2, 0.3], "category": "a"}], r"objects\[0\]: .* shares of the image's sides"),
    ({"bbox": None, "category": None}, r"objects\.bbox is None, no list"),
    ({"bbox": [[1, 2, 3, 4]], "category": "a"}, r"objects\.category is 'a', no list"),
    ({"bbox": [[1, 2, 3, 4]], "category": ["a"], "iscrowd": 1}, r"objects\.iscrowd is 1, no list"),
    ({}, r"objects\.bbox is None, no list"),
    ([{"bbox": [1, 2, 3, 4], "category": -1}], r"category is -1, no name and no whole number of 0 or more"),
    ([{"bbox": [1, 2, 3, 4], "category": "a\ud800"}], "surrogate"),
])  # fmt: skip
def test_objects_that_would_be_misread_are_refused(objects: object, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        objects_of(objects, "objects")


def test_objects_in_arrays_are_read_and_what_is_no_list_is_named() -> None:
    found = {"bbox": np.array([[1, 2, 3, 4]]), "category": ["a"], "id": np.array([7]), "licence": "free"}
    assert objects_of(found, "objects") == objects_of([{"bbox": [1, 2, 3, 4], "category": "a"}], "objects")
    task = get("object-detection")()
    assert task.unused({"image": BLACK, "objects": found}) == ["objects.id", "objects.licence"]


def test_a_box_of_two_corners_is_told_so() -> None:
    task = fitted(shapes(4))
    with pytest.raises(TaskError, match="as two corners, x1, y1, x2, y2, this one would lie inside"):
        task.encode([{"image": BLACK, "objects": [{"bbox": [60, 20, 90, 40], "category": "circle"}]}])
    with pytest.raises(TaskError, match=r"in pixels$"):
        task.encode([{"image": BLACK, "objects": [{"bbox": [60, 20, 90, 10], "category": "circle"}]}])


def test_objects_that_stand_twice_are_counted_and_their_order_is_no_other_answer() -> None:
    one, other = {"bbox": [1, 1, 5, 5], "category": "circle"}, {"bbox": [9, 1, 5, 5], "category": "circle"}
    task = fitted(shapes(4))
    rows = [{"image": BLACK, "objects": objects} for objects in ([one, other], [other, one], [one, one])]
    assert task.encode(rows)["repeated"].tolist() == [0, 0, 1]
    answers = [task.answer(row) for row in rows]
    assert answers[0] == answers[1] != answers[2]


def test_categories_that_come_as_text_and_as_numbers_are_told() -> None:
    objects = [{"bbox": [1, 1, 5, 5], "category": category} for category in ("1", 1)]
    task = get("object-detection")()
    said = task.fit(task.observe([{"image": BLACK, "objects": objects}]))
    assert any("numbers and as text" in each for each in said), said


def test_a_crowd_of_an_unknown_category_excuses_no_guess() -> None:
    known = {"bbox": [55, 25, 40, 15], "category": "c"}
    task = fitted([{"image": BLACK, "objects": [{**known, "category": each} for each in "abc"]}], image_size=64)
    here = {"bbox": [10, 5, 30, 20], "category": "a"}
    scores = {}
    for category in "ac?":  # the model sees a c where the crowd is, and an a where there is nothing
        crowd = {"bbox": [5, 0, 40, 30], "category": category, "iscrowd": 1}
        objects = [crowd, {**here, "bbox": [55, 25, 40, 15]}]
        batch = batch_of(task, [{"image": BLACK, "objects": objects}])
        sums = {name: value.detach().numpy() for name, value in task.measure(Seeing(), batch).items()}
        assert np.isfinite(sums["loss"])
        scores[category] = task.summarise(sums)["mAP50"]
        found, truths = sums["found"].copy(), sums["truths"]
        found[0, :, 5] = np.where(found[0, :, 5] == 2, 0, found[0, :, 5])  # an a in the crowd, sure as the right one
        found[0, :, 4] = np.where(found[0, :, 0] < 50, found[0, :, 4], 0.5 * found[0, :, 4])
        scores[f"{category} a"] = precision(found, truths)["mAP50"]
    assert scores["a a"] == pytest.approx(1)  # a wrong guess in a crowd of its category does not count
    assert scores["? a"] == scores["c a"] == pytest.approx(0.5)


def test_all_guesses_that_are_kept_are_measured() -> None:
    truths = np.array([[[10 * at, 0, 9, 9, 0, 0] for at in range(150)]], float)
    found = np.array([[[10 * at, 0, 9, 9, 1 - at / 200, 0] for at in range(150)]])
    assert precision(found, truths) == {"mAP": pytest.approx(1), "mAP50": pytest.approx(1)}
    assert precision(found[:, :75], truths)["mAP50"] == pytest.approx(51 / 101)  # recall 0, 0.01, …, 0.5


def test_an_image_with_more_objects_than_guesses_is_refused_in_training() -> None:
    objects = [{"bbox": [10 * at, 5, 8, 8], "category": "circle"} for at in range(9)]
    example = {"image": BLACK, "objects": objects}
    task = fitted([example])
    model, batch = task.build("yolos", YOLOS), batch_of(task, [example])
    with pytest.raises(TaskError, match="holds 9 objects, and the model makes 8 guesses"):
        task.loss(model.train(), batch)
    assert torch.isfinite(task.loss(model.eval(), batch)[0])
    assert torch.isfinite(task.loss(model.train(), batch_of(task, [{**example, "objects": objects[:8]}]))[0])
