"""Text, binarised by stock ``fairseq-preprocess``, and the flags of a model that trains in seconds."""

import json
import random

import pytest

SHAPE = "--decoder-layers 2 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2".split()
TASKS = {
    "stock": ["--task", "language_modeling", "--criterion", "cross_entropy", "--optimizer", "adam"],
    "ours": [
        "--task",
        "momentum_language_modeling",
        "--criterion",
        "chunked_cross_entropy",
        "--optimizer",
        "fused_adamw",
    ],
}


@pytest.fixture(scope="session")
def documents():
    """400 documents, one line of lower-case words each: a Markov chain over 2,000 words, the frequent ones English."""
    draw = random.Random(0)
    words = "the a is to of and value return if file in or that with are it for as by from on not at this which".split()
    words += [
        "".join(draw.choices(("ba", "co", "di", "fu", "le", "mo", "na", "ri", "su", "te"), k=4)) for _ in range(2000)
    ]
    words = list(dict.fromkeys(words))
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    following = {word: draw.choices(words, frequencies, k=6) for word in words}
    made = []
    for _ in range(400):
        document = ["the"]
        for _ in range(20 + int(600 * draw.random() ** 6)):
            document.append(draw.choices(following[document[-1]], (6, 5, 4, 3, 2, 1))[0])
        made.append(" ".join(document))
    return made


@pytest.fixture(scope="session")
def data(documents, tmp_path_factory, run_cli):
    """A folder of binarised data, made by fairseq-preprocess."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "valid.txt").write_text("\n".join(documents[::10]) + "\n")
    (folder / "train.txt").write_text("\n".join(d for i, d in enumerate(documents) if i % 10) + "\n")
    out = folder / "bin"
    paths = ["--trainpref", folder / "train.txt", "--validpref", folder / "valid.txt", "--destdir", out]
    result = run_cli(["fairseq-preprocess", "--only-source", *paths, "--nwordssrc", "500", "--workers", "1"])
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def flags():
    """flags(data, save_dir, *more, task="stock" or "ours", updates=6) -> a fairseq-train command; words in ``more``
    win.
    """

    def make(data, save_dir, *more, task="stock", updates=6):
        words = ["fairseq-train", data, *TASKS[task], "--lr", "1e-2", "--tokens-per-sample", "32", "--batch-size", "4",
                 "--max-update", updates, "--cpu", "--num-workers", "0", "--seed", "7", "--log-format", "json",
                 "--log-interval", "1",
                 "--no-epoch-checkpoints", "--save-dir", save_dir, *SHAPE, *more]  # fmt: skip
        return [str(w) for w in words]

    return make


@pytest.fixture(scope="session")
def json_lines():
    """json_lines(result, kind="train_inner") -> the dicts that fairseq logged as ``... | kind | {...}``."""

    def read(result, kind="train_inner"):
        output = result if isinstance(result, str) else result.stderr + result.stdout
        return [json.loads(line.split(" | ")[-1]) for line in output.splitlines() if f"| {kind} | {{" in line]

    return read


@pytest.fixture(scope="session")
def losses(json_lines):
    """losses(result) -> {update: logged loss}; the command must have succeeded."""

    def read(result):
        assert result.returncode == 0, result.stderr[-3000:]
        return {int(line["num_updates"]): line["loss"] for line in json_lines(result)}

    return read


@pytest.fixture
def train_here(flags, data):
    """train_here(save_dir, *more, task="ours", updates=6) -> fairseq-train in this process, as a process of its own
    would run it.
    """
    import signal

    from fairseq import checkpoint_utils, options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.logging import metrics
    from fairseq_cli import train

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(save_dir, *more, task="ours", updates=6, folder=data):
        metrics.reset()
        # both remember things in their attributes
        for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
            vars(function).clear()
        words = flags(folder, save_dir, *more, task=task, updates=updates)[1:]
        train.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words)))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
