"""A small random model on real files: what is computed, what is kept, and what is not computed again."""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections import defaultdict

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.icl.datasets.loading import load_dataset
from momentum_lm.report.classification import write_report
from momentum_lm.report.classification_comparison import ClassificationComparison
from momentum_lm.results import identity
from momentum_lm.results.records import read_results
from momentum_lm.studies.classification import KEY, Questions, Settings, Unit, evaluate, units
from momentum_lm.text.dictionary import EOS

WORDS = ["good", "bad", "dull", "long", "thin", "film", "plot", "actors", "very", "the"]
FILMS = """\
name: films
description: made-up reviews
licence: none
files: {train: train.jsonl, evaluation: validation.jsonl}
label: label
labels: [Negative, Positive]
templates:
  code: "Review: {text} Sentiment:"
"""
PICK = """\
name: pick
description: made-up choices
licence: none
files: {train: train.jsonl, evaluation: validation.jsonl}
label: label
choices: [one, two]
templates:
  code: "the {text} is"
"""


def write(folder, name, yaml, rows):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / f"{name}.yaml").write_text(yaml)
    for split, count in (("train", 12), ("validation", 24)):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(rows(split, i)) + "\n" for i in range(count)))
    return str(folder / name / f"{name}.yaml")


def text(*key):
    draw = np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))
    return " ".join(draw.choice(WORDS, size=draw.integers(1, 9)))


@pytest.fixture
def films(tmp_path):
    return load_dataset(
        write(
            tmp_path,
            "films",
            FILMS,
            lambda split, i: {"text": text(split, i), "label": int(text(split, i, "label") > "f")},
        )
    )


@pytest.fixture
def pick(tmp_path):
    return load_dataset(
        write(
            tmp_path,
            "pick",
            PICK,
            lambda split, i: {"text": text(split, i), "one": text(i), "two": text(i, 2), "label": i % 2},
        )
    )


SETTINGS = Settings(shots=(0, 2), seeds=(1, 2), batch_tokens=120, sampling="balanced", calibrations=("none", "batch"))


def run(lm, datasets, settings, folder, **more):
    evaluate(lm, datasets, settings, folder, show_progress=False, **more)
    return read_results(folder)


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def calls(lm, monkeypatch):
    """How many batches went through the model."""
    seen = []
    log_probs = lm.log_probs
    monkeypatch.setattr(lm, "log_probs", lambda *a: (seen.append(len(a[0])), log_probs(*a))[1])
    return seen


def test_runs_and_predictions(lm, films, tmp_path):
    results = run(lm, [films], SETTINGS, tmp_path / "out")
    keys = [(r["seed"], r["shots"], r["calibration"]) for r in results["runs"]]
    assert sorted(keys) == sorted((s, k, c) for s in (1, 2) for k in (0, 2) for c in ("none", "batch"))
    found = lines(tmp_path / "out")
    assert len(found) == 8 * 24
    gold = [example.gold for example in films.evaluation]
    for one in results["runs"]:
        mine = [x for x in found if all(x[k] == one[k] for k in ("dataset", "seed", "shots", "order", "calibration"))]
        assert [x["index"] for x in mine] == list(range(24)) and [x["gold"] for x in mine] == gold
        assert all(
            x["pred"] == int(np.argmax(x["scores"])) and x["setting"] == ("in_context" if one["shots"] else "zero_shot")
            for x in mine
        )
        right = np.mean([x["pred"] == x["gold"] for x in mine])
        assert one["accuracy"] == pytest.approx(right) and one["ci95"][0] < right < one["ci95"][1]
        assert np.sum(one["confusion"]) == 24 and np.trace(one["confusion"]) == round(24 * right)
        assert one["majority"] == max(np.bincount(gold)) / 24 and one["num_examples"] == 24
    assert results["summary"]["films"]["2"]["num_seeds"] == 2
    zero = [
        [x["scores"] for x in found if (x["seed"], x["shots"], x["calibration"]) == (seed, 0, "none")]
        for seed in (1, 2)
    ]
    assert zero[0] == zero[1]


