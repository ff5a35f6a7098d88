"""Token files as blocks of a fixed length, and batches of these in the order in which fairseq draws them, found by
arithmetic.

Blocks, batches and their order are those of fairseq's ``--sample-break-mode none`` to the last one, so that runs go on
and compare. What fairseq builds for that (five integers a block, a Python object a batch, after reading all token files
once) is not built here: a block is a stretch of the mapped files, a batch a slice of one shuffled array of 4 bytes a
block.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from momentum_lm.errors import UserError
from momentum_lm.text.indexed import IndexedDataset


class UnknownToken(UserError):
    """A token id that the dictionary does not have. Made of text, of which it keeps what follows its own name: a
    process that loads data hands its errors on as the text of a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Documents:
    """The documents of one or more token files: a sequence of items, and a stream of tokens that runs through all of
    them.

    ``num_tokens`` is the stream's length. What is read is int64. Raises UnknownToken, a UserError that names the file
    and the document, where an id that is read is not below ``vocab_size``.
    """

    def __init__(self, files: Sequence[IndexedDataset], vocab_size: int) -> None:
        self.files = tuple(files)
        self.vocab_size = vocab_size
        self._items = [0, *itertools.accumulate(len(file) for file in files)]
        self._tokens = [0, *itertools.accumulate(file.num_tokens for file in files)]

    @property
    def num_tokens(self) -> int:
        return self._tokens[-1]

    @property
    def sizes(self) -> NDArray[np.int32]:
        """The documents' lengths in tokens, (documents,)."""
        return self.files[0].sizes if len(self.files) == 1 else np.concatenate([file.sizes for file in self.files])

    def __len__(self) -> int:
        return self._items[-1]

    def __getitem__(self, item: int) -> NDArray[np.int64]:
        """Token ids (T,) of one document."""
        if not 0 <= item < len(self):
            raise IndexError(item)
        number = bisect.bisect_right(self._items, item) - 1
        place = item - self._items[number]
        ids = self.files[number][place].astype(np.int64)
        if (wrong := self._unknown(ids)) is not None:
            raise self._error(self.files[number], place, int(ids[wrong]))
        return ids

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token ids (stop - start,) of the stream. Raises UserError, naming file and document, for one that the
        dictionary lacks.
        """
        ids = np.empty(stop - start, dtype=np.int64)
        filled = 0
        for file, first, last in self._pieces(start, stop):
            ids[filled : filled + last - first] = file.tokens(first, last)
            filled += last - first
        if (wrong := self._unknown(ids)) is not None:
            file, place = self._file_at(start + wrong)
            raise self._error(file, file.item_at(place)[0], int(ids[wrong]))
        return ids

    def read_ahead(self, start: int, stop: int) -> None:
        """Has the system read these tokens of the stream, and does not wait for them."""
        for piece in self._pieces(start, stop):
            piece[0].read_ahead(*piece[1:])

    def begins(self, position: int) -> bool:
        """Whether a document begins at this position of the stream."""
        file, place = self._file_at(position)
        return file.item_at(place)[1] == 0

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[IndexedDataset, int, int]]:
        number = bisect.bisect_right(self._tokens, start) - 1
        while start < stop:
            origin, end = self._tokens[number], min(stop, self._tokens[number + 1])
            yield self.files[number], start - origin, end - origin
            start, number = end, number + 1

    def _file_at(self, position: int) -> tuple[IndexedDataset, int]:
        number = bisect.bisect_right(self._tokens, position) - 1
        return self.files[number], position - self._tokens[number]

    def _unknown(self, ids: NDArray[np.int64]) -> int | None:
        unsigned = ids.view(np.uint64)  # in which negative ids are large ones
        if not len(ids) or int(unsigned.max()) < self.vocab_size:
            return None
        return int((unsigned >= self.vocab_size).argmax())

    def _error(self, file: IndexedDataset, item: int, wrong: int) -> UnknownToken:
        return UnknownToken(
            f"{file.prefix}.bin holds the token id {wrong} in document {item} (counted from 0), but the dictionary "
            f"has {self.vocab_size} "
            "entries: put the dict.txt beside it that it was made with, or copy or make the data anew"
        )


class TokenBlocks:
    """The stream of ``documents`` in blocks of ``block_size`` tokens, of which the last one may be shorter.

    A block is (inputs, targets), int64 (T,) each: the inputs are the targets one token later, after the token before
    the block, or after ``eos`` where a document begins with the block.
    """

    def __init__(self, documents: Documents, block_size: int, eos: int) -> None:
        self.documents = documents
        self.block_size = block_size
        self.eos = eos

    @property
    def last_size(self) -> int:
        """Tokens of the last block."""
        return self.documents.num_tokens - (len(self) - 1) * self.block_size

    @property
    def longest(self) -> int:
        """Tokens of the longest block."""
        return min(self.block_size, self.documents.num_tokens)

    def __len__(self) -> int:
        return -(-self.documents.num_tokens // self.block_size)

    def __getitem__(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start, stop = self._range(block)
        if not start:
            targets = self.documents.tokens(start, stop)
            return np.concatenate([[self.eos], targets[:-1]]), targets
        ids = self.documents.tokens(start - 1, stop)
        inputs, targets = ids[:-1].copy(), ids[1:]
        if inputs[0] != self.eos and self.documents.begins(start):
            inputs[0] = self.eos
        return inputs, targets

    def read_ahead(self, blocks: Iterable[int]) -> None:
        """Has the system read these blocks, all at the same time, and does not wait for them."""
        for block in blocks:
            start, stop = self._range(block)
            self.documents.read_ahead(max(0, start - 1), stop)

    def _range(self, block: int) -> tuple[int, int]:
        if not 0 <= block < len(self):
            raise IndexError(block)
        return block * self.block_size, min((block + 1) * self.block_size, self.documents.num_tokens)


class BlockBatches:
    """Numbers of blocks in batches, each block once; a shorter last block is in the first batch.

    The batches are fairseq's for blocks of one length: of ``max_rows`` blocks at most, and ``max_tokens`` with padding;
    of a multiple of ``multiple`` where these limits allow as many; and in the end one of the greatest multiple that is
    left, and one of the rest. ``seed`` shuffles the blocks, and :meth:`of_process` the batches. Raises ValueError where
    ``max_tokens`` is less than a block.
    """

    def __init__(
        self, blocks: TokenBlocks, max_rows: int | None, max_tokens: int | None, multiple: int, seed: int
    ) -> None:
        self.blocks = blocks
        count = len(blocks)
        place = np.random.RandomState(seed).permutation(count)  # fairseq sorts by size, and then by these numbers
        if blocks.last_size < blocks.block_size:
            place += place < place[-1]
            place[-1] = 0
        self._order = np.empty(count, dtype=np.uint32 if count < 1 << 32 else np.int64)
        self._order[place] = np.arange(count, dtype=self._order.dtype)
        rows = min(max_rows or count, max_tokens // blocks.longest if max_tokens else count)
        if rows == 0:
            raise ValueError(f"a block of {blocks.longest} tokens is more than {max_tokens}")
        self._rows, self._multiple = rows if rows < multiple else rows - rows % multiple, multiple
        self._cut()

    def _cut(self) -> None:
        self._full, rest = divmod(len(self._order), self._rows)
        even = rest - rest % self._multiple
        self._rests = [size for size in (even, rest - even) if size]

    @property
    def cut(self) -> tuple[int, int]:
        """Blocks of a full batch, and the multiple that the last ones keep: what the batches of given
        blocks depend on.
        """
        return self._rows, self._multiple

    def of(self, order: NDArray[np.integer]) -> BlockBatches:
        """Batches cut in the same way from other blocks, in the ``order`` (blocks,) given."""
        other = copy.copy(self)
        other._order = order
        other._cut()
        return other

    def __len__(self) -> int:
        return self._full + len(self._rests)

    def __getitem__(self, batch: int) -> list[int]:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        start, size = batch * self._rows, self._rows
        if batch >= self._full:
            before = self._rests[: batch - self._full]
            start, size = self._full * self._rows + sum(before), self._rests[len(before)]
        return self._order[start : start + size].tolist()

    def blocks_of(self, numbers: NDArray[np.integer]) -> NDArray[np.integer]:
        """The blocks of these batches one after another, (blocks,)."""
        sizes = np.full(len(self), self._rows)
        sizes[self._full :] = self._rests
        starts = np.cumsum(sizes) - sizes
        sizes, starts = sizes[numbers], starts[numbers]
        return self._order[np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())]

    def of_process(self, processes: int, process: int, seed: int | None, before: int = 0) -> ShardedBatches:
        """The batches that one of ``processes`` gets: every ``processes``-th, of all shuffled by ``seed`` unless it is
        None, after ``before`` numbers that stand for none of them. All processes get as many, filled up with empty
        batches.
        """
        numbers = np.arange(-before, len(self))
        if seed is not None:
            np.random.RandomState(seed).shuffle(numbers[before:])
        return ShardedBatches(self, numbers[process::processes].copy(), -(-len(numbers) // processes))


Part = tuple[int, int, int]  # BlockBatches.cut of a part of an epoch, and how many of these batches have been had


def remaining(blocks: TokenBlocks, seed: int, shuffle: int | None, parts: Sequence[Part]) -> NDArray[np.integer]:
    """Numbers of the blocks that an epoch still has to give, in their order, after ``parts``.

    Its first batches are those of ``BlockBatches(..., seed).of_process(1, 0, shuffle)``; where another part begins,
    what is left is cut anew, without another shuffle.
    """
    rows, multiple, had = parts[0]
    batches = BlockBatches(blocks, rows, None, multiple, seed)
    order = batches.blocks_of(batches.of_process(1, 0, shuffle).numbers[had:])
    for rows, multiple, had in parts[1:]:
        batches = BlockBatches(blocks, rows, None, multiple, seed).of(order)
        order = batches.blocks_of(np.arange(had, len(batches)))
    return order


class ShardedBatches(Sequence[list[int]]):
    """``length`` batches of ``batches``: those with these ``numbers``, and then empty ones. A slice of them copies
    nothing.

    A number below 0 stands for a batch that was had before; it is empty here.
    """

    def __init__(self, batches: BlockBatches, numbers: NDArray[np.int64], length: int) -> None:
        self._batches = batches
        self.numbers = numbers
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, batch: int) -> list[int]: ...
    @overload
    def __getitem__(self, batch: slice) -> ShardedBatches: ...
    def __getitem__(self, batch: int | slice) -> list[int] | ShardedBatches:
        if isinstance(batch, slice):
            return ShardedBatches(self._batches, self.numbers[batch], len(range(*batch.indices(self._length))))
        if not 0 <= batch < self._length:
            raise IndexError(batch)
        number = int(self.numbers[batch]) if batch < len(self.numbers) else -1
        return self._batches[number] if number >= 0 else []
