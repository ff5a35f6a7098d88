"""Which documents go where, decided by their content alone: duplicates, splits and the tokenizer's training sample.

Every document has a digest of 128 bits, keyed with the seed. Equal documents have equal digests, so they are found
whatever their order; the digest's first half, read as a number in [0, 1), puts the document in a split, its second half
orders the sample.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterator
from fractions import Fraction

from momentum_lm.errors import Argument, UserError, arg

SPLITS = ("train", "valid", "test")
_HALF = 8  # bytes


def digest_of(document: bytes, seed: int) -> bytes:
    """16 bytes: BLAKE2b of the document, keyed with the seed."""
    return hashlib.blake2b(document, digest_size=2 * _HALF, key=str(seed).encode()).digest()


def share(text: str, name: str) -> Fraction | int:
    """``0.01`` is a fraction of the documents, ``500`` a number of them. Raises UserError naming argument ``name``."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d*\.\d+|\d+\.\d*", text) and (value := Fraction(text)) < 1:
        return value if value else 0
    raise UserError(
        Argument(name, text),
        ": give a fraction of the documents below 1, such as 0.01, or a number of documents, such as 500",
    )


class Splitter:
    """Two thresholds on the first half of the digest: below the first test, below the second valid, else train."""

    def __init__(self, test_below: int, valid_below: int) -> None:
        self.thresholds = (test_below, valid_below)

    def split(self, digest: bytes) -> int:
        """Index into SPLITS."""
        value = int.from_bytes(digest[:_HALF], "big")
        test_below, valid_below = self.thresholds
        return 2 if value < test_below else 1 if value < valid_below else 0


class SplitSurvey:
    """Finds the thresholds for a number of documents, which takes a look at all of them; fractions are thresholds
    already.

    Keeps the smallest digest halves seen, as many as documents are wanted. Raises UserError if the fractions leave
    nothing for train.
    """

    def __init__(self, valid: Fraction | int, test: Fraction | int) -> None:
        self._valid, self._test = valid, test
        if sum(s for s in (valid, test) if isinstance(s, Fraction)) >= 1:
            raise UserError(
                arg(valid=float(valid)),
                " and ",
                arg(test=float(test)),
                " together leave nothing to train on; lower them",
            )
        self._floor = int(test * 2**64) if isinstance(test, Fraction) else 0
        self.wanted = sum(s for s in (valid, test) if isinstance(s, int))
        self._heap: list[int] = []  # negated: the largest kept one on top
        self._kept: set[int] = set()

    def add(self, digest: bytes) -> None:
        """Takes note of one document; a duplicate changes nothing."""
        value = int.from_bytes(digest[:_HALF], "big")
        if (
            value < self._floor
            or value in self._kept
            or (len(self._heap) >= self.wanted and not value < -min(self._heap[:1], default=0))
        ):
            return
        self._kept.add(value)
        heapq.heappush(self._heap, -value)
        if len(self._heap) > self.wanted:
            self._kept.discard(-heapq.heappop(self._heap))

    def splitter(self) -> Splitter:
        """With as many documents as there are, where more were wanted."""
        kept = sorted(self._kept)

        def above(bound: int, wanted: Fraction | int, rank: int) -> int:
            if isinstance(wanted, Fraction):
                return bound + int(wanted * 2**64)
            return bound if not wanted else kept[rank - 1] + 1 if rank <= len(kept) else 1 << 64

        rank = self._test if isinstance(self._test, int) else 0
        test_below = above(0, self._test, rank)
        return Splitter(
            test_below, above(test_below, self._valid, rank + (self._valid if isinstance(self._valid, int) else 0))
        )


class Sample:
    """A random sample of distinct documents, the same for any order of them: those whose digest's second half is
    smallest, while they fit into ``limit`` bytes. Holds at most ``limit`` bytes and one document.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._heap: list[tuple[int, bytes]] = []
        self._keys: set[int] = set()

    def add(self, digest: bytes, document: bytes) -> None:
        """Offers one document; it is kept for as long as it is in the sample."""
        key = int.from_bytes(digest[_HALF:], "big")
        if key in self._keys or (self.size >= self.limit and key >= -self._heap[0][0]):
            return
        heapq.heappush(self._heap, (-key, document))
        self._keys.add(key)
        self.size += len(document)
        while self.size - len(self._heap[0][1]) >= self.limit:
            dropped, text = heapq.heappop(self._heap)
            self._keys.discard(-dropped)
            self.size -= len(text)

    def documents(self) -> Iterator[bytes]:
        """The documents, in an order that depends on nothing but their content."""
        for _, document in sorted(self._heap, reverse=True):
            yield document