def test_scores_are_those_of_the_full_prompt(lm, films, tmp_path):
    """The whole way from files to scores, against the prompt written out by hand."""
    results = run(lm, [films], SETTINGS, tmp_path / "out")
    one = next(r for r in results["runs"] if (r["seed"], r["shots"], r["calibration"]) == (2, 2, "none"))
    assert sorted(films.train[i].gold for i in one["demonstrations"]) == [0, 1]
    head = list(lm.bos)
    for i in one["demonstrations"]:
        head += [*lm.encode(["".join(films.train[i].pair(films.train[i].gold))])[0], EOS]
    for line in [x for x in lines(tmp_path / "out") if (x["seed"], x["shots"], x["calibration"]) == (2, 2, "none")]:
        given = head + lm.encode(films.evaluation[line["index"]].inputs)[0]
        for label, score in zip((" Negative", " Positive"), line["scores"], strict=True):
            tokens = lm.encode([label])[0]
            with torch.no_grad():
                log_probs = lm.model(torch.tensor([given + tokens]))[0].log_softmax(-1)[len(given) - 1 : -1]
            assert score == pytest.approx(log_probs.gather(1, torch.tensor(tokens)[:, None]).mean().item(), abs=1e-4)
    sample = json.loads((tmp_path / "out" / "samples.json").read_text())[1]
    assert (
        sample["prompt"].count("</s>") == 2
        and sample["prompt"].startswith("<s>Review:")
        and sample["prompt"].endswith("Sentiment:")
        and sample["shots"] == 2
    )


@pytest.mark.parametrize(
    "change", [{"batch_tokens": 1}, {"batch_tokens": 10_000}, {"padding_side": "left"}, {"batch_tokens": None}]
)
def test_batches_and_padding_change_no_prediction(lm, films, tmp_path, change):
    outputs = []
    for name, settings in (("a", SETTINGS), ("b", Settings(**{**SETTINGS.__dict__, **change}))):
        run(lm, [films], settings, tmp_path / name)
        outputs.append(lines(tmp_path / name))
    for one, other in zip(*outputs, strict=True):
        assert one["pred"] == other["pred"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_an_interrupted_evaluation_goes_on(lm, films, tmp_path, calls, monkeypatch):
    run(lm, [films], SETTINGS, tmp_path / "whole")
    total = len(calls)
    assert total > 6
    counted = lm.log_probs
    stopped = 0
    for stop in (1, 3, 2, 4):  # batches until each interruption
        begun = itertools.count()

        def interrupted(*args, begun=begun, stop=stop):
            if next(begun) == stop:
                raise KeyboardInterrupt
            return counted(*args)

        monkeypatch.setattr(lm, "log_probs", interrupted)
        try:
            run(lm, [films], SETTINGS, tmp_path / "parts")
            break
        except KeyboardInterrupt:
            stopped += 1
            if stopped == 2:  # as kill -9 may leave them
                (journal,) = (tmp_path / "parts" / "scores").glob("*.jsonl")
                journal.write_bytes(journal.read_bytes() + b'{"batch": 99, "sums": {"0": [-1.')
                if (tmp_path / "parts" / "predictions.jsonl").exists():
                    with open(tmp_path / "parts" / "predictions.jsonl", "a") as file:
                        file.write(
                            '{"dataset": "films", "seed": 2, "shots": 2, "order": 0, "calibration": "none", "ind'
                        )
    monkeypatch.setattr(lm, "log_probs", counted)
    run(lm, [films], SETTINGS, tmp_path / "parts")
    assert stopped >= 2 and len(calls) == 2 * total, "a finished batch was computed again"
    assert (tmp_path / "parts" / "predictions.jsonl").read_bytes() == (
        tmp_path / "whole" / "predictions.jsonl"
    ).read_bytes()
    done = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in read_results(tmp_path / name)["runs"]]
        for name in ("whole", "parts")
    ]
    assert done[0] == done[1]
    assert not list((tmp_path / "parts" / "scores").glob("*.jsonl"))


