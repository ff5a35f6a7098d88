"""Labelled data from files and from the hub's library, a data set of one's own, and what is wrong with either."""

import csv
import json
import logging
import os

import pytest

from momentum_lm.errors import UserError
from momentum_lm.icl.datasets.loading import Example, by_name, load_dataset, load_spec

ROWS = [{"text": f"film {i}", "label": i % 2} for i in range(5)]
YAML = """
description: tickets
label: {column: dept, values: [billing, [tech, it, 7]]}
labels: [Money, Technology]
templates: {paper: "Ticket: {text}\\nDepartment:", short: "{text} ->"}
"""


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture
def folder(tmp_path):
    """A data folder with MR."""
    write_jsonl(tmp_path / "mr/train.jsonl", ROWS)
    write_jsonl(tmp_path / "mr/validation.jsonl", ROWS[:3])
    return tmp_path


@pytest.fixture
def own(tmp_path):
    """own(yaml, rows): writes a data set of one's own, and gives the path of its YAML file."""

    def write(yaml=YAML, rows=({"text": "Help", "dept": "it"},)):
        write_jsonl(tmp_path / "train.jsonl", rows)
        path = tmp_path / "tickets.yaml"
        path.write_text(yaml + "files: {train: train.jsonl, evaluation: train.jsonl}\n", encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("suffix", WRITERS)
def test_local_files_of_every_format_give_the_same(suffix, tmp_path):
    for split, rows in (("train", ROWS), ("validation", ROWS[:3])):
        WRITERS[suffix](tmp_path / f"mr/{split}.{suffix}", rows)
    data = load_dataset("mr", tmp_path)
    assert data.train[3] == Example(3, ("Review: film 3 Sentiment:",), (" Negative", " Positive"), 1)
    assert [len(data.train), len(data.evaluation)] == [5, 3]
    assert data.source["kind"] == "local" and data.source["path"] == str(tmp_path / "mr")
    assert data.source["splits"] == {"train": f"train.{suffix}", "evaluation": f"validation.{suffix}"}
    write_jsonl(tmp_path / "other/mr/train.jsonl", ROWS)
    write_jsonl(tmp_path / "other/mr/test.jsonl", ROWS[:3])
    assert load_dataset("mr", tmp_path / "other").source["sha256"] == data.source["sha256"]
    assert load_dataset("mr", tmp_path, "paper").source["sha256"] != data.source["sha256"]


def test_only_the_splits_that_are_asked_for(folder):
    (folder / "mr/train.jsonl").unlink()
    data = load_dataset("mr", folder, splits=["evaluation"])
    assert data.train == [] and len(data.evaluation) == 3
    with pytest.raises(
        UserError, match=r"mr has no file for train; provide .*/mr/train\.jsonl and .*columns: text, label"
    ):
        load_dataset("mr", folder)


def test_the_hubs_name_of_the_evaluated_split_comes_first(tmp_path):
    row = {"text": "Who ?", "coarse_label": 3, "fine_label": 29}
    for split, count in (("train", 1), ("validation", 2), ("test", 3)):
        write_jsonl(tmp_path / f"trec/{split}.jsonl", [row] * count)
    assert len(load_dataset("trec", tmp_path).evaluation) == 3
    (tmp_path / "trec/test.jsonl").unlink()
    assert len(load_dataset("trec", tmp_path).evaluation) == 2


def test_rows_keep_their_number_where_others_are_left_out(tmp_path):
    rows = [{"question": "?", "choices": {"text": list("abcd"[:n]), "label": []}, "answerKey": "A"} for n in (3, 4, 4)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"arce/{split}.jsonl", rows)
    assert [example.index for example in load_dataset("arce", tmp_path).train] == [1, 2]
    write_jsonl(tmp_path / "arce/train.jsonl", rows[:1])
    with pytest.raises(UserError, match=r"train\.jsonl: no examples, for none of its 1 rows has 4 choices"):
        load_dataset("arce", tmp_path)


def test_shorten(folder):
    assert load_dataset("mr", folder, shorten=lambda text: text[:3]).train[0].inputs == ("Review: fil Sentiment:",)


# A data set of one's own


def test_a_new_data_set_is_one_yaml_file(own):
    data = load_dataset(
        own(rows=[{"text": "a", "dept": "billing"}, {"text": "b", "dept": "it"}, {"text": "c", "dept": 7}])
    )
    assert data.spec.name == "tickets" and data.spec.template == "paper"
    assert [example.gold for example in data.train] == [0, 1, 1]
    assert data.evaluation[2] == Example(2, ("Ticket: c\nDepartment:",), (" Money", " Technology"), 1)
    assert data.source["kind"] == "local" and data.source["splits"]["train"] == "train.jsonl"


def test_the_data_folder_comes_before_the_yaml_files(own, tmp_path):
    path = own()
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"data/tickets/{split}.jsonl", [{"text": "x", "dept": "it"}] * 4)
    assert len(load_dataset(path, tmp_path / "data").train) == 4
    assert len(load_dataset(path, tmp_path).train) == 1  # where the data folder lacks it


