"""In-context classification by every command that does it: fairseq-eval, also under torchrun and killed, stock
fairseq-validate, and fairseq-train while it trains. All of them ask a model the same.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from momentum_lm.formats.checkpoint import load_checkpoint

SHAPE = "--decoder-layers 2 --decoder-embed-dim 48 --decoder-ffn-embed-dim 96 --decoder-attention-heads 2".split()
ARCHITECTURES = {
    "ours": ["--arch", "momentum_lm_tiny", "--momentum-learned", "--add-bos-token", *SHAPE],
    "stock": ["--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed", *SHAPE],
}
GOOD, BAD, PEOPLE, PLACES = (
    "fine lovely great".split(),
    "dull poor bad".split(),
    "who whose whom".split(),
    "where whence whither".split(),
)
NOUNS, ADVERBS = "film plot cast song end".split(), "very quite so".split()
TASK = ["--task", "icl_classification"]
VALIDATE = [*TASK, "--criterion", "icl_classification", "--cpu", "--num-workers", "0", "--log-format", "json"]
TORCHRUN = "torchrun --standalone --no-python --nproc_per_node".split()


def rows(split, count):
    """{data set: rows} of made-up questions of three kinds: two labels, six labels, and choices with inputs of their
    own.
    """
    draw = random.Random(split)
    made = {"mr": [], "trec": [], "winogrande": []}
    for _ in range(count):
        label, noun, other = draw.randrange(2), *draw.sample(NOUNS, 2)
        text = f"the {noun} of the {other} is {draw.choice(ADVERBS)} {draw.choice((BAD, GOOD)[label])}"
        made["mr"].append({"text": text, "label": label})
        person = draw.randrange(2)
        made["trec"].append(
            {
                "text": f"{draw.choice((PLACES, PEOPLE)[person])} is the {noun} of the {other}",
                "coarse_label": 3 if person else 4,
            }
        )
        made["winogrande"].append(
            {
                "sentence": f"the _ is {draw.choice(GOOD)}",
                "option1": noun,
                "option2": other,
                "answer": str(draw.randrange(1, 3)),
            }
        )
    return made


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder for --data-dir."""
    folder = tmp_path_factory.mktemp("questions")
    for split, count in (("train", 40), ("validation", 70)):
        for name, made in rows(split, count).items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (folder / "sst2").mkdir()  # one that lacks its files
    return folder


