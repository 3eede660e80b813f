"""Other libraries' private interfaces are used in the adapters (`*_internals.py`) alone, and each is registered."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from cluster.internals import Internal
from tests.contracts import (
    test_deepspeed_contract,
    test_mlflow_contract,
    test_pyarrow_contract,
    test_ray_contract,
    test_ray_serve_contract,
    test_ray_train_contract,
    test_seq2seq_contract,
    test_swap_contract,
    test_torch_contract,
    test_trial_contract,
    test_uvicorn_contract,
)
from tests.support.contracts import Contract

ROOT = Path(__file__).parents[2]
FOLDERS = ("cluster", "jobs", "serve", "tracking")
ALLOWED = {
    ("cluster/fork_server.py", "atexit._run_exitfuncs"),  # what multiprocessing's own forked processes end with
    ("cluster/fork_client.py", "'THP_MEM_ALLOC_ENABLE'"),  # a name to tell fork servers apart by
    ("jobs/noise.py", "'torch.utils._pytree'"),  # a logger's name: were it another, the log would have a remark more
}
"""Nothing else outside the adapters: to be added to only with a reason."""
DOCUMENTED = {"os._exit"}
NAMED_TUPLES = {"_replace", "_asdict", "_fields"}
"""Their documented methods, named so that no field hides them."""
HOOKS = {"_init_weights"}
"""What transformers asks of a model class of one's own."""
LIGHT = {*sys.stdlib_module_names, "pydantic"}
"""What no class takes private attributes over from: the standard library, and pydantic, which keeps its own apart."""
PRIVATE_PLACES = (
    "ray.autoscaler",
    "ray.core.generated",
    "ray.dashboard",
    "ray.scripts",
    "ray.serve.context",
    "ray.train.v2",
    "mlflow.server",
    "mlflow.utils",
)
"""Modules without an underscore that their libraries promise nothing about."""
VARIABLES = re.compile(r"^(__RAY|RAY|_MLFLOW|DS|THP)_\w+$")
DOCUMENTED_VARIABLES = {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "DS_ACCELERATOR"}
DOCUMENTED_VARIABLES |= {"RAY_TRAIN_"}  # a prefix
PRIVATE_NAME = re.compile(r"^(ray|torch|mlflow|deepspeed|transformers)(\.\w+)*\._\w+")
CONTRACTS = (
    test_ray_contract.CALLS,
    test_ray_contract.PROCESSES,
    test_ray_train_contract.TRAIN,
    test_ray_serve_contract.SERVE,
    test_deepspeed_contract.DEEPSPEED,
    test_mlflow_contract.MLFLOW,
    test_pyarrow_contract.PYARROW,
    test_torch_contract.CUDA,
    test_torch_contract.JOBS,
    test_torch_contract.TASKS,
    test_torch_contract.WORKER,
    test_torch_contract.SERVE,
    test_swap_contract.SWAP,
    test_trial_contract.TRIAL,
    test_uvicorn_contract.UVICORN,
    test_seq2seq_contract.CHRF,
    test_seq2seq_contract.POSITIONS,
)


def adapters() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*_internals.py")}


@cache
def sources() -> dict[str, ast.Module]:
    """Parse everything but the adapters."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): path for path in [*paths, ROOT / "tandem.py"]}
    return {name: ast.parse(path.read_text("utf-8")) for name, path in found.items() if name not in adapters()}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def is_ours(module: str) -> bool:
    return module.split(".")[0] in {*FOLDERS, "tandem", "__future__"}


def imported(tree: ast.AST, ours: bool = False) -> dict[str, str]:
    """Return what modules and names of others, or of ours, are called here: alias → dotted name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return {alias: name for alias, name in found.items() if is_ours(name) == ours}


def dotted(node: ast.expr) -> list[str]:
    """Return the parts of `a.b.c`; the first is empty where it starts with something else than a name."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Return the private names that our own code defines: methods, functions, attributes of self and of classes."""
    found = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node)[0] == "self":
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if is_private(name)}


def breaches(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Yield what a file uses of other libraries' private interfaces."""
    foreign = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name in imported(node).values() if _is_private_place(name))
        elif isinstance(node, ast.Attribute):
            parts = dotted(node)
            is_foreign = parts[0] in foreign
            if is_private(node.attr) and parts[0] not in ("self", "cls") and (is_foreign or node.attr not in known):
                yield ".".join(parts)
            elif is_foreign and isinstance(node.ctx, ast.Store) and len(parts) > 1:
                yield f"{'.'.join(parts)} = …"
            elif re.fullmatch(r"__\w+_ops__", node.attr):
                yield ".".join(parts)
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
            yield f"{node.arg}=…"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if PRIVATE_NAME.match(text) or (VARIABLES.match(text) and text not in DOCUMENTED_VARIABLES):
                yield repr(text)


