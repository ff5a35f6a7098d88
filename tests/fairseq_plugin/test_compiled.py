"""The NumPy forms of fairseq's compiled extensions against rules written out, and against the extensions where they are
installed.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from momentum_lm.fairseq_plugin import compiled

MODES = ("none", "eos", "complete", "complete_doc")


def _corpora(trials, seed=0):
    """(sizes, block_size, document_sep_len) of small corpora, empty sentences and sentences longer than a block among
    them.
    """
    rng = np.random.default_rng(seed)
    for trial in range(trials):
        sizes = rng.integers(trial % 2, int(rng.integers(2, 20)), int(rng.integers(1, 40)))
        yield sizes.astype(np.int64), int(rng.integers(1, 40)), int(rng.integers(0, 3))


def _blocks_by_rule(sizes, mode, block_size, separator):
    """Which (begin, end) a reader of fairseq's documentation expects, sentence by sentence."""
    total = sum(sizes)
    if mode == "none":
        return [(at, min(at + block_size, total)) for at in range(0, total, block_size)]
    if mode == "eos":
        return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    blocks, begin, at = [], 0, 0
    for size in sizes:
        ends_document = mode == "complete_doc" and size == separator
        if ends_document or (at > begin and at + size - begin > block_size):
            blocks.append((begin, at))
            begin = at
        at += size
        if ends_document:
            begin = at
    blocks.append((begin, at))
    return [(a, b) for a, b in blocks if b - a >= (2 if mode == "complete_doc" else 1)]


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_cut_where_the_mode_says(mode):
    for sizes, block_size, separator in _corpora(200):
        blocks = compiled.slice_indices(sizes, mode, block_size, separator)
        assert blocks.dtype == np.int64 and blocks.shape[1:] == (2,)
        assert list(map(tuple, blocks.tolist())) == _blocks_by_rule(sizes.tolist(), mode, block_size, separator)


def test_an_unknown_break_mode_is_refused():
    with pytest.raises(ValueError, match="Invalid break_mode: words"):
        compiled.slice_indices(np.array([3]), "words", 2, 1)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_find_their_sentences(mode):
    for sizes, block_size, separator in _corpora(100, seed=1):
        sizes = np.maximum(sizes, 1)  # which of several empty sentences is named is the extensions' affair, see below
        tokens = [(i, offset) for i, size in enumerate(sizes.tolist()) for offset in range(size)]
        blocks = compiled.slice_indices(sizes, mode, block_size, separator)
        found = compiled.block_to_dataset_index(sizes, blocks).tolist()
        assert found == [[*tokens[begin], tokens[end - 1][0]] for begin, end in blocks.tolist()]


def _batches_by_rule(sizes, max_tokens, most, multiple):
    """Sentence by sentence: a batch is cut at the last size that is a multiple when one more sentence would be too
    much.
    """
    batches, batch, left_over = [], [], []

    def too_much(sentences):
        return (
            len(sentences) > most > 0 or len(sentences) * max((sizes[i] for i in sentences), default=0) > max_tokens > 0
        )

    for i in range(len(sizes)):
        if too_much([*batch, *left_over, i]):
            batches.append(batch)
            if max_tokens > 0 and (len(left_over) + 1) * max(sizes[j] for j in [*left_over, i]) > max_tokens:
                batches.append(left_over)
                left_over = []
            batch, left_over = [*left_over, i], []
        elif len([*batch, *left_over, i]) < multiple or len([*batch, *left_over, i]) % multiple == 0:
            batch, left_over = [*batch, *left_over, i], []
        else:
            left_over.append(i)
    return [b for b in (*batches, batch, left_over) if b]


def _batch_cases(trials):
    rng = np.random.default_rng(2)
    for trial in range(trials):
        sizes = rng.integers(1, 20, int(rng.integers(1, 60)))
        if trial % 3 == 0:
            sizes[:] = sizes[0]  # blocks of one length ...
            sizes[rng.integers(len(sizes))] = 1  # ... but for the last
        limits = int(rng.integers(20, 120)) if trial % 4 else -1, int(rng.integers(1, 20)) if trial % 5 else -1
        yield sizes.astype(np.int64), *limits, int(rng.choice([1, 2, 3, 8]))


def test_batches_are_cut_where_the_limits_say():
    for sizes, max_tokens, most, multiple in _batch_cases(600):
        indices = np.arange(len(sizes)) * 3
        batches = compiled.batch_by_size_vec(indices, sizes, max_tokens, most, multiple)
        expected = _batches_by_rule(sizes.tolist(), max_tokens, most, multiple)
        assert [b.tolist() for b in batches] == [[3 * i for i in batch] for batch in expected]
        by_function = compiled.batch_by_size_fn(
            indices, lambda i, sizes=sizes: sizes[i // 3], max_tokens, most, multiple
        )
        assert [b.tolist() for b in by_function] == [b.tolist() for b in batches]


def test_no_sentence_makes_no_batch_and_one_too_long_is_refused():
    assert compiled.batch_by_size_vec(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 5, 5, 1) == []
    with pytest.raises(AssertionError, match="should not exceed max_tokens=5"):
        compiled.batch_by_size_vec(np.arange(2), np.array([3, 6]), 5, -1, 1)


def test_batches_fit_one_of_the_shapes():
    shapes = np.array([[2, 9], [4, 5], [8, 2]])
    lengths = [1, 2, 2, 1, 5, 5, 9, 9, 9, 1]
    batches = compiled.batch_fixed_shapes(np.arange(10), lengths.__getitem__, shapes)
    assert batches == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9]]


