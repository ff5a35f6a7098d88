"""Estimates by hand; tables, page, pictures and events read back."""

import copy
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from momentum_lm.analysis.statistics import ratio_difference_interval, ratio_interval, t_interval, wilson_interval
from momentum_lm.errors import UserError
from momentum_lm.report import finetuning_verdicts as v
from momentum_lm.report import icl_vs_finetuning as r
from momentum_lm.report import published as p
from momentum_lm.report.figures import draw, read_png, save_png, to_svg
from momentum_lm.report.layer_figures import Curve, heads_panel, layer_panel, overlap_panel
from momentum_lm.studies import finetuning_summary as f
from momentum_lm.studies.controls import CONTROLS, FINETUNED


def by_name(table, column):
    at = list(table.columns).index(column)
    return {row[at]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def run(simaou=(0.1, 0.3), seed=1, random=(0.0, 0.0), **more):
    ends = [[v - 0.05, v + 0.15] if v is not None else None for v in simaou]
    return {"dataset": "sst2", "seed": seed, "shots": 4, "num_examples": 50, "finetune_lr": 0.01,
            "accuracy": {"zero_shot": 0.5, "in_context": 0.8, "finetuned": 0.6}, "rec2ftp": 0.8,
            "rec2ftp_ci95": [0.490, 0.943],
            "rec2ftp_chance": 0.72, "rec2ftp_counts": {"cells": [[[5, 2], [10, 8]], [[1, 2], [3, 19]]]},
            "paper": {"simaou": [0.4, 0.6]},
            "corrected": {"simaou": list(simaou), "simaou_random": list(random)}, "corrected_ci95": {"simaou": ends},
            "baselines": {"untrained": {"corrected": {"simaou": [0.1, 0.1]}}, "lcgd": None}, **more}  # fmt: skip


NOTHING = {
    "rec2ftp": None,
    "rec2ftp_ci95": None,
    "rec2ftp_counts": {"cells": [[[5, 0], [10, 0]], [[1, 2], [3, 19]]]},
}  # to recover


def test_metric_is_the_mean_over_layers_then_over_seeds():
    runs = [run((0.1, 0.3)), run((0.2, None), seed=2), run((0.4, 0.8), seed=3)]
    found = f.metric(runs, "simaou")
    expected = t_interval([0.2, 0.2, 0.6])
    assert found["mean"] == pytest.approx(1 / 3) and found["over"] == "seeds" and found["num"] == 3
    assert found["ci95"] == pytest.approx([expected.low, expected.high])
    assert f.metric(runs, "kendall") == {
        "mean": None,
        "ci95": None,
        "over": None,
        "sd": None,
        "min": None,
        "max": None,
        "num": 0,
    }


def test_one_seed_has_the_interval_over_examples():
    found = f.metric([run((0.1, 0.3, None))], "simaou")
    assert found["mean"] == pytest.approx(0.2) and found["over"] == "examples" and found["sd"] is None
    assert found["ci95"] == pytest.approx([0.15, 0.35])
    assert f.metric([run()], "simaou", "paper")["ci95"] is None  # no interval was recorded
    gap = f.difference([run()], "simaou", "untrained")
    assert gap["mean"] == pytest.approx(0.1) and gap["ci95"] == pytest.approx([0.05, 0.25])
    band = f.bands([run((0.1, None))], "simaou", "corrected")
    np.testing.assert_allclose(band, [[0.1, np.nan], [0.05, np.nan], [0.25, np.nan]])


def test_differences_are_paired_by_seed():
    runs = [run((0.2 + x, 0.2 + x), seed=s, random=(x, x + 0.01 * s)) for s, x in enumerate((0.0, 0.3, 0.6))]
    gap = f.difference(runs, "simaou", "random")  # seeds differ by far more than the metric from its control
    expected = t_interval([0.2, 0.195, 0.19])
    assert gap["ci95"] == pytest.approx([expected.low, expected.high]) and v.place(gap) == "above"
    assert v.place(f.difference(runs, "simaou", "untrained")) == "level"
    assert f.difference(runs, "simaou", "lcgd")["num"] == 0  # it diverged


@pytest.mark.parametrize(
    ("ends", "side"), [([0.01, 0.2], "above"), ([-0.2, -0.01], "below"), ([-0.1, 0.1], "level"), (None, "unknown")]
)
def test_place(ends, side):
    assert v.place({"ci95": ends}) == side


def test_summary():
    runs = [run(seed=s, simaou=(0.1 * s, 0.1)) for s in (1, 2)] + [run(dataset="trec", **NOTHING)]
    found = f.summary(runs)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    entry = found["sst2"]["4"]
    assert entry["num_seeds"] == 2 and entry["num_examples"] == 50
    wilson = wilson_interval(25, 50)
    assert entry["accuracy"]["zero_shot"]["ci95"] == [wilson.low, wilson.high]
    assert entry["rec2ftp"]["mean"] == 0.8 and entry["rec2ftp"]["ci95"] == [(w := wilson_interval(16, 20)).low, w.high]
    assert entry["corrected"]["simaou"]["mean"] == pytest.approx(0.125) and entry["paper"]["simaou"]["mean"] == 0.5
    assert entry["baselines"] == {
        "untrained": {"simaou": f.metric(runs[:2], "simaou", control="untrained")},
        "lcgd": {},
    }
    assert entry["differences"]["simaou"]["untrained"]["mean"] == pytest.approx(0.025)
    assert found["trec"]["4"]["rec2ftp"]["mean"] is None


def test_rec2ftp_is_of_all_seeds_together():
    """One repair that ICL shares in one seed, none of nine in another: 1 of 10, and not one half."""
    few = [
        run(seed=s, rec2ftp_counts={"cells": [[[5, n - k], [5, k]], [[0, 0], [0, 0]]]})
        for s, k, n in ((1, 1, 1), (2, 0, 9), (3, 0, 0))
    ]
    found = f.rec2ftp(few)
    interval = ratio_interval([1, 0, 0], [1, 9, 0])
    assert found["mean"] == pytest.approx(0.1) and found["num"] == 2
    assert found["ci95"] == pytest.approx([max(0, interval.low), min(1, interval.high)])
    assert f.chance(few)["mean"] == pytest.approx(16 / 40)
    gap = ratio_difference_interval([1, 0, 0], [1, 9, 0], [6, 5, 5], [11, 19, 10])
    assert f.above_chance(few)["mean"] == pytest.approx(0.1 - 0.4) and f.above_chance(few)["ci95"] == pytest.approx(
        [gap.low, gap.high]
    )
    for order in (few[:1] + few[2:], few[2:] + few[:1]):  # the only seed that has one, wherever it stands
        assert f.rec2ftp(order)["ci95"] == pytest.approx([(w := wilson_interval(1, 1)).low, w.high])


def test_verdicts_follow_the_intervals():
    clear = " ".join(v.verdict([run()]))
    assert "Accuracy: 50.0% zero-shot, 60.0% finetuned, 80.0% in context." in clear
    assert "Of 10 errors that finetuning repairs ICL repairs 8: Rec2FTP is 80.0% (49.0 to 94.3)." in clear
    assert (
        "72.0% (52.4 to 85.7) of all zero-shot errors, the level that chance would give; Rec2FTP cannot be told"
        in clear
    )
    low = " ".join(v.verdict([run((0.0, 0.1), rec2ftp_counts={"cells": [[[50, 0], [0, 20]], [[0, 0], [0, 0]]]})]))
    assert "Rec2FTP lies above it" in low
    assert "nothing for Rec2FTP to recover" in " ".join(v.verdict([run(**NOTHING)]))


def test_conclusions_follow_the_intervals():
    below = run((0.0, 0.1), baselines={"untrained": {"corrected": {"simaou": [0.5, 0.5]}}}, dataset="trec")
    first, none, failed, repairs, sure = v.conclusions([run(), below])
    assert first == "sst2, 4 shots: similarities of ICL and finetuning above every control: SimAOU (1 of 1)."
    assert none == (
        "trec, 4 shots: none of the tested similarities of ICL and finetuning lies above every control (SimAOU)."
    )
    assert failed == (
        "trec, 4 shots, not shown to lie above every control: SimAOU (below untrained; not told apart from random)."
    )
    assert repairs == (
        "ICL is shown to repair what finetuning repairs more often than other errors in 0 of 2 settings where "
        "finetuning repairs anything."
    )
    assert sure.startswith(
        "How sure: 1 draw of demonstrations, 50 examples each. With one draw the controls' own doubt"
    )
    many = v.conclusions([run(seed=seed) for seed in range(5)])
    assert many[-1] == "How sure: 5 draws of demonstrations, 50 examples each."
    together = v.verdict([run(seed=seed) for seed in range(2)])[1]
    assert together.startswith("Over 2 draws together, of 20 errors that finetuning repairs ICL repairs 16:")
    bare = v.conclusions([run(baselines={}, corrected={"simaou": [0.1]}, corrected_ci95={}, **NOTHING)])
    assert bare[0] == "sst2, 4 shots, measured without a control: SimAOU." and len(bare) == 2
    undefined = run(baselines={}, corrected={"simaou": [None, None], "simaou_random": [0.0, 0.0]}, corrected_ci95={})
    assert v.conclusions([undefined])[0] == "sst2, 4 shots: no similarity of ICL and finetuning could be measured."


def test_every_metric_and_control_has_a_meaning():
    assert f.MEANINGS.keys() == f.METRICS.keys() >= f.AUTHORS.keys()
    assert all(control.meaning.endswith(".") for control in (FINETUNED, *CONTROLS.values()))


def test_a_control_of_one_seed_has_its_own_interval():
    lone = run(
        baselines={"untrained": {"corrected": {"simaou": [0.1, 0.2]}, "corrected_ci95": {"simaou": [[0.0, 0.3], None]}}}
    )
    np.testing.assert_allclose(
        f.bands([lone], "simaou", "corrected", "untrained"), [[0.1, 0.2], [0.0, np.nan], [0.3, np.nan]]
    )
    diverged = run(seed=0, baselines={"untrained": None})
    assert f.bands([diverged, lone], "simaou", "corrected", "untrained")[0].tolist() == [0.1, 0.2]
    assert f.difference([diverged, lone], "simaou", "untrained")["num"] == 1


def test_no_minus_before_zero():
    assert v.three(-0.0001) == "0.000" and v.three(-0.0006) == "-0.001" and v.three(26993.4) == "26,993"


@pytest.mark.parametrize(
    ("quantity", "model", "average"),
    [("rec2ftp", "1.3B", 85.56), ("rec2ftp", "2.7B", 89.39), ("simaou", "1.3B", 0.186), ("simaou", "2.7B", 0.225),
     ("simam", "1.3B", 0.442), ("simam", "2.7B", 0.434), ("simam_before", "1.3B", 0.338), ("simam_before", "2.7B",
     0.355),
     ("kendall", "1.3B", 0.193), ("kendall", "2.7B", 0.214)],
)  # fmt: skip
def test_published_numbers_have_the_published_averages(quantity, model, average):
    values = [p.published(quantity, model, dataset) for dataset in p.DATASETS]
    assert np.mean(values) == pytest.approx(average, abs=0.006 if quantity == "rec2ftp" else 0.0011)
    with pytest.raises(KeyError):
        p.published(quantity, model, "trec")


def test_tables(analysed):
    runs = [analysed(seed=s) for s in (1, 2, 3)] + [analysed("trec", seed=s) for s in (1, 2, 3)]
    table = r.results_table(runs)
    assert len(table.rows) == 24 and [row[0] for row in table.rows] == ["sst2"] * 12 + ["trec"] * 12
    row = by_name(table, "metric")["SimAOU"]  # trec's, the last
    assert row["corrected"] == v.number(f.metric(runs[3:], "simaou"))
    assert row["authors' form"] == v.number(f.metric(runs[3:], "simaou", "paper"))
    assert row["untrained"] == v.three(f.metric(runs[3:], "simaou", control="untrained")["mean"])
    assert (
        list(table.columns).count("its control") == 2 and "before" in by_name(table, "metric")["SimAM"]["its control"]
    )
    gaps = by_name(r.difference_table(runs[:3]), "corrected, minus")["SimAOU"]
    gap = f.difference(runs[:3], "simaou", "shuffled_labels")
    assert gaps["shuffled labels"] == f"{gap['mean']:+.3f} ({gap['ci95'][0]:+.3f} to {gap['ci95'][1]:+.3f})"
    first = by_name(r.accuracy_table(runs), "dataset")["sst2"]
    cells = f.cells(runs[:3])
    assert (
        first["recovered"] == f"{cells[0, 1, 1]} of {cells[0, :, 1].sum()}"
        and first["learning rates"] == "0.003, 0.003, 0.003"
    )
    beside = by_name(r.paper_table(runs), "")
    assert {row["dataset"] for row in beside.values()} == {"sst2"}
    assert (beside["SimAOU"]["paper, 1.3B"], beside["SimAOU"]["paper, 2.7B"]) == ("0.110", "0.195")
    assert (
        beside["accuracy, in context"]["paper, 2.7B"] == "95.0%"
        and beside["SimAM, before finetuning"]["paper, 1.3B"] == "0.555"
    )
    assert beside["Kendall, tokens, random"]["here, authors' form"] == v.number(
        f.metric(runs[:3], "kendall", "paper", "random")
    )
    assert r.paper_table(runs[3:]) is None


def test_report(write_analysis, analysed):
    runs = [analysed(seed=s) for s in (1, 2)] + [analysed("trec")]
    folder = write_analysis(runs)
    table = r.write_report(folder)
    assert table == r.results_table(runs)
    kinds = ("layers", "layers-paper", "heads", "overlap", "attention")
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {f"{kind}-{stem}.png" for kind in kinds for stem in ("sst2-4shot", "trec-4shot")}
    for name in pictures:
        pixels = np.asarray(Image.open(io.BytesIO((folder / name).read_bytes())).convert("L"))
        assert pixels[0, 0] == 255 and pixels.std() > 5, name
    page = (folder / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["What is compared", "sst2, 4 shots", "trec, 4 shots", "What the words mean", "All numbers",
                        "What was measured", "How to run it again"]  # fmt: skip
    # per setting: 12 panels corrected, 6 in the authors' form, 3 of heads, 1 of predictions, 2 for each of 2 examples
    assert page.count("<svg role") == 2 * (12 + 6 + 3 + 1 + 4)
    # accuracies, Rec2FTP, 12 metrics corrected and 6 in the authors' form
    assert page.count('class="forest"') == 2 * (2 + 12 + 6)
    value = f.metric(runs[:2], "simaou", control="untrained")
    assert f'<span class="value">{v.number(value)}</span>' in page
    assert (
        page.count('<span class="label">paper, 1.3B</span>') == 4
    )  # of Rec2FTP, SimAOU, SimAM and Kendall; not TREC's
    assert page.count('class="row other"><span class="label">in context, paper, 2.7B</span>') == 1
    assert "Example 17, in context" in page and "Demonstrations: 1 bad, 2 good, 3 bad, 4 good." in page
    for text in ("models/analysis", "by plain SGD, one demonstration a step", "3 runs</summary>",
                 "fairseq-eval --task y", "arXiv 2212.10559 v3", "shuffled labels", "LCGD", "2 draws together",
                 "finetuning repairs", *v.verdict(runs[2:])[:1]):  # fmt: skip
        assert text in page, text
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:text/csv)", page)

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    curve = {e.step: e.value for e in events.Scalars("sst2-4shot/corrected/simam_delta")}
    expected = np.mean([np.array(run["corrected"]["simam_delta"][1:]) for run in runs[:2]], axis=0)
    assert list(curve) == [2, 3, 4, 5, 6] and list(curve.values()) == pytest.approx(
        expected.tolist()
    )  # undefined in the first layer
    untrained = [e.value for e in events.Scalars("trec-4shot/corrected/simaou/untrained")]
    assert untrained == pytest.approx(runs[2]["baselines"]["untrained"]["corrected"]["simaou"])
    assert len(events.Scalars("trec-4shot/paper/kendall/random")) == 6
    (value,) = events.Scalars("hparam/sst2-4shot/rec2ftp")
    cells = f.cells(runs[:2])
    assert value.value == pytest.approx(cells[0, 1, 1] / cells[0, :, 1].sum())
    assert set(events.Tags()["images"]) == {name.removesuffix(".png") for name in pictures}
    image = Image.open(io.BytesIO(events.Images("overlap-sst2-4shot")[0].encoded_image_string))
    assert image.size == (810, 660)


def test_report_of_the_least_there_can_be(write_analysis, analysed):
    """One seed, no control, no heads, nothing to recover."""
    bare = copy.deepcopy(analysed("trec", controls=()))
    bare |= {
        "rec2ftp": None,
        "rec2ftp_ci95": None,
        "rec2ftp_chance": None,
        "heads": {},
        "baselines": {},
        "attention": [],
    }
    bare["rec2ftp_counts"]["cells"] = [[[0, 0], [0, 0]], [[10, 10], [10, 70]]]
    folder = write_analysis([bare])
    r.write_report(folder)
    page = (folder / "report.html").read_text()
    assert (
        "nothing to recover" in page
        and "zero-shot is right about every example" in page
        and "Beside the paper" not in page
    )
    assert not list(folder.glob("heads-*")) and not list(folder.glob("attention-*"))


@pytest.mark.parametrize(
    ("wrong", "texts"),
    [
        (((5, 3), (2, 7)), ["10 of 17", "7 of 17", "52.9%"]),
        (((9, 0), (1, 0)), ["10 of 10", "10.0%"]),
        (((0, 4), (0, 6)), ["10 of 10", "60.0%"]),
    ],
)
def test_overlap(wrong, texts):
    svg = to_svg(draw(overlap_panel([wrong, [[1, 1], [1, 1]]])))
    for text in texts:
        assert text in svg, text


def test_a_log_axis_has_plain_numbers():
    values = np.array([1.0, 100.0, 20000.0])
    svg = to_svg(draw(layer_panel({"a": Curve(values, values, values)}, log=True)))
    assert "mathdefault" not in svg and ">10,000</text>" in svg
    ends = Curve(
        np.array([1.5, 0.0]), np.full(2, np.nan), np.full(2, np.nan)
    )  # a line may end at what has no logarithm
    svg = to_svg(draw(layer_panel({"a": Curve(values[:2], values[:2], values[:2]), "b": ends}, log=True)))
    assert ">b</text>" in svg
    near = np.array([1.5, 4.0])
    assert re.search(r">[23]</text>", to_svg(draw(layer_panel({"a": Curve(near, near, near)}, log=True))))


def test_overlap_areas_are_counts(tmp_path):
    """The darkest blue is what both repair."""
    save_png(draw(overlap_panel([[[10, 10], [10, 70]], [[0, 0], [0, 0]]]), size=(6, 6)), tmp_path / "overlap.png")
    pixels = read_png(tmp_path / "overlap.png").astype(int)
    blue = (pixels[..., 2] - pixels[..., 0]) > 60
    orange = (pixels[..., 0] - pixels[..., 2]) > 60
    assert blue.sum() / orange.sum() == pytest.approx(7, rel=0.06)


def test_heads_show_sign_and_size():
    svg = to_svg(draw(heads_panel([[0.5, -0.25], [None, 0.0]])))
    assert "+0.5" in svg and "−0.5" in svg
    assert to_svg(draw(heads_panel([[None, None]])))  # nothing defined


def test_other_tasks_are_refused(write_results):
    with pytest.raises(UserError, match="holds results of icl_classification, and not of icl_finetune_analysis"):
        r.write_report(write_results(datasets=("mr",), shots=(0,)))


@pytest.mark.parametrize(
    ("config", "rates", "said"),
    [
        ({}, (0.1,), "key and value projections, on all of their tokens, .* with learning rate 0.1."),
        ({"finetune_lr": [0.1]}, (0.1, 0.1), "with learning rate 0.1."),
        (
            {"finetune_lr": [1, 0.1], "finetune_parameters": "all", "finetune_loss": "label"},
            (1.0, 0.1, 1.0),
            "all parameters, on their labels, .* with learning rates 1 and 0.1, for each draw the best of 2 by "
            "accuracy on training examples that are not demonstrations.",
        ),
        (
            {"finetune_lr": [1, 0.1], "finetune_parameters": r"fc\d", "protocol": "paper"},
            (1.0,),
            r"parameters whose names match fc\\d, .* accuracy on the evaluated examples, as the paper did.",
        ),
    ],
)
def test_a_page_says_how_the_model_was_finetuned(config, rates, said):
    text = r._compared({"config": config, "runs": [{"finetune_lr": rate} for rate in rates]})
    assert re.search(f"Finetuned .FT. it has learned them instead: .*{said}$", text), text
