"""What crosses between versions of Tandem: a message of another shape is never read as one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from serve.deploy.shapes import seal, shape_of, unseal
from serve.keys.limits import Limits
from serve.wire import Load


def test_a_shape_changes_with_names_types_and_order_of_fields_and_with_nothing_else() -> None:
    def of(body: str) -> str:
        names: dict[str, type] = {}
        exec(f"from __future__ import annotations\n@dataclass\nclass Told:\n{body}", {"dataclass": dataclass}, names)
        return shape_of(names["Told"])

    own = of("    a: int\n    b: str = ''")
    assert own == of('    """Says more."""\n    a: int\n    b: str = "x"')
    others = [
        of("    a: int"),
        of("    a: float\n    b: str"),
        of("    a: int\n    c: str"),
        of("    b: str\n    a: int"),
    ]
    assert len({own, *others}) == 5


def test_shapes_are_of_named_tuples_and_models_too() -> None:
    class Pair(NamedTuple):
        a: int
        b: int

    assert len({shape_of(Pair), shape_of(Limits), shape_of(Load), shape_of(Load, Limits)}) == 4


def test_a_message_comes_out_as_it_went_in() -> None:
    assert unseal(seal(Load(1, 2, 3.0))) == Load(1, 2, 3.0)
