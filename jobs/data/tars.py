"""Tar archives of samples, as WebDataset lays them out: members that share a name up to its first dot are one sample.

    0001.jpg  0001.cls  0002.jpg  0002.cls      →  {"image": bytes, "label": "cat"}, …
    a/17.flac a/17.txt                          →  {"audio": bytes, "path": "a/17.flac", "text": "…"}
    9.prompt.txt  9.completion.txt              →  {"prompt": "…", "completion": "…"}
    3.jpg  3.json                               →  {"image": bytes, and the fields of the JSON's object}

What follows the first dot names the field: its last part says how the member is read, what is before that is the
field's name, or else the kind's own. Members of a kind that is not known are fields of bytes with the whole as their
name; a task that does not read them says so. The rules are those of https://github.com/webdataset/webdataset.
A sample is read whole, and nothing else of the archive is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import UserError
from jobs.data import audio_folders, listing, readers
from jobs.data.compression import DAMAGED, compression, open_content, size_of
from jobs.data.examples import BadRow, Cut, Example, Rows, bounded
from jobs.data.media import IMAGE_SUFFIXES
from jobs.data.remote import Place
from jobs.data.tar_members import Archive, Member

VERSION = 1
"""Raise it when another example is made of the same bytes: rows encoded before are not used."""
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
"""A sample's name, and what follows its first dot."""
_OF_THE_WRITER = re.compile(r"(?:.*/)?__[^/]*__", re.DOTALL)
"""Members that WebDataset passes over: they are about the archive."""
_MEDIA = {kind[1:]: "image" for kind in IMAGE_SUFFIXES} | {kind[1:]: "audio" for kind in audio_folders.SUFFIXES}
_TEXTS = {kind[1:]: "text" for kind in readers.TEXT_SUFFIXES} | {"transcript": "text", "cls": "label", "class": "label"}
_OBJECTS = ("json", "jsn")
FIRST = 64
"""So many members are looked at where an archive is not looked through."""


@dataclass
class Look:
    """What is seen of an archive before it is read."""

    cuts: list[Cut] = field(default_factory=list)
    """The parts that it can be read in."""
    passed_over: list[str] = field(default_factory=list)
    """Members that belong to no sample."""
    samples: int = 0
    names_files: bool = False
    """True where a member is JSON, whose fields may name files."""


def read(path: Place) -> Rows:
    """Read the samples of an archive, compressed or not.

    Raises:
        BrokenTarError: it breaks off, or something in it is no member.
    """
    with open_content(path) as file:
        yield from _samples(path, Archive(file, None if compression(path) else size_of(path)), None)


def read_cut(path: Place, cut: Cut) -> Rows:
    """Read the samples of a part of an archive. Raises as `read`."""
    with path.open("rb") as file:
        file.seek(cut.start)
        yield from _samples(path, Archive(file, size_of(path), cut.start), cut.end)


def look(path: Place, size: int) -> Look:
    """Look through an archive, from header to header; of one that cannot be leapt through, at its first members.

    Args:
        size: the first sample that begins at a multiple of so many bytes, or behind it, begins a part.
    """
    found, through = Look(), isinstance(path, Path) and not compression(path)
    begins, wanted, last = [(0, 0)], size, None
    try:
        with open_content(path) as file:
            archive = Archive(file, None if compression(path) else size_of(path))
            for number, member in enumerate(archive.members()):
                parts = sample_of(member.name)
                if parts is None:
                    found.passed_over += [member.name] if is_passed_over(member.name) else []
                    continue
                if parts[0] != last and member.at >= wanted:
                    begins.append((member.at, found.samples))
                    wanted = (member.at // size + 1) * size
                found.samples += parts[0] != last
                found.names_files |= parts[1].rpartition(".")[2] in _OBJECTS
                last = parts[0]
                if not through and number >= FIRST:
                    break
    except DAMAGED:  # reading it says what is wrong with it
        return replace(found, samples=max(found.samples, 1))
    if not through:
        return found
    ends = [at for at, _ in begins[1:]] + [size_of(path)]
    found.cuts = [Cut(at, end, before, end - at) for (at, before), end in zip(begins, ends, strict=True)]
    return found


def sample_of(name: str) -> tuple[str, str] | None:
    """Return the sample that a member belongs to and, in lower case, what follows its first dot; None for no sample."""
    if is_passed_over(name):
        return None
    found = _NAME.fullmatch(name)
    return None if found is None else (found[1], found[2].lower())


def is_passed_over(name: str) -> bool:
    """Tell what belongs to no sample by its name: what systems leave behind, what is about the data or the archive."""
    path = PurePosixPath(name)
    hidden = any(listing.hidden(PurePosixPath(part)) for part in path.parts)
    return hidden or listing.is_about(path) or _OF_THE_WRITER.fullmatch(name) is not None


def _samples(path: Place, archive: Archive, end: int | None) -> Rows:
    """Yield sample by sample; one is whole when a member of another follows.

    Raises:
        UserError: the archive is damaged or breaks off behind a member that can be read.
    """
    last, rows = "", list[tuple[Member, str, bytes]]()
    for member in _read_on(path, archive.members(end)):
        if is_passed_over(member.name):
            continue
        parts = sample_of(member.name)
        if parts is None:
            yield BadRow(f"{path}:{member.name}", "no dot in its name: what follows one says what the member is")
            continue
        if parts[0] != last and rows:
            yield _row(path, last, rows)
            rows = []
        last = parts[0]
        rows.append((member, parts[1], b"" if member.is_link else archive.content(member)))
    if rows:
        yield _row(path, last, rows)


def _read_on(path: Place, members: Iterator[Member]) -> Iterator[Member]:
    last = ""
    try:
        for member in members:
            yield member
            last = member.name
    except DAMAGED as error:
        if last:
            raise UserError(f"data: {path}:{last}: the archive cannot be read on behind it: {error}") from error
        raise


def _row(path: Place, name: str, members: list[tuple[Member, str, bytes]]) -> Example | BadRow:
    """Return what the members of a sample make."""
    fields: dict[str, Any] = {}
    for member, kind, content in members:
        where = f"{path}:{member.name}"
        made = bounded(partial(_fields, member, kind, content), where)
        if isinstance(made, BadRow):
            return made
        twice = next((key for key in made if key in fields), None)
        if twice is not None:
            return BadRow(where, f"another member of the sample gives it the field {twice!r} too")
        fields |= made
    if "audio" in fields and isinstance(fields.get("text"), str):
        fields["text"] = fields["text"].strip()  # as of a text that lies beside a recording in a folder
    return Example(fields, f"{path}:{name}")


def _fields(member: Member, kind: str, content: bytes) -> dict[str, Any]:
    """Return the fields that a member gives its sample.

    Raises:
        UserError: it is a link, or not what its kind says.
    """
    if member.is_link:
        raise UserError("a link, without content of its own: pack the archive with --dereference --hard-dereference")
    named, _, how = kind.rpartition(".")
    if how in _MEDIA:
        field_ = named or _MEDIA[how]
        return {field_: content, "path": member.name} if field_ == "audio" else {field_: content}
    if how in _TEXTS:
        text = _text(content)
        return {named or _TEXTS[how]: text.strip() if _TEXTS[how] == "label" else text}
    if how in _OBJECTS:
        value = readers.json_object(content, "a sample's JSON", "its fields are those of one object")
        return {named: value} if named else value
    return {kind: content}


def _text(content: bytes) -> str:
    if b"\0" in content:
        raise UserError("a NUL byte: no text in UTF-8 (perhaps in UTF-16); convert the file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(readers.not_utf8(content[error.start])) from None
