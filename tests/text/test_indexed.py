"""fairseq's mmap format: the same bytes as fairseq's, both ways, and no half-written or half-read data."""

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.text.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype


def documents(vocab_size, count=50, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=rng.integers(1, 40)) for _ in range(count)]


def write(prefix, items, vocab_size):
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for item in items:
            writer.add(item)


@pytest.mark.parametrize("vocab_size", [5, 65499, 65500, 4294967294, 4294967295])
def test_token_type_is_fairseqs(vocab_size, fairseq_data):
    assert token_dtype(vocab_size) == np.dtype(fairseq_data.indexed_dataset.best_fitting_int_dtype(vocab_size))


@pytest.mark.parametrize("vocab_size", [300, 70000])
def test_same_bytes_as_fairseqs_builder(tmp_path, vocab_size, fairseq_data):
    items = documents(vocab_size)
    builder = fairseq_data.indexed_dataset.make_builder(str(tmp_path / "theirs.bin"), "mmap", vocab_size=vocab_size)
    for item in items:
        builder.add_item(torch.from_numpy(item))
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", items, vocab_size)
    for end in ("bin", "idx"):
        assert (tmp_path / f"ours.{end}").read_bytes() == (tmp_path / f"theirs.{end}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]


def test_each_reads_what_the_other_wrote(tmp_path, fairseq_data):
    items = documents(70000)
    write(tmp_path / "data", items, 70000)
    ours, theirs = (
        IndexedDataset(tmp_path / "data"),
        fairseq_data.indexed_dataset.MMapIndexedDataset(str(tmp_path / "data")),
    )
    assert len(ours) == len(theirs) == len(items)
    assert ours.sizes.tolist() == theirs.sizes.tolist() == [len(item) for item in items]
    assert ours.num_tokens == sum(map(len, items))
    for item, our, their in zip(items, ours, (theirs[i] for i in range(len(theirs))), strict=True):
        np.testing.assert_array_equal(our, item)
        np.testing.assert_array_equal(their.numpy(), item)
    np.testing.assert_array_equal(np.concatenate(list(ours.blocks(size=7))), np.concatenate(items))
    np.testing.assert_array_equal(ours[-1], items[-1])
    with pytest.raises(IndexError):
        ours[len(items)]


def test_empty_items_and_no_items(tmp_path):
    write(tmp_path / "some", [[], [4, 2], []], 10)
    assert [item.tolist() for item in IndexedDataset(tmp_path / "some")] == [[], [4, 2], []]
    write(tmp_path / "none", [], 10)
    assert len(IndexedDataset(tmp_path / "none")) == 0 == IndexedDataset(tmp_path / "none").num_tokens
    assert list(IndexedDataset(tmp_path / "none").blocks()) == []


def test_many_at_once_is_one_by_one(tmp_path):
    items = documents(100)
    write(tmp_path / "one", items, 100)
    with IndexedDatasetWriter(tmp_path / "many", 100) as writer:
        writer.add_many(np.concatenate(items[:30]), [len(item) for item in items[:30]])
        writer.add_many(np.concatenate(items[30:]), [len(item) for item in items[30:]])
    for end in ("bin", "idx"):
        assert (tmp_path / f"one.{end}").read_bytes() == (tmp_path / f"many.{end}").read_bytes()


def test_ids_and_sizes_that_cannot_be_are_refused(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "data", 100)
    for ids in ([100], [-1], [3, 70000]):
        with pytest.raises(ValueError, match="do not fit a vocabulary of 100"):
            writer.add(ids)
    with pytest.raises(ValueError, match="sizes sum to 3, but there are 2 ids"):
        writer.add_many([5, 6], [1, 2])
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "data", [[5, 2]], 10)
    before = [(tmp_path / f"data.{end}").read_bytes() for end in ("bin", "idx")]
    with pytest.raises(ValueError, match="do not fit"), IndexedDatasetWriter(tmp_path / "data", 10) as writer:
        writer.add_many([6, 2, 11], [2, 1])
    assert [(tmp_path / f"data.{end}").read_bytes() for end in ("bin", "idx")] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_resume_cuts_off_what_came_after_the_checkpoint(tmp_path):
    items = documents(100)
    write(tmp_path / "whole", items, 100)
    writer = IndexedDatasetWriter(tmp_path / "data", 100)
    for item in items[:20]:
        writer.add(item)
    saved = writer.checkpoint()
    for item in items[20:27]:
        writer.add(item)
    writer.close()  # as if the program had died here
    assert not (tmp_path / "data.bin").exists() and not (tmp_path / "data.idx").exists()
    writer = IndexedDatasetWriter(tmp_path / "data", 100, resume=saved)
    for item in items[20:]:
        writer.add(item)
    writer.finish()
    for end in ("bin", "idx"):
        assert (tmp_path / f"whole.{end}").read_bytes() == (tmp_path / f"data.{end}").read_bytes()


