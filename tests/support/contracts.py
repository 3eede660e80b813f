"""Checks that a private interface still has the shape Tandem relies on, named after the adapter's entries."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from cluster.internals import Internal

Check = Callable[[], None]


class Contract:
    """The checks of one adapter: one for each of its entries."""

    def __init__(self, adapter: str, entries: Iterable[Internal]) -> None:
        self.adapter = adapter
        self.entries = {entry.name: entry for entry in entries}
        self.checks: dict[str, Check] = {}

    def check(self, name: str) -> Callable[[Check], Check]:
        """Register the check of the entry `name`."""
        assert name in self.entries, f"{self.adapter} has no entry {name!r}"
        assert name not in self.checks

        def keep(check: Check) -> Check:
            self.checks[name] = check
            return check

        return keep

    def verify(self, name: str) -> None:
        """Fail with the entry's own words if its check does."""
        assert name in self.checks, f"{self.adapter}: the entry {name!r} has no check in tests/contracts/"
        try:
            self.checks[name]()
        except Exception as error:
            pytest.fail(f"{self.adapter}: {self.entries[name].explain(repr(error))}", pytrace=False)


def has_attributes(owner: object, *names: str) -> None:
    """Fail unless `owner` has all of them."""
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f"{owner!r} has no {', '.join(missing)}"


def takes(function: Callable[..., object], *names: str) -> None:
    """Fail unless the function has parameters of these names, or takes any keyword."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = set(names) - parameters.keys()
    assert not missing, f"{function.__qualname__}{inspect.signature(function)} takes no {', '.join(sorted(missing))}"


def calls(function: Callable[..., object], *names: str) -> None:
    """Fail unless the function's source mentions the names: what replaces a method must still be asked for it."""
    source = inspect.getsource(function)
    missing = [name for name in names if name not in source]
    assert not missing, f"{function.__qualname__} no longer uses {', '.join(missing)}"


def source_of(module: str) -> str:
    """Return a module's source without importing it (its packages are imported)."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def file_of(package: str, name: str) -> Path:
    """Return a file below a package's folder, without importing more than its parents."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"there is no package {package}"
    path = Path(next(iter(spec.submodule_search_locations or []))) / name
    assert path.exists(), f"{package} has no {name}"
    return path


def source_mentions(module: str, *words: str) -> None:
    """Fail unless the module's source has all of the words."""
    text = source_of(module)
    missing = [word for word in words if word not in text]
    assert not missing, f"{module} does not mention {', '.join(missing)} any more"


def defines(path: Path, *names: str) -> None:
    """Fail unless a file defines the names at its top level, without importing it."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    missing = set(names) - found
    assert not missing, f"{path} does not define {', '.join(sorted(missing))} any more"


def binary_holds(path: Path, *words: str) -> None:
    """Fail unless a binary holds all of the words: settings and variables of compiled parts."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        missing = [word for word in words if content.find(word.encode()) < 0]
    assert not missing, f"{path} does not know {', '.join(missing)} any more"
