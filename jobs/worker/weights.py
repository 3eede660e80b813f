"""Weights that a job starts from and that cannot be read: a sentence, and no second try."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PERMANENT = (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR)


class Unreadable(UserError):
    """The weights of the parent cannot be loaded, and will not be loaded at a second try."""


@contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turn what goes wrong while weights are loaded into a sentence.

    Raises:
        Unreadable: they are pickles, of another model, damaged, or not there. Too little memory and a storage that
            fails for the moment are no such errors.
    """
    found = pickles(directory)
    if found:
        raise Unreadable(
            f"model.from: the weights in {directory} are a pickle ({found[0]}), which may run any code when it is "
            "read, so it is not: have them converted to safetensors where they come from"
        )
    try:
        yield
    except Exception as error:
        # A task may have made a sentence of it already; what decides is what it was made of.
        first = error.__cause__ if isinstance(error, UserError) else error
        if not isinstance(first, Exception):
            raise
        if is_permanent(first):
            raise Unreadable(sentence(directory, first)) from error
        raise first from None


def is_permanent(error: Exception) -> bool:
    """Say whether loading again would fail the same way. Pure."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):  # transformers raises it without a number where files are missing
        return error.errno in _PERMANENT
    if isinstance(error, (MemoryError, NotImplementedError)) or "out of memory" in str(error):
        return False
    kinds = (SafetensorError, pickle.UnpicklingError, EOFError, ValueError, KeyError, RuntimeError)
    return isinstance(error, kinds)


def pickles(directory: Path) -> list[str]:
    """List the weights that are pickles, where a directory has none that are not."""
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    found = [name for name in names if name.endswith(PICKLES) and not name.startswith("training_args")]
    return [] if any(name.endswith(".safetensors") for name in names) else found


def sentence(directory: Path, error: Exception) -> str:
    """Say what is wrong with the weights in a directory, and never how to read a pickle all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in said:
        said = "a file is a pickle, which may run any code when it is read"
    return f"model.from: the weights in {directory} cannot be loaded: {said}"