@pytest.mark.parametrize("renamed", [1, 2])
def test_resume_after_death_inside_finish(tmp_path, monkeypatch, renamed):
    """finish() renames two files; whatever it has done when it dies, doing it again ends well."""
    from momentum_lm.text import indexed

    writer = IndexedDatasetWriter(tmp_path / "data", 100)
    writer.add([5, 6, 2])
    saved = writer.checkpoint()
    calls = []

    class Dying:
        def __getattr__(self, name):
            return getattr(indexed_os, name)

        def replace(self, *paths):
            if len(calls) == renamed:
                raise KeyboardInterrupt
            calls.append(paths)
            indexed_os.replace(*paths)

        def unlink(self, path):
            raise KeyboardInterrupt

    indexed_os = indexed.os
    monkeypatch.setattr(indexed, "os", Dying())
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    monkeypatch.undo()
    IndexedDatasetWriter(tmp_path / "data", 100, resume=saved).finish()
    assert [item.tolist() for item in IndexedDataset(tmp_path / "data")] == [[5, 6, 2]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_resume_without_its_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.bin\.partial is gone"):
        IndexedDatasetWriter(tmp_path / "data", 100, resume=(3, 20))
    writer = IndexedDatasetWriter(tmp_path / "data", 100)
    writer.add([5])
    writer.close()
    with pytest.raises(UserError, match="shorter than when it was last saved"):
        IndexedDatasetWriter(tmp_path / "data", 100, resume=(3, 20))


def damaged(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "end, change, message",
    [
        ("bin", lambda b: b[:-1], r"data\.bin has \d+ bytes, but .*data\.idx needs \d+: it is cut short"),
        ("bin", lambda b: b"", r"data\.bin has 0 bytes"),
        ("idx", lambda b: b[:-1], r"data\.idx says 50 items .* cut short or damaged"),
        ("idx", lambda b: b[:10], r"data\.idx is not an index of fairseq's mmap format"),
        ("idx", lambda b: b"TNTIDX\0\0" + b[8:], r"data\.idx is not an index of fairseq's mmap format"),
        ("idx", lambda b: b[:9] + b"\2" + b[10:], r"version 2"),
        ("idx", lambda b: b[:17] + b"\6" + b[18:], r"type code 6"),
        ("idx", lambda b: b[:30] + b"\xff" + b[31:], r"data\.idx is damaged: its offsets do not fit"),
        ("idx", lambda b: b[:-3] + b"\xff" + b[-2:], r"data\.idx is damaged: its offsets do not fit"),
        ("idx", lambda b: b[:18] + b"\xff" * 8 + b[26:], r"data\.idx says 18446744073709551615 items and should have"),
        ("idx", lambda b: b[:18] + bytes(8) + b[26:], r"data\.idx says 0 items and should have 26 bytes"),
        ("idx", lambda b: b[:18] + bytes(7) + b"\x10" + b[26:], r"data\.idx says 1152921504606846976 items"),
        ("idx", lambda b: b[:-8] + b"\xff" * 8, r"data\.idx is damaged: its last item has \d+ tokens at byte -1"),
        (
            "idx",
            lambda b: b[:-8] + b"\xff" * 7 + b"\x7f",
            r"data\.idx is damaged: its offsets do not fit|data\.bin has",
        ),
        (
            "idx",
            lambda b: b[: 26 + 4 * 49] + b"\xff" * 4 + b[26 + 4 * 50 :],
            r"data\.idx is damaged: its last item has -1 tokens",
        ),
        ("idx", lambda b: b[:26] + b"\xff\xff\xff\x7f" + b[30:], r"data\.idx is damaged: its offsets do not fit"),
        ("idx", lambda b: b"", r"data\.idx is not an index"),
        ("idx", None, r"data\.idx is missing; make it with `momentum-lm prepare`"),
        ("bin", None, r"data\.bin is missing"),
    ],
)
def test_damaged_data_is_refused_by_name(tmp_path, end, change, message):
    write(tmp_path / "data", documents(100), 100)
    path = tmp_path / f"data.{end}"
    path.unlink() if change is None else damaged(path, change)
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "data")


def test_files_that_shrink_while_they_are_opened(tmp_path, monkeypatch):
    """What is mapped has the length that was checked; a file that is replaced meanwhile is not mixed with the old."""
    from momentum_lm.text import indexed

    write(tmp_path / "data", documents(100), 100)
    stock = indexed._header

    def cut(end, size):
        def header(prefix):
            found = stock(prefix)
            path = tmp_path / f"data.{end}"
            path.write_bytes(path.read_bytes()[:size])
            return found

        return header

    monkeypatch.setattr(indexed, "_header", cut("idx", 100))
    with pytest.raises(UserError, match=r"data\.idx was written to while it was read"):
        IndexedDataset(tmp_path / "data")
    write(tmp_path / "data", documents(100), 100)
    monkeypatch.setattr(indexed, "_header", cut("bin", 100))
    with pytest.raises(UserError, match=r"data\.bin has 100 bytes, but"):
        IndexedDataset(tmp_path / "data")
    monkeypatch.setattr(indexed, "_header", stock)
    write(tmp_path / "data", documents(100), 100)
    data = IndexedDataset(tmp_path / "data")
    (tmp_path / "new.bin").write_bytes((tmp_path / "data.bin").read_bytes()[:100])
    (tmp_path / "new.bin").rename(tmp_path / "data.bin")  # the old file stays mapped; a reader by name sees the new one
    assert len(data[len(data) - 1])
    with pytest.raises(UserError, match=r"data\.bin was cut short while it was read"):
        list(data.blocks(30))