def test_templates_by_name(own):
    assert load_spec(own(), "short").template == "short"
    assert load_spec(own(), "code").template == "paper"  # the first stands in
    assert load_spec("trec", "paper").template == "code"
    with pytest.raises(UserError, match=r"tickets\.yaml: no template 'shrt'; there are: paper, short"):
        load_spec(own(), "shrt")


def test_literal_braces_in_templates(own):
    example = load_spec(own(YAML.replace("Ticket: {text}", "{{Ticket}}: {text}"))).render(
        {"text": "{x}", "dept": "it"}, 0, ""
    )
    assert example.inputs == ("{Ticket}: {x}\nDepartment:",)


@pytest.mark.parametrize("label", [1, 1.0, True, "1", " 1 "])
def test_labels_may_be_numbers_or_text(label):
    assert load_spec("mr").render({"text": "a", "label": label}, 0, "").gold == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (("labels:", "label_words:"), r"tickets\.yaml: give either `labels`.* or `choices`"),
        (("description:", "descripton:"), r"tickets\.yaml: unknown key 'descripton'; did you mean description\?"),
        (("column: dept", "colum: dept"), r"unknown key 'colum' in `label`; did you mean column\?"),
        (
            ("[Money, Technology]", "[No, Yes]"),
            r'`labels` must be a list of two or more words, in quotes .*\("Yes"\): \[False, True\]',
        ),
        (("[Money, Technology]", "[Money]"), "`labels` must be a list of two or more words"),
        (("[Money, Technology]", "[Money, Money]"), "`labels` holds the same word twice: Money, Money"),
        (("[Money, Technology]", "[Money, Tech, Talk]"), r"`label\.values` has 2 entries for 3 labels"),
        (("[tech, it, 7]", "[tech, billing]"), r"`label\.values` must hold each value once"),
        (("{text} ->", "->"), r"template '->' has no \{column\} in it"),
        (("{text} ->", "{text}: "), r"template '\{text\}: ' ends in white space"),
        (
            ("{text} ->", "{text!r} ->"),
            r"\{text\} is not the name of a column alone; write \{column\}, and \{\{ for a brace",
        ),
        (("{text} ->", "{text ->"), r"template '\{text ->': expected '\}' before end of string"),
        (("{text} ->", "{} ->"), r"\{\} is not the name of a column alone"),
        (("templates: {", "templates: {1: 2, "), r"`templates\.1` must be text, not 2"),
        (("description: tickets", "description: [a]"), "`description` must be text, in quotes, not "),
        (("description: tickets", "num_choices: 4"), "`num_choices` and `lowercase_choices` go with `choices`"),
        (("description: tickets", "name: a/b"), "the name 'a/b' must be of letters"),
        (("description: tickets", "hub: {subset: x}"), "`hub` the key id"),
        (("description: tickets", "splits: {test: x}"), "unknown key 'test' in `splits`; there are: train, evaluation"),
        (("description: tickets", "fields: {a: {words: {}}}"), r"`fields\.a` needs the key column"),
        (("description: tickets", "description: 2024-99-99"), "`description` must be text, in quotes, not 2024-99-99"),
        (
            ("description: tickets", "description: " + "1" * 5000),
            r"`description` must be text, in quotes, not 1+\.\.\. \(5,000 characters\)",
        ),
        (("description: tickets", "blank: ''"), "`blank` is empty"),
        (("description: tickets", "labels: [a, b]"), "the key 'labels' is there twice"),
        (("description: tickets", "choices: [a, a]\nbase: 1"), "`choices` names the same column twice: a, a"),
        (("[tech, it, 7]", "[tech, null]"), r"`label\.values` must hold texts, numbers or truth values, not None"),
        (("[tech, it, 7]", "[7, 7.0]"), r"`label\.values` must hold each value once"),
        (
            ("[Money, Technology]", "[" + "a" * 10**5 + ", [b]]"),
            r"two or more words, .* \(100,000 characters\), \['b'\]\]",
        ),
        (
            ("description: tickets", "x" * 1000 + ": 1"),
            r"unknown key 'x+'\.\.\. \(1,000 characters\); see .*README\.md",
        ),
        (("description: tickets", "a: {"), r"tickets\.yaml: not a YAML file \(.*line "),
    ],
)
def test_mistakes_in_a_yaml_file_are_one_line(own, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_spec(own(YAML.replace(*change)))
    assert "\n" not in " ".join(str(caught.value).split()) and "tickets.yaml: " in str(caught.value)


def test_names_that_are_none():
    with pytest.raises(UserError, match=r"there is no data set 'sst-2'; did you mean sst2\?"):
        load_dataset("sst-2")
    with pytest.raises(UserError, match=r"there is no data set 'quux'; choose from agnews, arcc"):
        load_dataset("quux")
    with pytest.raises(UserError, match=r"no/where\.yaml: No such file"):
        load_dataset("no/where.yaml")


VALUES = [
    "[False, True]",
    "[0.0, 1.0]",
    "[0, 1]",
    '["0", "1"]',
    '["False", "True"]',
    '["false", "true"]',
    "[no, yes]",
    "[0x0, 0b1]",
]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("cells", [(False, True), (0, 1), (0.0, 1.0)])
def test_values_mean_the_same_in_every_format(tmp_path, values, suffix, cells):
    """As pandas writes them: True and 1.0 in CSV, true and 1.0 in JSON Lines."""
    rows = [{"text": f"t{i}", "dept": cell} for i, cell in enumerate(cells)]
    if suffix == "tsv":
        (tmp_path / "t.tsv").write_text("text\tdept\n" + "".join(f"{row['text']}\t{row['dept']}\n" for row in rows))
    else:
        WRITERS[suffix](tmp_path / f"t.{suffix}", rows)
    path = tmp_path / "set.yaml"
    path.write_text(
        YAML.replace("[billing, [tech, it, 7]]", values) + f"files: {{train: t.{suffix}, evaluation: t.{suffix}}}\n"
    )
    assert [example.gold for example in load_dataset(str(path)).train] == [0, 1]


def test_values_as_they_are_written_come_first(own):
    yaml = YAML.replace("[billing, [tech, it, 7]]", '[["1", "010", no, 2024-01-01], ["True", "1.50", 1:30]]')
    spec = load_spec(own(yaml))
    for cell, gold in [
        ("1", 0),
        (1, 0),
        ("010", 0),
        ("no", 0),
        (False, 0),
        ("2024-01-01", 0),
        (True, 1),
        (1.5, 1),
        ("1:30", 1),
    ]:
        assert spec.render({"text": "a", "dept": cell}, 0, "").gold == gold, cell
    for cell in (8, "10", "yes", None, float("nan"), "", [1], {"a": 1}, 10**300, 2):
        with pytest.raises(UserError, match=r"label .* in column 'dept' is none of 1, True \(Money, Technology\)"):
            spec.render({"text": "a", "dept": cell}, 0, "row 3")


def test_labels_are_told_by_their_words_and_as_the_yaml_has_them(own):
    spec = load_spec(own(YAML.replace("[billing, [tech, it, 7]]", "[False, True]")))
    with pytest.raises(
        UserError, match=r"^row 3: label 'x' in column 'dept' is none of False, True \(Money, Technology\); fix"
    ):
        spec.render({"text": "a", "dept": " x"}, 0, "row 3")


def test_words_of_a_field_by_number_text_and_truth_value(own):
    spec = load_spec(own(YAML + "fields: {text: {column: text, words: {0: none, 1: one, two: Two}}}\n"))
    texts = [spec.render({"text": cell, "dept": "it"}, 0, "").inputs[0][8:-12] for cell in (0, 1.0, True, "1", "two")]
    assert texts == ["none", "one", "one", "one", "Two"]
    with pytest.raises(UserError, match=r"row 3: None in column 'text' is none of 0, 1, two; fix the row"):
        spec.render({"text": None, "dept": "it"}, 0, "row 3")


# What is there twice, or not at all


def test_two_data_sets_of_one_name(own, tmp_path):
    first, second = load_dataset(own()), load_dataset(own(YAML + "name: Tickets\n"))
    for others in ([first, load_dataset(own())], [first, second]):
        with pytest.raises(
            UserError,
            match=r"two data sets are called tickets.*: .*tickets\.yaml and .*; give one of them another `name`",
        ):
            by_name(others)
    assert list(by_name([first])) == ["tickets"]


@pytest.mark.parametrize("name, text", [
    ("t.csv", "text,dept,text\na,it,b\n"), ("t.tsv", "text\tdept\ttext\na\tit\tb\n"),
    ("t.jsonl", '{"text": "a", "text": "b", "dept": "it"}\n'),
])  # fmt: skip
def test_a_column_that_is_there_twice(own, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for column, fails in (("text", True), ("dept", False)):
        path = tmp_path / "set.yaml"
        path.write_text(YAML.replace("{text}", f"{{{column}}}") + f"files: {{train: {name}, evaluation: {name}}}\n")
        if fails:
            with pytest.raises(
                UserError,
                match=rf"{name}:\d: (the column 'text' is there more than once|2 columns are called 'text'); rename ",
            ):
                load_dataset(str(path))
        else:
            assert load_dataset(str(path)).train[0].gold == 1  # of what is not read it may be


OPTIONS = """
label: label
choices: [a, b, c, d]
templates: {code: "{text}"}
files: {train: t.csv, evaluation: t.csv}
"""


def options(folder, rows, yaml=OPTIONS):
    (folder / "t.csv").write_text("text,label,a,b,c,d\n" + rows)
    (folder / "set.yaml").write_text(yaml)
    return load_dataset(str(folder / "set.yaml"))


def test_empty_options_are_no_choices(tmp_path):
    data = options(tmp_path, "q,0,x,y,,\nq,2,x,, z,\nq,3,w,x,y,z\n")
    assert [(e.continuations, e.gold) for e in data.train] == [
        ((" x", " y"), 0),
        ((" x", "  z"), 1),
        ((" w", " x", " y", " z"), 3),
    ]
    assert data.notes == [f"{tmp_path}/t.csv: 2 of 3 rows have empty cells among a, b, c, d, which are no choices"]
    data = options(tmp_path, "q,0,x,y,,\nq,2,x,, z,\nq,3,w,x,y,z\n", OPTIONS + "num_choices: 2\n")
    assert [e.index for e in data.train] == [0, 1] and "1 of 3 rows left out, which have not 2 choices" in data.notes[0]
    spec = data.spec
    row = {
        "text": "q",
        "label": 1,
        "a": "x",
        "b": "y",
        "c": None,
        "d": None,
    }  # what pandas writes in JSON Lines and parquet
    assert spec.render(row, 0, "").continuations == (" x", " y")


@pytest.mark.parametrize("rows, message", [
    ("q,1,x,,y,\n", r"t\.csv:2: the right answer is in column 'b', which is empty"),
    ("q,0,x,y,,\nq,0,x,,,\n", r"t\.csv:3: fewer than two choices with text in columns 'a', 'b', 'c', 'd'"),
])  # fmt: skip
def test_empty_options_that_cannot_be(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        options(tmp_path, rows)


def test_empty_items_of_a_list_of_choices():
    spec = load_spec("hellaswag")
    assert spec.render({"ctx": "?", "endings": ["a", None, "", "d"], "label": "3"}, 0, "").gold == 1
    with pytest.raises(UserError, match="row 3: the right answer is in item 1 of column 'endings', which is empty"):
        spec.render({"ctx": "?", "endings": ["a", None, "", "d"], "label": "1"}, 0, "row 3")


def test_rows_without_text_are_counted(folder):
    (folder / "mr/train.jsonl").unlink()
    (folder / "mr/train.csv").write_text("text,label\n,1\nb,0\n,0\n")
    assert load_dataset("mr", folder).notes == [f"{folder}/mr/train.csv: 2 of 3 rows have no text"]


# Columns within columns


@pytest.mark.parametrize("column, text", [
    ("input.1.content", "why"), ("input[1][content]", "why"), ("input.-1.content", "why"), ("input.0.content", "brief"),
    ("a.b", "dot"), ("a.c", "in"), ("tags.1", "y"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_items_of_lists_and_objects(tmp_path, suffix, column, text):
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "why"}]
    row = {"input": messages, "a.b": "dot", "a": {"b": "no", "c": "in"}, "tags": ["x", "y"], "dept": "it"}
    WRITERS[suffix](tmp_path / f"t.{suffix}", [row])
    path = tmp_path / "set.yaml"
    path.write_text(YAML.replace("{text}", f"{{{column}}}") + f"files: {{train: t.{suffix}, evaluation: t.{suffix}}}\n")
    assert load_dataset(str(path)).train[0].inputs == (f"Ticket: {text}\nDepartment:",)


def test_items_that_are_not_there(own):
    row = {"input": [{"content": "a"}, {"content": "b"}], "dept": "it"}
    for column, message in [
        ("input.2.content", r"row 3: no item 2 for column 'input\.2\.content', in a list of 2"),
        (
            "input.content",
            r"row 3: column 'input\.content' holds list, not text \(an item of it is \{input\.content\.0\}\)",
        ),
        ("input.1.role", r"row 3: no column 'input\.1\.role'; there are: input, dept"),
    ]:
        with pytest.raises(UserError, match=message):
            load_spec(own(YAML.replace("{text}", f"{{{column}}}"))).render(row, 0, "row 3")


# Links and paths


def test_linked_folders_are_entered_and_links_to_nothing_named(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/mr").symlink_to(folder / "mr")
    assert len(load_dataset("mr", tmp_path / "linked").train) == 5
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/mr").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data_dir: .*broken/mr is a link to .*nowhere, where there is nothing"):
        load_dataset("mr", tmp_path / "broken")
    (folder / "mr/train.jsonl").unlink()
    (folder / "mr/train.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl is a link to .*nowhere\.jsonl, where there is nothing"):
        load_dataset("mr", folder)


def test_a_folder_whose_name_is_no_utf8(folder):
    odd = folder / os.fsdecode(b"caf\xe9")
    (folder / "mr").rename(odd)
    (folder / "data").mkdir()
    (folder / "data/mr").symlink_to(odd)
    odd.parent.joinpath(os.fsdecode(b"d\xe9")).symlink_to(folder / "data")
    data = load_dataset("mr", folder / os.fsdecode(b"d\xe9"))
    assert data.source["path"] == f"{folder}/d\\xe9/mr" and len(data.train) == 5


# What is wrong with the data


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a", "label": 1', r"train\.jsonl:2: not a JSON record \(Expecting"),
        ("[1]", r"train\.jsonl:2: expected a JSON object with a key for each column, got list"),
        ('{"txt": "a", "label": 1}', r"train\.jsonl:2: no column 'text'; there are: txt, label; rename it"),
        ('{"text": "a"}', r"train\.jsonl:2: no column 'label'; there are: text"),
        ('{"text": "a", "label": 2}', r"train\.jsonl:2: label '2' in column 'label' is none of 0, 1"),
        ('{"text": "a", "label": null}', r"train\.jsonl:2: label null in column 'label' is none of 0, 1"),
        ('{"text": NaN, "label": 1}', r"train\.jsonl:2: column 'text' holds nan, not text; fix or remove the row"),
        ('{"text": 1e999, "label": 1}', r"train\.jsonl:2: column 'text' holds inf, not text"),
        (
            '{"text": "a", "label": NaN}',
            r"train\.jsonl:2: label 'nan' in column 'label' is none of 0, 1 \(Negative, Positive\)",
        ),
        (
            '{"text": ' + "1" * 1000 + ', "label": 1}',
            r"train\.jsonl:2: column 'text' holds a whole number of 3,319 bits, not text",
        ),
        ('{"text": "a", "label": "' + "x" * 10**5 + '"}', r"label 'x{60}'\.\.\. \(100,000 characters\) in column"),
        ('{"text": null, "label": 1}', r"train\.jsonl:2: column 'text' holds nothing, not text"),
        (
            '{"text": "a\\ud800", "label": 1}',
            r"train\.jsonl:2: column 'text' holds half of a surrogate pair at character 1",
        ),
        ('{"text": ["a"], "label": 1}', r"train\.jsonl:2: column 'text' holds list, not text"),
        (b'{"text": "\xff", "label": 1}', r"train\.jsonl: byte \d+ is not UTF-8 \(0xff\)"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    with open(folder / "mr/train.jsonl", "rb+") as file:
        file.readline()
        file.truncate()
        file.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(UserError, match=message):
        load_dataset("mr", folder)


def test_blank_lines_and_a_byte_order_mark_are_nothing(folder):
    path = folder / "mr/train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n"))
    assert [example.index for example in load_dataset("mr", folder).train] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "text, message",
    [
        ("text,label\na,1\nb\n", r"train\.csv:3: 1 columns, the header has 2"),
        ('text,label\na,1\n"b,1\n', r"train\.csv:3: not proper CSV \(unexpected end of data\)"),
        ("text,lable\na,1\n", r"train\.csv:2: no column 'label'; there are: text, lable"),
        ("text,label\n", r"train\.csv: no examples, for it has no rows"),
        ("", r"train\.csv: no examples, for it has no rows"),
    ],
)
def test_bad_csv(folder, text, message):
    (folder / "mr/train.jsonl").unlink()
    (folder / "mr/train.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_dataset("mr", folder)


def test_csv_cells_may_be_long_and_have_line_breaks(folder):
    (folder / "mr/train.jsonl").unlink()
    write_csv(folder / "mr/train.csv", [{"text": "a\nb" * 100_000, "label": 1}])
    assert len(load_dataset("mr", folder).train[0].inputs[0]) == 300_000 + len("Review: \nSentiment:")


def test_bad_parquet(folder):
    (folder / "mr/train.jsonl").unlink()
    (folder / "mr/train.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match=r"train\.parquet is cut short or not a parquet file"):
        load_dataset("mr", folder)


def test_an_empty_split(folder):
    (folder / "mr/validation.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"validation\.jsonl: no examples, for it has no rows"):
        load_dataset("mr", folder)


@pytest.mark.parametrize(
    "name, row, message",
    [
        (
            "arce",
            {"question": "?", "choices": {"text": "abcd"}, "answerKey": "A"},
            "column 'choices.text' is no list of choices",
        ),
        (
            "arce",
            {"question": "?", "choices": ["a"], "answerKey": "A"},
            "no column 'choices.text'; there are: question, choices",
        ),
        (
            "arce",
            {"question": "?", "choices": {"text": list("abcd")}, "answerKey": "E"},
            "label 'E' in .* is none of A, B, C, D",
        ),
        ("hellaswag", {"ctx": "?", "endings": ["a", "b"], "label": "2"}, "label '2' in column 'label' is none of 0, 1"),
        (
            "winogrande",
            {"sentence": "No gap.", "option1": "a", "option2": "b", "answer": "1"},
            "no '_' with text after it",
        ),
        (
            "copa",
            {"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "why", "label": 0},
            "'why' in column 'question' is no",
        ),
    ],
)
def test_bad_rows_of_multiple_choice(name, row, message):
    with pytest.raises(UserError, match=f"^row 3: .*{message}"):
        load_spec(name).render(row, 3, "row 3")


def test_no_data_folder(tmp_path):
    with pytest.raises(UserError, match=r"data_dir=.*absent.*: no such folder"):
        load_dataset("mr", tmp_path / "absent")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(yaml): a data set of one's own whose "hub" is a folder, which the library loads in the same way."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "hub/train.jsonl", [{"text": "a", "dept": "it", "more": [1]}] * 3)
    write_jsonl(tmp_path / "hub/test.jsonl", [{"text": "b", "dept": "billing", "more": [1]}] * 2)

    def write(extra=""):
        path = tmp_path / "tickets.yaml"
        path.write_text(f"{YAML}hub: {{id: {tmp_path / 'hub'}}}\n{extra}")
        return str(path)

    return write


def test_the_hubs_library_loads_the_splits(hub, tmp_path):
    data = load_dataset(hub("splits: {evaluation: test}\n"))
    assert [len(data.train), len(data.evaluation)] == [3, 2]
    assert data.evaluation[1] == Example(1, ("Ticket: b\nDepartment:",), (" Money", " Technology"), 0)
    assert (
        data.source["kind"] == "hub" and data.source["id"] == str(tmp_path / "hub") and data.source["revision"] is None
    )
    assert data.source["splits"] == {"train": "train", "evaluation": "test"}


def test_a_split_that_the_hub_has_not(hub):
    with pytest.raises(
        UserError, match=r'tickets could not be loaded from the hub .*Unknown split "validation".* DIR/tickets/train'
    ):
        load_dataset(hub())


def test_a_column_that_the_hub_has_not(hub, tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"hub/{split}.jsonl", [{"body": "a", "dept": "it"}])
    with pytest.raises(UserError, match=r"hub, train row 0: no column 'text'; there are: body, dept"):
        load_dataset(hub("splits: {evaluation: test}\n"))


def test_script_data_sets_are_loaded_from_their_conversion(hub, monkeypatch):
    import datasets

    real, revisions = datasets.load_dataset, []

    def scripted(*args, revision=None, **kwargs):
        revisions.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found trec.py")
        return real(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    assert len(load_dataset(hub("splits: {evaluation: test}\n"), splits=["evaluation"]).evaluation) == 2
    assert revisions == [None, "refs/convert/parquet"]


def test_without_a_network_it_is_quick_and_says_what_to_provide(run_cli, tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": "0"}
    result = run_cli(["momentum-lm", "datasets", "mr"], env=environment, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "error: mr could not be loaded from the hub (cornell-movie-review-data/rotten_tomatoes: "
    )
    assert (
        "provide DIR/mr/train.jsonl and DIR/mr/validation.jsonl (or .csv, .tsv, .parquet; columns: text, label)"
        in result.stderr
    )
    assert "and give --data-dir DIR" in result.stderr and "fetch_datasets.py mr --output DIR" in result.stderr


def test_a_hub_that_cannot_be_reached_leaves_no_traces_in_this_process(tmp_path, monkeypatch, caplog):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="sst2 could not be loaded"):
        load_dataset("sst2", tmp_path)
    after = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    assert after == before
    assert not caplog.records
