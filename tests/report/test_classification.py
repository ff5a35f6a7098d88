"""Summary and table by hand; page, pictures and events read back."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from momentum_lm.analysis.statistics import t_interval, wilson_interval
from momentum_lm.errors import UserError
from momentum_lm.report import classification as c
from momentum_lm.results.records import read_results
from momentum_lm.studies import classification_summary as numbers


def run(accuracy, seed=1, shots=4, order=0, calibration="none", dataset="mr", n=100, **more):
    return {"dataset": dataset, "seed": seed, "shots": shots, "order": order, "calibration": calibration,
    "num_examples": n,
            "accuracy": accuracy, "macro_f1": accuracy / 2, "majority": 0.5, "shots_fitted": shots, **more}  # fmt: skip


def test_other_queries_for_each_seed_are_draws_too():
    """Without demonstrations seeds differ by their queries alone, and the baseline is that of all queries together."""
    confusions = [[[2, 4], [1, 3]], [[5, 1], [2, 2]]]
    runs = [
        run(x, seed, shots=0, n=10, confusion=confusion, examples_sha256=str(seed))
        for seed, (x, confusion) in enumerate(zip((0.5, 0.7), confusions, strict=True))
    ]
    cell = numbers.summarise_cell(runs)
    assert (cell["over"], cell["mean"], cell["sd"]) == ("seeds", pytest.approx(0.6), pytest.approx(0.1 * np.sqrt(2)))
    assert numbers.baseline(runs) == ("majority", 12 / 20)
    same = [r | {"examples_sha256": "a", "accuracy": 0.5} for r in runs]
    assert numbers.summarise_cell(same)["over"] == "examples"


def test_summary_averages_orders_then_seeds():
    runs = [
        run(0.6),
        run(0.8, order=1),
        run(0.9, seed=2),
        run(0.3, calibration="batch"),
        run(0.3, seed=2, calibration="batch"),
    ]
    entry = numbers.summary(runs)["mr"]["4"]
    assert entry["calibration"] == "none" and entry["num_seeds"] == 2 and entry["over"] == "seeds"
    assert (entry["mean"], entry["min"], entry["max"]) == pytest.approx((0.8, 0.7, 0.9))  # (0.7 + 0.9) / 2, not 2.3 / 3
    assert entry["sd"] == pytest.approx(0.2 / np.sqrt(2))
    assert entry["ci95"] == [0.0, 1.0]  # Student's with one degree of freedom goes beyond, and is cut
    assert entry["by_calibration"]["none"] == {
        k: v for k, v in entry.items() if k not in ("calibration", "by_calibration")
    }
    batch = entry["by_calibration"]["batch"]
    wilson = wilson_interval(30, 100)
    assert batch["over"] == "examples" and batch["ci95"] == [
        wilson.low,
        wilson.high,
    ]  # seeds that agree do not remove all doubt
    assert json.loads(json.dumps(numbers.summary(runs))) == numbers.summary(runs)


def test_summary_intervals():
    three = numbers.summarise_cell([run(a, seed=s) for s, a in enumerate((0.70, 0.72, 0.74))])
    expected = t_interval([0.70, 0.72, 0.74])
    assert three["ci95"] == pytest.approx([expected.low, expected.high]) and three["over"] == "seeds"
    wilson = wilson_interval(61, 100)
    for runs in ([run(0.61)], [run(0.61, seed=s, shots=0) for s in (1, 2, 3)], [run(0.6, order=0), run(0.62, order=1)]):
        cell = numbers.summarise_cell(runs)
        assert cell["ci95"] == [wilson.low, wilson.high] and cell["over"] == "examples" and cell["sd"] is None
    assert numbers.summarise_cell([run(0.61, seed=s, shots=0) for s in (1, 2, 3)])["num_seeds"] == 3


def test_table_lets_the_interval_decide():
    runs = [
        run(0.55),
        run(0.65, calibration="batch"),
        run(0.65, dataset="piqa", majority=None, chance=0.5, macro_f1=None),
    ]
    runs.append(run(0.61, shots=16, shots_fitted=9))
    table = c.results_table(runs)
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(r["dataset"], r["shots"], r["calibration"], r["beats it?"]) for r in cells] == [
        ("mr", "4", "none", "NO"),  # 55 is above 50, but its interval is not
        ("mr", "4", "batch", "yes"),
        ("mr", "9 of 16", "none", "yes"),
        ("piqa", "4", "none", "yes"),
    ]
    assert (
        cells[0]["accuracy %"] == "55.0"
        and cells[0]["baseline %"] == "50.0 majority"
        and cells[0]["over"] == "100 examples"
    )
    assert cells[3]["baseline %"] == "50.0 chance" and cells[3]["macro-F1 %"] == ""


def test_conclusions_let_the_interval_decide():
    runs = [
        run(0.55),
        run(0.65, calibration="batch"),
        run(0.65, dataset="piqa", majority=None, chance=0.5, macro_f1=None),
        run(0.2, dataset="cb"),
    ]
    told = c.conclusions(runs)
    one = "one draw cannot show how much accuracy depends on the demonstrations; --seeds 1,2,...,10 can."
    right = "of the examples are classified right"
    assert told == [
        f"mr: with 4 shots (calibration none) 55.0% {right} (95%: 45.2 to 64.4 over 100 examples). Always giving the "
        "most frequent label is right about 50.0%: this is not shown to be better.",
        f"mr: in the best of 2 settings, 4 shots (calibration batch), 65.0% {right} (95%: 55.3 to 73.6 over 100 "
        "examples). The best of several is partly luck.",
        "mr: 1 of 2 settings beat the baseline; not shown for 4 shots (calibration none).",
        f"mr: {one}",
        f"piqa: with 4 shots (calibration none) 65.0% {right} (95%: 55.3 to 73.6 over 100 examples). Guessing is right "
        "about 50.0%: this is better.",
        f"piqa: {one}",
        f"cb: with 4 shots (calibration none) 20.0% {right} (95%: 13.3 to 28.9 over 100 examples). Always giving the "
        "most frequent label is right about 50.0%: this is worse.",
        f"cb: {one}",
    ]


def test_conclusions_say_how_sure_and_what_next():
    many = [run(0.6 + 0.01 * seed, seed=seed, shots=shots) for seed in range(6) for shots in (0, 4)]
    told = c.conclusions(many)
    assert "over 6 draws" in told[0] and not any("one draw" in text for text in told)
    command = "momentum-lm report RESULTS --between shots=0,4"
    assert told[-1] == f"Do demonstrations help on mr? `{command}` pairs the answers and says."
    assert "best of" not in " ".join(told)  # the same accuracy is not better
    without_zero = c.conclusions([run(0.6, shots=4), run(0.6, shots=16)])
    assert not any("help" in text for text in without_zero)
    fitted = c.conclusions([run(0.61, shots=16, shots_fitted=9)])
    assert "with 9 of 16 shots (" in fitted[0]
    assert fitted[-1] == "mr: of 16 demonstrations only 9 fitted into the model's context."
    gap = c.conclusions([run(0.5, shots=0), run(0.6, shots=4, calibration="batch")])  # not every setting was measured
    assert gap[0].startswith("mr: with 4 shots (calibration batch) 60.0%")
    each = c.conclusions([run(0.56, majority=0.4, shots=0, n=1000), run(0.56, majority=0.6, n=1000)])
    assert "1 of 2 settings beat the baseline" in " ".join(each)  # each its own, as in the table


def test_many_data_sets_are_counted_first(write_results):
    runs = [run(0.9 if number else 0.5, dataset=f"d{number}") for number in range(4)]
    first, *_ = c._headline(runs, "RESULTS")
    assert first.startswith("With the most shots, the first calibration beats the baseline on 3 of 4 data sets;")
    assert c._headline(runs[:3], "RESULTS") == c.conclusions(runs[:3])


def test_report(write_results):
    folder = write_results(datasets=("mr", "trec", "piqa"), fitted=12)
    samples = [
        {"dataset": "mr", "shots": 4, "seed": 1, "prompt": "Review: "
        "<b>fine</b>\nSentiment:", "continuations": [" Negative", " Positive"],
         "gold": 1},
        {"dataset": "mr", "shots": 0, "seed": 1, "prompt": "Review: x", "continuations": [" Negative"], "gold": 0},
    ]  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(samples))
    table = c.write_report(folder)
    assert len(table.rows) == 2 * 3 * 2 + 3
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {
        "accuracy-mr.png",
        "accuracy-trec.png",
        "accuracy-piqa.png",
        "confusion-mr.png",
        "confusion-trec.png",
    }
    for name in pictures:
        pixels = np.asarray(Image.open(io.BytesIO((folder / name).read_bytes())).convert("L"))
        assert pixels[0, 0] == 255 and pixels.std() > 5, name
    page = (folder / "report.html").read_text()
    for text in ("models/results", "not shown for", "only 12 fitted", "45 runs</summary>",
                 "Review: &lt;b&gt;fine&lt;/b&gt;\nSentiment:", "mr, 4 shots, seed 1", "mr, 0 "
                 "shots</summary>", "fairseq-eval --task x",
                 "✗ …<mark> Negative</mark>", "✓ …<mark> Positive</mark>", "majority", "chance 50.0"):  # fmt: skip
        assert text in page, text
    assert page.index('class="verdict"') < page.index('class="forest"') < page.index("<table")
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:text/csv)", page)
    row = page[page.index('<span class="label">4 shots, batch') :]
    cell = numbers.summarise_cell(numbers.cells(read_results(folder)["runs"])["mr", 4, "batch"])
    ends = c.interval_text(cell["ci95"])
    assert f'<span class="value">{c.percent(cell["mean"])}% ({ends}; 3 draws)</span>' in row


def test_report_of_one_setting(write_results):
    """The least there can be: one shot count, one seed, one calibration, no samples."""
    folder = write_results(datasets=("mr",), shots=(0,), seeds=(5,), calibrations=("none",))
    assert len(c.write_report(folder).rows) == 1
    assert "A prompt as the model saw it" not in (folder / "report.html").read_text()


def test_confusions_are_summed_over_seeds(write_results):
    folder = write_results(datasets=("trec",), calibrations=("none",))
    runs = read_results(folder)["runs"]
    ((caption, _),) = c._confusions(runs, ["Entity", "Person", "Number"]).items()
    assert "16 shots" in caption and "3 runs together" in caption
    c.write_report(folder)
    page = (folder / "report.html").read_text()
    gold = np.sum([r["confusion"] for r in runs if r["shots"] == 16], axis=0).sum(axis=1)
    for label, count in zip(("Entity", "Person", "Number"), gold, strict=True):
        assert f"{label} ({count})" in page


def test_events(write_results):
    folder = write_results(datasets=("mr",))
    for _ in range(2):
        c.write_report(folder)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    summary = read_results(folder)["summary"]["mr"]
    for name in ("none", "batch"):
        means = {int(shots): entry["by_calibration"][name]["mean"] for shots, entry in summary.items()}
        assert {e.step: e.value for e in events.Scalars(f"mr/accuracy/{name}")} == pytest.approx(means)
        assert [e.value for e in events.Scalars(f"hparam/mr/accuracy/{name}_at_16")] == pytest.approx([means[16]])
    seeds = [e.value for s in (1, 2, 3) for e in events.Scalars(f"mr/accuracy/none/seed{s}") if e.step == 16]
    assert np.mean(seeds) == pytest.approx(summary["16"]["mean"])
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize(
    "content",
    ["[", "{}", '[{"dataset": "mr"}]', '[{"dataset": "m", "shots": 0, "prompt": "", "continuations": [], "gold": 0}]'],
)
def test_damaged_samples_are_named(write_results, content):
    folder = write_results(datasets=("mr",), shots=(0,))
    (folder / "samples.json").write_text(content)
    with pytest.raises(UserError, match=r"samples\.json is damaged"):
        c.write_report(folder)


def test_examples_in_both_splits_are_told_of():
    overlap = {"not_shown": 6, "not_evaluated": 5, "shown_and_evaluated": 0}
    runs = [run(0.9, overlap=overlap), run(0.9, seed=2, overlap=overlap), run(0.9, dataset="piqa")]
    runs.append(run(0.9, dataset="cb", overlap={}))
    assert c.conclusions(runs)[-1] == (
        "mr: 5 examples are left out, for demonstrations are drawn from the training split's copies of them."
    )
    told = c.conclusions([run(0.9, overlap={"shown_and_evaluated": 3})])[-1]
    assert told == "mr: 3 training examples are evaluated too and may be among their own demonstrations."