def test_what_is_there_is_not_computed_again(lm, films, pick, tmp_path, calls):
    out = tmp_path / "out"
    run(lm, [films], SETTINGS, out)
    before = len(calls)
    run(lm, [films], SETTINGS, out)
    assert len(calls) == before
    more = run(lm, [films], Settings(**{**SETTINGS.__dict__, "calibrations": ("none", "batch", "contextual")}), out)
    assert len(calls) == before and len(more["runs"]) == 12, "calibrations come from the same scores"
    (out / "predictions.jsonl").unlink()
    run(lm, [films], SETTINGS, out)
    assert len(calls) == before and len(lines(out)) == 8 * 24
    wider = run(lm, [films, pick], Settings(**{**SETTINGS.__dict__, "calibrations": ("none",), "seeds": (1, 3)}), out)
    assert len(calls) > before
    assert {(r["dataset"], r["seed"]) for r in wider["runs"]} == {
        ("films", 1),
        ("films", 2),
        ("films", 3),
        ("pick", 1),
        ("pick", 3),
    }
    assert set(wider["config"]["datasets"]) == {"films", "pick"}


@pytest.mark.parametrize("keep", [0, 10, -40])
def test_damaged_scores_are_computed_again(lm, films, tmp_path, calls, keep):
    """As a full disk or a broken copy leaves them."""
    first = run(lm, [films], SETTINGS, tmp_path / "out")
    before = len(calls)
    for path in (tmp_path / "out" / "scores").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:keep])
    again = run(
        lm,
        [films],
        Settings(**{**SETTINGS.__dict__, "calibrations": ("none", "batch", "contextual")}),
        tmp_path / "out",
    )
    assert len(calls) == 2 * before
    assert again["runs"][: len(first["runs"])] == first["runs"] and len(again["runs"]) == 12


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(lm, films, tmp_path, calls):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"folder=.*file/out. cannot be written: Not a directory"):
        run(lm, [films], SETTINGS, tmp_path / "file" / "out")
    assert not calls


def test_other_settings_do_not_mix(lm, make_lm, films, tmp_path):
    out = tmp_path / "out"
    first = run(lm, [films], SETTINGS, out)
    kept = (out / "results.json").read_bytes(), (out / "predictions.jsonl").read_bytes()
    for change in ({"score": "sum"}, {"limit": 10}, {"separator": " "}):
        with pytest.raises(UserError, match=r"holds other results \(config\..*force=True"):
            run(lm, [films], Settings(**{**SETTINGS.__dict__, **change}), out)
    assert kept == ((out / "results.json").read_bytes(), (out / "predictions.jsonl").read_bytes())
    changed = make_lm(momentum_eta=0.2)  # the same tensors, computed with otherwise: the old scores must not be found
    with pytest.raises(UserError, match=r"holds other results \(model.architecture.momentum_eta"):
        run(changed, [films], SETTINGS, out)
    again = run(changed, [films], SETTINGS, out, force=True)
    assert len(again["runs"]) == len(first["runs"]) and len(lines(out)) == 8 * 24
    assert kept[1] != (out / "predictions.jsonl").read_bytes()


def test_choices_of_their_own(lm, pick, tmp_path, caplog):
    settings = Settings(
        shots=(0, 2), seeds=(1,), calibrations=("none", "contextual", "domain_pmi", "batch"), batch_tokens=120
    )
    with caplog.at_level(logging.WARNING):
        results = run(lm, [pick], settings, tmp_path / "out")
    assert {r["calibration"] for r in results["runs"]} == {"none", "domain_pmi"}
    assert "pick: no calibration contextual, because every example has its own choices" in caplog.text
    assert all(r["macro_f1"] is None and r["confusion"] is None and r["chance"] == 0.5 for r in results["runs"])
    raw, pmi = (
        [x["scores"] for x in lines(tmp_path / "out") if (x["shots"], x["calibration"]) == (0, c)]
        for c in ("none", "domain_pmi")
    )
    premise = lm.encode([pick.spec.domain_premise])[0]
    for example, one, other in zip(pick.evaluation, raw, pmi, strict=True):
        for continuation, before, after in zip(example.continuations, one, other, strict=True):
            tokens = lm.encode([continuation])[0]
            with torch.no_grad():
                log_probs = lm.model(torch.tensor([[*lm.bos, *premise, *tokens]]))[0].log_softmax(-1)[
                    len(lm.bos) + len(premise) - 1 : -1
                ]
            assert before - after == pytest.approx(
                log_probs.gather(1, torch.tensor(tokens)[:, None]).mean().item(), abs=1e-4
            )


