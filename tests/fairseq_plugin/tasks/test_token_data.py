"""What our task reads is what stock fairseq's reads, token by token; runs go on at the exact sample;
damage is named.
"""

import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.data.iterators import EpochBatchIterator, GroupedIterator
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import momentum_lm
from momentum_lm.errors import UserError
from momentum_lm.fairseq_plugin.tasks.token_data import BlockIterator
from momentum_lm.text.indexed import IndexedDataset, IndexedDatasetWriter

momentum_lm.register()

VOCAB = 64


def write(prefix, count, seed, longest=40):
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, VOCAB) as writer:
        for _ in range(count):
            writer.add([*rng.integers(4, VOCAB, size=rng.integers(0, longest)), 2])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two folders with a dictionary, train and valid; the first has a train1 as well, which fairseq appends."""
    folder = tmp_path_factory.mktemp("corpus")
    dictionary = Dictionary()
    for i in range(VOCAB - 4):
        dictionary.add_symbol(f"w{i}")
    for name, seed in (("a", 0), ("b", 10)):
        (folder / name).mkdir()
        dictionary.save(str(folder / name / "dict.txt"))
        write(folder / name / "train", 150, seed)
        write(folder / name / "valid", 40, seed + 1)
    write(folder / "a" / "train1", 13, 2)
    return folder


def build(task, data, *flags):
    """The task, as fairseq-train sets it up, and all its configuration."""
    words = [
        str(data),
        "--task",
        task,
        "--arch",
        "gpt_lm_tiny",
        "--tokens-per-sample",
        "24",
        "--batch-size",
        "4",
        *flags,
    ]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
    return tasks.setup_task(cfg.task), cfg


@pytest.fixture(autouse=True)
def no_workers_left():
    """fairseq's iterators keep theirs while anything knows them; a later test that kills a child of this process would
    meet one.
    """
    yield
    gc.collect()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's takes their end for an error
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    signal.signal(signal.SIGCHLD, handler)


def iterator(task, cfg, epoch=1, split="train", processes=1, process=0, positions=1024, workers=0, **more):
    """As fairseq's trainer gets it."""
    task.load_dataset(split, epoch=epoch, combine=split == "train")
    data = cfg.dataset
    return task.get_batch_iterator(
        dataset=task.dataset(split),
        max_tokens=data.max_tokens,
        max_sentences=data.batch_size,
        max_positions=positions,
        ignore_invalid_inputs=True,
        required_batch_size_multiple=data.required_batch_size_multiple,
        seed=cfg.common.seed,
        num_shards=processes,
        shard_id=process,
        num_workers=workers,
        epoch=epoch,
        data_buffer_size=data.data_buffer_size,
        skip_remainder_batch=cfg.optimization.skip_remainder_batch,
        grouped_shuffling=data.grouped_shuffling,
        **more,
    )


def flat(batch):
    """All that is in a batch, to compare."""
    if isinstance(batch, dict):
        return {key: flat(value) for key, value in batch.items()}
    if isinstance(batch, list):
        return [flat(value) for value in batch]
    return (batch.dtype, batch.tolist()) if isinstance(batch, torch.Tensor) else batch


OURS = [[], ["--batch-size", "7"], ["--batch-size", "19"], ["--max-tokens", "100"], ["--max-tokens", "1000",
"--batch-size", "11"],
        ["--required-batch-size-multiple", "3", "--batch-size", "8"], ["--add-bos-token"], ["--pad-to-fixed-length",
        "--pad-to-fixed-bsz"],
        ["--seed", "5"], ["--tokens-per-sample", "5000"], ["--tokens-per-sample", "3"], ["--data-buffer-size", "0"],
        ["--skip-remainder-batch"], ["--shorten-method", "truncate", "--shorten-data-split-list", "test"],
        ["--dataset-impl", "mmap"]]  # fmt: skip
STOCKS = [["--sample-break-mode", "eos"], ["--sample-break-mode", "complete"], ["--sample-break-mode", "complete_doc"],
          ["--shorten-method", "truncate"], ["--shorten-method", "random_crop"], ["--self-target"], ["--future-target",
          "--past-target"],
          ["--grouped-shuffling"], ["--sample-break-mode", "eos", "--max-tokens", "60"]]  # fmt: skip


