"""Keep pairs aside whose source has two neighbouring words that no other source has side by side:

    python tools/pairs_aside.py pairs.tsv rest.tsv aside.tsv

A model that is trained on rest.tsv has seen each of these words, in at least three other sources, but never the two
together: what it makes of aside.tsv says whether it puts words together or knows sentences by heart. The files are TSV
of source and target, without a header line.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

Pair = tuple[str, ...]
LEAST = 3
"""So many sources that are not kept aside have each word."""


def words(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def neighbours(text: str) -> set[tuple[str, str]]:
    """Return the pairs of neighbouring words."""
    return set(itertools.pairwise(words(text)))


def cut(pairs: Sequence[Pair], wanted: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs that stay, and at least `wanted` that are kept aside, as far as there are any to be had.

    Neighbours are drawn by the seed; with two of them go all pairs whose source has them side by side.
    """
    sources = sorted({pair[0] for pair in pairs})
    having: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for source in sources:
        for both in neighbours(source):
            having[both].add(source)
    left = Counter(word for source in sources for word in set(words(source)))
    counts, aside = Counter(pair[0] for pair in pairs), set[str]()
    drawn = sorted(having)
    random.Random(seed).shuffle(drawn)
    for both in drawn:
        new = having[both] - aside
        lost = Counter(word for source in new for word in set(words(source)))
        if all(left[word] - count >= LEAST for word, count in lost.items()):
            aside |= new
            left -= lost
        if sum(counts[source] for source in aside) >= wanted:
            break
    return [p for p in pairs if p[0] not in aside], [p for p in pairs if p[0] in aside]


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep pairs aside with a combination of words that is not seen.")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("rest", type=Path)
    parser.add_argument("aside", type=Path)
    parser.add_argument("--wanted", type=int, default=300, help="pairs to keep aside")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    lines = given.pairs.read_text(encoding="utf-8").splitlines()
    rest, aside = cut([tuple(line.split("\t")) for line in lines], given.wanted, given.seed)
    for path, part in ((given.rest, rest), (given.aside, aside)):
        path.write_text("".join("\t".join(pair) + "\n" for pair in part), encoding="utf-8")
        print(f"{path}: {len(part)} pairs, {len({pair[0] for pair in part})} sources")


if __name__ == "__main__":
    main()
