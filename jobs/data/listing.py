"""Which files a place names: a path, a glob or a folder; and what lies there that is no data, with the reason."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from cluster.errors import UserError
from jobs.data.examples import printable

NAMED = 5
"""So many of the files that are left out are named."""
BRACED = 100_000
"""So many names may stand in braces."""
_ABOUT = re.compile(
    r"^(readme|licen[cs]e|copying|notice|authors|changelog|contributing|citation|code_of_conduct|security|"
    r"dataset[-_ ]?card|data[-_ ]?card|data[-_ ]?sheet|model[-_ ]?card)([-_. ].*)?$",
    re.IGNORECASE,
)
_ABOUT_KINDS = {"", ".md", ".txt", ".rst", ".text", ".markdown", ".html", ".pdf", ".cff", ".bib"}
_SPLIT = re.compile(r"(?:^|[-_.])(train|training|test|eval|valid|validation|val|dev)(?=[-_.]|$)", re.IGNORECASE)
_NOT_DATA = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "dataset_infos.json", "dataset_info.json"}


@dataclass
class Listing:
    """The files found, in order, and what was passed over: reason → paths relative to the place."""

    files: list[Path] = field(default_factory=list)
    root: Path | None = None
    """Where the place begins: what is above says nothing of a file."""
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str) -> None:
        """Note what is passed over."""
        self.left_out.setdefault(reason, []).append(path)

    def add(self, other: Listing) -> None:
        """Note what another passes over."""
        for reason, paths in other.left_out.items():
            self.left_out.setdefault(reason, []).extend(paths)

    def notes(self, name: str) -> tuple[str, ...]:
        """Return a sentence for each reason, with the first names; and one where a test set is among what is read."""
        said = [f"{name}: {_counted(paths)} left out ({why}): {_some(paths)}" for why, paths in self.left_out.items()]
        splits = dict(found for path in self.files if (found := self._split(path)))
        if len(splits) > 1 and any(split.startswith("train") for split in splits):
            said.append(
                f"{name}: {_some(sorted(splits.values()))} are all read; name one of them to leave out the others"
            )
        return tuple(said)

    def _split(self, path: Path) -> tuple[str, str] | None:
        """Return the split that a path names ("test"), and the part of it that does."""
        below = self.root is not None and path.is_relative_to(self.root)
        parts = path.relative_to(self.root).parts if self.root and below else path.parts[-1:]
        named = ((match, part) for part in reversed(parts) if (match := _SPLIT.search(part)))
        return next(((match[1].lower(), part) for match, part in named), None)


def braced(where: str) -> list[str]:
    """Return the names that one with braces stands for, in order: `{000..011}` and `{a,b}`; none without braces.

    Raises:
        UserError: they are too many.
    """
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", where)
    if found is None:
        return []
    first, last, names = found[1], found[2], found[3]
    if names is None and abs(int(last) - int(first)) >= BRACED:
        raise UserError(f"data: {where!r} names more than {BRACED} files: a glob does too")
    numbers = [] if names is not None else range(int(first), int(last) + 1)
    width = len(first) if first and first.startswith("0") else 0
    parts = names.split(",") if names is not None else [f"{number:0{width}d}" for number in numbers]
    if not parts:
        raise UserError(f"data: {where!r} names no file: {found[0]} counts backwards")
    made = [where[: found.start()] + part + where[found.end() :] for part in parts]
    whole = [name for each in made for name in braced(each) or [each]]
    if len(whole) > BRACED:
        raise UserError(f"data: {where!r} names more than {BRACED} files: a glob does too")
    return whole


def existing(where: str, base: Path) -> Path | None:
    """Return the path that `where` names from `base`, if it exists: a name with brackets or stars is no glob then."""
    place = _place(where, base)
    return place if os.path.lexists(place) else None


def _place(where: str, base: Path) -> Path:
    given = Path(os.path.expanduser(where))
    return given if given.is_absolute() else base / given


def of_glob(where: str, base: Path) -> Listing:
    """List the files that the glob `where` matches from `base`; a folder that it matches stands for what is in it.

    What is about the data is left out unless the pattern names it (`README*`). Links are followed, each file is taken
    once.
    """
    place = _place(where, base)
    listing = _deep(place, base) if "**" in place.parts else _flat(place, base, Path(os.path.expanduser(where)))
    listing.root = Path(*place.parts[: _first_magic(place)])
    _take_once(listing, base)
    return listing


def _take_once(listing: Listing, base: Path) -> None:
    """Leave out the links to a file that is there itself, or through another link."""
    links = {path for path in listing.files if path.is_symlink()}
    folders = {folder: os.path.realpath(folder) for folder in {path.parent for path in listing.files}}
    real = {  # asked of each file by itself, every folder above it would be looked at
        path: os.path.realpath(path) if path in links else os.path.join(folders[path.parent], path.name)
        for path in listing.files
    }
    first: dict[str, Path] = {}
    for path in sorted(real, key=lambda path: (path in links, path)):
        if first.setdefault(real[path], path) != path:
            listing.leave_out("the same file once more, through a link", _from(base, path))
    listing.files = [path for path in real if first[real[path]] == path]


def _flat(place: Path, base: Path, given: Path) -> Listing:
    listing = Listing()
    literal = re.split(r"[*?[]", place.name)[0].lower()
    pattern = str(given) if given.is_absolute() else os.path.join(glob.escape(str(base)), str(given))
    for folder in glob.glob(os.path.dirname(pattern)):  # a pattern passes over what it may not look into
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(f"data: cannot read {folder}: Permission denied")
    for path in sorted(map(Path, glob.glob(pattern))):
        if path.is_dir():
            inside = of_folder(path)
            listing.files += inside.files
            for reason, names in inside.left_out.items():
                for name in names:
                    listing.leave_out(reason, _from(base, path / name))
        else:
            _sort_in(listing, path, _from(base, path), about=not (literal and _ABOUT.match(literal)))
    return listing


def _deep(place: Path, base: Path) -> Listing:
    """List what a pattern with `**` matches, by a walk that no link leads in circles, as glob's own may be led."""
    magic = _first_magic(place)
    root, pattern = Path(*place.parts[:magic]), place.parts[magic:]
    found, listing = of_folder(root) if root.is_dir() else Listing(), Listing()
    listing.files = [path for path in found.files if fits(path.relative_to(root).parts, pattern)]
    for reason, names in found.left_out.items():
        for name in names:
            if fits(Path(name).parts, pattern):
                listing.leave_out(reason, _from(base, root / name))
    return listing


