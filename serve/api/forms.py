"""Forms with files (multipart/form-data) as their fields. Pure functions over a whole body, which is bounded before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve.api.body import ApiError

MOST_PARTS = 64
MOST_TEXT = 64 * 1024
"""Bytes of a field that is no file."""


@dataclass(frozen=True)
class FormFile:
    """A file of a form. Its name is the client's, and opens nothing."""

    name: str
    content: bytes


Fields = dict[str, Any]
"""Texts and files by name; a list, where a name came several times."""


@dataclass
class _Part:
    headers: dict[str, str] = field(default_factory=dict)
    header: list[bytes] = field(default_factory=lambda: [b"", b""])
    content: bytearray = field(default_factory=bytearray)


def boundary(content_type: str | None) -> bytes:
    """Return what separates a form's parts.

    Raises:
        ApiError: 400, the body is no form.
    """
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(content_type or "")
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        said = (content_type or "nothing").split(";")[0]
        message = f"the body must be a form (multipart/form-data with a boundary), and says that it is {said!r:.60}"
        raise ApiError(400, message, code="invalid_value")
    return bytes(options[b"boundary"])


def check_form(content_type: str | None) -> None:
    """Refuse, 400, a body that is no form."""
    boundary(content_type)


def read(raw: bytes, content_type: str | None) -> Fields:
    """Read a form.

    Raises:
        ApiError: 400, it is no whole form, or has too many parts.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser

    parts: list[_Part] = []
    ended: list[bool] = []
    try:
        parser = MultipartParser(boundary(content_type), _callbacks(parts, ended))
        parser.write(raw)
    except FormParserError as error:
        raise _broken(" ".join(str(error).split())[:120]) from None
    if not ended:
        raise _broken("it ends too early")
    fields: Fields = {}
    for part in parts:
        name, value = _value(part)
        earlier = fields.get(name)
        repeated = [*earlier, value] if isinstance(earlier, list) else [earlier, value]
        fields[name] = repeated if name in fields else value
    return fields


def _callbacks(parts: list[_Part], ended: list[bool]) -> dict[str, Any]:
    """Return what the parser calls with pieces of the body: they gather in the last of `parts`."""

    def begin() -> None:
        if len(parts) == MOST_PARTS:
            raise _broken(f"it has more than {MOST_PARTS} parts")
        parts.append(_Part())

    def header(which: int, data: bytes, start: int, end: int) -> None:
        parts[-1].header[which] += data[start:end]

    def header_end() -> None:
        name, value = (piece.decode("utf-8", "replace") for piece in parts[-1].header)
        parts[-1].headers[name.strip().lower()] = value
        parts[-1].header = [b"", b""]

    def content(data: bytes, start: int, end: int) -> None:
        parts[-1].content += data[start:end]

    return {
        "on_part_begin": begin,
        "on_header_field": lambda data, start, end: header(0, data, start, end),
        "on_header_value": lambda data, start, end: header(1, data, start, end),
        "on_header_end": header_end,
        "on_part_data": content,
        "on_end": lambda: ended.append(True),
    }


def _value(part: _Part) -> tuple[str, str | FormFile]:
    """Return a part's name and what it holds: a file where it has a file's name, else a text."""
    from python_multipart.multipart import parse_options_header

    _, options = parse_options_header(part.headers.get("content-disposition", ""))
    name = options.get(b"name", b"").decode("utf-8", "replace")
    if not name:
        raise _broken("a part has no name")
    if b"filename" in options:
        return name, FormFile(options[b"filename"].decode("utf-8", "replace"), bytes(part.content))
    if len(part.content) > MOST_TEXT:
        raise ApiError(400, f"{name:.60}: longer than {MOST_TEXT} bytes", code="invalid_value", param=name)
    try:
        return name, part.content.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, f"{name:.60}: is no text in UTF-8", code="invalid_value", param=name) from None


def _broken(why: str) -> ApiError:
    return ApiError(400, f"the body is no valid form: {why}", code="invalid_value")