def lanes(every, by_day):
    """Each of ``every``, by night but for the first ``by_day``."""
    return [
        each if number < by_day else pytest.param(each, marks=pytest.mark.nightly) for number, each in enumerate(every)
    ]


@pytest.mark.parametrize("flags", lanes(OURS, 6) + lanes(STOCKS, 3), ids=lambda flags: " ".join(flags))
def test_batches_are_those_of_the_stock_task(flags, corpus):
    """Over epochs and processes, with the same tokens, padding and numbers, in the same order."""
    data = f"{corpus / 'a'}:{corpus / 'b'}"
    stock, ours = (build(name, data, *flags) for name in ("language_modeling", "momentum_language_modeling"))
    for (process, processes), split in itertools.product(((0, 1), (1, 3)), ("train", "valid")):
        for epoch in (1, 2, 3):  # the third is the first folder's second
            theirs, found = (
                iterator(*built, epoch, split, processes, process, positions=5000) for built in (stock, ours)
            )
            assert isinstance(found, BlockIterator) is (flags in OURS)
            assert flat(found.first_batch) == flat(theirs.first_batch) and len(found) == len(theirs)
            for shuffle in (True, False):
                theirs.epoch = found.epoch = epoch
                a, b = ([flat(batch) for batch in it.next_epoch_itr(shuffle)] for it in (theirs, found))
                assert a == b and len(a) > 0


def test_samples_longer_than_the_model_are_left_out_as_by_the_stock_task(corpus):
    stock, ours = (build(name, corpus / "a") for name in ("language_modeling", "momentum_language_modeling"))
    theirs, found = (iterator(*built, split="valid", positions=20) for built in (stock, ours))
    a, b = ([flat(batch) for batch in it.next_epoch_itr()] for it in (theirs, found))
    assert a == b and sum(batch["ntokens"] for batch in a) < 24  # the short last one, if any
    with pytest.raises(UserError, match="a sample of 24 tokens does not fit the model, which takes 20"):
        iterator(*ours, positions=20)  # nobody means to train on that last one alone


def test_evaluation_with_a_context_window_is_the_stock_tasks(corpus):
    (stock, _), (ours, _) = (build(name, corpus / "a") for name in ("language_modeling", "momentum_language_modeling"))
    batches = []
    for task in (stock, ours):
        task.load_dataset("valid")
        for window in (0, 8):
            loader = task.eval_lm_dataloader(
                task.dataset("valid"), max_tokens=100, max_positions=1024, num_workers=0, context_window=window
            )
            batches.append([flat(batch) for batch in loader])
    assert batches[:2] == batches[2:] and len(batches[0]) > 1


def test_workers_change_nothing_and_hand_over_bytes(corpus):
    task, cfg = build("momentum_language_modeling", corpus / "a", "--batch-size", "16")
    alone, helped = (list(iterator(task, cfg, workers=workers).next_epoch_itr()) for workers in (0, 1))
    assert [flat(batch) for batch in alone] == [flat(batch) for batch in helped] and type(helped[0]) is dict
    tokens = max(batch["net_input"]["src_tokens"].numel() for batch in alone)
    assert (
        max(len(pickle.dumps(batch)) for batch in alone) < 2 * 2 * tokens + 1500
    )  # source and target, two bytes an id
    assert (
        copy.copy(alone[0]) == dict(alone[0]) and pickle.loads(pickle.dumps(task.dataset("train").collater([]))) == {}
    )


