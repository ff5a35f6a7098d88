"""A thousand mutations of every file of a results folder: the right answer, or one clear line."""

import copy
import json
import random
import resource
import time

import numpy as np
import pytest

from momentum_lm.errors import UserError
from momentum_lm.icl.scoring import Scores
from momentum_lm.report import classification, finetuning_summary, icl_vs_finetuning, perplexity
from momentum_lm.report.classification_comparison import ClassificationComparison
from momentum_lm.report.finetuning_comparison import FinetuningComparison
from momentum_lm.results.journal import Journal
from momentum_lm.results.records import Predictions, Results, Samples, read_results

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2,
    1e308,
    10**25,
    10**400,
    0.5,
    "",
    "x",
    "\x00",
    "$x^$",
    "../..",
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    [1, 2, 3],
    "y" * 5000,
]
BYTES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"NaN",
    b"1e999",
    b"-Infinity",
    b"[" * 3000,
    b"{",
    b"}",
    b'"',
    b"\n",
    b"9" * 5000,
    b"\\ud800",
    b"null",
]
COUNT = 1000


def paths(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*path, key))


def odd_value(draw, data):
    """JSON with one value or key replaced, removed or doubled."""
    data = copy.deepcopy(data)
    for _ in range(draw.randint(1, 2)):
        path = draw.choice(list(paths(data))[1:] or [None])
        if path is None:
            return data
        *way, last = path
        home = data
        for key in way:
            home = home[key]
        if draw.random() < 0.2:
            del home[last]
        elif isinstance(home, list) and draw.random() < 0.2:
            home.append(copy.deepcopy(home[last]))
        else:
            home[last] = draw.choice(ODD)
    return data


def odd_bytes(draw, content):
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(4)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + draw.choice([1, 5, 100, len(content)])]
        elif kind == 2:
            content[at:at] = draw.choice(BYTES)
        else:
            content[at:at] = content[at : at + draw.choice([1, 10, 200])]
    return bytes(content)


def survives(work):
    """Whether ``work`` gave an answer; else it has raised a UserError of one line. Anything else is an error of
    ours."""
    began = time.process_time()
    try:
        work()
        return True
    except UserError as error:
        said = str(error)
        if "\n" in said or len(said) > 2000:
            pytest.fail(said[:500])
        return False
    finally:
        assert time.process_time() - began < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 << 20  # KB; torch and matplotlib are in it


def mutate_json(draw, path, good, data):
    path.write_bytes(odd_bytes(draw, good) if draw.random() < 0.4 else json.dumps(odd_value(draw, data)).encode())


@pytest.mark.nightly
@pytest.mark.parametrize("task", ["perplexity", "classification", "analysis"])
def test_results(task, tmp_path, write_results, write_analysis, analysed):
    if task == "classification":
        folder = write_results(datasets=("mr", "piqa"), shots=(0, 4), seeds=(1, 2), calibrations=("none",), examples=8)
    elif task == "analysis":
        folder = write_analysis([analysed(seed=seed, depth=2, heads=2, controls=("untrained",)) for seed in (1, 2)])
    else:
        folder = tmp_path / "p"
        (folder / "documents").mkdir(parents=True)
        run = {"split": "valid", "context_length": 8, "perplexity": 9.0, "ci95": [8.0, 9.5], "bits_per_byte": 1.5, "num_tokens": 10,
               "num_documents": 2, "data_sha256": "0", "documents": "documents/valid-8.npz"}  # fmt: skip
        data = {
            "task": "lm_perplexity",
            "model": {"path": "m"},
            "config": {"data": {"path": "x"}},
            "runs": [run, run | {"split": "test"}],
        }
        (folder / "results.json").write_text(json.dumps(data))
    path = folder / "results.json"
    good, data, draw, answers = path.read_bytes(), json.loads(path.read_bytes()), random.Random(task), 0
    for turn in range(COUNT):
        mutate_json(draw, path, good, data)

        def look(pages=turn % 40 == 0):
            results = read_results(folder)
            runs = results["runs"]
            if results["task"] == "icl_classification":
                if runs:
                    ClassificationComparison([folder]).table().text()
                    json.dumps(classification.summary(runs)), classification.verdicts(runs)
                if pages:
                    classification.write_report(folder)
            elif results["task"] == "icl_finetune_analysis":
                if runs:
                    FinetuningComparison([folder]).table().text()
                    json.dumps(finetuning_summary.summary(runs)), finetuning_summary.headlines(runs)
                    icl_vs_finetuning.results_table(runs), icl_vs_finetuning.accuracy_table(runs)
                    for chosen in finetuning_summary.settings(
                        runs
                    ).values():  # drawing them all would take half a minute a turn
                        icl_vs_finetuning.panels(chosen), icl_vs_finetuning.attention_panels(chosen[0])
                        icl_vs_finetuning.verdict(chosen), finetuning_summary.mean_heads(chosen, "kendall")
            elif results["task"] == "lm_perplexity":
                perplexity.results_table(runs).text()
                if pages:
                    perplexity.write_report(folder)

        answers += survives(look)
    assert 20 < answers < COUNT  # neither refuses all nor takes all


