"""``momentum-lm datasets``: the list, and prompts as they are read."""

import json

import pytest

from momentum_lm.cli.datasets import main
from momentum_lm.icl.datasets.loading import available


@pytest.fixture
def folder(tmp_path):
    for name, rows in {
        "mr": [{"text": f"film {i}", "label": i % 2} for i in range(6)],
        "winogrande": [{"sentence": "Is the _ big?", "option1": "cup", "option2": "bag", "answer": "2"}] * 3,
    }.items():
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_list_names_all(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "task", "classes", "hub", "licence"]
    assert [line.split()[0] for line in lines[2:21]] == available()
    assert any(line.split() == ["sst2", "sentiment", "2", "nyu-mll/glue", "sst2", "none", "stated"] for line in lines)


def test_the_list_is_fast(run_cli):
    code = "import sys; from momentum_lm.cli.datasets import main; main([]); print(sorted(sys.modules))"
    modules = run_cli(["python", "-c", code]).stdout.splitlines()[-1]
    for heavy in ("torch", "numpy", "datasets", "pyarrow", "transformers"):
        assert f"'{heavy}'" not in modules


def test_a_prompt_of_each_template(folder, capsys):
    assert main(["mr", "--data-dir", str(folder), "--shots", "2", "--seed", "1", "--sampling", "balanced"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "mr: sentences of film reviews, negative or positive (Rotten Tomatoes)\nhub: cornell-movie-review-data/"
    )
    paper, code = out.split("--- template ")[1:]
    assert paper.startswith("paper (6 to show, 6 to ask; row ") and code.startswith("code ")
    shown, choices = paper.split("\n---\n")
    demonstrations = shown.split("\n", 1)[1].split("\n\n")
    assert [text.split("\n")[1] for text in demonstrations[:2]] in (
        ["Sentiment: Negative", "Sentiment: Positive"],
        ["Sentiment: Positive", "Sentiment: Negative"],
    )
    assert demonstrations[2].startswith("Review: film ") and demonstrations[2].endswith("\nSentiment:")
    assert sorted(choices.split()) == sorted(["*", "'", "Negative'", "'", "Positive'"])
    assert " Sentiment: " in code and "\nSentiment" not in code


def test_one_template_and_no_demonstrations(folder, capsys):
    (folder / "mr/train.jsonl").unlink()
    assert main(["mr", "--data-dir", str(folder), "--template", "code", "--shots", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- template ") == 1 and "code (6 to ask; row " in out and out.count("Review: ") == 1


def test_partial_evaluation_shows_what_is_scored(folder, capsys):
    assert main(["winogrande", "--data-dir", str(folder), "--shots", "1"]) == 0
    prompt, choices = capsys.readouterr().out.split("to ask; ")[1].split("\n---\n")
    assert prompt.endswith("\nIs the bag big?\n\nIs the bag")
    assert choices == "  'Is the cup'\n* 'Is the bag'\n  each followed by ' big?', which is scored\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["sst-2"], "error: there is no data set 'sst-2'; did you mean sst2?"),
        (["mr", "--template", "papr"], "mr.yaml: no template 'papr'; there are: paper, code"),
        (["mr", "--shots", "-1"], "error: --shots -1: must not be negative"),
        (["mr", "--shots", "7"], "error: --shots 7: the training split has no more than 6 examples"),
        (["winogrande", "--seed", "-1"], "error: --seed -1: must not be negative"),
    ],
)
def test_mistakes_are_one_line(folder, argv, message, capsys):
    assert main([*argv, "--data-dir", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_what_is_left_out_is_told(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("text,label,a,b,c\nq,0,x,y,\nr,2,x,y,z\n")
    (tmp_path / "set.yaml").write_text(
        "files: {train: t.csv, evaluation: t.csv}\nlabel: label\nchoices: [a, b, c]\ntemplates: {code: '{text}'}\n"
    )
    assert main([str(tmp_path / "set.yaml"), "--shots", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == f"note: {tmp_path}/t.csv: 1 of 2 rows have empty cells among a, b, c, which are no choices\n"
    assert out.count("' x'") == 1 and "1 to show" not in out
    assert main([str(tmp_path / "set.yaml"), "--shots", "2"]) == 0
    assert "which is asked, is among the demonstrations: the training split has it too" in capsys.readouterr().err