def _is_private_place(name: str) -> bool:
    top, *rest = name.split(".")
    if top in sys.stdlib_module_names:
        return False
    return any(is_private(part) for part in rest) or any(f"{name}.".startswith(f"{p}.") for p in PRIVATE_PLACES)


def test_private_interfaces_are_used_in_adapters_alone() -> None:
    trees = sources()
    known = own_names(trees) | NAMED_TUPLES
    found = {(name, use) for name, tree in trees.items() for use in breaches(tree, known) if use not in DOCUMENTED}
    assert found - ALLOWED == set(), "move it to the library's adapter, with an entry and a check"
    assert ALLOWED - found == set(), "the exception is not needed any more"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from ray._private.state import state", ["ray._private.state.state"]),
        ("import ray\nray._raylet.Config", ["ray._raylet"]),
        ("from ray.train.v2.api import config", ["ray.train.v2.api.config"]),
        ("def f(client):\n    client._do_request('GET')", ["client._do_request"]),
        ("def f():\n    import torch\n    torch.compile = None", ["torch.compile = …"]),
        ("from ray import serve\nserve.delete('x', _blocking=False)", ["_blocking=…"]),
        ("X = {'RAY_gcs_storage': '1', 'RAY_ADDRESS': 'x'}", ["'RAY_gcs_storage'"]),
        ("class A:\n    def f(self, other):\n        return self._a + other._ours", []),
        ("from ray import serve\nserve.delete('x')", []),
    ],
)
def test_the_search_finds_each_kind_of_use(code: str, found: list[str]) -> None:
    assert list(breaches(ast.parse(code), {"_ours"})) == found


def classes() -> list[tuple[str, str, ast.ClassDef]]:
    """List (module, class, its syntax) of the classes with a base from another library, or from an adapter."""
    found = []
    for name, tree in sources().items():
        foreign = {alias for alias, origin in imported(tree).items() if origin.split(".")[0] not in LIGHT}
        foreign |= {alias for alias, origin in imported(tree, ours=True).items() if "_internals." in origin}
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(dotted(base)[0] in foreign for base in node.bases):
                found.append((name.removesuffix(".py").replace("/", "."), node.name, node))
    return found


def inherited(found: type) -> set[str]:
    """Return the private names that a class has from other libraries' classes: of the class, or set in `__init__`."""
    names: set[str] = set()
    for base in found.__mro__[1:]:
        top = base.__module__.split(".")[0]
        if not is_ours(base.__module__) and top not in sys.stdlib_module_names:
            names |= {name for name in vars(base) if is_private(name)}
            names |= set(getattr(getattr(base.__init__, "__code__", None), "co_names", ()))
    return {name for name in names if is_private(name)}


def test_no_class_of_ours_takes_over_or_reads_a_private_attribute_of_its_base() -> None:
    wrong = []
    for module, name, node in classes():
        theirs = inherited(getattr(importlib.import_module(module), name))
        attributes = [child for child in ast.walk(node) if isinstance(child, ast.Attribute)]
        used = {child.attr for child in attributes if dotted(child)[0] == "self"}
        used |= {child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)}
        wrong += [f"{module}.{name}.{attribute}" for attribute in sorted(used & theirs - HOOKS)]
    assert wrong == []


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.adapter)
def test_every_entry_says_what_it_must_and_has_a_check(contract: Contract) -> None:
    assert contract.entries.keys() == contract.checks.keys()
    for entry in contract.entries.values():
        assert all(len(part) > 10 for part in (entry.why, entry.without, entry.until)), entry.name


def test_every_adapter_has_a_contract() -> None:
    assert {contract.adapter for contract in CONTRACTS} == adapters() - {"cluster/internals.py"}


def remove_client(patch: pytest.MonkeyPatch) -> None:
    import ray.serve.context as context

    patch.delattr(context, "_get_global_client")


def rename_member(patch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    def other(self: object, scaling_config: object) -> None: ...

    patch.setattr(ElasticScalingPolicy, "__init__", other)


@pytest.mark.parametrize(
    ("change", "contract", "name"),
    [
        (remove_client, test_ray_serve_contract.SERVE, "ray.serve.context._get_global_client"),
        (rename_member, test_ray_train_contract.TRAIN, "ElasticScalingPolicy._latest_monitor_time"),
    ],
)
def test_an_upgrade_names_what_it_broke(monkeypatch: pytest.MonkeyPatch, change, contract: Contract, name: str) -> None:
    contract.verify(name)
    change(monkeypatch)
    with pytest.raises(pytest.fail.Exception) as failure:
        contract.verify(name)
    entry: Internal = contract.entries[name]
    for words in (contract.adapter, entry.name, entry.why, entry.without, entry.until):
        assert words in str(failure.value)


def test_nothing_is_imported_with_the_adapters_that_forked_workers_read() -> None:
    for name in ("cluster.internals", "cluster.ray_process_internals"):
        module: ModuleType = importlib.import_module(name)
        tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
        tops = {name.split(".")[0] for name in imported(tree).values()}
        assert tops <= {"typing"}, name