@pytest.mark.nightly
def test_predictions_and_samples(tmp_path, write_results):
    folder = write_results(datasets=("mr",), shots=(0, 4), seeds=(1, 2), calibrations=("none",), examples=8)
    data = json.loads((folder / "results.json").read_bytes())
    sample = {"dataset": "mr", "shots": 0, "seed": 1, "prompt": "x", "continuations": [" a", " b"], "gold": 1}
    (folder / "samples.json").write_text(json.dumps([sample, sample | {"shots": 4}]))
    lines = (folder / "predictions.jsonl").read_bytes()
    draw, answers = random.Random(1), 0
    for turn in range(COUNT):
        if turn % 2:
            (folder / "predictions.jsonl").write_bytes(odd_bytes(draw, lines))
        else:
            entries = odd_value(draw, [json.loads(line) for line in lines.splitlines()])
            (folder / "predictions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        mutate_json(draw, folder / "samples.json", json.dumps([sample]).encode(), [sample])

        def look():
            results = Results(
                folder,
                data["task"],
                data["model"],
                {"other": 1},
                ("dataset", "seed", "shots", "order", "calibration"),
                True,
            )
            results.data["runs"] = data["runs"]
            results.force = False
            survives(lambda: Samples(results))
            Predictions(results)

        survives(lambda: ClassificationComparison([folder], between=("shots", [0, 4])))
        answers += survives(look)
    assert 20 < answers < COUNT


@pytest.mark.nightly
def test_scores(tmp_path):
    choices = [2, 2, 3]
    there = np.arange(3)[None] < np.array(choices)[:, None]
    scores = Scores(np.where(there, -1.5, np.nan), there.astype(np.int64))
    journal = Journal(tmp_path, "mr-0shot", "ab")
    journal.begin(100, [[0, 1], [2]], choices)
    journal.add(0, {0: [-1.0, -2.0], 1: [-1.0, -2.0]})
    open_ = (tmp_path / "mr-0shot.0.jsonl").read_bytes()
    journal.add(1, {2: [-1.0, -2.0, -3.0]})
    journal.finish(scores)
    whole = (tmp_path / "mr-0shot.npz").read_bytes()
    draw, found = random.Random(2), 0
    for _ in range(COUNT):
        (tmp_path / "mr-0shot.npz").write_bytes(odd_bytes(draw, whole))
        (tmp_path / "mr-0shot.0.jsonl").write_bytes(odd_bytes(draw, open_))

        def look():
            again = Journal(tmp_path, "mr-0shot", "ab")
            read = again.scores(choices)
            assert read is None or np.array_equal(read.sums, scores.sums, equal_nan=True)
            again.begin(100, [[0, 1], [2]], choices)
            assert again.batches.keys() <= {0, 1}

        found += survives(look)
    assert found > COUNT / 4


@pytest.mark.nightly
def test_documents(tmp_path):
    (tmp_path / "documents").mkdir()
    path = tmp_path / "documents" / "valid-8.npz"
    np.savez_compressed(path, fingerprint=np.array("ab"), nll=np.arange(50.0), tokens=np.ones(50, dtype=np.int64))
    good, draw, answers = path.read_bytes(), random.Random(3), 0
    for _ in range(COUNT):
        path.write_bytes(odd_bytes(draw, good))
        answers += survives(
            lambda: perplexity.document_sums(tmp_path, {"documents": "documents/valid-8.npz", "num_tokens": 50})
        )
    assert 0 < answers < COUNT