@pytest.fixture(scope="module")
def corpus(run_cli, tmp_path_factory):
    """Binarised text with its tokenizer, in which the answers to the questions can be learned."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [
        *(
            f"Review: {row['text']}\nSentiment: {('Negative', 'Positive')[row['label']]}"
            for row in rows("text", 400)["mr"]
        ),
        *(
            f"Question: {row['text']}\nType: {'Person' if row['coarse_label'] == 3 else 'Location'}"
            for row in rows("text", 400)["trec"]
        ),
    ]
    documents = list(dict.fromkeys(documents))
    random.Random(0).shuffle(documents)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    made = run_cli(["momentum-lm", "prepare", folder / "text.jsonl", "--vocab-size", "310", "--valid", "10", "--test",
    "0",
                    "--output", folder / "bin"])  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def train(corpus):
    """train(save_dir, *more) -> a fairseq-train command of our task; words in ``more`` win."""

    def make(save_dir, *more):
        return ["fairseq-train", corpus, "--task", "momentum_language_modeling", "--criterion", "chunked_cross_entropy",
                *ARCHITECTURES["ours"], "--optimizer", "adam", "--lr", "0.01", "--tokens-per-sample", "256",
                "--batch-size", "8",
                "--max-update", "40", "--cpu", "--num-workers", "0", "--seed", "3", "--save-dir", save_dir,
                "--disable-validation",
                "--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "1", *more]  # fmt: skip

    return make


@pytest.fixture(scope="module", params=["ours", pytest.param("stock", marks=pytest.mark.nightly)])
def checkpoint(request, train, run_cli, tmp_path_factory):
    """Of our own and of fairseq's architecture, trained for a moment with the stock task."""
    folder = tmp_path_factory.mktemp(request.param)
    stock = ["--task", "language_modeling", "--criterion", "cross_entropy", *ARCHITECTURES[request.param]]
    words = train(folder, "--max-update", "150", "--lr", "0.02")
    start = words.index("--task")
    done = run_cli([*words[:2], *stock, *words[words.index("--optimizer") :]])
    assert start == 2 and done.returncode == 0, done.stderr[-3000:]
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def hasty(train, run_cli, tmp_path_factory):
    """A checkpoint of our task that has learned next to nothing."""
    folder = tmp_path_factory.mktemp("hasty")
    done = run_cli(train(folder, "--max-update", "2"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "checkpoint_last.pt"


def evaluate(folder, path, corpus, questions, *more):
    return [
        "fairseq-eval",
        *TASK,
        "--path",
        path,
        "--tokenizer",
        corpus,
        "--data-dir",
        questions,
        "--results-dir",
        folder,
        *more,
    ]


def accuracies(folder):
    """{(data set, shots): accuracy over all seeds} of what fairseq-eval predicted."""
    right = {}
    for line in map(json.loads, (folder / "predictions.jsonl").read_text().splitlines()):
        right.setdefault((line["dataset"], line["shots"]), []).append(line["gold"] == line["pred"])
    return {key: sum(values) / len(values) for key, values in right.items()}


# fairseq-validate


def validate(path, corpus, questions, *more):
    return ["fairseq-validate", corpus, *VALIDATE, "--path", path, "--data-dir", questions, *more]


def test_stock_validate_gives_the_same_accuracy(checkpoint, corpus, questions, run_cli, json_lines, tmp_path):
    names = ["mr", "trec", "winogrande"]
    selection = ["--datasets", ",".join(names), "--seeds", "1,2", "--limit", "60"]
    done = run_cli(evaluate(tmp_path, checkpoint, corpus, questions, *selection, "--shots", "0,4"))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = accuracies(tmp_path)
    for shots, seeds in ((0, 1), (4, 2)):
        done = run_cli(
            validate(
                checkpoint,
                corpus,
                questions,
                *selection,
                "--shots",
                shots,
                "--valid-subset",
                ",".join(names),
                "--max-tokens",
                "2000",
            )
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for name in names:
            (line,) = json_lines(done, name)
            assert float(line[f"{name}_accuracy"]) == pytest.approx(expected[name, shots], abs=1e-6)
            assert int(line[f"{name}_num_examples"]) == 60 * seeds and float(line[f"{name}_loss"]) > 0
    # It learned something, and not everything. (Many texts are in both splits; what is evaluated is not shown.)
    assert max(expected.values()) > 0.6 and len(set(expected.values())) > 3


@pytest.mark.nightly
def test_validate_in_two_processes(hasty, corpus, questions, run_cli, json_lines):
    """The batches are dealt out, the last one to the first process alone; the sums are those of one process."""
    words = [
        "--datasets",
        "mr",
        "--limit",
        "45",
        "--batch-size",
        "10",
        "--shots",
        "2",
        "--seeds",
        "1",
        "--distributed-backend",
        "gloo",
    ]
    words = validate(hasty, corpus, questions, *words)
    one, two = run_cli(words), run_cli([*TORCHRUN, "2", *words], warm=True, timeout=300)
    assert one.returncode == two.returncode == 0, one.stderr[-2000:] + two.stderr[-3000:]
    (expected,), found = json_lines(one, "valid"), json_lines(two, "valid")
    assert expected["valid_num_examples"] == "45" and 0 < float(expected["valid_accuracy"]) < 1
    assert found and all(
        line.items() >= {k: v for k, v in expected.items() if "wps" not in k}.items() for line in found
    )


# torchrun and kills


def predictions(folder):
    return (folder / "predictions.jsonl").read_bytes()


def children(parent):
    """torchrun's workers: they outlive a kill of torchrun."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if path.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(int(path.parent.name))
    return found


@pytest.mark.nightly
def test_any_number_of_processes_before_and_after_a_kill(hasty, corpus, questions, run_cli, cli_command, tmp_path):
    selection = [
        "--datasets",
        "mr,trec",
        "--shots",
        "0,3",
        "--seeds",
        "1,2,3,4,5,6",
        "--calibration",
        "none,contextual",
        "--batch-tokens",
        "60",
    ]
    one = run_cli(evaluate(tmp_path / "one", hasty, corpus, questions, *selection))
    assert one.returncode == 0, one.stderr[-3000:]
    expected = predictions(tmp_path / "one")
    assert expected.count(b"\n") == 2 * 2 * 6 * 2 * 70

    def start(folder, processes):
        command = evaluate(folder, hasty, corpus, questions, *selection)
        # killed with nothing between them and the test, and started again with
        launch, environment = cli_command([*TORCHRUN, processes, *cli_command(command)[0]], warm=processes == 3)
        return subprocess.Popen(launch, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    killed = start(tmp_path / "killed", 2)
    scores = tmp_path / "killed" / "scores"
    while not list(scores.glob("trec-*.jsonl")) and killed.poll() is None:  # half of it is done
        time.sleep(0.005)
    for pid in [*children(killed.pid), killed.pid]:
        os.kill(pid, signal.SIGKILL)
    killed.communicate()
    finished = {path: path.stat().st_mtime_ns for path in scores.glob("*.npz")}
    assert finished and not list(scores.glob("trec-3shot-seed6*.npz"))
    again = start(tmp_path / "killed", 3)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output[-3000:]
    assert predictions(tmp_path / "killed") == expected
    assert all(path.stat().st_mtime_ns == moment for path, moment in finished.items())


# In training


def curves(folder):
    """{tag: {update: value}} of a TensorBoard run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def in_training(questions, *more):
    return ["--icl-eval-datasets", "mr,trec", "--icl-eval-interval", "4", "--icl-eval-data-dir", questions,
    "--icl-eval-limit", "40",
            "--icl-eval-shots", "0,3", "--icl-eval-seeds", "1,2", *more]  # fmt: skip


def test_evaluation_in_training_is_fairseq_evals_and_changes_nothing(
    train, corpus, questions, run_cli, json_lines, tmp_path
):
    short = ["--dropout", "0.1", "--max-update", "40", "--log-interval", "2", "--lr", "0.02"]
    interval = ["--icl-eval-interval", "20"]
    plain = run_cli(train(tmp_path / "plain", *short))
    done = run_cli(
        train(tmp_path / "run", *short, *in_training(questions, *interval), "--tensorboard-logdir", tmp_path / "tb")
    )
    assert plain.returncode == done.returncode == 0, done.stderr[-3000:]

    losses = [[(line["num_updates"], line["loss"], line["gnorm"]) for line in json_lines(run)] for run in (plain, done)]
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert max(line["epoch"] for line in json_lines(done)) > 1  # the order of the data has been drawn again
    before, after = (load_checkpoint(tmp_path / name / "checkpoint_last.pt") for name in ("plain", "run"))
    assert all(torch.equal(before["model"][key], after["model"][key]) for key in before["model"])

    assert not json_lines(plain, "icl")
    lines = json_lines(done, "icl")
    assert [line["num_updates"] for line in lines] == ["20", "40"]
    names = [f"icl_{name}_{shots}shot" for name in ("mr", "trec") for shots in (0, 3)]
    assert lines[1].keys() == {"num_updates", *names, *(f"{name}_n" for name in names)}
    assert [lines[1][f"{name}_n"] for name in names] == ["40", "80", "40", "80"]
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    selection = ["--datasets", "mr,trec", "--shots", "0,3", "--seeds", "1,2", "--limit", "40"]
    evaluated = run_cli(evaluate(tmp_path / "results", checkpoint, corpus, questions, *selection))
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    expected = accuracies(tmp_path / "results")
    for run in ("icl", "model"):
        curve = curves(tmp_path / "tb" / run)
        assert all(list(curve[name]) == [20, 40] for name in names)
        for (name, shots), accuracy in expected.items():
            assert curve[f"icl_{name}_{shots}shot"][40] == pytest.approx(accuracy, abs=1e-6)
    assert max(expected.values()) > 0.6 and len(set(expected.values())) > 2


@pytest.mark.nightly
def test_evaluation_in_training_on_two_processes_and_after_a_restart(train, questions, run_cli, json_lines, tmp_path):
    """With a learning rate of 0 the model stays the same: so do its accuracies, whatever is trained by how many
    processes.
    """
    words = [*in_training(questions), "--lr", "0", "--dropout", "0.1", "--batch-size", "2"]
    one = run_cli(train(tmp_path / "one", *words, "--max-update", "6"))
    assert one.returncode == 0, one.stderr[-3000:]
    (first,) = json_lines(one, "icl")
    assert first["num_updates"] == "4"
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "checkpoint_last.pt", tmp_path / "two")
    again = run_cli(train(tmp_path / "one", *words, "--max-update", "9"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert json_lines(again, "icl") == [first | {"num_updates": "8"}]
    command = train(tmp_path / "two", *words, "--max-update", "9", "--distributed-backend", "gloo")
    two = run_cli([*TORCHRUN, "2", *command], warm=True, timeout=300)
    assert two.returncode == 0, two.stderr[-3000:]
    assert json_lines(two, "icl") == [first | {"num_updates": "8"}]


# What cannot be

CASES = {
    "unknown data set": (["--icl-eval-datasets", "mr,nothing"], "nothing"),
    "missing folder": (["--icl-eval-data-dir", "{questions}/nowhere"], "--icl-eval-data-dir"),
    "missing file": (["--icl-eval-datasets", "trec,sst2"], "sst2/validation.jsonl"),
    "no tokenizer": (["DATA", "{bare}"], "{bare}"),
    "prompts that do not fit": (["--tokens-per-sample", "12"], "--icl-eval-max-field-tokens"),
    "interval": (["--icl-eval-interval", "0"], "--icl-eval-interval"),
    "limit": (["--icl-eval-limit", "-1"], "--icl-eval-limit"),
    "shots": (["--icl-eval-shots", "few"], "--icl-eval-shots"),
    "more shots than examples": (["--icl-eval-shots", "1000"], "--icl-eval-shots"),
    "labels without examples": (["--icl-eval-sampling", "balanced"], "--icl-eval-sampling"),
    "training with the criterion": (["--criterion", "icl_classification"], "fairseq-validate"),
    "training with the task": (["--task", "icl_classification", "--datasets", "mr"], "fairseq-validate"),
}


@pytest.mark.parametrize("case", CASES)
def test_training_does_not_begin(case, train, corpus, questions, run_cli, tmp_path):
    more, word = CASES[case]
    bare = tmp_path / "bare"
    shutil.copytree(corpus, bare, ignore=shutil.ignore_patterns("*.model"))
    more = [str(w).format(questions=questions, bare=bare) for w in more]
    words = train(tmp_path / "out", *in_training(questions))
    if more[0] == "DATA":
        words[1] = more[1]
    elif more[0] == "--task":  # which does not have our flags
        words = [
            "fairseq-train",
            corpus,
            *more,
            "--arch",
            "transformer_lm_gpt",
            "--batch-size",
            "2",
            "--save-dir",
            tmp_path / "out",
        ]
    else:
        words += more
    done = run_cli(words)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert word.format(bare=bare) in lines[0]
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--shots", "0,4"], "--shots"),
        (["--datasets", "mr,trec"], "--valid-subset"),
        (["--criterion", "cross_entropy"], "--criterion icl_classification"),
        (["--data-dir", "{questions}/nowhere"], "--data-dir"),
    ],
)
def test_validation_that_cannot_be(more, word, hasty, corpus, questions, run_cli):
    more = [w.format(questions=questions) for w in more]
    done = run_cli(validate(hasty, corpus, questions, "--datasets", "mr", "--batch-size", "4", *more))
    assert done.returncode
    assert re.findall("^error: .*", done.stderr, re.MULTILINE)[0].count(word) and "Traceback" not in done.stderr
