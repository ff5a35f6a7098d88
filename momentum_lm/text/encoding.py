"""Documents to token ids, in parallel and in order."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.errors import arg
from momentum_lm.system import isolated_children
from momentum_lm.text.indexed import token_dtype
from momentum_lm.text.selection import digest_of
from momentum_lm.text.sources import REMARKS, Interrupted, Source
from momentum_lm.text.tokenizer import Tokenizer, load_tokenizer

CHUNK = 1 << 20  # bytes of text that travel to a worker together, or one document


class DocumentStream:
    """The distinct documents of all sources in order, as (digest, UTF-8 text), and what was read, dropped and seen on
    the way.
    """

    def __init__(self, sources: Sequence[Source], seed: int, limit: int | None = None) -> None:
        self._sources, self._seed, self._limit = sources, seed, limit
        self._seen: set[bytes] = set()
        self._chain = hashlib.blake2b(digest_size=16)
        self._before = 0
        self._remarks = dict.fromkeys(REMARKS, 0)  # of the sources before
        self._source: Source | None = None
        self.read = self.empty = self.duplicates = 0

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        for source in self._sources:
            self._source = source
            for document in source.documents():
                if len(self._seen) == self._limit:
                    return
                self.read += 1
                if not document or document.isspace():
                    self.empty += 1
                    continue
                digest = digest_of(document, self._seed)
                self._chain.update(digest)
                if digest in self._seen:
                    self.duplicates += 1
                else:
                    self._seen.add(digest)
                    yield digest, document
            self._before += source.size or 0
            self._remarks = self._all_remarks()
            self._source = None

    def position(self) -> int:
        """Bytes of the sources read so far."""
        return self._before + (self._source.position() if self._source else 0)

    def counts(self) -> dict[str, Any]:
        """Documents read, how many of them were empty or repeated another, and the sources' remarks; ``chain`` is a
        digest of all that was read: where it is the same, so were the documents."""
        own = {"read": self.read, "empty": self.empty, "duplicates": self.duplicates, "chain": self._chain.hexdigest()}
        return own | self._all_remarks()

    def _all_remarks(self) -> dict[str, int]:
        own = self._source.remarks if self._source else {}
        return {name: count + own.get(name, 0) for name, count in self._remarks.items()}


@dataclass
class Chunk:
    """Documents with the index of their split, and how far the stream was when the last of them was read."""

    documents: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0
    position: int = 0
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Encoded:
    """One split's part of a chunk: ``ids`` (tokens,) with ``</s>`` after each document and nowhere else, ``sizes``
    (documents,), and its text's bytes. ``spelled`` is how often the text spells out special tokens, which the tokenizer
    would take for them elsewhere."""

    ids: NDArray[Any]
    sizes: NDArray[np.int32]
    bytes: int
    unknown: int
    spelled: int


def encode_in_order(
    chunks: Iterable[Chunk], tokenizer_folder: Path, workers: int
) -> Iterator[tuple[Chunk, dict[int, Encoded]]]:
    """Each chunk with its encoded parts by split, in the chunks' order. One worker is this process itself.

    At most 2 chunks per worker are under way, or 2 MiB of text per worker where documents are longer, and one document
    beyond that. Raises Interrupted if a worker is killed.
    """
    if workers == 1:
        tokenizer = load_tokenizer(tokenizer_folder)
        yield from ((chunk, _encode(tokenizer, chunk.documents)) for chunk in chunks)
        return
    spawning = multiprocessing.get_context("spawn")
    # A process that looks after the pool's semaphores starts here, and Ctrl-C in between would leave it some.
    with isolated_children(), _ctrl_c_waits():
        pool = ProcessPoolExecutor(workers, spawning, initializer=_start_worker, initargs=(str(tokenizer_folder),))
    under_way: deque[tuple[Chunk, Future[dict[int, Encoded]]]] = deque()
    try:
        for chunk in chunks:
            while under_way and sum(c.size for c, _ in under_way) + chunk.size > 2 * CHUNK * workers:
                yield _next(under_way)
            under_way.append((chunk, _submit(pool, chunk)))
            while under_way and (under_way[0][1].done() or len(under_way) > 2 * workers):
                yield _next(under_way)
        while under_way:
            yield _next(under_way)
    except BrokenProcessPool as error:
        raise Interrupted(
            "a worker process was killed, perhaps for want of memory; run the command again with fewer ",
            arg("workers"),
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunk: Chunk) -> Future[dict[int, Encoded]]:
    """Ctrl-C is this process's to handle: workers, which start here, inherit that it is blocked for now."""
    with isolated_children(), _ctrl_c_waits():
        return pool.submit(_encode_here, chunk.documents)


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C comes after the block, whichever of this process's threads gets it, and not to processes started in it."""
    handler, came = signal.getsignal(signal.SIGINT), list[int]()
    ours = threading.current_thread() is threading.main_thread() and handler is not None
    if ours:
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if ours:
            signal.signal(signal.SIGINT, handler)
            if came:
                signal.raise_signal(signal.SIGINT)


def _next(under_way: deque[tuple[Chunk, Future[dict[int, Encoded]]]]) -> tuple[Chunk, dict[int, Encoded]]:
    chunk, future = under_way.popleft()
    return chunk, future.result()


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_folder: str) -> None:
    global _worker_tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer_folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # without this a worker whose parent is killed waits for work for ever


def _encode_here(documents: list[tuple[int, bytes]]) -> dict[int, Encoded]:
    return _encode(_worker_tokenizer, documents)


def _encode(tokenizer: Tokenizer, documents: list[tuple[int, bytes]]) -> dict[int, Encoded]:
    """Split by split: ``{split: Encoded}``, documents in the order given."""
    result = {}
    for split in sorted({split for split, _ in documents}):
        texts = [text.decode() for own, text in documents if own == split]
        ids: list[int] = []
        sizes = []
        for document in tokenizer.encode_as_text(texts):
            ids += document
            ids.append(tokenizer.eos)
            sizes.append(len(document) + 1)
        array = np.array(ids, dtype=token_dtype(tokenizer.vocab_size))
        lengths = np.array(sizes, dtype=np.int32)
        # No text is a control token: </s> in a document would be taken for its end, <pad> for nothing
        control = np.isin(array, (tokenizer.bos, tokenizer.pad, tokenizer.eos))
        control[np.cumsum(lengths) - 1] = False
        array[control] = tokenizer.unk
        unknown = int((array == tokenizer.unk).sum())
        size = sum(len(text) for own, text in documents if own == split)
        result[split] = Encoded(array, lengths, size, unknown, tokenizer.special_tokens_in(texts))
    return result
