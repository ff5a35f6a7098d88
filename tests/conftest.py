"""For every test: one thread per process, and a way to run the installed programs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in what the tests start

import gc
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from interpreter import Interpreter
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell's background job; the programs that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


def pytest_collection_finish():
    """Garbage is not looked for among a million objects of imported modules, which stay: each configuration of hydra's
    makes much of it.
    """
    gc.collect()
    gc.freeze()


ENVIRONMENT = dict(os.environ)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """What the code under test leaves in the environment would reach later commands, which then are not forked."""
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    return (yield)


def clean_environment(**variables):
    """This process's environment without what would change Python's or the hook's behaviour, plus ``variables``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FAIRSEQ_", "PYTEST_")) and name not in ("PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS")
    }
    return {**kept, **{name: str(value) for name, value in variables.items()}}


@pytest.fixture(scope="session")
def interpreter():
    """``interpreter()`` is that of ``run_cli``; it starts at the first command."""
    started = []

    def get():
        if not started:
            started.append(Interpreter(clean_environment(), sysconfig.get_path("scripts")))
        return started[0]

    yield get
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def cli_command(interpreter):
    """cli_command([program, *args], env) -> (command, environment) for subprocess.

    ``program`` is a script of this interpreter's environment, or "python", or a path. With ``warm=True`` a script is
    the one in ``interpreter().bin``, and so are those that it starts by name: forked from the interpreter.
    """

    def build(args, env=None, warm=False):
        program, *rest = map(str, args)
        environment = clean_environment(**(env or {}))
        if warm:
            environment["PATH"] = f"{interpreter().bin}:{environment['PATH']}"
            return [program if "/" in program else f"{interpreter().bin}/{program}", *rest], environment
        if program == "python":
            found = sys.executable
        else:
            found = program if "/" in program else shutil.which(program, path=sysconfig.get_path("scripts"))
            assert found, f"{program} is not installed beside {sys.executable}: run bash scripts/test.sh"
        return [found, *rest], environment

    return build


@pytest.fixture(scope="session")
def run_cli(cli_command, interpreter, tmp_path_factory):
    """run_cli([program, *args], env={...}, **subprocess.run's) -> CompletedProcess with text; ``cli_command`` says
    which.

    It runs in an empty folder unless ``cwd`` is given, forked from ``interpreter`` where that makes no difference
    (``forked`` says whether), else and with ``fresh=True`` in a process from scratch. With ``warm=True`` what it starts
    is forked too, and so is ``python -c``, where no import is looked at.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(args, env=None, fresh=False, warm=False, **kwargs):
        command, environment = cli_command(args, env)
        if warm:
            environment["PATH"] = f"{interpreter().bin}:{environment['PATH']}"
        forked = (
            not fresh
            and kwargs.keys() <= {"cwd", "timeout", "input"}
            and interpreter().runs(command, environment, code=warm)
        )
        if forked:
            where, limit = kwargs.get("cwd", elsewhere), kwargs.get("timeout", 600)
            done = interpreter().run(command, environment, where, limit, kwargs.get("input", ""))
        else:
            settings = {
                "cwd": elsewhere,
                "capture_output": True,
                "text": True,
                "timeout": 600,
                "check": False,
                **kwargs,
            }
            done = subprocess.run(command, env=environment, **settings)
        done.forked = forked
        return done

    return run


class LargestTensor(TorchDispatchMode):
    """``with LargestTensor() as largest: ...``; largest.size is the number of elements of the largest tensor made,
    backward pass too.
    """

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.fixture(scope="session")
def largest_tensor():
    return LargestTensor


# A small random decoder with a real tokenizer, and questions to ask it.

TEXTS = [
    "a film that is good and long", "a bad film", "the plot is thin but the actors are very good indeed", "dull",
    "nobody should see this bad and dull film twice", "good", "the actors are thin", "very long and very dull "
    "plot", "see this film",
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a SentencePiece model of 330 pieces."""
    from momentum_lm.text.vocabulary import train_sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["Positive", "Negative", "Review:", "Sentiment:", *" ".join(TEXTS).split()]
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(words, k=draw.randrange(3, 12))) for _ in range(2000)]
    (folder / "sentencepiece.model").write_bytes(train_sentencepiece(sentences, 330))
    return folder


@pytest.fixture(scope="session")
def make_lm(tokenizer_folder):
    """make_lm(**DecoderConfig's) -> NativeLM; its checkpoint lies beside the tokenizer."""
    from momentum_lm.lm.native import NativeLM
    from momentum_lm.model import Decoder, DecoderConfig
    from momentum_lm.text.tokenizer import load_tokenizer

    shape = {
        "dim": 32,
        "ffn_dim": 48,
        "layers": 2,
        "heads": 4,
        "max_positions": 160,
        "momentum_kind": "ema",
        "momentum_eta": 0.7,
    }

    def make(**changes):
        torch.manual_seed(0)
        model = Decoder(DecoderConfig(load_tokenizer(tokenizer_folder).vocab_size, **{**shape, **changes})).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
        path = tokenizer_folder / f"model{len(list(tokenizer_folder.glob('*.pt')))}.pt"
        flags = {"dim": "decoder_embed_dim", "ffn_dim": "decoder_ffn_embed_dim", "layers": "decoder_layers",
                 "heads": "decoder_attention_heads", "activation": "activation_fn"}  # fmt: skip
        options = {flags.get(name, name): value for name, value in vars(model.config).items()}
        options |= {
            "untie_embeddings": not model.config.tie_embeddings,
            "no_scale_embedding": not model.config.scale_embeddings,
        }
        tensors = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"model": tensors, "cfg": {"model": options | {"absent_tokens": ""}}}, path)
        return NativeLM(model, path)

    return make


@pytest.fixture(scope="session")
def lm(make_lm):
    return make_lm()


@pytest.fixture(scope="session")
def examples():
    """Labels of one token and of several, some of which begin others; a gold label that varies."""
    from momentum_lm.icl.datasets.loading import Example

    labels = (" Positive", " Negative", " Negative film", " Pos")
    return [Example(i, (f"Review: {text} Sentiment:",), labels, i % 4) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="session")
def choices():
    """Each example with its own choices; the last like Winogrande: its own inputs, one continuation."""
    from momentum_lm.icl.datasets.loading import Example

    own = [
        Example(i, (f"{text} is",), tuple(f" {other}" for other in TEXTS[i + 1 : i + 3 + i % 2]), 1)
        for i, text in enumerate(TEXTS[:5])
    ]
    return [*own, Example(5, ("the film", "the plot"), (" is very long",) * 2, 0)]
