"""Policies: what a log's actions are, observations of every shape, episodes held out whole, what a network answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from jobs.data import corpora, grouping, pole
from jobs.data.examples import BadRow, BadRows, Example
from jobs.tasks import TaskError, get
from jobs.tasks.policy import Policy
from serve.engines.inputs import blank, rows
from serve.tensors import output
from tests.support.measured import sums, train


def log(count: int = 200, **columns: Any) -> list[dict[str, Any]]:
    """Return steps whose action is told by the sign of the sum of two of three numbers."""
    seen = np.random.default_rng(0).normal(size=(count, 2))
    return [
        {
            "observation": [float(x), float(y), 1.0],
            "action": "up" if x + y > 0 else "down",
            "thrust": [float(100 * x), float(y - 7)],
            "x": float(x),
            "y": str(y),
            **columns,
        }
        for x, y in seen
    ]


def policy(steps: list[dict[str, Any]], **options: Any) -> tuple[Policy, list[str]]:
    """Return the task, fitted to the steps, and what it said."""
    made = get("policy")(options)
    assert isinstance(made, Policy)
    for step in steps:
        made.check(step)
    return made, made.fit(made.observe(steps))


def trained(made: Policy, steps: list[dict[str, Any]], architecture: str = "mlp", **config: Any) -> Any:
    """Return a network that was trained for a moment."""
    torch.manual_seed(0)
    model = made.build(architecture, config or {"hidden_size": 16, "layers": 1, "dropout": 0.0})
    return train(model, made, steps, steps=80)


def test_chosen_actions_are_learned_saved_and_answered(tmp_path: Path) -> None:
    steps = log()
    made, said = policy(steps)
    assert said == [
        "2 labels: down, up",
        "observations are 3 numbers",
        "the same in all steps, and not read: observation[2]",
    ]
    model = trained(made, steps)
    found = made.summarise(sums(made, model, steps))
    assert found.keys() == {"loss", "accuracy"}
    assert found["accuracy"] > 0.97
    assert list(made.figures(sums(made, model, steps))) == ["confusion.png"]
    made.save(tmp_path)
    model.save_pretrained(tmp_path)
    served = get("policy").load(tmp_path)
    loaded = served.load_model(tmp_path)
    states = rows({"observation": np.array([[2, 1, 1], [-2, -1, 5]], np.float32)}, served.inputs())
    answers = served.predict(loaded, states)
    assert [answer["action"] for answer in answers] == ["up", "down"]
    assert answers[0]["scores"].keys() == {"down", "up"}
    assert served.inputs() == [{"name": "observation", "datatype": "FP32", "shape": [-1, 3]}]
    assert [part["name"] for part in served.outputs()] == list(answers[0])
    assert served.instance({"observation": [1, 2, 3]}).tolist() == [1, 2, 3]


def test_amounts_are_learned_and_answered_on_their_own_scale() -> None:
    steps = log()
    made, said = policy(steps, action_column="thrust")
    assert said[0] == "continuous actions: 2 numbers each"
    model = trained(made, steps)
    found = made.summarise(sums(made, model, steps))
    assert found.keys() == {"loss", "rmse", "r2"}
    assert found["r2"] > 0.97
    action = made.predict(model, [np.array([0.5, 1.0, 1.0])])[0]["action"]
    assert action == pytest.approx([50, -6], abs=15)
    tensor = output("action", [action, action])
    assert (tensor.datatype, tensor.shape) == ("FP32", [2, 2])
    assert made.outputs() == [{"name": "action", "datatype": "FP32", "shape": [-1, 2]}]
    assert list(made.figures(sums(made, model, steps))) == ["actions.png"]


def test_columns_of_a_number_each_are_one_observation_and_one_action() -> None:
    steps = [{**step, "push": 2 * step["x"], "pull": 1.0 - step["x"]} for step in log()]
    made, _ = policy(steps, observation_columns=["x", "y"], action_columns=["push", "pull"])
    assert made.encode(steps)["action"].shape == (200, 2)
    assert made.encode(steps[:2])["observation"].shape == (2, 2)
    assert made.inputs()[0]["parameters"] == {"columns": ["x", "y"]}
    assert made.instance({"x": 1, "y": "2"}).tolist() == [1, 2]
    with pytest.raises(TaskError, match="column 'y' holds 'fast', which is no finite number"):
        made.encode([{"x": 1, "y": "fast"}])
    with pytest.raises(TaskError, match="column 'x' is named twice"):
        get("policy")({"observation_columns": ["x", "y"], "action_column": "x"})


@pytest.mark.parametrize(
    ("actions", "kind", "labels"),
    [
        (["left", "right"] * 10, "discrete", ["left", "right"]),
        ([0, 1, 2] * 10, "discrete", ["0", "1", "2"]),
        ([0.5, 1.0] * 10, "continuous", []),
        (list(range(30)), "continuous", []),
        ([True, False] * 10, "discrete", ["false", "true"]),
        ([[1.0], [2.0]] * 10, "continuous", []),
    ],
)
def test_what_actions_are(actions: list[Any], kind: str, labels: list[str]) -> None:
    made, _ = policy([{"observation": [at], "action": action} for at, action in enumerate(actions)])
    assert (made.kind, made.labels) == (kind, labels)


def test_whole_numbers_that_are_names_are_answered_as_numbers() -> None:
    steps = [{"observation": [float(at % 2), 1.0 * at], "action": at % 2} for at in range(40)]
    made, said = policy(steps)
    assert said[0].startswith("actions are few whole numbers, taken as names")
    model = trained(made, steps)
    assert made.predict(model, [np.array([1.0, 3.0])])[0]["action"] == 1
    assert made.outputs()[0] == {"name": "action", "datatype": "INT64", "shape": [-1]}
    amounts, _ = policy(steps, kind="continuous")
    assert isinstance(amounts.predict(trained(amounts, steps), [np.array([1.0, 3.0])])[0]["action"], float)
    for kind, action in (("continuous", "up"), ("discrete", [1.0])):
        with pytest.raises(TaskError, match=f"task.kind is {kind}"):
            policy([{"observation": [at], "action": action} for at in range(4)], kind=kind)


def test_images_keep_where_something_is() -> None:
    draw = np.random.default_rng(0)
    steps = []
    for at in range(120):
        image = draw.integers(0, 60, (16, 12))
        image[draw.integers(0, 14) :, 1 + 6 * (at % 2)][:3] = 255
        steps.append({"observation": image.tolist(), "action": ["left", "right"][at % 2]})
    made, said = policy(steps)
    assert "observations are images [16, 12, 1] (height, width, channels) of whole numbers to 255" in said
    assert made.encode(steps)["observation"].dtype == np.uint8
    assert made.inputs() == [{"name": "observation", "datatype": "UINT8", "shape": [-1, 16, 12]}]
    model = trained(made, steps, "policy-cnn", width=4, hidden_size=16)
    states = rows({"observation": np.array([step["observation"] for step in steps[:4]], np.uint8)}, made.inputs())
    assert [answer["action"] for answer in made.predict(model, states)] == ["left", "right"] * 2
    assert made.summarise(sums(made, model, steps))["accuracy"] > 0.95
    assert made.build("mlp", {"hidden_size": 8}).config.numbers == 192
    vectors, _ = policy(log())
    with pytest.raises(TaskError, match="policy-cnn sees images, and an observation is 3 numbers"):
        vectors.build("policy-cnn", {})
    vectors.check_model("policy-cnn", {"width": 4})


def test_images_of_codes_are_not_all_black() -> None:
    generator = np.random.default_rng(0)
    steps = [{"observation": generator.integers(0, 2, (8, 8)).tolist(), "action": at % 2} for at in range(40)]
    made, said = policy(steps)
    assert set(np.unique(made.collate(made.encode(steps))["numbers"])) == {-1.0, 1.0}
    assert "observations are images [8, 8, 1] (height, width, channels) of numbers, scaled to ±1" in said
    assert made.inputs()[0]["datatype"] == "FP32"


def test_what_may_be_meant_otherwise_is_said() -> None:
    generator = np.random.default_rng(0)
    image = [{"observation": generator.integers(0, 255, (3, 8, 8)).tolist(), "action": at % 2} for at in range(9)]
    assert "they are 3 high: if that is their channels, these are to come last" in policy(image)[1]
    choices = [{"observation": [at, 1], "action": [at % 2, 1 - at % 2]} for at in range(9)]
    assert any("if it is a choice, give its number" in said for said in policy(choices)[1])
    amounts = [*choices, {"observation": [1, 1], "action": [0.5, 0.5]}]
    assert not any("if it is a choice" in said for said in policy(amounts)[1])


def test_an_image_in_another_unit_is_refused() -> None:
    generator = np.random.default_rng(0)
    steps = [{"observation": generator.random((8, 8)).tolist(), "action": at % 2} for at in range(40)]
    made, _ = policy(steps)
    state = np.array(steps[0]["observation"])
    made.encode([{"observation": (2 * state).tolist(), "action": 0}])  # a little brighter than any in training
    with pytest.raises(TaskError, match=r"an image that holds .*, and those in training lie between .*: give it in"):
        made.encode([{"observation": (255 * state).tolist(), "action": 0}])


def test_images_of_other_ranges_are_scaled_to_one() -> None:
    steps = [{"observation": [[-3.0, 5.0], [1.0, at / 10]], "action": at % 2} for at in range(40)]
    made, _ = policy(steps)
    batch = made.collate(made.encode(steps[:1]))
    assert batch["numbers"][0].tolist() == pytest.approx([-1, 1, 0, -0.25])
    assert made.inputs()[0]["datatype"] == "FP32"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"action": 1}, "no column 'observation'.*task.observation_column"),
        ({"observation": [1.0]}, "no column 'action'.*task.action_column"),
        ({"observation": [1, "a"], "action": 1}, "an observation is a list of numbers, or an image"),
        ({"observation": [[1], [1, 2]], "action": 1}, "an observation is a list of numbers, or an image"),
        ({"observation": [1, float("inf")], "action": 1}, "holds inf, which is no finite number"),
        ({"observation": [1], "action": [[1.0]]}, r"an action of shape \(1, 1\)"),
        ({"observation": [1], "action": None}, "the action, is empty"),
    ],
)
def test_steps_that_cannot_be_used_are_refused(step: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        get("policy")().check(step)


def test_an_episode_is_no_state_to_answer() -> None:
    episode = {"observation": [[0, 255], [255, 0]], "action": [1, 0], "episode": 1}
    with pytest.raises(TaskError, match=r"task\.episode_column is set.*leave it out to predict"):
        get("policy")({"episode_column": "episode"}).instance(episode)


def test_steps_unlike_the_first_are_refused() -> None:
    made, _ = policy(log())
    with pytest.raises(TaskError, match=r"an observation of shape \[2\]; most in training have \[3\]"):
        made.encode([{"observation": [1, 2], "action": "up"}])
    with pytest.raises(TaskError, match=r"labels \['sideways'\] are not among the 2"):
        made.encode([{"observation": [1, 2, 3], "action": "sideways"}])
    amounts, _ = policy(log(), action_column="thrust")
    with pytest.raises(TaskError, match="an action of 3 numbers, and others have 2"):
        amounts.encode([{"observation": [1, 2, 3], "thrust": [1, 2, 3]}])


def test_an_episode_is_one_example_of_many_rows() -> None:
    made = get("policy")({"episode_column": "episode"})
    steps = [Example({"episode": at // 5, **step}, f"log.jsonl:{at + 1}") for at, step in enumerate(log(20))]
    steps.insert(7, Example({"episode": 1, "observation": "none", "action": "up"}, "log.jsonl:99"))
    bad = BadRows(5)
    wanted = made.grouping()
    assert wanted is not None
    episodes = list(grouping.grouped(iter(steps), wanted, made.check, bad))
    assert [len(episode["observation"]) for episode in episodes] == [5, 5, 5, 5]
    assert [row.where for row in bad.first if isinstance(row, BadRow)] == ["log.jsonl:99"]
    made.fit(made.observe(episodes))
    alone, _ = policy(log(20))
    assert np.array_equal(made.encode(episodes)["observation"], alone.encode(log(20))["observation"])
    assert made.encode(episodes)["label"].tolist() == alone.encode(log(20))["label"].tolist()
    assert made.unused(episodes[0]) == ["thrust", "x", "y"]


def test_findings_do_not_depend_on_where_the_log_is_cut(tmp_path: Path) -> None:
    odd = [{"observation": [1.0], "thrust": [2.0, 3.0]}, {"observation": [[1.0]], "thrust": 4}]
    steps, learned = [odd[0], *log(88), odd[1]], []
    for size in (90, 31, 1):
        made = get("policy")({"action_column": "thrust"})
        found = made.observe(steps[:size])
        for start in range(size, 90, size):
            found = found.merged(made.observe(steps[start : start + size]))
        made.fit(found)
        made.save(tmp_path)
        learned.append(json.loads((tmp_path / "policy.json").read_text()))
    assert learned[0] == learned[1] == learned[2]


def test_a_job_that_goes_on_keeps_scales_and_actions(tmp_path: Path) -> None:
    made, _ = policy(log())
    made.save(tmp_path)
    later = get("policy")()
    assert later.inherit(tmp_path)
    assert (later.labels, later.seen, later.names) == (made.labels, made.seen, made.names)
    assert later.inherited() == ["the 2 actions and the form of observations are those of the model it starts from"]
    with pytest.raises(TaskError, match=r"task\.kind is continuous, but the model it starts from"):
        get("policy")({"kind": "continuous"}).inherit(tmp_path)
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no policy of Tandem: policy\.json"):
        get("policy").load(tmp_path)


def test_a_state_without_a_finite_answer_is_refused() -> None:
    made, _ = policy(log(), action_column="thrust")
    model = made.build("mlp", {"hidden_size": 8, "frequencies": 0})
    with torch.no_grad():
        model.straight.weight.fill_(1e9)
    with pytest.raises(TaskError, match="so far from those in training that the model has no finite answer"):
        made.predict(model, [np.array([1e38, 0, 0])])


def test_a_blank_state_is_one() -> None:
    made, _ = policy(log())
    assert blank(made.inputs()).tolist() == [0, 0, 0]


def test_the_built_in_controller_keeps_the_pole_upright_and_its_log_is_always_the_same() -> None:
    rows_ = [dict(row) for row in corpora.BUILT_IN["pole-balance"]().read() if isinstance(row, Example)]
    assert len(rows_) == 5720
    assert rows_ == list(pole.episodes())
    assert {row["action"] for row in rows_} == {"left", "right"}
    assert all(abs(row["force"]) <= pole.FORCE_N for row in rows_)
    state = pole.State(0.4, 0.2, 0.1, -0.2)
    for _ in range(500):
        state = state.after(pole.controlled(state))
    assert not state.lost
    assert abs(state.angle) < 0.01
    fallen = pole.State(0, 0, 0.05, 0)
    for _ in range(60):
        fallen = fallen.after(0.0)
    assert fallen.lost
