"""Fixed-length blocks and their batches: fairseq's own, with every token once, and damage named."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.text.blocks import BlockBatches, Documents, TokenBlocks, UnknownToken
from momentum_lm.text.indexed import IndexedDataset, IndexedDatasetWriter

EOS, PAD = 2, 1
RNG = np.random.default_rng(0)


def ordinary(count, longest=30):
    return [[*RNG.integers(4, 60, size=RNG.integers(0, longest)), EOS] for _ in range(count)]


CORPORA = {
    "ordinary": [ordinary(40)],
    "one token": [[[EOS]]],
    "one document": [[[*RNG.integers(4, 60, size=201), EOS]]],
    "tiny documents": [[[EOS]] * 9 + [[5, EOS]] * 8],
    "without </s>": [[list(RNG.integers(4, 60, size=n)) for n in (7, 7, 14, 3, 1, 1, 20)]],
    "empty documents": [[[], [], *ordinary(9), [], [], list(range(4, 18)), [], [5, 6], []]],
    "files": [ordinary(11), [[]], [[7]], ordinary(5), [list(range(4, 30))]],
}


@pytest.fixture
def write(tmp_path):
    """write(items of one file, of another, ...) -> their IndexedDatasets"""
    counter = itertools.count()

    def write(*files, vocab_size=60):
        names = [tmp_path / f"data{next(counter)}" for _ in files]
        for name, items in zip(names, files, strict=True):
            with IndexedDatasetWriter(name, vocab_size) as writer:
                for item in items:
                    writer.add(np.array(item, dtype=np.int64))
        return [IndexedDataset(name) for name in names]

    return write


def small(dataset, size=7):
    return TokenBlocks(Documents(dataset, 60), size, EOS)


@pytest.mark.parametrize("size", [1, 2, 7, 14, 1000])
@pytest.mark.parametrize("corpus", CORPORA)
def test_blocks_are_fairseqs(corpus, size, write, fairseq_data):
    # none of the empty ones: where one lies before the last token of a block, fairseq loses that token
    items = [torch.tensor(item) for file in CORPORA[corpus] for item in file if item]
    sizes = np.array([len(item) for item in items])
    theirs = fairseq_data.TokenBlockDataset(items, sizes, size, PAD, EOS, break_mode="none", include_targets=True)
    ours = small(write(*CORPORA[corpus]), size)
    assert len(ours) == len(theirs)
    assert [ours.block_size] * (len(ours) - 1) + [
        ours.last_size
    ] == theirs.sizes.tolist() and ours.longest == theirs.sizes.max()
    for i in range(len(ours)):
        inputs, targets = ours[i]
        source, target, _ = theirs[i]
        assert inputs.dtype == targets.dtype == np.int64
        np.testing.assert_array_equal(inputs, source)
        np.testing.assert_array_equal(targets, target)
    ours.read_ahead(range(len(ours)))  # changes nothing; at the ends of files and around empty ones too
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in ours]), torch.cat(items))
    with pytest.raises(IndexError):
        ours[len(ours)]


def test_reading_ahead_brings_blocks_and_little_more_into_memory(write):
    """Else the system would read megabytes around a block."""
    import ctypes
    import mmap
    import os

    (dataset,) = write([RNG.integers(4, 60, size=4 << 20)])
    path = f"{dataset.prefix}.bin"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    def resident():
        flags = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        assert libc.mincore(ctypes.addressof(ctypes.c_char.from_buffer(pages)), len(pages), flags) == 0
        return np.array(flags) & 1

    if resident().any():
        pytest.skip("this file system keeps files in memory")
    blocks = small([IndexedDataset(dataset.prefix)], size=2048)
    wanted = [3, 700, 701, 1999]
    blocks.read_ahead(wanted)
    for block in wanted:
        assert blocks[block][1].shape == (2048,)
    assert len(wanted) <= resident().sum() <= 3 * len(wanted)


def test_inputs_and_targets_share_no_memory(write):
    """fairseq marks targets in place where the output dictionary is smaller."""
    for inputs, targets in small(write(ordinary(20))):
        assert not np.shares_memory(inputs, targets)


def test_documents_of_files_are_one_sequence(write):
    documents = Documents(write(*CORPORA["files"]), 60)
    items = [item for file in CORPORA["files"] for item in file]
    assert len(documents) == len(items) and documents.num_tokens == sum(map(len, items))
    assert documents.sizes.tolist() == [len(item) for item in items]
    assert [document.tolist() for document in documents] == [list(item) for item in items]
    stream = np.concatenate(items)
    for start, stop in itertools.combinations(range(0, len(stream) + 1, 9), 2):
        np.testing.assert_array_equal(documents.tokens(start, stop), stream[start:stop])
    begins = np.cumsum([0, *(len(item) for item in items)])
    assert [documents.begins(i) for i in range(len(stream))] == [i in begins for i in range(len(stream))]


@pytest.mark.parametrize("wrong", [60, 70000, -1])
def test_an_id_beyond_the_dictionary_is_named_with_its_file_and_document(wrong, write):
    good, bad = write(
        ordinary(3), [[5, EOS], [], [6, 7, EOS], [8, 9, EOS]], vocab_size=1 << 40
    )  # int64, which holds -1 too
    path = f"{bad.prefix}.bin"
    data = np.fromfile(path, np.int64)
    data[6] = wrong
    data.tofile(path)
    documents = Documents([good, IndexedDataset(bad.prefix)], 60)
    named = rf"{path} holds the token id {wrong} in document 3 \(counted from 0\), but the dictionary has 60 entries: "
    named += r".* dict.txt"
    with pytest.raises(UserError, match=named):
        documents[len(documents) - 1]
    start = good.num_tokens
    with pytest.raises(UnknownToken, match=named):
        documents.tokens(start - 2, start + 8)
    assert documents.tokens(start - 2, start + 6).tolist()[2:] == [5, EOS, 6, 7, EOS, 8]


def test_an_error_of_a_loading_process_stays_one_line(write):
    from torch.utils.data import DataLoader

    blocks = small(write([[5, 6, EOS], [99, EOS]], vocab_size=100))
    alone, loaded = None, None
    try:
        blocks[0]
    except UserError as error:
        alone = str(error)
    try:
        list(DataLoader(blocks, batch_size=None, num_workers=1))
    except UserError as error:
        loaded = str(error)
    assert alone and alone.count("\n") == 0 and loaded == alone


def test_what_goes_to_another_process_is_names(write):
    blocks = small(write([list(RNG.integers(4, 60, size=50000))]))
    sent = pickle.dumps(blocks)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent)[5], blocks[5])


BATCHES = [
    (rows, tokens, multiple)
    for rows in (None, 1, 3, 4, 8, 13, 20)
    for tokens in (None, 7, 50, 130)
    for multiple in (1, 2, 8)
]


@pytest.mark.parametrize("tokens", [5, 7, 7 * 13, 7 * 29 + 3, 7 * 64, 7 * 65 + 1])
def test_batches_are_fairseqs(tokens, write, fairseq_data):
    items = [torch.arange(tokens) % 50 + 4]
    dataset = fairseq_data.TokenBlockDataset(
        items, np.array([tokens]), 7, PAD, EOS, break_mode="none", include_targets=True
    )
    theirs = fairseq_data.MonolingualDataset(dataset, dataset.sizes, None, shuffle=True)
    blocks = small(write([items[0].numpy()]))
    for (rows, limit, multiple), seed in itertools.product([b for b in BATCHES if b[0] or b[1]], (1, 2)):
        with fairseq_data.data_utils.numpy_seed(seed):
            indices = theirs.ordered_indices()
        expected = theirs.batch_by_size(indices, limit, rows, multiple)
        ours = BlockBatches(blocks, rows, limit, multiple, seed)
        assert [ours[i] for i in range(len(ours))] == [batch.tolist() for batch in expected], (rows, limit, multiple)


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("seed", [None, 5])
def test_processes_get_what_fairseqs_shards_get(processes, seed, write, fairseq_data):
    from fairseq.data.iterators import ShardedIterator

    batches = BlockBatches(small(write([list(RNG.integers(4, 60, size=7 * 91 + 2))])), 4, None, 8, seed=1)
    listed = [batches[i] for i in range(len(batches))]
    if seed is not None:
        with fairseq_data.data_utils.numpy_seed(seed):
            np.random.shuffle(listed)
    for process in range(processes):
        ours = batches.of_process(processes, process, seed)
        theirs = list(ShardedIterator(listed, processes, process, fill_value=[]))
        assert list(ours) == theirs and len(ours) == len(theirs)
        assert list(ours[2:]) == theirs[2:] and len(ours[2:]) == len(theirs[2:])
