"""Write docs/keys.md, every key of every spec with type, default and help: python tools/spec_keys.py [--check]

The page is made from the pydantic models alone. `--check` writes nothing and exits with 1 if the page is stale; so does
a key without help, which is the docstring below the key, or for a section that of its class.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "keys.md"
sys.path.insert(0, str(ROOT))

HEAD = """# All keys

Made by `python tools/spec_keys.py` from the models that check the specs; `make check` fails when it is stale. A key
without a default is required; "–" stands for a key that may be left out. `--set a.b=value` changes the key `a.b`.
"""

Schema = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One line of a table: a key's path, and what the page says of it."""

    path: str
    kind: str
    default: str
    help: str


@dataclass(frozen=True)
class Section:
    """A mapping of the spec: its path ("" for the whole), its help, and its own keys."""

    path: str
    help: str
    keys: tuple[Key, ...]


def sections(model: type[BaseModel], path: str = "") -> list[Section]:
    """List a model's sections, the outermost first; `path` is where it lies in the spec."""
    schema = model.model_json_schema()
    return list(_sections(schema, schema.get("$defs", {}), path))


def without_help(chapter: list[Section]) -> list[str]:
    """List the paths of keys that nothing explains."""
    return [key.path for section in chapter for key in section.keys if not key.help]


def _sections(schema: Schema, defs: Schema, path: str) -> Iterator[Section]:
    required = schema.get("required", [])
    below = [(_join(path, name), field) for name, field in schema.get("properties", {}).items()]
    keys = [
        Key(where, _nullable(_kind(field, defs), field), _default(field, name in required), _help(field, defs))
        for (where, field), name in zip(below, schema.get("properties", {}), strict=True)
    ]
    yield Section(path, _one_line(schema.get("description", "")), tuple(keys))
    for where, field in below:
        for inner, suffix in _inner(field, defs):
            yield from _sections(inner, defs, where + suffix)


def _inner(field: Schema, defs: Schema) -> Iterator[tuple[Schema, str]]:
    """Yield the sections that a key's value may be, with what their paths have behind the key's."""
    if "$ref" in field:
        yield defs[field["$ref"].rpartition("/")[2]], ""
    for choice in field.get("anyOf", []):
        yield from _inner(choice, defs)
    if isinstance(items := field.get("items"), dict):
        yield from ((schema, f"[]{suffix}") for schema, suffix in _inner(items, defs))
    values = _values(field)
    if values:
        yield from ((schema, f".<name>{suffix}") for schema, suffix in _inner(values, defs))


def _values(field: Schema) -> Schema:
    """Return the schema of a mapping's values, {} where it is any."""
    candidates = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
    return next((schema for schema in candidates if isinstance(schema, dict)), {})


def _kind(field: Schema, defs: Schema) -> str:
    """Return a type in words, with its bounds."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(c, defs) for c in field["anyOf"] if c.get("type") != "null"))
    if "$ref" in field:
        return "section"
    choices = field.get("enum", [field["const"]] if "const" in field else [])
    if choices:
        return " or ".join(f"`{choice}`" for choice in choices)
    return _PLAIN.get(field.get("type", ""), _plain_any)(field, defs)


def _nullable(kind: str, field: Schema) -> str:
    """Say where a key that has a default may be `null` too."""
    may_be_null = {"type": "null"} in field.get("anyOf", []) and field.get("default") is not None
    return f"{kind} or `null`" if may_be_null else kind


def _number(word: str) -> Any:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}

    def kind(field: Schema, defs: Schema) -> str:
        bounds = [f"{sign} {field[bound]:g}" for bound, sign in signs.items() if bound in field]
        return " ".join([word, ", ".join(bounds)]).strip()

    return kind


def _text(field: Schema, defs: Schema) -> str:
    return "name" if "pattern" in field else "text"


def _list(field: Schema, defs: Schema) -> str:
    if "prefixItems" in field:
        return f"[{', '.join(_kind(item, defs) for item in field['prefixItems'])}]"
    kind = _kind(field.get("items", {}), defs)
    return f"list of {kind}s" if kind == "section" else f"list of {kind}"


def _mapping(field: Schema, defs: Schema) -> str:
    values = _values(field)
    return f"mapping of names to {_kind(values, defs)}s" if values else "mapping"


def _plain_any(field: Schema, defs: Schema) -> str:
    return "any"


_PLAIN = {
    "boolean": lambda field, defs: "`true` or `false`",
    "integer": _number("integer"),
    "number": _number("number"),
    "string": _text,
    "array": _list,
    "object": _mapping,
}


def _default(field: Schema, required: bool) -> str:
    if required:
        return ""
    default = field.get("default")
    return "–" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`".replace('"', "")


def _help(field: Schema, defs: Schema) -> str:
    own = field.get("description") or next((s.get("description", "") for s, _ in _inner(field, defs)), "")
    return _one_line(own)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def render(title: str, chapter: list[Section]) -> str:
    """Return a chapter as Markdown: for each section its path, its help, and a table of its keys."""
    first, *rest = chapter
    below = [part for section in rest for part in (f"### {section.path}", *_body(section))]
    return "\n\n".join([f"## {title}", *_body(first), *below]) + "\n"


def _body(section: Section) -> Iterator[str]:
    rows = [f"| `{key.path}` | {_cell(key.kind)} | {key.default} | {_cell(key.help)} |" for key in section.keys]
    yield section.help
    if rows:
        yield "\n".join(["| key | type | default | what it is |", "| --- | --- | --- | --- |", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def chapters() -> dict[str, list[Section]]:
    """Return the sections of the page, by chapter."""
    from cluster.kubernetes.spec import DeploymentSpec
    from cluster.slurm.spec import SlurmSpec
    from jobs.spec import JobSpec
    from jobs.tasks import TASKS, get
    from serve.engines.table import ENGINES
    from serve.spec import ServeSpec

    engines = {
        f"Options of the engine `{name}`": sections(engine.options, "models.<name>.engine")
        for name, engine in ENGINES.items()
    }
    options = {f"Options of the task `{name}`": sections(get(name).Options, "task") for name in TASKS}
    return {
        "Jobs: `tandem jobs submit SPEC`": sections(JobSpec),
        **options,
        "Endpoints: `tandem serve up SPEC`": sections(ServeSpec),
        **engines,
        "Kubernetes: `tandem cluster manifests SPEC`": sections(DeploymentSpec),
        "Slurm: `tandem cluster sbatch SPEC`": sections(SlurmSpec),
    }


def main(arguments: list[str]) -> int:
    """Write the page, or compare it; return the exit code."""
    found = chapters()
    missing = [path for chapter in found.values() for path in without_help(chapter)]
    if missing:
        print(f"no help for {', '.join(missing)}: write a docstring below each", file=sys.stderr)
        return 1
    page = "\n".join([HEAD, *(render(title, chapter) for title, chapter in found.items())])
    if arguments == ["--check"]:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page
        print("docs/keys.md is up to date" if fresh else "docs/keys.md is stale: run python tools/spec_keys.py")
        return int(not fresh)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