def test_demonstrations_that_do_not_fit_are_left_out(make_lm, films, tmp_path, caplog):
    lm = make_lm(max_positions=70)
    with caplog.at_level(logging.WARNING):
        results = run(lm, [films], Settings(shots=(8,), seeds=(1,)), tmp_path / "out")
    (one,) = results["runs"]
    assert 0 < one["shots_fitted"] == len(one["demonstrations"]) < 8 == one["shots"]
    assert (
        f"films-8shot-seed1-order0: only {one['shots_fitted']} of 8 demonstrations fit in the model's 70 tokens"
        in caplog.text
    )


def test_warns_of_labels_that_begin_alike(lm, tmp_path, caplog):
    yaml = FILMS.replace("[Negative, Positive]", "[very good, very bad]")
    data = load_dataset(write(tmp_path, "films", yaml, lambda split, i: {"text": text(split, i), "label": i % 2}))
    with caplog.at_level(logging.WARNING):
        run(lm, [data], Settings(shots=(0,), seeds=(1,)), tmp_path / "out")
    assert "films: the labels 'very good' and 'very bad' begin with the same token" in caplog.text


def test_a_prompt_that_is_too_long_names_its_dataset(make_lm, films, tmp_path):
    lm = make_lm(max_positions=12)
    message = r"^films: example \d+ has a prompt of \d+ tokens, but .* takes 12; shorten texts with shorten"
    with pytest.raises(UserError, match=message):
        run(lm, [films], Settings(shots=(0,), seeds=(1,)), tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_units_draw_what_they_must():
    settings = Settings(shots=(0, 4), seeds=(1, 2), orders=2)
    found = list(units(["mr"], settings))
    assert found == [Unit("mr", 0, 1, 0), *(Unit("mr", 4, seed, order) for seed in (1, 2) for order in (0, 1))]
    assert len({unit.name for unit in found}) == 5


def test_orders_are_permutations(lm, films, tmp_path):
    results = run(lm, [films], Settings(shots=(6,), seeds=(1,), orders=3), tmp_path / "out")
    drawn = [r["demonstrations"] for r in sorted(results["runs"], key=lambda r: r["order"])]
    assert len({tuple(d) for d in drawn}) == 3 and len({tuple(sorted(d)) for d in drawn}) == 1
    assert results["summary"]["films"]["6"]["num_seeds"] == 1


# ---- what a number depends on


def small(lm, datasets, folder, **changes):
    settings = Settings(**{**SETTINGS.__dict__, "shots": (0,), "seeds": (1,), "calibrations": ("none",), **changes})
    return run(lm, datasets, settings, folder)


def test_another_tokenizer_is_not_the_same_model(lm, films, tmp_path, monkeypatch, calls):
    small(lm, [films], tmp_path / "out")
    before = (tmp_path / "out" / "results.json").read_bytes()
    calls.clear()
    monkeypatch.setattr(type(lm), "tokenizer_sha256", "another")
    with pytest.raises(
        UserError, match=r"holds other results \(config\.tokenizer: .*\); choose another folder, or add force=True"
    ):
        small(lm, [films], tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_bytes() == before and not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: folder.joinpath("films.yaml").write_text(FILMS.replace("Review:", "Film:")),
        lambda folder: folder.joinpath("films.yaml").write_text(FILMS.replace("Positive", "Fine")),
        lambda folder: folder.joinpath("films.yaml").write_text(FILMS + "domain_premise: 'A film is'\n"),
        lambda folder: folder.joinpath("validation.jsonl").write_text(
            folder.joinpath("validation.jsonl").read_text().replace("bad", "dab")
        ),
        lambda folder: folder.joinpath("train.jsonl").write_text(
            folder.joinpath("train.jsonl").read_text().replace("film", "mlif")
        ),
    ],
)
def test_changed_data_is_not_the_same_data(lm, films, tmp_path, change, calls):
    small(lm, [films], tmp_path / "out")
    calls.clear()
    change(tmp_path / "films")
    with pytest.raises(UserError, match=r"holds other results \(config\.datasets\.films\."):
        small(lm, [load_dataset(str(tmp_path / "films" / "films.yaml"))], tmp_path / "out")
    assert not calls


