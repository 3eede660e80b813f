"""Whoever takes or returns tensors says of which shapes."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TENSORS = re.compile(r"\b(Tensor|ndarray|Batch|Columns)\b")
SHAPE = re.compile(r"[\[(][A-Za-z0-9.][^\])]*[\])]|scalar|shape")
INHERITED = {"forward", "update", "lazy_initialization"}
"""Methods of classes that torch or transformers call: their base says it, or the class does."""


def silent(path: Path) -> list[str]:
    """List the public functions of a file whose signature has tensors and whose docstring has no shape."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        f for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) for f in ast.walk(outer) if f is not outer
    }
    found = []
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.FunctionDef)
            or node in inner
            or node.name.startswith("_")
            or node.name in INHERITED
        ):
            continue
        arguments = [*node.args.args, *node.args.kwonlyargs]
        signature = " ".join(
            ast.unparse(a) for a in [*(a.annotation for a in arguments), node.returns] if a is not None
        )
        if TENSORS.search(signature) and not SHAPE.search(ast.get_docstring(node) or ""):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    return found


def test_public_functions_that_take_or_return_tensors_say_their_shapes():
    files = [path for folder in ("jobs", "serve") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [entry for path in files for entry in silent(path)] == []


def test_a_docstring_without_a_shape_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "x.py").write_text(
        'def f(x: torch.Tensor) -> None:\n    """Do."""\n\n\ndef g(x: torch.Tensor) -> None:\n    """Do x [N]."""\n'
    )
    assert silent(tmp_path / "x.py") == ["x.py:1 f"]
