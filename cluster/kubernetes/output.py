"""Objects → YAML files that people read: one file for each concern, the same bytes for the same specs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UserError

Object = dict[str, Any]
WIDTH = 118


class _Dumper(yaml.SafeDumper):
    """Keys in the order in which they were made, lists indented, texts of several lines as they are, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def document(each: Object, remarks: Mapping[str, str]) -> str:
    """Return an object as YAML, with remarks above the keys that they are about.

    Args:
        remarks: text by dotted path; a path that the object has not is left out.
    """
    text = yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=WIDTH, allow_unicode=True)
    lines = text.splitlines()
    places = {".".join(path): line for path, line in _places(yaml.compose(text, Loader=yaml.CSafeLoader), ())}
    for path, remark in sorted(remarks.items(), key=lambda item: -places.get(item[0], -1)):
        if path in places:
            line = places[path]
            indent = " " * (len(lines[line]) - len(lines[line].lstrip()))
            lines[line:line] = [f"{indent}# {part}" for part in remark.splitlines()]
    return "\n".join(lines) + "\n"


def file(head: str, documents: Sequence[str]) -> str:
    """Return a file of several documents under a remark."""
    remark = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
    return remark + "---\n" + "---\n".join(documents)


def write(files: Mapping[str, str], folder: Path) -> list[Path]:
    """Write all of the files into a folder, each as a whole.

    Raises:
        UserError: the folder cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            partial = folder / f".{name}.{os.getpid()}.partial"
            partial.write_text(text, encoding="utf-8")
            written.append((partial, folder / name))
        for partial, path in written:
            partial.replace(path)
    except OSError as error:
        for partial, _ in written:
            partial.unlink(missing_ok=True)
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}; name another folder") from error
    return [path for _, path in written]


def _places(node: yaml.Node | None, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line
            yield from _places(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _places(value, (*path, str(index)))