def _stat(**values):
    names = ["reflen", "predlen", *(f"{kind}{n}" for n in range(1, 5) for kind in ("match", "count"))]
    return SimpleNamespace(**{**dict.fromkeys(names, 0), **values})


def test_bleu_counts_matching_n_grams():
    stat = _stat(match2=1, count2=1)
    # Reference 5 6 7 8 9 and prediction 5 6 7 7 9: unigrams 5, 6, 7, 9 match (7 once), bigrams 56 and 67, one trigram
    # 567.
    compiled.add_bleu_counts(stat, [1, 1, 5, 6, 7, 8, 9, 2, 1], [5, 6, 7, 7, 9, 2], pad=1, eos=2)
    assert vars(stat) == vars(
        _stat(reflen=5, predlen=5, match1=4, count1=5, match2=3, count2=5, match3=1, count3=3, count4=2)
    )
    # fairseq's extension never returns from a sentence of padding
    compiled.add_bleu_counts(stat, [1, 1], [2], pad=1, eos=2)
    assert (stat.reflen, stat.predlen) == (5, 6)


def test_they_return_what_the_extensions_return():
    """Where fairseq was installed with a compiler."""
    pytest.importorskip("fairseq")
    from importlib import import_module

    blocks, batches = (
        import_module("fairseq.data.token_block_utils_fast"),
        import_module("fairseq.data.data_utils_fast"),
    )
    if not hasattr(blocks, "__file__"):
        pytest.skip("fairseq was installed without its extensions")
    for sizes, block_size, separator in _corpora(200, seed=3):
        for mode in MODES:
            expected = _blocks_by_rule(sizes.tolist(), mode, block_size, separator)
            if not expected:
                continue  # which the extension cannot return
            theirs = blocks._get_slice_indices_fast(sizes, mode, block_size, separator)
            np.testing.assert_array_equal(compiled.slice_indices(sizes, mode, block_size, separator), theirs)
            np.testing.assert_array_equal(
                compiled.block_to_dataset_index(sizes, theirs), blocks._get_block_to_dataset_index_fast(sizes, theirs)
            )
    for sizes, *limits in _batch_cases(200):
        indices = np.arange(len(sizes))
        theirs = batches.batch_by_size_vec(indices, sizes, *limits)
        ours = compiled.batch_by_size_vec(indices, sizes, *limits)
        assert [b.tolist() for b in ours] == [b.tolist() for b in theirs]


def test_fairseq_takes_them_where_it_was_installed_without_a_compiler(tmp_path):
    """A copy of fairseq without its extensions, as READTHEDOCS=1 installs it: blocks, batches and BLEU are ours."""
    fairseq = pytest.importorskip("fairseq")
    source = os.path.dirname(fairseq.__file__)
    for name in ("fairseq", "fairseq/data"):
        (tmp_path / name).mkdir()
        folder = source if name == "fairseq" else os.path.join(source, "data")
        for entry in os.listdir(folder):
            if not entry.endswith((".so", ".pyd")) and entry not in (
                "__pycache__",
                "data" if name == "fairseq" else "",
            ):
                os.symlink(os.path.join(folder, entry), tmp_path / name / entry)
    program = """
import json, torch, fairseq, numpy as np
from fairseq.data import TokenBlockDataset, data_utils, data_utils_fast
from fairseq.scoring.bleu import BleuConfig, Scorer
texts = [torch.arange(1, n) for n in (5, 3, 9, 2)]
blocks = TokenBlockDataset(texts, [len(t) for t in texts], block_size=4, pad=0, eos=1, break_mode="none")
scorer = Scorer(BleuConfig(pad=1, eos=2, unk=3))
scorer.add(torch.IntTensor([5, 6, 7, 3, 2]), torch.IntTensor([5, 6, 7, 3, 2]))
batches = data_utils.batch_by_size(np.arange(5), lambda i: 3, max_tokens=7)
made = [[b.tolist() for b in some] for some in (blocks, batches)]
origin = data_utils_fast.__spec__.origin
print(json.dumps([fairseq.__file__, origin, *made, scorer.stat.match1, scorer.stat.count1]))
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    where, origin, blocks, batches, match1, count1 = json.loads(result.stdout.splitlines()[-1])
    assert where.startswith(str(tmp_path)) and origin == "NumPy"
    assert blocks == [[1, 2, 3, 4], [1, 2, 1, 2], [3, 4, 5, 6], [7, 8, 1]] and batches == [[0, 1], [2, 3], [4]]
    assert (match1, count1) == (3, 4)  # an unknown word matches nothing