def test_what_changes_no_number_goes_on(lm, films, tmp_path, calls, monkeypatch):
    small(lm, [films], tmp_path / "out")
    calls.clear()
    path = tmp_path / "films" / "films.yaml"
    path.write_text(FILMS.replace("made-up reviews", "reviews, made up"))
    monkeypatch.setattr(identity, "versions", lambda: {"momentum_lm": "99"})
    small(lm, [load_dataset(str(path))], tmp_path / "out")
    assert not calls
    monkeypatch.setattr(identity, "REVISION", identity.REVISION + 1)
    with pytest.raises(UserError, match=r"holds other results \(config\.revision: "):
        small(lm, [films], tmp_path / "out")


def test_runs_that_were_copied_from_other_results_are_refused(lm, films, tmp_path):
    results = small(lm, [films], tmp_path / "out")
    (one,) = results["runs"]
    (tmp_path / "out" / "results.json").write_text(json.dumps(results | {"runs": [one, one | {"seed": 2}]}))
    with pytest.raises(UserError, match="run 1 was measured on something else than the file says"):
        small(lm, [films], tmp_path / "out")


def test_results_of_an_older_version_are_reported_but_not_added_to(lm, films, tmp_path):
    results = small(lm, [films], tmp_path / "out")
    for name in ("revision", "versions", "device", "tokenizer"):
        del results["config"][name]
    del results["config"]["datasets"]["films"]["sha256"]
    for one in results["runs"]:
        for name in ("digest", "prompts_sha256", "examples_sha256", "demonstrations_sha256"):
            del one[name]
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    assert read_results(tmp_path / "out") == results
    write_report(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"was written by an older version.*choose another folder, or add force=True to start anew"
    ):
        small(lm, [films], tmp_path / "out")


