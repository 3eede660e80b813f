"""The four folders import in one direction, and a command line's `--help` loads nothing heavy."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("cluster", "tracking", "jobs", "serve")
ALLOWED = {
    "cluster": set(),
    "tracking": {"cluster"},
    "jobs": {"cluster", "tracking"},
    "serve": {"cluster", "tracking", "jobs"},
}
ONLY_IN = {
    "mlflow": "tracking/",
    "deepspeed": "jobs/worker/deepspeed_internals.py",
    "opentelemetry": "serve/tracing/spans.py",
}


@cache
def imports(*, for_types: bool = True) -> list[tuple[str, str]]:
    """List (file, what it imports); `for_types`: what only type checkers import too."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if not for_types:
                tree.body = [node for node in tree.body if not _only_for_types(node)]
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    found += [(name, f"{node.module}.{alias.name}") for alias in node.names]
                elif isinstance(node, ast.Import):
                    found += [(name, alias.name) for alias in node.names]
    return found


def _only_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_folders_import_in_one_direction():
    breaches = [
        f"{name} imports {target}"
        for name, target in imports()
        if (top := target.split(".")[0]) in FOLDERS
        and top != (folder := name.split("/")[0])
        and top not in ALLOWED[folder]
    ]
    assert breaches == []


def test_serve_takes_only_tasks_from_jobs():
    breaches = [
        f"{name} imports {target}"
        for name, target in imports()
        if name.startswith("serve/") and target.startswith("jobs.") and not target.startswith("jobs.tasks")
    ]
    assert breaches == []


def test_tasks_import_nothing_of_ours_but_errors_digests_what_specs_share_and_where_weights_lie():
    forbidden = {"ray", "deepspeed", "mlflow", "cluster", "tracking", "serve"}
    light = ("cluster.errors.", "cluster.internals.", "cluster.strict.", "cluster.unique_keys.")
    light += ("tracking.weights_digest",)  # the registry and whoever loads know a base by the same digest
    light += ("cluster.stored_weights", "cluster.weights_cache.local", "tracking.model_store")  # where models lie
    breaches = [
        f"{name} imports {target}"
        for name, target in imports()
        if name.startswith("jobs/tasks/")
        and not target.startswith(light)
        and (target.split(".")[0] in forbidden or (target.startswith("jobs.") and not target.startswith("jobs.tasks")))
    ]
    assert breaches == []


@pytest.mark.parametrize(("library", "home"), ONLY_IN.items())
def test_only_one_place_imports(library, home):
    breaches = [name for name, target in imports() if target.split(".")[0] == library and not name.startswith(home)]
    assert breaches == []


def test_specs_import_only_pydantic_names_and_the_standard_library():
    light = ("cluster.names.", "cluster.precision.", "cluster.errors.", "serve.engines.table", "serve.wire.")
    sections = ("spec_sections", "spec_mixture", "spec_rules", "spec_predict", "spec_schedule", "spec_sweep")
    light += (*(f"jobs.{name}." for name in sections), "cluster.strict.", "serve.runtime_env")
    light += ("cluster.mistakes.", "cluster.redact.", "cluster.home.", "serve.keys.place", "serve.scaling.settings.")
    specs = [f"jobs/{name}.py" for name in ("spec", *sections)]
    for spec in (
        *specs,
        "serve/spec.py",
        "serve/runtime_env.py",
        "serve/engines/table.py",
        "serve/wire.py",
        "serve/keys/place.py",
        "serve/scaling/settings.py",
    ):
        tops = {t.split(".")[0] for name, t in imports(for_types=False) if name == spec and not t.startswith(light)}
        assert tops - sys.stdlib_module_names <= {"pydantic", "pydantic_core"}, spec


def test_help_loads_nothing_heavy():
    code = (
        "import sys, tandem; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(tandem.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'deepspeed', 'transformers', 'numpy', 'pyarrow', 'pydantic'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
