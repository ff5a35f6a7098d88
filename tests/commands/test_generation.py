"""The recipes of examples/generation/README.md, with a small random model and each kind of tokenizer."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.text.indexed import IndexedDatasetWriter
from momentum_lm.text.tokenizer import _byte_letters, load_tokenizer

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "examples" / "generation" / "README.md").read_text("utf-8")
COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]
PROMPT = "the value of the"
DOCUMENTS = ["a film that is good and long", "the plot is thin but the actors are very good indeed"]
OPTIONS = {
    "_name": "momentum_lm_tiny", "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "activation_fn": "gelu", "position": "sinusoidal", "momentum_kind": "ema", "momentum_eta": 0.7,
    "max_target_positions": 128,
    "tokens_per_sample": 128, "dropout": 0.0,
}  # fmt: skip


def add_tokenizer(folder, kind, tokenizer_folder):
    if kind == "sentencepiece":
        shutil.copy(tokenizer_folder / "sentencepiece.model", folder)
        return
    letters = _byte_letters()
    if kind == "gpt2":
        (folder / "encoder.json").write_text(
            json.dumps({token: i for i, token in enumerate([*letters, "he"])}), encoding="utf-8"
        )
        (folder / "vocab.bpe").write_text("#version: 0.2\nh e\n", encoding="utf-8")
        return
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate([*letters, "he"])}, [("h", "e")])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.save(str(folder / "tokenizer.json"))


def make(place, kind, tokenizer_folder):
    """A folder in which the recipes run: data, and a checkpoint elsewhere."""
    for name in ("data", "checkpoints"):
        (place / name).mkdir()
    add_tokenizer(place / "data", kind, tokenizer_folder)
    tokenizer = load_tokenizer(place / "data")
    tokenizer.dictionary.save(place / "data" / "dict.txt")
    with IndexedDatasetWriter(place / "data" / "valid", tokenizer.vocab_size) as writer:
        for text in DOCUMENTS:
            writer.add(np.array([*tokenizer.encode(text), 2]))
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(tokenizer.vocab_size, 16, 24, 2, 2, max_positions=128, momentum_kind="ema", momentum_eta=0.7)
    )
    state = {
        f"decoder.{name}": torch.randn_like(tensor) * 0.3
        for name, tensor in model.state_dict().items()
        if "log_decay" not in name
    }
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    rest = {
        "cfg": {"model": OPTIONS, "task": {"_name": "momentum_language_modeling"}}, "args": None, "task_state": {},
        "optimizer_history": [{"optimizer_name": "FusedAdamW", "num_updates": 1, "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }  # fmt: skip
    torch.save(rest | {"model": state}, place / "checkpoints" / "checkpoint_best.pt")
    return place


@pytest.fixture(scope="module")
def place(tokenizer_folder, tmp_path_factory):
    return make(tmp_path_factory.mktemp("place"), "sentencepiece", tokenizer_folder)


def lines(output, letter):
    """{id: [text]} of the lines ``LETTER-id``; a continuation may hold line breaks, and its line then goes on."""
    score = "" if letter in "ST" else r"[^\t\n]*\t"
    found = {}
    for number, text in re.findall(rf"^{letter}-(\d+)\t{score}(.*)", output, re.MULTILINE):
        found.setdefault(int(number), []).append(text)
    return found


def start(run_cli, command, place, *words):
    return run_cli(["/bin/bash", "-c", " ".join([command, *words, "--cpu"])], cwd=place, warm=True)


def run(*args):
    done = start(*args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "tokenizer.json"])
def test_interactive(kind, tokenizer_folder, run_cli, tmp_path):
    place = make(tmp_path, kind, tokenizer_folder)
    output = run(run_cli, COMMANDS[0], place)
    (text,) = lines(output, "D")[0]
    assert text.startswith(PROMPT) and text != PROMPT
    tokenizer = load_tokenizer(place / "data")
    symbols = lines(output, "S")[0][0].split(" ")
    assert [tokenizer.dictionary.index(symbol) for symbol in symbols] == tokenizer.encode(PROMPT)


def test_sampling_in_several_lines(place, run_cli):
    words = re.search(r"`(--sampling .*?)`", README)[1]
    command = (
        COMMANDS[0]
        .replace('"the value of the"', '-e "the value of the\\n\\n a  film \\nthe"')
        .replace("--beam 5", words)
    )
    found = lines(run(run_cli, command, place), "D")
    assert sorted(found) == [0, 1, 2, 3] and all(len(texts) == 3 for texts in found.values())
    for i, prompt in enumerate([PROMPT, "", "a  film", "the"]):
        assert all(text.startswith(prompt) for text in found[i])
    assert len(set(found[0])) > 1


def test_generate(place, run_cli):
    (command,) = (c for c in COMMANDS if "fairseq-generate" in c)
    output = run(run_cli, command, place, "--num-workers", "0")
    tokenizer = load_tokenizer(place / "data")
    given, found = lines(output, "T"), lines(output, "D")
    assert sorted(given) == sorted(found) == [0, 1]
    assert sorted(text for (text,) in given.values()) == DOCUMENTS
    for i, (text,) in given.items():
        assert found[i][0].startswith(tokenizer.decode(tokenizer.encode(text)[:8]))


def test_a_published_models_recipe_is_the_same_with_its_folder():
    """tests/commands/test_published.py runs it."""
    published = (
        COMMANDS[2]
        .replace("en_dense_lm_125m/model.pt", "checkpoints/checkpoint_best.pt")
        .replace("en_dense_lm_125m", "data")
    )
    assert published.split("--bpe")[0].split() == COMMANDS[0].split("--bpe")[0].split() and len(COMMANDS) == 3


def test_where_the_tokenizer_lies(place, run_cli, tmp_path):
    """Beside the checkpoint, or where --tokenizer-path says; with none the error says what is missing."""
    shutil.copytree(place, tmp_path / "place")
    (tmp_path / "tokenizer").mkdir()
    for file in (tmp_path / "place" / "data").glob("*"):
        if file.name not in ("dict.txt", "valid.bin", "valid.idx"):
            file.rename(tmp_path / "tokenizer" / file.name)
    command = COMMANDS[0].replace("--beam 5", "--beam 1")
    refused = start(run_cli, command, tmp_path / "place")
    assert refused.returncode != 0 and refused.stderr.splitlines()[-1].startswith("error: data holds no tokenizer")
    named = lines(run(run_cli, command, tmp_path / "place", "--tokenizer-path", "../tokenizer"), "D")
    for file in (tmp_path / "tokenizer").glob("*"):
        shutil.copy(file, tmp_path / "place" / "checkpoints")
    assert lines(run(run_cli, command, tmp_path / "place"), "D") == named and named[0][0].startswith(PROMPT)