KILLED = """
import multiprocessing, os, signal, sys
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
import momentum_lm
momentum_lm.register()
words = [sys.argv[1], "--task", "momentum_language_modeling", "--arch", "gpt_lm_tiny", "--tokens-per-sample", "1024"]
args = options.parse_args_and_arch(options.get_training_parser(), words)
task = tasks.setup_task(convert_namespace_to_omegaconf(args).task)
task.load_dataset("train")
batches = task.get_batch_iterator(task.dataset("train"), max_sentences=64, num_workers=1).next_epoch_itr()
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_training_is_killed(tmp_path, corpus):
    """They see it after 5 s at most, and must not wait to hand over what nobody takes any more: more
    than a pipe holds.
    """
    shutil.copy(corpus / "a" / "dict.txt", tmp_path)
    with IndexedDatasetWriter(tmp_path / "train", VOCAB) as writer:
        writer.add(np.arange(64 * 1024 * 6) % 60 + 4)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    (worker,) = map(int, killed.stdout.split()[-1:])
    deadline = time.monotonic() + 30
    while alive := _alive(worker):
        if time.monotonic() > deadline:
            os.kill(worker, signal.SIGKILL)
            break
        time.sleep(0.1)
    assert not alive


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_iterator_is_kept_over_epochs_unless_that_is_not_wanted(corpus):
    task, cfg = build("momentum_language_modeling", corpus / "a")
    first = iterator(task, cfg)
    more = {"max_tokens": None, "max_sentences": 4, "max_positions": 1024, "epoch": 2}
    assert task.get_batch_iterator(task.dataset("train"), **more) is first
    assert task.get_batch_iterator(task.dataset("train"), **more, disable_iterator_cache=True) is not first


def train_tokens(folder, names):
    return np.concatenate([np.concatenate(list(IndexedDataset(folder / name))) for name in names])


@pytest.mark.parametrize("processes, rows, seed", [(1, 4, 1), (2, 3, 2), (3, 8, 3), (5, 1, 4), (7, 16, 5)])
def test_every_token_of_every_document_once_an_epoch(processes, rows, seed, corpus):
    """In epochs 1 to 3, by putting the targets of all processes back in their places; and each epoch in
    another order.
    """
    expected, orders = train_tokens(corpus / "a", ["train", "train1"]), []
    task, cfg = build("momentum_language_modeling", corpus / "a", "--batch-size", str(rows), "--seed", str(seed))
    for epoch in (1, 2, 3):
        seen, lengths = [], set()
        for process in range(processes):
            batches = list(iterator(task, cfg, epoch, processes=processes, process=process).next_epoch_itr())
            lengths.add(len(batches))
            for batch in filter(None, batches):
                real = batch["target"] != 1
                assert torch.equal(real, batch["net_input"]["src_tokens"] != 1) and int(real.sum()) == batch["ntokens"]
                assert torch.equal(real.sum(1), batch["net_input"]["src_lengths"]) and batch["nsentences"] == len(
                    batch["id"]
                )
                assert torch.equal(
                    batch["target"][:, :-1][real[:, 1:]], batch["net_input"]["src_tokens"][:, 1:][real[:, 1:]]
                )
                seen += [(int(i), row[keep]) for i, row, keep in zip(batch["id"], batch["target"], real, strict=True)]
        assert len(lengths) == 1  # all processes make as many steps
        orders.append([i for i, _ in seen])
        assert sorted(orders[-1]) == list(range(len(seen)))
        np.testing.assert_array_equal(torch.cat([row for _, row in sorted(seen, key=lambda pair: pair[0])]), expected)
    assert orders[0] != orders[1] != orders[2]


def samples(batches):
    return [batch["id"].tolist() if batch else [] for batch in batches]


@pytest.mark.parametrize(
    "done, before, after", [(1, 0, 0), (4, 1, 0), pytest.param(11, 0, 1, marks=pytest.mark.nightly), (15, 0, 0)]
)
def test_a_run_goes_on_at_the_exact_sample(done, before, after, corpus, tmp_path):
    """Whatever the number of workers. Also with the state of the stock task, and the stock task with ours."""
    task, cfg = build("momentum_language_modeling", corpus / "a")
    whole = samples(iterator(task, cfg, 2, processes=2, process=1).next_epoch_itr())
    following = samples(iterator(task, cfg, 3, processes=2, process=1).next_epoch_itr())
    stopped = iterator(task, cfg, 2, processes=2, process=1, workers=before)
    epoch = stopped.next_epoch_itr()
    assert samples(itertools.islice(epoch, done)) == whole[:done]
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["epoch"] == 2 and state["iterations_in_epoch"] == done and state["batches_in_epoch"] == 2 * done
    stock = {key: value for key, value in state.items() if key != "batches_in_epoch"}
    ours, theirs = "momentum_language_modeling", "language_modeling"
    for name, known, workers in ((ours, state, after), (ours, stock, 0), (theirs, state, 0)):
        resumed = iterator(*build(name, corpus / "a"), state["epoch"], processes=2, process=1, workers=workers)
        resumed.load_state_dict(known)
        assert resumed.iterations_in_epoch == done
        assert samples(resumed.next_epoch_itr()) == whole[done:]
        assert resumed.state_dict()["epoch"] == 3 and samples(resumed.next_epoch_itr()) == following


def test_resuming_reads_nothing_that_was_read_before(corpus, monkeypatch):
    task, cfg = build("momentum_language_modeling", corpus / "a")
    whole = samples(iterator(task, cfg).next_epoch_itr())
    resumed = iterator(*build("momentum_language_modeling", corpus / "a"))
    read = []
    blocks = type(resumed.dataset.dataset)
    stock = blocks.__getitem__
    monkeypatch.setattr(blocks, "__getitem__", lambda self, block: read.append(int(block)) or stock(self, block))
    resumed.load_state_dict({"epoch": 1, "iterations_in_epoch": len(whole) - 2, "version": 2, "shuffle": True})
    assert samples(resumed.next_epoch_itr()) == whole[-2:] and read == [*whole[-2], *whole[-1]]


@pytest.mark.parametrize("worlds", lanes([(3, 5, 1, 2), (2, 3), (3, 2), (1, 4), (4, 1), (2, 3, 2)], 1))
def test_other_numbers_of_processes_go_on_without_loss_or_repetition(worlds, corpus):
    """As after elastic restarts on fewer nodes or more; the next epoch is then that of a run that never stopped."""
    task, cfg = build("momentum_language_modeling", corpus / "a", "--batch-size", "2")
    drawn, state = [], None
    for turn, processes in enumerate(worlds):
        iterators = [
            iterator(task, cfg, 2, processes=processes, process=p, disable_iterator_cache=True)
            for p in range(processes)
        ]
        epochs = []
        for it in iterators:
            if state:
                it.load_state_dict(state)
            epochs.append(it.next_epoch_itr())
        steps = 3 if turn + 1 < len(worlds) else len(epochs[0])
        for _, step in zip(range(steps), zip(*epochs, strict=True), strict=False):
            drawn += samples(step)
        if turn + 1 < len(worlds):
            states = [it.state_dict() for it in iterators]
            state = states[0]
            assert all(other == state for other in states) and state["batches_in_epoch"] == len(drawn)
    straight = iterator(task, cfg, 2)
    assert [batch for batch in drawn if batch] == samples(straight.next_epoch_itr())
    last = iterators[-1]
    following = samples(last.next_epoch_itr())
    assert last.epoch == 3 and following == samples(straight.next_epoch_itr())[worlds[-1] - 1 :: worlds[-1]] + [[]] * (
        len(following) - len(range(worlds[-1] - 1, len(straight.frozen_batches), worlds[-1]))
    )


@pytest.mark.parametrize("turn", lanes(range(4), 1))
def test_other_batches_and_processes_go_on_without_loss_or_repetition(turn, corpus):
    """Stretches of an epoch of two updates, each with a batch size, a number of processes and an --update-freq of its
    own.
    """
    draw = np.random.default_rng(turn)
    drawn, state, stretches = [], {}, 0
    while state.get("epoch", 2) == 2:
        stretches += 1
        rows, processes, frequency = (int(draw.integers(1, most)) for most in (6, 4, 4))
        task, cfg = build("momentum_language_modeling", corpus / "a", "--batch-size", str(rows))
        iterators = [
            iterator(task, cfg, 2, processes=processes, process=p, disable_iterator_cache=True)
            for p in range(processes)
        ]
        epochs = []
        for it in iterators:
            it.update_freq = frequency
            if state:
                it.load_state_dict(state)
            epochs.append(GroupedIterator(it.next_epoch_itr(), frequency))
        for _, step in zip(range(2), zip(*epochs, strict=True), strict=False):
            drawn += [i for batches in step for batch in samples(batches) for i in batch]
        states = [it.state_dict() for it in iterators]
        state = states[0]
        assert all(other == state for other in states)
    assert stretches > 2 and sorted(drawn) == list(range(len(iterators[0].dataset)))


@pytest.mark.parametrize(
    "change", [{"parts": [[0, 1, 3]]}, {"parts": []}, {"parts": "x"}, {"seed": None}, {"blocks": "many"}]
)
def test_a_damaged_place_in_the_data_is_one_line(change, corpus):
    it = iterator(*build("momentum_language_modeling", corpus / "a"))
    list(itertools.islice(it.next_epoch_itr(), 3))
    state = it.state_dict()
    with pytest.raises(UserError, match="place in the data is damaged"):
        iterator(*build("momentum_language_modeling", corpus / "a")).load_state_dict(
            {**state, "batching": {**state["batching"], **change}}
        )


DAMAGE = {
    "first .bin cut short": (
        "a/train.bin",
        lambda b: b[:-10],
        r"a/train\.bin has \d+ bytes, but .* cut short; copy or make it anew",
    ),
    "garbage for an index": (
        "a/train.idx",
        lambda b: b"garbage" * 99,
        r"a/train\.idx is not an index of fairseq's mmap format; make",
    ),
    "damaged index": (
        "a/train.idx",
        lambda b: b[:40] + b"\xff" + b[41:],
        r"a/train\.idx is damaged: its offsets do not fit",
    ),
    "second folder's .idx missing": ("b/train.idx", None, r"b/train\.idx is missing; make it with"),
    "second folder's .bin missing": ("b/train.bin", None, r"b/train\.bin is missing; make it with"),
    "second folder's .bin cut short": (
        "b/train.bin",
        lambda b: b[:-1],
        r"b/train\.bin has \d+ bytes, .* cut short; copy or make it anew",
    ),
    "second folder's .idx cut short": (
        "b/train.idx",
        lambda b: b[:-1],
        r"b/train\.idx says 150 items .* copy or make it anew",
    ),
    "appended .idx missing": ("a/train1.idx", None, r"a/train1\.idx is missing"),
    "appended .bin cut short": ("a/train1.bin", lambda b: b[:-1], r"a/train1\.bin has \d+ bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_before_training(case, corpus, tmp_path):
    name, change, message = DAMAGE[case]
    shutil.copytree(corpus, tmp_path / "corpus")
    path = tmp_path / "corpus" / name
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    task, _ = build("momentum_language_modeling", f"{tmp_path / 'corpus' / 'a'}:{tmp_path / 'corpus' / 'b'}")
    task.load_dataset("valid")
    with pytest.raises(UserError, match=message):
        task.load_dataset("train", epoch=1, combine=True)


@pytest.mark.parametrize("mode, workers", [("none", 0), ("eos", 0), ("none", 1)])
def test_ids_beyond_the_dictionary_are_named_when_they_are_met(mode, workers, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    prefix = tmp_path / "corpus" / "a" / "train"
    document = len(IndexedDataset(prefix)) - 2
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    ids[IndexedDataset(prefix).sizes[:document].sum()] = 64321
    ids.tofile(f"{prefix}.bin")
    built = build("momentum_language_modeling", tmp_path / "corpus" / "a", "--sample-break-mode", mode)
    batches = iterator(*built, workers=workers).next_epoch_itr()
    with pytest.raises(UserError) as caught:
        list(batches)
    assert str(caught.value) == (
        f"{prefix}.bin holds the token id 64321 in document {document} (counted from 0), but the dictionary has 64 "
        "entries: "
        "put the dict.txt beside it that it was made with, or copy or make the data anew"
    )


def test_other_formats_are_left_to_fairseq(corpus, tmp_path):
    from fairseq.data.indexed_dataset import make_builder

    shutil.copy(corpus / "a" / "dict.txt", tmp_path)
    builder = make_builder(str(tmp_path / "train.bin"), "lazy")
    for document in IndexedDataset(corpus / "a" / "train"):
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
    builder.finalize(str(tmp_path / "train.idx"))
    found = iterator(*build("momentum_language_modeling", tmp_path))
    assert type(found) is EpochBatchIterator
    np.testing.assert_array_equal(
        sum(batch["ntokens"] for batch in found.next_epoch_itr()), len(train_tokens(corpus / "a", ["train"]))
    )
