"""Which sequence holds which block of the cache, and which blocks hold a prefix that may come again. Pure Python.

A block's content is named by a digest of its tokens and all before it, so two texts share their common beginning as
far as it fills whole blocks. A block that nobody holds keeps its content until the room is needed: then the one that
has been idle longest goes.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BLOCK = 32
"""Tokens a block holds. With 16, block tables and hashes cost twice; with 64, less of a prefix is shared."""


class BlockPool:
    """Blocks 1 to `blocks` - 1. Block 0 is never given out: padding goes there."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks - 1
        self._free = list(range(blocks - 1, 0, -1))
        """Blocks without content. The last returned is the first taken, so few pages of memory are touched."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Blocks that nobody holds and whose content has a name, longest idle first."""
        self._holders = [0] * blocks
        self._names: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.total - self.available

    def take(self) -> int:
        """Give out a block whose content may be overwritten. There must be one available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._blocks[self._names.pop(block)]
        self._holders[block] = 1
        return block

    def find(self, name: bytes) -> int | None:
        """Return the block with this content, if there is one."""
        return self._blocks.get(name)

    def is_idle(self, block: int) -> bool:
        return self._holders[block] == 0

    def share(self, block: int) -> None:
        """Hold a found block too; nobody may write to it."""
        if self._holders[block] == 0:
            del self._idle[block]
        self._holders[block] += 1

    def publish(self, block: int, name: bytes) -> None:
        """Name the content of a held block that is full. The first block with a content keeps the name."""
        if name not in self._blocks and block not in self._names:
            self._blocks[name] = block
            self._names[block] = name

    def release(self, blocks: Sequence[int]) -> None:
        """Hold a sequence's blocks no more. The end of a text goes idle first, so that it is overwritten first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def forget(self) -> None:
        """Take the names of all contents away: they may never have been written."""
        self._names.clear()
        self._blocks.clear()
        self._free.extend(self._idle)
        self._idle.clear()


def blocks_for(tokens: int) -> int:
    """Return how many blocks hold that many tokens."""
    return -(-tokens // BLOCK)


def content_name(before: bytes, tokens: Iterable[int]) -> bytes:
    """Return the name of a full block: a digest of its tokens and of the name of the block before it.

    Cryptographic, because a collision would let one user's text answer for another's.
    """
    return blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()