def _first_magic(place: Path) -> int:
    """Return which part of a path is the first to be a pattern; the last one, where none is."""
    parts = enumerate(place.parts)
    magic = (index for index, part in parts if glob.has_magic(part) and not _there(place, index))
    return next(magic, len(place.parts) - 1)


def _there(place: Path, index: int) -> bool:
    return os.path.lexists(Path(*place.parts[: index + 1]))


def fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Tell whether a path's parts match a pattern's, of which `**` matches any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(fits(parts[index:], pattern[1:]) for index in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and fits(parts[1:], pattern[1:])


def _from(base: Path, path: Path) -> str:
    return str(path.relative_to(base) if path.is_relative_to(base) else path)


def of_folder(folder: Path) -> Listing:
    """List the regular files in a folder and its folders; links are followed.

    Raises:
        UserError: a folder cannot be read.
    """
    listing = Listing(root=folder)
    try:
        for path in _walk(folder, folder, set(), listing):
            _sort_in(listing, path, str(path.relative_to(folder)))
    except OSError as error:
        raise UserError(f"data: cannot read {error.filename or folder}: {error.strerror}") from error
    _take_once(listing, folder)
    return listing


def hidden(path: PurePath) -> bool:
    """Tell what systems and editors leave behind: `.git`, `.DS_Store`, `__MACOSX`, `train.jsonl~`."""
    return path.name.startswith(".") or path.name.endswith("~") or path.name.lower() in _NOT_DATA


def is_about(path: PurePath) -> bool:
    """Tell what is about data by its name, as a README is."""
    named = path.stem if path.suffix else path.name
    return bool(_ABOUT.match(named)) and path.suffix.lower() in _ABOUT_KINDS


def _walk(folder: Path, root: Path, seen: set[tuple[int, int]], listing: Listing) -> Iterator[Path]:
    """Yield the paths below, sorted. A folder that links lead to twice, or into itself, is entered once."""
    state = folder.stat()
    identity = (state.st_dev, state.st_ino)
    if identity in seen:
        listing.leave_out("the same folder once more, through a link", str(folder.relative_to(root)))
        return
    seen.add(identity)
    for path in sorted(folder.iterdir()):
        if hidden(path):
            listing.leave_out("hidden, or not data by its name", str(path.relative_to(root)))
        elif path.is_dir():
            yield from _walk(path, root, seen, listing)
        else:
            yield path


def _sort_in(listing: Listing, path: Path, shown: str, about: bool = True) -> None:
    if hidden(path):
        listing.leave_out("hidden, or not data by its name", shown)
    elif about and is_about(path):
        listing.leave_out("about the data, not data", shown)
    elif path.is_symlink() and not path.exists():
        listing.leave_out("a link to nothing", shown)
    else:
        refuse_special(path)
        listing.files.append(path)


def refuse_special(path: Path) -> None:
    """Refuse what is no regular file: a pipe keeps its reader waiting, a device may never end.

    Raises:
        UserError: names it and says what it is.
    """
    if path.is_file():
        return
    mode = path.stat().st_mode
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    what = next((what for is_so, what in kinds.items() if is_so(mode)), "special")
    raise UserError(f"data: {path} is no regular file: it is {what}, which is never opened; take it out")


def _counted(paths: list[str]) -> str:
    return "1 entry" if len(paths) == 1 else f"{len(paths)} entries"


def _some(paths: list[str]) -> str:
    return printable(", ".join(paths[:NAMED]) + (", …" if len(paths) > NAMED else ""))
