"""What is said of a data set's content, and of how it was told apart: sentences for the job's log. Pure."""

from __future__ import annotations

from cluster.errors import UserError
from jobs.data import splitting, stream
from jobs.data.examples import printable
from jobs.data.stream import Survey
from jobs.spec import DataSpec

NAMED = 12
"""So many files or columns are named."""


def said_of_split(survey: Survey, data: DataSpec, held: int) -> list[str]:
    """Say what was chosen: how a few examples were told apart, and that copies were kept together.

    Args:
        held: how many are held out whole.
    """
    how, tally = stream.way_of(survey, data), survey.tally
    count, twice, different = tally.count, tally.copies, tally.contents
    said = []
    if survey.cut_each:
        return _said_of_ends(survey, data)
    if how == "nothing" and data.eval_fraction:
        one = "there is 1 example" if different == 1 else "all examples belong together, as those of one prompt do"
        said.append(f"nothing is held out: {one}{', many times over' if count > 1 == different else ''}")
    if how == "cut":
        what = "the text is" if count == 1 else f"the {count} texts are each"
        said.append(f"{what} cut: the last {100 * data.eval_fraction:.3g}% is held out")
    elif how == "whole" and survey.is_listed and (twice or count < splitting.FEW):
        said.append(f"{held} of {count} examples are held out, whole")
    elif how == "whole" and not survey.is_listed:
        said.append(f"{held} of {count} examples are held out, whole, each by a hash of its content")
    beside = ", and are kept on its side of the split" if how == "whole" else ""
    if twice and how != "cut" and different > 1:
        said.append(f"{twice} of {count} examples are copies of an earlier one{beside}")
    if tally.kin and how == "whole":
        said.append(f"{tally.kin} of {count} examples have the prompt of an earlier one{beside}")
    return said


def _said_of_ends(survey: Survey, data: DataSpec) -> list[str]:
    if not data.eval_fraction:
        return []
    if "eval_fraction" in data.model_fields_set:
        raise UserError(
            f"data.eval_fraction {data.eval_fraction:g}: this task holds out {survey.cut_each}, and no share; leave it "
            "out, or set it to 0 to hold nothing out"
        )
    short = f"; {survey.uncut} of {survey.tally.count} are too short, and are learned whole" if survey.uncut else ""
    return [f"held out: {survey.cut_each}{short}"]


def said_of_content(survey: Survey) -> list[str]:
    """Say what of a source has no effect: files without an example, columns that are not read."""
    said = []
    if survey.empty:
        named = _some(list(survey.empty), len(survey.empty))
        said.append(f"{len(survey.empty)} of the files hold no example: {named}")
    if survey.tally.contradicting:
        count = survey.tally.count
        said.append(
            f"{survey.tally.contradicting} of {count} examples are copies of an earlier one with another target"
        )
    if survey.unused:
        columns = [f"{column!r} (in {count})" for column, count in sorted(survey.unused.items())]
        said.append(f"columns that have no effect: {_some(columns, len(columns))}")
    return said


def _some(names: list[str], count: int) -> str:
    return printable(", ".join(names[:NAMED]) + (f", … ({count})" if count > NAMED else ""))


def said_of_overlap(train: Survey, held_out: Survey, shared: tuple[int, int]) -> list[str]:
    """Say how many training examples are copies, and how many held-out ones are in the training data too.

    Args:
        shared: how many held-out ones have the content, and the group, of a training one.
    """
    in_content, in_group = shared
    count, twice = held_out.tally.count, train.tally.copies
    said = [f"{twice} of {train.tally.count} examples are copies of an earlier one"] if twice else []
    said += [f"{in_content} of {count} held-out examples are also in the training data"] if in_content else []
    kin = in_group - in_content
    return said + ([f"{kin} of {count} held-out examples have a prompt of the training data"] if kin else [])


def said_of_dropped(dropped: int, count: int) -> list[str]:
    """Say how many copies were left out of so many examples."""
    if not dropped:
        return []
    return [f"{dropped} of {count} examples are copies of an earlier one, and are left out (data.duplicates: drop)"]
