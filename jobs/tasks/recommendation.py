"""Task `recommendation`: what a user will want next, from what the user has met so far.

Rows to learn from: inputs (N, L) int32, items from 1 with 0 behind the end, labels (N, L) int32, the item that follows
each or 0, targets (N,) int32. Rows whose next item is to be predicted have besides: wanted (N,), negatives (N, K),
met (N, S), popular (N,) and popular_all (N,), int32 too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import Batch, Columns, TaskError, TaskOptions
from jobs.tasks.finite import finite
from jobs.tasks.grouping import Grouping
from jobs.tasks.held_ends import HeldEnd
from jobs.tasks.interaction_rows import Encoding, to_learn, to_predict
from jobs.tasks.interactions import End, History, InteractionFindings, check_row, history_of
from jobs.tasks.labels import alike, check_columns, chosen, natural
from jobs.tasks.next_item import NextItem
from jobs.tasks.recommending import Wish, answer, shares, wish_of

if TYPE_CHECKING:
    import torch

ITEMS_FILE = "items.json"
LENGTH, NEGATIVES = 50, 100
MOST_MET = 1000
"""So many items of a user are taken out of the ranking of all items, the latest ones."""


class RecommendationOptions(TaskOptions):
    """Which interactions count, how they are learned from and measured."""

    user_column: Text = "user"
    """The column that names the user."""
    item_column: Text = "item"
    """The column that names the item."""
    time_column: Text | None = "time"
    """The column that orders a user's interactions, a number or an ISO date; null: they stand in order."""
    rating_column: Text | None = None
    """The column of a rating, where one decides whether an interaction counts. Left out with min_rating: none, or that
    of the model that the job starts from."""
    min_rating: float | None = None
    """Interactions with a lower rating are left out, and counted. A model that was trained with one goes on with it,
    unless a lower one is said."""
    same_time: Literal["shuffle", "keep"] | None = None
    """Interactions of one moment: in an order that user and item decide by a hash, or as they stand in the data. Left
    out: shuffle, or as the model that the job starts from was trained."""
    max_length: int | None = Field(None, ge=1, le=65_536)
    """The latest so many items of a history are read. Left out: 50, or as the model that the job starts from does."""
    softmax: Literal["full", "in-batch"] | None = None
    """The loss compares with all items, or with those that follow in the same micro-batch, corrected for how often
    each is there (logQ). Left out: full, or as the model that the job starts from was trained."""
    negatives: int | None = Field(None, ge=1, le=10_000)
    """The wanted item is ranked among so many that the user has not met. Left out: 100, or as many as the model that
    the job starts from was measured with."""
    negatives_seed: int | None = Field(None, ge=0, lt=2**63)
    """Decides, with the user's name, which these are. Left out: 0, or that of the model that the job starts from."""

    @model_validator(mode="after")
    def _go_together(self) -> RecommendationOptions:
        if (self.rating_column is None) != (self.min_rating is None):
            raise ValueError("rating_column and min_rating go together: a rating only decides whether a row counts")
        return check_columns(self, "user_column", "item_column", "time_column", "rating_column")


