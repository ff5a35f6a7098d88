"""Against brute force over the definition; equality with fairseq-eval-lm is in tests/cli/test_evaluate.py."""

import itertools
import json
import math
import shutil
import time

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.lm.native import NativeLM
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.report.perplexity import Comparison, document_sums, write_report
from momentum_lm.results.records import read_results, results_lock
from momentum_lm.studies import perplexity
from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.indexed import IndexedDataset, IndexedDatasetWriter

VOCAB, LENGTHS = 40, (5, 1, 13, 2, 30, 7)


@pytest.fixture
def lm(tmp_path):
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            VOCAB, dim=16, ffn_dim=16, layers=2, heads=2, max_positions=64, momentum_kind="ema", momentum_eta=0.7
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "model" / "model.pt"
    path.parent.mkdir()
    torch.save(model.state_dict(), path)
    return NativeLM(model, path)


def write(folder, lengths=LENGTHS, split="valid", seed=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(4, VOCAB, size=n - 1), 2) for n in lengths]
    with IndexedDatasetWriter(folder / split, VOCAB) as writer:
        for document in documents:
            writer.add(document)
    Dictionary(f"w{i}" for i in range(VOCAB - 4)).save(folder / "dict.txt")
    return documents


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "data")
    return tmp_path / "data"


def brute_force(lm, documents, length, packed):
    """-log p of every token by its own forward pass over what it may see, summed per document."""
    stream = np.concatenate(documents)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    sums = np.zeros(len(documents))
    for t in range(len(stream)):
        start = t - t % length
        context = [2 if start == 0 else stream[start - 1], *stream[start:t]]
        if packed and 2 in context:
            context = context[len(context) - 1 - context[::-1].index(2) :]
        with torch.no_grad():
            logits = lm.model(torch.tensor([context]))[0, -1]
        sums[owner[t]] -= logits.log_softmax(-1)[stream[t]].item()
    return sums