def test_a_checkpoint_that_changes_meanwhile_gives_no_results(make_lm, films, tmp_path, monkeypatch):
    lm = make_lm()
    log_probs = lm.log_probs

    def replaced(*args):
        lm.path.write_bytes(lm.path.read_bytes())
        return log_probs(*args)

    monkeypatch.setattr(lm, "log_probs", replaced)
    with pytest.raises(
        UserError, match=r"model\d+\.pt was (changed|replaced) while it was read, so its weights may be of two models"
    ):
        small(lm, [films], tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_two_runs_into_one_folder_lose_nothing(lm, films, tmp_path, monkeypatch):
    """The one that comes second is told; what the first has found is read by the second when it comes again."""
    check = Questions.check
    said = []

    def meanwhile(self, form, unit):
        if not said:
            with pytest.raises(UserError) as error:
                small(lm, [films], tmp_path / "out", shots=(0,))
            said.append(str(error.value))
        return check(self, form, unit)

    monkeypatch.setattr(Questions, "check", meanwhile)
    small(lm, [films], tmp_path / "out", shots=(1,))
    assert "out is being written by process" in said[0]
    assert {r["shots"] for r in small(lm, [films], tmp_path / "out", shots=(0,))["runs"]} == {0, 1}
    assert {line["shots"] for line in lines(tmp_path / "out")} == {0, 1}
    assert not (tmp_path / "out" / ".lock").exists()


# ---- what others put into the folder

MINE = {"predictions.jsonl": '{"mine": 1}\n', "samples.json": "[]", "report.html": "mine",
    "scores/films-0shot.npz": "mine",
        "scores/films-0shot.0.jsonl": "mine\n"}  # fmt: skip


@pytest.mark.parametrize("name", MINE)
def test_a_file_of_ours_name_that_is_not_ours_stays(lm, films, tmp_path, name, calls):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(MINE[name])
    with pytest.raises(
        UserError, match=rf"{name}\S* .*(not ours|not written by fairseq-eval|not a prediction of ours)"
    ):
        small(lm, [films], tmp_path / "out")
    assert path.read_text() == MINE[name] and not calls and not (tmp_path / "out" / "results.json").exists()


def test_files_of_other_names_stay(lm, films, tmp_path):
    for name in (
        "scores/films-0shot.notes.jsonl",
        "tensorboard/train/events.out.tfevents.1.host",
        "tensorboard/events.out.tfevents.2.host",
    ):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    for _ in range(2):
        small(lm, [films], tmp_path / "out")
        write_report(tmp_path / "out")
    kept = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
    assert len(kept) == 3
    ours = [path.name for path in (tmp_path / "out" / "tensorboard").glob("*.momentum_lm")]
    assert len(ours) == 1


@pytest.mark.parametrize("name", ["scores", "tensorboard"])
def test_a_linked_folder_is_not_written_through(lm, films, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"out/{name} is a symbolic link, where a folder is to be"):
        small(lm, [films], tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_pickled_scores_are_scored_anew(lm, films, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    first = small(lm, [films], tmp_path / "out")
    (tmp_path / "out" / "predictions.jsonl").unlink()
    evil = np.array([Evil()], dtype=object)
    np.savez(tmp_path / "out" / "scores" / "films-0shot.npz", fingerprint=evil, sums=evil, counts=evil)
    again = small(lm, [films], tmp_path / "out")
    assert again["runs"][0]["accuracy"] == first["runs"][0]["accuracy"] and not (tmp_path / "owned").exists()


def test_finished_work_is_said_to_be_finished(lm, films, tmp_path, capsys):
    settings = Settings(shots=(0,), seeds=(1,))
    evaluate(lm, [films], settings, tmp_path / "out")
    assert "already" not in capsys.readouterr().out
    evaluate(lm, [films], settings, tmp_path / "out")
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'out'} holds all of these results already; nothing was scored. --force measures anew.\n\n"
    )


@pytest.fixture
def one_file(tmp_path):
    """A data set with one file for both splits."""
    rows = [{"text": f"the film {text(i)}", "label": i % 2} for i in range(24)]
    path = write(tmp_path, "films", FILMS.replace("validation.jsonl", "train.jsonl"), lambda split, i: rows[i])
    return load_dataset(path)


@pytest.mark.parametrize("sampling", ["random", "balanced"])
def test_no_evaluated_example_is_a_demonstration(lm, one_file, tmp_path, caplog, sampling):
    settings = Settings(shots=(0, 2, 4), seeds=(1, 2, 3), sampling=sampling, orders=2)
    with caplog.at_level(logging.WARNING):
        runs = run(lm, [one_file], settings, tmp_path / "out")["runs"]
    by_run = itertools.groupby(lines(tmp_path / "out"), lambda line: tuple(line[name] for name in KEY))
    evaluated = {tuple(line["index"] for line in group) for _, group in by_run}
    assert len(evaluated) == 1, "all shots, seeds and orders are evaluated on the same examples"
    (indices,) = evaluated
    texts = [
        {one_file.evaluation[i].inputs for i in indices},
        *({one_file.train[i].inputs for i in r["demonstrations"]} for r in runs),
    ]
    assert len(indices) == runs[0]["num_examples"] == 6 and not any(texts[0] & shown for shown in texts[1:])
    assert all(r["overlap"] == {"not_shown": 6, "not_evaluated": 6, "shown_and_evaluated": 0} for r in runs)
    assert (
        "films: 6 examples are not evaluated, for demonstrations are drawn from the training split's copies of them"
        in caplog.text
    )
    assert len({tuple(r["demonstrations"]) for r in runs if r["shots"] == 4}) > 3


def test_without_demonstrations_all_are_evaluated(lm, one_file, tmp_path):
    (one,) = run(lm, [one_file], Settings(shots=(0,), seeds=(1,)), tmp_path / "out")["runs"]
    assert one["num_examples"] == 12 and not any(one["overlap"].values())
    with pytest.raises(UserError, match=r"holds other results \(config.datasets.films.not_evaluated: null there, 6 "):
        run(lm, [one_file], Settings(shots=(0, 2), seeds=(1,)), tmp_path / "out")


def test_the_authors_protocol_draws_what_it_draws(lm, one_file, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        (one,) = run(lm, [one_file], Settings(shots=(2,), seeds=(1,), protocol="paper"), tmp_path / "out")["runs"]
    assert one["num_examples"] == 12 and one["overlap"] == {
        "not_shown": 0,
        "not_evaluated": 0,
        "shown_and_evaluated": 12,
    }
    assert one["demonstrations"] == np.random.default_rng(1).permutation(12)[:2].tolist()
    assert "films: 12 training examples are evaluated too (the same text) and may be demonstrations" in caplog.text


def test_two_data_sets_of_one_name_are_refused(lm, films, tmp_path):
    with pytest.raises(
        UserError,
        match=r"two data sets are called films: .*films\.yaml and .*films\.yaml; give one of them another `name`",
    ):
        evaluate(lm, [films, load_dataset(str(films.spec.path))], SETTINGS, tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists()


def test_fresh_queries_are_a_sample_for_each_seed(lm, films, tmp_path):
    settings = Settings(shots=(0, 2), seeds=(1, 2, 3), limit=4, fresh_queries=True, calibrations=("none", "domain_pmi"))
    runs = run(lm, [films], settings, tmp_path / "fresh")["runs"]
    cells_of = defaultdict(set)
    for line in lines(tmp_path / "fresh"):
        cells_of[line["seed"]].add((line["shots"], line["calibration"], line["index"]))
    samples = {seed: {index for _, _, index in cells} for seed, cells in cells_of.items()}
    assert [len(sample) for sample in samples.values()] == [4, 4, 4] and len(set(map(frozenset, samples.values()))) == 3
    for seed, cells in cells_of.items():  # all numbers of shots and calibrations of a seed have the same queries
        assert cells == {
            (shots, c, index) for shots in (0, 2) for c in settings.calibrations for index in samples[seed]
        }
    alone = run(lm, [films], dataclasses.replace(settings, seeds=(2,)), tmp_path / "alone")["runs"]
    keys = ("accuracy", "prompts_sha256", "shots", "calibration")
    assert [[r[k] for k in keys] for r in runs if r["seed"] == 2] == [[r[k] for k in keys] for r in alone]
    comparison = ClassificationComparison([tmp_path / "fresh"], between=("shots", [0, 2]))  # each seed's with its own
    pairs = comparison.pairs[("films", "none"), 1]
    assert [(one["seed"], two["seed"]) for one, two in pairs] == [(1, 1), (2, 2), (3, 3)]
    found = {(r["seed"], r["shots"]): r["accuracy"] for r in runs if r["calibration"] == "none"}
    gaps = [found[seed, 2] - found[seed, 0] for seed in (1, 2, 3)]
    assert comparison.differences[("films", "none"), 1].difference == pytest.approx(np.mean(gaps))
    calibrations = ClassificationComparison([tmp_path / "fresh"], between=("calibration", ["none", "domain_pmi"]))
    assert {len(pairs) for pairs in calibrations.pairs.values()} == {3}  # without demonstrations too
    both = ClassificationComparison([tmp_path / "fresh", tmp_path / "alone"])
    assert "films, 0 shots, none: 2 runs of fresh or alone have no counterpart and are not compared." in both.notes