class Recommendation(NextItem):
    """Answers the items that most likely come next for a history of items, with their scores.

    It knows the items of its training data only, and users by nothing but their histories: new users need no training,
    new items do. What is ranked first is also what was met often; figures stand beside those of popularity alone.
    """

    name: ClassVar[str] = "recommendation"
    version: ClassVar[int] = 2
    Options: ClassVar[type[TaskOptions]] = RecommendationOptions
    networks: ClassVar[Mapping[str, str]] = {
        "sasrec": "jobs.tasks.sasrec:SasRec",
        "two-tower": "jobs.tasks.two_tower:TwoTower",
    }
    unit: ClassVar[str] = "interactions"
    learned_files: ClassVar[tuple[str, ...]] = (ITEMS_FILE,)
    cuts_each: ClassVar[str] = "the last interaction of each user"
    counted: ClassVar[Mapping[str, str]] = {
        "short": "users have fewer than two interactions: nothing is learned from them",
        "unknown": "users have met items that the training data does not hold: left out of their histories",
        "unseen": "users' next items are not in the training data: they count as missed",
        "few": "users have met so many items that fewer than task.negatives are left to rank among",
        "told": "users' interactions to predict are no later than what the model has learned of them: how good it is, "
        "they do not say",
        "again": "users' next items are ones that they have met before: answers leave these out, unless exclude_seen "
        "is false",
        "much": f"users have met more than {MOST_MET} items, or than any in training: not all leave the ranking of all",
    }

    options: RecommendationOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        own = self.options
        self.max_length = own.max_length or LENGTH
        self.softmax = chosen(own.softmax, "full")
        self.negatives, self.seed = chosen(own.negatives, NEGATIVES), chosen(own.negatives_seed, 0)
        self.met = 1
        """How many of a user's items are noted for the ranking of all."""
        self.ends: dict[str, End] = {}
        """When the histories end that were learned, by user."""
        self.same_time = chosen(own.same_time, "shuffle")
        self.rating: tuple[str | None, float | None] = (own.rating_column, own.min_rating)
        """The column of ratings, and the lowest that counts."""

    # -- data -------------------------------------------------------------------------------------------------------

    def grouping(self) -> Grouping:
        """Say that the rows of a user are one example."""
        user, time = self.options.user_column, self.options.time_column
        return Grouping((user,), time, {user: "user_column", **({time: "time_column"} if time else {})})

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for a row that names no item, or has no rating where one is asked for."""
        check_row(example, self.options.item_column, self.rating[0])

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the user and the history."""
        return [str(example[self.options.user_column]), *self._history(example).items]

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither user, item, time nor rating."""
        own = self.options
        read = {own.user_column, own.item_column, own.time_column, self.rating[0]}
        return [key for key, value in example.items() if key not in read and any(each is not None for each in value)]

    def cut(self, example: Mapping[str, Any], at: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return a user without the last interaction that counts, and the whole with a mark that it is to be predicted.

        None where fewer than two count.
        """
        own, history = self.options, self._history(example)
        if len(history.items) < 2:
            return None
        last = {history.rows[-1], *history.copies_of_last}
        first = {
            key: value if key == own.user_column else [each for row, each in enumerate(value) if row not in last]
            for key, value in example.items()
        }
        return first, {**example, own.item_column: HeldEnd(example[own.item_column])}

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> InteractionFindings:
        """Count items, users, and what does not count."""
        return InteractionFindings.of([self._history(example) for example in examples])

    def fit(self, findings: InteractionFindings) -> list[str]:
        """Learn which items there are, how popular each is, and how many one user meets."""
        self.items = sorted(findings.counts, key=natural)
        if len(self.items) < 2:
            raise TaskError(f"the training interactions are with {len(self.items)} item(s): a choice needs two")
        self.counts = [findings.counts[item] for item in self.items]
        self.ends = findings.ends
        self.met = min(findings.longest + 1, MOST_MET)
        total = sum(self.counts)
        said = [
            f"{len(self.items)} items, {total} interactions of {findings.users} users; the latest {self.max_length}"
        ]
        said[0] += " of each are read"
        if findings.left_out:
            said.append(f"{findings.left_out} interactions are rated below {self.rating[1]:g}: left out")
        said += alike(self.items, "items")
        if findings.copies:
            said.append(f"{findings.copies} rows repeat user, item and moment of another: counted once")
        if findings.tied:
            how = "in the data's order" if self.same_time == "keep" else "in an order drawn by a hash"
            said.append(f"{findings.tied} interactions share their moment with another of the user's: {how}")
        return said

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's items, and what decides histories unless the options do; another length is refused."""
        wanted = self.options.max_length
        super().inherit(parent)
        if wanted and wanted != self.max_length:
            raise TaskError(f"task.max_length is {wanted}, but the model it starts from reads {self.max_length}")
        return True

    def follow(self, parent: Path | str) -> None:
        """Take over which interactions count, and in which order those of one moment are."""
        self.inherit(parent)

    def inherited(self) -> list[str]:
        """Say that items and popularity are the parent's, and which interactions count."""
        said = [f"{len(self.items)} items and their popularity are those of the model that the job starts from"]
        column, least = self.rating
        if least is not None:
            said.append(f"interactions that column {column!r} rates below {least:g} are left out")
        return [*said, *["interactions of one moment are in the data's order"] * (self.same_time == "keep")]

    def save(self, directory: Path) -> None:
        """Write items.json: the items, how often each was met, and the length of a history."""
        known = {"items": self.items, "counts": self.counts, "max_length": self.max_length, "met": self.met}
        known |= {"softmax": self.softmax, "negatives": self.negatives, "negatives_seed": self.seed}
        known |= {"ends": self.ends}
        known |= {"same_time": self.same_time, "rating_column": self.rating[0], "min_rating": self.rating[1]}
        (directory / ITEMS_FILE).write_text(json.dumps(known), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Recommendation:
        """Read what `save` wrote."""
        task = cls(options)
        try:
            known = json.loads((Path(directory) / ITEMS_FILE).read_text(encoding="utf-8"))
            task.items, task.counts = known["items"], known["counts"]
            task.max_length, task.met = known["max_length"], known["met"]
            task.ends = {user: tuple(end) for user, end in known.get("ends", {}).items()}
            task.softmax = chosen(task.options.softmax, known.get("softmax", "full"))
            task.negatives = chosen(task.options.negatives, known.get("negatives", NEGATIVES))
            task.seed = chosen(task.options.negatives_seed, known.get("negatives_seed", 0))
            task.same_time = chosen(task.options.same_time, known.get("same_time") or "shuffle")
            if task.options.min_rating is None:
                task.rating = known.get("rating_column"), known.get("min_rating")
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise TaskError(f"{directory} holds no recommender of Tandem: {ITEMS_FILE}: {error}") from error
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Cut histories into N windows, or note what is to be predicted, and ranked among what: columns (N, …)."""
        own = self.options
        held = [isinstance(example[own.item_column], HeldEnd) for example in examples]
        assert all(held) or not any(held), "a chunk holds rows to learn from, or ends to predict"
        histories = [self._history(example) for example in examples]
        how = Encoding(self.numbers(), self.counts, self.max_length, self.met, self.negatives, self.seed, self.ends)
        if not all(held):
            return to_learn(histories, how)
        return to_predict(histories, [example[own.user_column] for example in examples], how)

    def collate(self, rows: Columns) -> Batch:
        """Return the columns as int64, (B, …); inputs and labels as long as the longest history."""
        import torch

        longest = max(1, int((rows["inputs"] > 0).sum(1).max(initial=0)))
        short = {key: column[:, :longest] if key in ("inputs", "labels") else column for key, column in rows.items()}
        return {key: torch.from_numpy(column.astype(np.int64)) for key, column in short.items()}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> Any:
        """Return the history of a user, all of it, and what the user has seen besides: items that are rated too low."""
        history = self._history(example)
        return {"history": history.items, **({"also_seen": sorted(history.below)} if history.below else {})}

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer the best `k` items for each history, with scores; popular ones where it holds no known item.

        Args:
            instances: mappings with history (a list of names, "" for none), and also_seen, k and exclude_seen where
                given.

        Raises:
            TaskError: k is out of range, or a history or also_seen is no list of names.
        """
        import torch

        numbers = self.numbers()
        wishes: list[Wish] = [wish_of(instance, numbers, len(self.items)) for instance in instances]
        device = next(model.parameters()).device
        inputs = np.zeros((len(wishes), self.max_length), dtype=np.int64)
        for row, wish in enumerate(wishes):
            latest = wish.known[-self.max_length :]
            inputs[row, : len(latest)] = latest
        with torch.inference_mode():
            scores = finite(self._last(model, torch.from_numpy(inputs).to(device))).cpu().numpy()
        return [
            answer(wish, row, self.items, "model")
            if wish.known
            else answer(wish, shares(self.counts), self.items, "popularity")
            for wish, row in zip(wishes, scores, strict=True)
        ]

    def inputs(self) -> list[dict[str, Any]]:
        """Describe history, also_seen, k and exclude_seen."""
        optional = {"parameters": {"optional": True}}
        return [
            {"name": "history", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "also_seen", "datatype": "BYTES", "shape": [-1, -1], **optional},
            {"name": "k", "datatype": "INT32", "shape": [-1], **optional},
            {"name": "exclude_seen", "datatype": "BOOL", "shape": [-1], **optional},
        ]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe items, scores, how many of the history are unknown, and what ranked."""
        if self.answers_otherwise(Recommendation):
            return []
        return [
            {"name": "items", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "unknown", "datatype": "INT64", "shape": [-1]},
            {"name": "ranked_by", "datatype": "BYTES", "shape": [-1]},
        ]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _history(self, example: Mapping[str, Any]) -> History:
        own = self.options
        columns = (own.user_column, own.item_column, own.time_column)
        return history_of(example, *columns, *self.rating, shuffle=self.same_time != "keep")
