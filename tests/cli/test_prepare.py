"""The command: what it prints, how it refuses, what it needs of memory."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from momentum_lm.cli.prepare import main as prepare_command
from momentum_lm.cli.prepare import summary

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    f"Document {i} tells of {i * i} things; it ends here.\nIts second line is {'very ' * (i % 7)}long."
    for i in range(200)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, DOCUMENTS[0], " "]))
    return path


@pytest.fixture(scope="module")
def prepare(run_cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cwd")

    def run(*args, **kwargs):
        return run_cli(["momentum-lm", "prepare", *args], **{"cwd": folder} | kwargs)

    run.program = run_cli
    return run


def files(folder):
    return (
        {p.name: p.read_bytes() for p in folder.iterdir()}
        if folder.is_dir()
        else folder.read_bytes()
        if folder.exists()
        else None
    )


def test_summary_and_next_command(prepare, corpus, tmp_path):
    output = tmp_path / "my data"
    done = prepare(corpus, "--output", output, "--vocab-size", 400, "--valid", 20, "--test", "0.1", "--workers", 2)
    assert done.returncode == 0, done.stderr
    first, header, *rows, command = done.stdout.splitlines()
    assert first == f"{output}: dictionary of 400 (sentencepiece), 1 duplicates and 1 empty documents dropped of 202"
    assert header.split() == ["split", "documents", "tokens", "bytes", "bytes/token"]
    made = json.loads((output / "prepare.json").read_text())
    for row, (name, split) in zip(rows, made["splits"].items(), strict=True):
        assert row.split()[:4] == [name, *(f"{split[key]:,}" for key in ("documents", "tokens", "bytes"))]
        assert float(row.split()[4]) == pytest.approx(split["bytes"] / split["tokens"], abs=0.01)
    assert sum(split["bytes"] for split in made["splits"].values()) == sum(len(text.encode()) for text in DOCUMENTS)
    assert command.startswith(f"next: fairseq-train {shlex.quote(str(output))} --task language_modeling")
    assert (
        done.stderr
        == f"training SentencePiece: 400 pieces on {made['splits']['train']['bytes'] / 1e6:.1f} MB, about 0 s\n"
    )

    again = prepare(corpus, "--output", output, "--vocab-size", 400, "--valid", 20, "--test", "0.1", "--workers", 1)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert again.stderr == f"{output} is already prepared with these settings\n"


@pytest.mark.slow
def test_the_next_command_runs(prepare, run_cli, corpus, tmp_path):
    for name, shares in (("with", ["--valid", "20"]), ("without", ["--valid", "0"])):
        done = prepare(corpus, "--output", tmp_path / name, "--vocab-size", 400, "--test", 0, *shares)
        program, *args = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
        trained = run_cli([program, *args, "--cpu", "--max-update", "2", "--batch-size", "2"])
        assert trained.returncode == 0, trained.stderr
        assert (tmp_path / f"{name}-model" / "checkpoint_last.pt").exists()


def test_console_script(run_cli, corpus, tmp_path):
    done = run_cli(
        [
            "momentum-lm",
            "prepare",
            corpus,
            "--output",
            tmp_path / "data",
            "--vocab-size",
            400,
            "--valid",
            20,
            "--test",
            0,
        ]
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "train.idx").exists()


def test_help_states_the_memory(prepare):
    done = prepare("--help")
    assert done.returncode == 0
    assert "under 400 MB with 2 workers" in done.stdout


def test_missing_characters_and_normalisation_are_told(prepare, corpus, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_prefix=str(tmp_path / "sp"), vocab_size=100, minloglevel=2
    )
    done = prepare(
        corpus, "--output", tmp_path / "data", "--sentencepiece", tmp_path / "sp.model", "--valid", 20, "--test", 0
    )
    assert done.returncode == 0, done.stderr
    assert "<unk>" not in done.stdout
    assert "note: this tokenizer normalises text; decoding does not give it back exactly" in done.stdout
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"日本 {i}" for i in range(100)))
    output = tmp_path / "other"
    done = prepare(
        other,
        "--document",
        "line",
        "--output",
        output,
        "--sentencepiece",
        tmp_path / "sp.model",
        "--test",
        0,
        "--valid",
        5,
    )
    assert re.search(
        r"warning: [\d,]+ tokens \(\d+\.\d\d%\) are <unk>: the tokenizer lacks characters of this text", done.stdout
    )


BAD = {
    "missing file": ("gone.txt", [], r"gone\.txt: no such file or folder"),
    "empty file": ("empty.txt", [], r"empty\.txt is empty"),
    "wrong column": ("corpus.jsonl", ["--column", "body"], r"corpus\.jsonl:1: no column 'body'; there are: text; name "
    "one with --column"),
    "malformed line": ("bad.jsonl", [], r"bad\.jsonl:2: not a JSON record"),
    "not UTF-8": ("latin1.txt", [], r"latin1\.txt: byte 2 is not UTF-8"),
    "vocabulary": ("corpus.jsonl", ["--vocab-size", "60000"], r"--vocab-size 60000 is too large for this text, .* at "
    r"most \d+"),
    "small vocabulary": ("corpus.jsonl", ["--vocab-size", "50"], r"--vocab-size 50 is too small: .* need at least \d+"),
    "no tokenizer": ("corpus.jsonl", ["--sentencepiece", "corpus.jsonl"], r"corpus\.jsonl is not a SentencePiece "
    "model"),
    "no GPT-2": ("corpus.jsonl", ["--gpt2-bpe", "."], r"cannot read the GPT-2 tokenizer: encoder\.json: No such file"),
    "fraction": ("corpus.jsonl", ["--valid", "1.5"], r"--valid 1\.5: give a fraction of the documents below 1"),
    "fractions": ("corpus.jsonl", ["--valid", "0.5", "--test", "0.5"], r"--valid 0\.5 and --test 0\.5 together leave "
    "nothing"),
    "empty split": ("corpus.jsonl", ["--valid", "0.00001", "--vocab-size", "400"], r"--valid 0\.00001 leaves the "
    "valid split empty"),
    "workers": ("corpus.jsonl", ["--workers", "0"], r"--workers 0: must be at least 1"),
    "record": ("empty.txt", ["--document", "record"], r"--document record does not go with empty\.txt"),
}  # fmt: skip


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_touches_nothing(prepare, corpus, tmp_path, case, existing):
    source, flags, message = BAD[case]
    (tmp_path / "corpus.jsonl").write_bytes(corpus.read_bytes())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n')
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin1"))
    output = tmp_path / "data"
    if existing:
        assert (
            prepare(
                "corpus.jsonl", "--output", "data", "--vocab-size", 300, "--valid", 9, "--test", 9, cwd=tmp_path
            ).returncode
            == 0
        )
    before = files(output)
    done = prepare(source, "--output", "data", *flags, *(["--force"] if existing else []), cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("training SentencePiece")]
    assert len(lines) == 1 and re.search(f"^error: .*{message}", lines[0]), done.stderr
    assert files(output) == before


def test_output_that_is_a_file(prepare, corpus, tmp_path):
    (tmp_path / "data").write_text("mine")
    done = prepare(corpus, "--output", tmp_path / "data")
    assert (done.returncode, done.stderr) == (2, f"error: --output {tmp_path / 'data'} is a file; name a folder\n")
    assert (tmp_path / "data").read_text() == "mine"


@pytest.mark.parametrize("room", [6000, 20000])  # too little for the tokenizer; for the tokens
def test_a_full_disk_is_one_line_and_the_work_goes_on_later(prepare, corpus, tmp_path, room):
    """The largest file that the process may write stands in for the free space."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    command = [corpus, "--output", tmp_path / "data", "--vocab-size", 400, "--valid", 20, "--test", 0, "--workers", 1]
    done = prepare(*command, preexec_fn=limit, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 2
    problem = f"error: {tmp_path / 'data'}: File too large"
    assert done.stderr.splitlines()[-1] == f"{problem}; fix that and run the same command again"
    assert not (tmp_path / "data" / "train.bin").exists()
    assert (tmp_path / "data" / ".prepare" / "plan.json").exists() == (room == 20000)
    assert prepare(*command).returncode == 0
    prepare(corpus, "--output", tmp_path / "other", *command[3:])
    assert files(tmp_path / "data") == files(tmp_path / "other")


def test_ctrl_c(corpus, tmp_path):
    import signal

    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(150) for text in DOCUMENTS))
    command = [
        sys.executable,
        "-m",
        "momentum_lm.cli.prepare",
        big,
        "--output",
        tmp_path / "data",
        "--vocab-size",
        "400",
        "--workers",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    while not (tmp_path / "data" / ".prepare" / "plan.json").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in err


def tree_memory(pid):
    """Resident bytes of a process and its descendants, shared pages counted in each."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return total + sum(map(tree_memory, children))


def main(*args, status=0):
    assert prepare_command([str(arg) for arg in args]) == status


def test_a_file_that_is_one_document_is_told_of_before_anything_is_made(tmp_path, capsys):
    path = tmp_path / "reviews.txt"
    path.write_text("\n".join(DOCUMENTS))
    main(path, "--output", tmp_path / "data", "--vocab-size", 300, status=2)
    assert capsys.readouterr().err == (
        f"error: {path} is one document, since a whole file is one, and leaves nothing to split: --document line makes "
        "each line one, "
        "--document blank-line what stands between blank lines; or --valid 0 --test 0 trains on it alone\n"
    )
    assert not (tmp_path / "data").exists()
    main(path, "--output", tmp_path / "data", "--vocab-size", 300, "--valid", 0, "--test", 0)
    assert f"note: {path} is one document; --document line makes each line one, " in capsys.readouterr().err
    main(path, path, "--output", tmp_path / "both", "--vocab-size", 300, status=2)
    said = capsys.readouterr().err
    assert "note: 2 text files are 2 documents; --document line" in said
    assert f"note: {path} is the same file as {path}" in said


def test_what_is_left_out_or_ambiguous_is_in_the_summary(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, None, None]))
    (tmp_path / "b.tsv").write_text('text\n"a ""quoted"" text"\n')
    main(
        tmp_path / "a.jsonl",
        tmp_path / "b.tsv",
        "--output",
        tmp_path / "data",
        "--vocab-size",
        300,
        "--valid",
        9,
        "--test",
        0,
    )
    out = capsys.readouterr().out
    assert "note: 2 rows have no text (null) and are left out\n" in out
    assert (
        "note: 1 texts of .tsv files look as if they were quoted for CSV; they are taken as they are, with their "
        "quotation marks" in out
    )
    text = summary({**json.loads((tmp_path / "data" / "prepare.json").read_text()), "special_tokens": 1234}, "data")
    assert (
        "note: the text spells out special tokens of the tokenizer 1,234 times; they are ordinary text here, and end "
        "no document" in text
    )


def test_paths_that_are_not_utf8(tmp_path, capfd):
    path, output = (tmp_path / os.fsdecode(name) for name in (b"\xff.txt", b"out\xfe"))
    path.write_text("\n".join(DOCUMENTS))
    for _ in range(2):
        main(path, "--document", "line", "--output", output, "--vocab-size", 300, "--valid", 9, "--test", 0)
    assert json.loads((output / "prepare.json").read_text())["config"]["sources"] == [str(path)]
    main(tmp_path / os.fsdecode(b"\xfd.txt"), "--output", output, status=2)
    assert "no such file or folder" in capfd.readouterr().err


def test_workers_run_no_file_of_the_folder_with_the_data(prepare, tmp_path):
    (tmp_path / "text").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "text" / f"{i}.txt").write_text(text * 3)
    for name in ("pickle", "multiprocessing", "json", "numpy", "signal"):
        (tmp_path / "text" / f"{name}.py").write_text("open('ran', 'w')")
    command = [
        "momentum-lm",
        "prepare",
        ".",
        "--output",
        "../out",
        "--vocab-size",
        400,
        "--valid",
        9,
        "--test",
        0,
        "--workers",
        2,
    ]
    done = prepare.program(command, cwd=tmp_path / "text")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "text" / "ran").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """200 MB of text, 2 workers: the whole tree of processes stays under the 400 MB that --help states."""
    import random

    rng = random.Random(0)
    lexicon = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 12))) for _ in range(30_000)]
    corpus, size = tmp_path / "big.jsonl", 0
    with open(corpus, "w") as file:
        while size < 200e6:
            text = " ".join(rng.choices(lexicon, k=rng.randint(20, 400)))
            size += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    command = [
        sys.executable,
        "-m",
        "momentum_lm.cli.prepare",
        str(corpus),
        "--output",
        str(tmp_path / "data"),
        "--workers",
        "2",
    ]
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    seconds = time.monotonic() - started
    print(f"peak {peak / 1e6:.0f} MB, {size / 1e6 / seconds:.1f} MB/s in all\n{process.stdout.read()}")
    assert process.returncode == 0
    made = json.loads((tmp_path / "data" / "prepare.json").read_text())
    assert sum(split["bytes"] for split in made["splits"].values()) == size
    assert peak < 400e6