@pytest.mark.parametrize("length", [1, 4, 7, 58, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_every_token_is_scored_once_from_what_it_may_see(lm, data, length, packed):
    documents = write(data)
    dataset = IndexedDataset(data / "valid")
    expected = brute_force(lm, documents, length, packed)
    for batch_tokens in (1, 20, 1000):
        sums = perplexity.score_documents(lm, dataset, length, batch_tokens, packed)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=2e-5)


def test_blocks_tile_the_stream(data):
    documents = write(data)
    for length, rows in ((1, 1), (4, 3), (7, 2), (100, 5)):
        pieces = list(perplexity.batches(IndexedDataset(data / "valid"), length, rows))
        targets = np.concatenate([t[d >= 0] for _, t, d in pieces])
        owners = np.concatenate([d[d >= 0] for *_, d in pieces])
        np.testing.assert_array_equal(targets, np.concatenate(documents))
        np.testing.assert_array_equal(owners, np.repeat(np.arange(len(documents)), LENGTHS))
        inputs = np.concatenate([i[d >= 0] for i, _, d in pieces])
        np.testing.assert_array_equal(inputs, [2, *targets[:-1]])
        assert all((t[d < 0] == 1).all() and (i[d < 0] == 1).all() for i, t, d in pieces)


def test_documents_without_an_end_begin_like_fairseqs(tmp_path):
    """A block that begins where a document does begins with </s>, whatever came before."""
    with IndexedDatasetWriter(tmp_path / "valid", VOCAB) as writer:
        for document in ([5, 6, 7], [], [8, 9, 10]):
            writer.add(np.array(document, dtype=np.int64))
    ((inputs, _, owners),) = perplexity.batches(IndexedDataset(tmp_path / "valid"), 3, 9)
    assert inputs.tolist() == [[2, 5, 6], [2, 8, 9]]
    assert owners.tolist() == [[0, 0, 0], [2, 2, 2]]


@pytest.mark.parametrize("sizes", [[3, 0, 0, 3], [0, 3, 3, 0], [1, 2, 3, 6], [6, 5, 1]])
def test_blocks_begin_with_an_end_of_sentence_where_documents_begin(tmp_path, sizes):
    with IndexedDatasetWriter(tmp_path / "valid", VOCAB) as writer:
        for size in sizes:
            writer.add(np.arange(5, 5 + size))
    stream = np.concatenate([np.arange(5, 5 + size) for size in sizes])
    starts = set(np.cumsum([0, *sizes[:-1]]).tolist())
    expected = [2 if at in starts else stream[at - 1] for at in range(0, len(stream), 3)]
    for rows in (1, 2, 9):
        found = [
            i for inputs, _, _ in perplexity.batches(IndexedDataset(tmp_path / "valid"), 3, rows) for i in inputs[:, 0]
        ]
        assert found == expected


def test_a_batch_costs_the_same_however_many_documents_there_are(lm, tmp_path, monkeypatch):
    """Else a split of a million documents would take hours before the model had a say."""
    monkeypatch.setattr(lm, "token_losses", lambda tokens, targets, packed: torch.ones(targets.shape))
    seconds = {}
    for count in (500, 100_000):
        with IndexedDatasetWriter(tmp_path / str(count), VOCAB) as writer:
            writer.add_many(np.full(20 * count, 2), np.full(count, 20, dtype=np.int64))
        dataset = IndexedDataset(tmp_path / str(count))
        began = time.process_time()
        assert perplexity.score_documents(lm, dataset, 4, 1000).sum() == 20 * count
        seconds[count] = (time.process_time() - began) / (20 * count / 1000)
    assert seconds[100_000] < 5 * seconds[500] + 0.001


def evaluate(lm, data, out, lengths=(4, 16), **more):
    return perplexity.evaluate(lm, data, out, lengths, show_progress=False, **more)


def test_records(lm, data, tmp_path):
    (data / "prepare.json").write_text(json.dumps({"splits": {"valid": {"documents": 6, "tokens": 58, "bytes": 200}}}))
    evaluate(lm, data, tmp_path / "out")
    results = read_results(tmp_path / "out")
    assert results["task"] == "lm_perplexity"
    assert results["model"]["architecture"]["momentum_eta"] == 0.7
    assert [run["context_length"] for run in results["runs"]] == [4, 16]
    for run in results["runs"]:
        nll, tokens = document_sums(tmp_path / "out", run)
        assert tokens.tolist() == list(LENGTHS)
        assert run["num_tokens"] == 58
        assert run["perplexity"] == pytest.approx(math.exp(nll.sum() / 58))
        assert run["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / 200)
        assert run["ci95"][0] < run["perplexity"] < run["ci95"][1]
        ends, blocks = [part["end"] for part in run["by_position"]], [part["blocks"] for part in run["by_position"]]
        assert (ends, blocks) == (
            ([1, 2, 4], [15, 15, 14]) if run["context_length"] == 4 else ([1, 2, 4, 8, 16], [4, 4, 4, 4, 3])
        )
        assert run["icl_score"] is None


def test_icl_score_of_long_blocks(lm, tmp_path, monkeypatch):
    """A model whose loss rises by 0.01 a token, from the 300th on by less in later blocks."""
    write(tmp_path / "data", (700, 1000, 348))
    monkeypatch.setattr(type(lm), "max_positions", 1024)
    seen = itertools.count()

    def losses(tokens, targets, packed):
        blocks = torch.tensor([next(seen) for _ in tokens])
        return torch.arange(512.0).div(100).sub(blocks[:, None] / 500 * torch.arange(512).ge(300)).clamp(min=0)

    monkeypatch.setattr(lm, "token_losses", losses)
    (run,) = evaluate(lm, tmp_path / "data", tmp_path / "out", (512,)).runs
    assert run["icl_score"]["score"] == pytest.approx(4.5 - 0.003, abs=1e-5) and run["icl_score"]["blocks"] == 4
    assert run["icl_score"]["ci95"][0] < 4.497 < run["icl_score"]["ci95"][1]
    assert run["by_position"][-1] == {
        "end": 512, "loss": pytest.approx(3.835 - 0.003 * 212 / 256, abs=1e-5), "blocks": 4,
        "ci95": [pytest.approx(3.832, abs=0.003), pytest.approx(3.836, abs=0.003)],
    }  # fmt: skip
    write_report(tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "ICL score" in page and "+4.497" in page and "257 to 512" in page and "Loss by position on valid" in page


def test_finished_lengths_are_not_run_again(lm, data, tmp_path, monkeypatch):
    evaluate(lm, data, tmp_path / "out", (4,))
    before = read_results(tmp_path / "out")["runs"][0]
    scored = []
    stock = perplexity.score_documents
    monkeypatch.setattr(perplexity, "score_documents", lambda *a: scored.append(a[2]) or stock(*a))
    evaluate(lm, data, tmp_path / "out", (4, 8))
    assert scored == [8]
    assert read_results(tmp_path / "out")["runs"][0] == before
    (tmp_path / "out/documents/valid-4.npz").unlink()
    evaluate(lm, data, tmp_path / "out", (4, 8))
    assert scored == [8, 4]


def test_other_configuration_model_or_data_are_refused(lm, data, tmp_path):
    evaluate(lm, data, tmp_path / "out")
    before = (tmp_path / "out/results.json").read_bytes()
    with pytest.raises(UserError, match="packed_documents"):
        evaluate(lm, data, tmp_path / "out", packed_documents=True)
    write(data, seed=1)
    with pytest.raises(UserError, match=r"another .*valid\.bin"):
        evaluate(lm, data, tmp_path / "out")
    (tmp_path / "model" / "other.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.sha256"):
        evaluate(NativeLM(lm.model, tmp_path / "model" / "other.pt"), data, tmp_path / "out")
    assert (tmp_path / "out/results.json").read_bytes() == before
    evaluate(lm, data, tmp_path / "out", (8,), packed_documents=True, force=True)
    assert [run["context_length"] for run in read_results(tmp_path / "out")["runs"]] == [8]


def test_stale_byte_counts_give_no_bits_per_byte(lm, data, tmp_path, caplog):
    (data / "prepare.json").write_text(json.dumps({"splits": {"valid": {"documents": 6, "tokens": 57, "bytes": 200}}}))
    assert evaluate(lm, data, tmp_path / "out").runs[0]["bits_per_byte"] is None
    assert "57 tokens" in caplog.text


def test_a_split_that_prepare_did_not_make_has_no_bits_per_byte(lm, data, tmp_path):
    (data / "prepare.json").write_text(json.dumps({"splits": {"valid": {"documents": 6, "tokens": 58, "bytes": 200}}}))
    write(data, split="extra")
    runs = evaluate(lm, data, tmp_path / "out", (4,), splits=("valid", "extra")).runs
    assert [run["bits_per_byte"] is None for run in runs] == [False, True]


def test_a_results_folder_that_cannot_be_written_is_refused_before_scoring(lm, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(lm, "token_losses", None)  # would fail if it were called
    with pytest.raises(UserError, match=r"folder=.*file/out. cannot be written: Not a directory"):
        evaluate(lm, data, tmp_path / "file" / "out")


def break_weights(lm, data):
    lm.model.layers[0].fc1.weight[0, 0] = math.nan


def empty(lm, data):
    write(data, lengths=())


def wrong_dictionary(lm, data):
    Dictionary(f"w{i}" for i in range(VOCAB)).save(data / "dict.txt")


def renamed_symbols(lm, data):
    Dictionary(f"x{i}" for i in range(VOCAB - 4)).save(lm.path.parent / "dict.txt")


def padding_inside(lm, data):
    with IndexedDatasetWriter(data / "valid", VOCAB) as writer:
        writer.add(np.array([5, 1, 2]))


def foreign_tokens(lm, data):
    with IndexedDatasetWriter(data / "valid", VOCAB + 100) as writer:
        writer.add(np.array([5, 90, 2]))


def damaged_manifest(lm, data):
    (data / "prepare.json").write_text('{"splits": {"valid": {}}}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_weights, r"model\.pt gives probabilities of 0 or NaN"),
        (empty, "is empty: there is nothing to score"),
        (wrong_dictionary, "has 44 entries, but"),
        (renamed_symbols, "is not the model's dictionary"),
        (padding_inside, "holds padding"),
        (foreign_tokens, "token 90, beyond the model's vocabulary of 40"),
        (damaged_manifest, r"prepare\.json is damaged"),
    ],
)
def test_nothing_is_ever_scored_wrongly(lm, data, tmp_path, spoil, message):
    spoil(lm, data)
    with pytest.raises(UserError, match=message):
        evaluate(lm, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(lm, data, tmp_path):
    with pytest.raises(UserError, match=r"context_lengths=65: .*from 1 to 64"):
        evaluate(lm, data, tmp_path / "out", (4, 65))
    with pytest.raises(UserError, match=r"no split 'test' \(there: valid\)"):
        evaluate(lm, data, tmp_path / "out", splits=("valid", "test"))
    with pytest.raises(UserError, match="is not a folder"):
        evaluate(lm, data / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_document_has_no_interval(lm, data, tmp_path):
    write(data, lengths=(9,))
    assert evaluate(lm, data, tmp_path / "out", (4,)).runs[0]["ci95"] is None


def test_a_dictionary_of_equal_size_with_other_symbols_is_refused(lm, data, tmp_path):
    """That of the data which the checkpoint names, where none lies beside it."""
    write(tmp_path / "trained_on")
    lm = NativeLM(lm.model, lm.path, trained_on=tmp_path / "trained_on")
    evaluate(lm, data, tmp_path / "out", (4,))
    Dictionary(f"x{i}" for i in range(VOCAB - 4)).save(data / "dict.txt")
    with pytest.raises(
        UserError,
        match=r"data/dict\.txt is not the dictionary of the data that the model was trained on, .*trained_on/dict\.txt",
    ):
        evaluate(lm, data, tmp_path / "new", (4,))
    assert not (tmp_path / "new").exists()


def test_another_dictionary_is_other_results(lm, data, tmp_path):
    evaluate(lm, data, tmp_path / "out", (4,))
    Dictionary(f"x{i}" for i in range(VOCAB - 4)).save(data / "dict.txt")
    with pytest.raises(UserError, match=r"holds other results \(config\.data\.dictionary_sha256: "):
        evaluate(lm, data, tmp_path / "out", (4,))


def test_the_folder_is_locked_before_it_is_read(lm, data, tmp_path):
    with results_lock(tmp_path / "out"), pytest.raises(UserError, match="out is being written by process"):
        evaluate(lm, data, tmp_path / "out", (4,))


def test_data_that_changes_meanwhile_gives_no_results(lm, data, tmp_path, monkeypatch):
    stock = perplexity.score_documents

    def rewritten(*args):
        found = stock(*args)
        (data / "valid.bin").write_bytes((data / "valid.bin").read_bytes())
        return found

    monkeypatch.setattr(perplexity, "score_documents", rewritten)
    with pytest.raises(UserError, match=r"valid\.bin was changed while it was read"):
        evaluate(lm, data, tmp_path / "out", (4,))
    assert not (tmp_path / "out").exists()


def test_documents_that_are_not_ours_stay(lm, data, tmp_path):
    path = tmp_path / "out" / "documents" / "valid-4.npz"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"valid-4\.npz is there and was not written by fairseq-eval"):
        evaluate(lm, data, tmp_path / "out", (4,))
    assert path.read_text() == "mine"


def test_finished_work_is_said_to_be_finished(lm, data, tmp_path, capsys):
    for expected in (False, True):
        perplexity.evaluate(lm, data, tmp_path / "out", (4,))
        assert ("holds all of these results already" in capsys.readouterr().out) == expected


def losses_by_place(lm, monkeypatch, offset=0.0):
    """No model: losses that fall with the place in the block."""

    def losses(tokens, targets, packed):
        return (5.0 + offset - torch.arange(float(targets.shape[1])) / 1000).expand(targets.shape)

    monkeypatch.setattr(type(lm), "max_positions", 1024)
    monkeypatch.setattr(lm, "token_losses", losses)


def test_losses_by_position_stand_side_by_side(lm, tmp_path, monkeypatch):
    """Of the same data alone, at the longest length that most folders have; what is missing is said."""
    write(tmp_path / "data", (700, 1000, 348))
    write(tmp_path / "other data", (700, 1000, 348), seed=1)
    folders = {name: tmp_path / name for name in ("first", "second", "other", "before")}
    losses_by_place(lm, monkeypatch)
    evaluate(lm, tmp_path / "data", folders["first"], (64, 512, 1024))
    evaluate(lm, tmp_path / "other data", folders["other"], (512,))
    lm.remove_momentum([0])
    losses_by_place(lm, monkeypatch, 0.25)
    evaluate(lm, tmp_path / "data", folders["second"], (512,), packed_documents=False)
    shutil.copytree(folders["first"], folders["before"])
    stored = json.loads((folders["before"] / "results.json").read_text())
    for run in stored["runs"]:
        del run["by_position"], run["icl_score"]
    (folders["before"] / "results.json").write_text(json.dumps(stored))

    comparison = Comparison(list(folders.values()), list(folders))
    shown = comparison.by_position["valid"]
    assert {name: run and run["context_length"] for name, run in shown.items()} == {
        "first": 512, "second": 512, "other": None, "before": None,
    }  # fmt: skip
    for name in ("other", "before"):
        (note,) = [note for note in comparison.notes if note.startswith(f"valid: {name} has no losses by position")]
        assert "--force" in note
    comparison.write_page(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "257 to 512" in page and "4.616 (4.616 to 4.616)" in page and "4.866 (4.866 to 4.866)" in page
    assert f"second: {lm.name}, without the filters layers.0.self_attn.momentum" in page

    write_report(folders["before"])  # which has none, and gets some
    assert "Loss by position" not in (folders["before"] / "report.html").read_text()


def test_packed_documents_are_said(lm, data, tmp_path):
    for packed in (True, False):
        evaluate(lm, data, tmp_path / str(packed), packed_documents=packed)
        write_report(tmp_path / str(packed))
        page = (tmp_path / str(packed) / "report.html").read_text()
        assert ("No document of a block sees another" in page) == packed
