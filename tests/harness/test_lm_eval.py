"""The real harness on a small checkpoint, against fairseq-eval, lm_perplexity and a plain loop."""

import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from momentum_lm.cli import evaluate
from momentum_lm.errors import UserError
from momentum_lm.harness.lm_eval import MomentumLM
from momentum_lm.lm.native import load_native
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.studies.perplexity import score_documents
from momentum_lm.text.dictionary import EOS
from momentum_lm.text.indexed import IndexedDataset, IndexedDatasetWriter
from momentum_lm.text.tokenizer import load_tokenizer

FILMS = """\
description: made-up reviews
files: {train: train.jsonl, evaluation: validation.jsonl}
label: label
labels: [Negative, Positive film]
templates:
  paper: "Review: {text} Sentiment:"
"""
CHOICES = ["Negative", "Positive film"]
WORDS = ["good", "bad", "dull", "long", "thin", "film", "plot", "actors", "very", "the"]
CONTEXTS = ["Review: the plot", "good", "Review: very long and very dull and thin and bad film Sentiment:", ""]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ask(lm, kind, arguments):
    """The harness's requests for a model's method of that name, and its answers."""
    return getattr(lm, kind)([Instance(kind, {}, given, i) for i, given in enumerate(arguments)], disable_tqdm=True)


def reviews(count, seed):
    """Made-up ones, whose label the last word tells."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(count)]
    return [{"text": text, "label": WORDS.index(text.split()[-1]) % 2} for text in texts]


def prompt(row):
    return f"Review: {row['text']} Sentiment:"


@pytest.fixture(scope="module")
def checkpoint(tokenizer_folder, tmp_path_factory):
    """A folder with a decoder that has seen a few reviews, in a checkpoint that says what it is, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    documents = [f"{prompt(row)} {CHOICES[row['label']]}" for row in reviews(400, seed=1)]
    shutil.copy(tokenizer_folder / "sentencepiece.model", folder)
    tokenizer = load_tokenizer(folder)
    stream = [token for ids in tokenizer.encode_batch(documents) for token in [*ids, EOS]]
    blocks = torch.tensor(stream[: len(stream) // 64 * 64]).view(-1, 64)
    torch.manual_seed(0)
    shape = {"dim": 32, "ffn_dim": 48, "layers": 2, "heads": 4, "max_positions": 160}
    model = Decoder(DecoderConfig(tokenizer.vocab_size, **shape, momentum_kind="ema", momentum_eta=0.7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        targets = blocks[torch.randint(len(blocks), (8,))]
        optimizer.zero_grad()
        model.loss(torch.cat([torch.full((8, 1), EOS), targets[:, :-1]], 1), targets).div(targets.numel()).backward()
        optimizer.step()
    options = {
        "_name": "momentum_lm_tiny", "decoder_embed_dim": 32, "decoder_ffn_embed_dim": 48, "decoder_layers": 2,
        "decoder_attention_heads": 4, "activation_fn": "gelu", "position": "sinusoidal", "momentum_kind": "ema",
        "momentum_eta": 0.7,
        "max_target_positions": 160,
    }  # fmt: skip
    cfg = {"model": options, "task": {"tokens_per_sample": 160, "add_bos_token": False}}
    weights = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"args": None, "cfg": cfg, "model": weights}, folder / "model.pt")
    return folder


@pytest.fixture(scope="module")
def native(checkpoint):
    return load_native(checkpoint)


@pytest.fixture(scope="module")
def harness(checkpoint):
    return MomentumLM(str(checkpoint), batch_size=3)


# The same answers as fairseq-eval


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A data set of ours: its YAML file and rows."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "films.yaml").write_text(FILMS)
    write(folder / "train.jsonl", reviews(12, seed=2))
    write(folder / "validation.jsonl", reviews(24, seed=3))
    return folder


@pytest.fixture(scope="module")
def evaluated(films, checkpoint, tmp_path_factory):
    """Without demonstrations and with two, after </s> (the default) and a line break: what fairseq-eval finds, and a
    task of the harness whose prompts are the very same text. {name of the task: (accuracy, predictions)}, and the
    folder of the tasks.
    """
    folder = tmp_path_factory.mktemp("tasks")
    train, rows = read(films / "train.jsonl"), read(films / "validation.jsonl")
    found = {}
    for name, separator, flags in (("end", "</s>", []), ("line", "\n", ["--separator", r"\n"])):
        words = [
            "--task",
            "icl_classification",
            "--path",
            checkpoint,
            "--datasets",
            films / "films.yaml",
            "--shots",
            "0,2",
            "--seeds",
            "5",
        ]
        out = folder / "results" / name
        assert evaluate.main([*map(str, words), "--score", "sum", "--results-dir", str(out), *flags]) == 0
        predictions = read(out / "predictions.jsonl")
        for run in json.loads((out / "results.json").read_text())["runs"]:
            task = f"films_{name}_{run['shots']}shot"
            shown = [f"{prompt(train[i])} {CHOICES[train[i]['label']]}{separator}" for i in run["demonstrations"]]
            assert len(shown) == run["shots"]
            write(
                folder / f"{task}.jsonl",
                [{"prompt": "".join(shown) + prompt(row), "label": row["label"]} for row in rows],
            )
            settings = {
                "task": task, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
                "dataset_kwargs": {"data_files": {"test": str(folder / f"{task}.jsonl")},
                "cache_dir": str(folder / "cache")},
                "doc_to_text": "prompt", "doc_to_target": "label", "doc_to_choice": CHOICES,
                "metric_list": [{"metric": "acc"}],
            }  # fmt: skip
            (folder / f"{task}.yaml").write_text(yaml.safe_dump(settings))
            found[task] = (run["accuracy"], [line for line in predictions if line["shots"] == run["shots"]])
    assert len(found) == 4 and len({accuracy for accuracy, _ in found.values()}) > 1, found
    return found, folder


def assert_same(evaluated, accuracies, samples):
    """``samples[task]``: the harness's own records of single examples."""
    for task, (accuracy, predictions) in evaluated[0].items():
        assert accuracies[task]["acc,none"] == pytest.approx(accuracy)
        by_row = {sample["doc_id"]: sample for sample in samples[task]}
        assert len(by_row) == len(predictions) == 24
        for line in predictions:
            sums = [float(total) for total, _ in by_row[line["index"]]["filtered_resps"]]
            np.testing.assert_allclose(sums, line["scores"], atol=1e-4, rtol=0)
            assert by_row[line["index"]]["acc"] == (line["pred"] == line["gold"])


def test_the_command_gives_the_accuracies_of_fairseq_eval(evaluated, checkpoint, run_cli, tmp_path):
    words = [
        "--model",
        "momentum_lm",
        "--model_args",
        f"path={checkpoint},device=cpu,dtype=fp32",
        "--tasks",
        ",".join(evaluated[0]),
    ]
    files = ["--include_path", evaluated[1], "--output_path", tmp_path / "out", "--log_samples"]
    environment = {"HF_HOME": tmp_path / "hub", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = run_cli(["lm_eval", "run", *words, *files], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    content = json.loads(results.read_text())
    assert (
        content["config"]["model"] == "momentum_lm" and content["config"]["model_sha"] == load_native(checkpoint).sha256
    )
    samples = {task: read(next(results.parent.glob(f"samples_{task}_*.jsonl"))) for task in evaluated[0]}
    for lines in samples.values():
        for sample in lines:  # which it writes as text
            sample["filtered_resps"] = [(float(total), greedy) for total, greedy in sample["filtered_resps"]]
    assert_same(evaluated, content["results"], samples)


@pytest.mark.parametrize("form", ["arguments", "string", "instance"])
def test_the_library_gives_them_too(form, evaluated, checkpoint, harness):
    arguments = {"path": str(checkpoint), "device": "cpu"}
    given = {
        "arguments": {"model": "momentum_lm", "model_args": arguments, "device": "cuda:0", "batch_size": "auto"},
        "string": {
            "model": "momentum_lm",
            "model_args": ",".join(f"{k}={v}" for k, v in arguments.items()),
            "batch_size": 4,
        },
        "instance": {"model": harness},
    }[form]
    tasks = TaskManager(include_path=str(evaluated[1]), include_defaults=False)
    found = simple_evaluate(**given, tasks=list(evaluated[0]), task_manager=tasks, bootstrap_iters=0)
    assert_same(evaluated, found["results"], found["samples"])


# Single requests


def test_a_prompt_begins_as_in_training_and_may_be_empty(harness, native):
    (first, second) = ask(harness, "loglikelihood", [("", "good film"), ("good", " film")])
    tokens = [*native.bos, *native.encode(["good film"])[0]]
    with torch.no_grad():
        log_probs = native.model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    values = log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert first[0] == pytest.approx(values.sum().item(), abs=1e-4)
    assert second[0] == pytest.approx(values[len(native.encode(["good"])[0]) :].sum().item(), abs=1e-4)
    begun, plain = ask(harness, "loglikelihood", [("</s>good", " film"), ("good", " film")])
    assert begun == pytest.approx(plain)  # not twice


SPELLED = ["good</s> film", "<s>the plot", "</s>", "a<unk>b </s></s>", "<|endoftext|> on", "< s></ s> </S>"]


def test_a_special_token_in_a_text_is_one_for_hf_on_the_export_too(harness, native, tmp_path):
    """The same ids and log-probabilities both ways."""
    from lm_eval.models.huggingface import HFLM

    from momentum_lm.formats.to_huggingface import write_model

    write_model(native, tmp_path, None, lambda count: None)
    hf = HFLM(pretrained=str(tmp_path), trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
    assert harness._encode(SPELLED) == [hf.tok_encode(text, add_special_tokens=False) for text in SPELLED]
    assert [EOS in ids for ids in harness._encode(SPELLED)] == [True, False, True, True, False, False]
    requests = [(text, " film") for text in SPELLED] + [("", "good film"), ("the film", " is")]
    theirs, ours = (ask(lm, "loglikelihood", requests) for lm in (hf, harness))
    np.testing.assert_allclose([total for total, _ in ours], [total for total, _ in theirs], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_padding_in_a_text_is_told(harness):
    with pytest.raises(
        UserError, match=r"a prompt holds <pad>, the padding of .*model.pt, which it cannot read: 'good <pad>'"
    ):
        ask(harness, "loglikelihood", [("good <pad>", " film")])


def test_white_space_before_a_continuation_is_its_own(harness):
    answers = ask(
        harness, "loglikelihood", [("the film ", "is"), ("the film", " is"), ("the film\n", "is"), ("the film", "\nis")]
    )
    assert answers[0] == answers[1] and answers[2] == answers[3] != answers[0]


def test_the_greedy_text_is_greedy(harness):
    for context in CONTEXTS:
        (text,) = ask(harness, "generate_until", [(context, {"max_gen_toks": 12})])
        words = re.findall(" ?[^ ]+", text)
        requests = [(context, "".join(words[:n])) for n in range(1, len(words))]
        changed = [
            (context, "".join([*words[:n], " dull" if words[n] != " dull" else " plot"])) for n in range(len(words))
        ]
        assert all(greedy for _, greedy in ask(harness, "loglikelihood", requests))
        assert not any(greedy for _, greedy in ask(harness, "loglikelihood", changed))


def test_a_long_prompt_loses_its_beginning(checkpoint, native, caplog):
    harness = MomentumLM(str(checkpoint), max_length=20)
    context, continuation = " ".join(WORDS * 6), " good film"
    ((total, _),) = ask(harness, "loglikelihood", [(context, continuation)])
    assert "1 of 1 prompts are longer than 20 tokens" in caplog.text
    tokens = native.encode([context + continuation])[0][-21:]
    count = len(native.encode([context + continuation])[0]) - len(native.encode([context])[0])
    with torch.no_grad():
        log_probs = native.model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(tokens[1:])[:, None])[-count:].sum().item()
    assert total == pytest.approx(expected, abs=1e-4)
    ((alone, _),) = ask(harness, "loglikelihood", [("", continuation)])
    assert alone != pytest.approx(total)


def test_rolling_perplexity_is_that_of_lm_perplexity(checkpoint, native, tmp_path):
    """Documents of several windows and of less than one; whole windows, where the two cut alike."""
    length = 16
    draw = random.Random(2)
    texts = ["good", "the plot is thin", " ".join(draw.choices(WORDS, k=40)), " ".join(draw.choices(WORDS, k=90))]
    documents = [[*ids, EOS] for ids in native.encode(texts)]
    cut = [ids if len(ids) < length else ids[: len(ids) // length * length] for ids in documents]
    spoken = [native.decode(ids) for ids in cut]
    assert [native.encode([text.removesuffix("</s>")])[0] for text in spoken] == [
        [t for t in ids if t != EOS] for ids in cut
    ]
    assert max(map(len, cut)) >= 3 * length and min(map(len, cut)) < length
    harness = MomentumLM(str(checkpoint), max_length=length)
    found = ask(harness, "loglikelihood_rolling", [(text,) for text in spoken])
    for i, document in enumerate(cut):
        with IndexedDatasetWriter(tmp_path / f"{i}", native.vocab_size) as writer:
            writer.add(np.array(document))
        nll = score_documents(native, IndexedDataset(tmp_path / f"{i}"), length).sum()
        assert math.exp(-found[i] / len(document)) == pytest.approx(math.exp(nll / len(document)), rel=1e-5)
    assert ask(harness, "loglikelihood_rolling", [("",)]) == [0.0]


def plain(native, context, most, room):
    """Greedy text, a full forward pass for each token."""
    tokens = [*native.bos, *native.encode([context])[0]][-room:]
    start = len(tokens)
    while len(tokens) < start + most:
        with torch.no_grad():
            logits = native.model(torch.tensor([tokens]))[0, -1]
        logits[1] = -torch.inf
        if int(logits.argmax()) == EOS:
            break
        tokens.append(int(logits.argmax()))
    return native.tokenizer.decode(tokens[start:])


def test_generated_text_is_that_of_a_plain_loop(harness, native):
    contexts = [*CONTEXTS, " ".join(WORDS * 20)]
    requests = [(context, {"max_gen_toks": most}) for most in (25, 10) for context in contexts]
    expected = [
        plain(native, context, given["max_gen_toks"], 160 - given["max_gen_toks"]) for context, given in requests
    ]
    assert ask(harness, "generate_until", requests) == expected and len(set(expected)) > 4


def test_text_ends_before_what_it_is_to_end_at(harness, monkeypatch):
    """Also where that spans tokens; and no token is generated after it."""
    whole = ask(harness, "generate_until", [(context, {"max_gen_toks": 25}) for context in CONTEXTS])
    ends = sorted({text[n : n + 3] for text in whole for n in range(2, len(text) - 2, 3)})
    assert len(ends) > 5
    steps = []
    features = harness.lm.model.features
    monkeypatch.setattr(harness.lm.model, "features", lambda *a, **k: (steps.append(0), features(*a, **k))[1])
    for end in ends:
        for until in (end, ["never", end, ""]):
            found = ask(
                harness, "generate_until", [(context, {"max_gen_toks": 25, "until": until}) for context in CONTEXTS]
            )
            assert found == [text.split(end)[0] for text in whole]
    steps.clear()
    ask(harness, "generate_until", [(CONTEXTS[0], {"max_gen_toks": 25, "until": whole[0][3:6]})])
    assert 0 < len(steps) < 20


def test_sampling_is_seeded_and_greedy_without_temperature(harness):
    requests = [
        (context, {"max_gen_toks": 20, "do_sample": True, "temperature": 1.5, "top_p": 0.95}) for context in CONTEXTS
    ]
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ask(harness, "generate_until", requests))
    assert runs[0] == runs[1] != runs[2]
    greedy = ask(harness, "generate_until", [(context, {"max_gen_toks": 20}) for context in CONTEXTS])
    for given in (
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0.0, "num_beams": 1},
        {"do_sample": True, "top_k": 1},
    ):
        assert (
            ask(harness, "generate_until", [(context, {"max_gen_toks": 20, **given}) for context in CONTEXTS]) == greedy
        )


def test_a_loaded_model_is_taken_as_it_is(native):
    harness = MomentumLM(native, batch_size="auto:4", max_batch_size=2)
    assert harness.lm is native and harness.max_length == 160 and harness.device == native.device
    assert harness.tokenizer_name == str(native.tokenizer_path) and harness.chat_template(False) == ""


def test_half_precision(checkpoint, harness):
    requests = [(context, f" {word}") for context in CONTEXTS for word in WORDS]
    exact = [total for total, _ in ask(harness, "loglikelihood", requests)]
    for dtype in ("bf16", "fp16"):
        half = MomentumLM(str(checkpoint), dtype=dtype)
        found = [total for total, _ in ask(half, "loglikelihood", requests)]
        np.testing.assert_allclose(found, exact, atol=0.3)
        assert found != exact
        texts = ask(
            half, "generate_until", [(context, {"max_gen_toks": 5, "temperature": 1.0}) for context in CONTEXTS]
        )
        assert all(isinstance(text, str) for text in texts) and any(texts)


# Bad input


def no_tokenizer(folder):
    (folder / "sentencepiece.model").unlink()


def no_checkpoint(folder):
    (folder / "model.pt").write_text("no")


BAD = {  # what is done to a copy of the checkpoint, --model_args, what is told
    "no path": (None, {"path": None, "dtype": "fp32"}, "--model_args lacks path=CKPT"),
    "missing": (None, {"path": "{folder}/none.pt"}, "{folder}/none.pt"),
    "no checkpoint": (no_checkpoint, {}, "{folder}/model.pt"),
    "no tokenizer": (no_tokenizer, {}, "holds no tokenizer"),
    "no tokenizer's folder": (None, {"tokenizer": "{folder}/no"}, "{folder}/no does not exist"),
    "unknown key": (None, {"max_lenght": 20}, "--model_args max_lenght: did you mean max_length?"),
    "strange key": (None, {"revision": "x"}, "--model_args revision: there are: path, tokenizer, dtype, device"),
    "too long": (None, {"max_length": 161}, "--model_args max_length=161: {folder}/model.pt takes 160 tokens"),
    "no length": (None, {"max_length": 0}, "--model_args max_length=0: give a whole number above 0"),
    "no batch": (None, {"batch_size": "many"}, "--model_args batch_size=many: give a whole number above 0"),
    "dtype": (None, {"dtype": "int8"}, "--model_args dtype=int8: choose from fp32, bf16, fp16"),
    "device": (None, {"device": "gpu"}, "--model_args device=gpu: no such device"),
    "override": (None, {"model_overrides": {"heads": 4}}, "--model_args model_overrides: no option is called 'heads'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_told_in_one_line(case, checkpoint, tmp_path):
    spoil, arguments, message = BAD[case]
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    if spoil is not None:
        spoil(folder)
    given = {"path": str(folder), **arguments}
    given = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in given.items() if v is not None}
    with pytest.raises(UserError) as error:
        MomentumLM.create_from_arg_obj(given, {"batch_size": 1, "device": "cuda:0"})
    assert message.format(folder=folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_was_asked_for_and_is_not_there_is_told(checkpoint):
    with pytest.raises(UserError, match="device=cuda: torch sees 0 CUDA devices"):
        MomentumLM(str(checkpoint), device="cuda")


def test_an_error_is_one_line(run_cli, tmp_path):
    code = f"import lm_eval; lm_eval.simple_evaluate('momentum_lm', 'path={tmp_path}/none.pt', tasks=['arc_easy'])"
    failed = run_cli(["python", "-c", code], env={"HF_HOME": tmp_path / "hub", "HF_HUB_OFFLINE": "1"})
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"error: cannot read checkpoint {tmp_path}/none.pt")
    assert "Traceback" not in failed.stderr


def test_several_processes_are_refused(checkpoint, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, and this is one of 2"):
        MomentumLM(str(checkpoint))


def test_what_cannot_be_asked_is_told(harness):
    with pytest.raises(UserError, match="no chat template: leave out --apply_chat_template"):
        harness.chat_template(True)
    with pytest.raises(UserError, match="no chat template"):
        harness.apply_chat_template([{"role": "user", "content": "hello"}])
    with pytest.raises(UserError, match=r"max_gen_toks=256 leaves no room .* 160 tokens .* max_gen_toks=N, such as 80"):
        ask(harness, "generate_until", [("good", {"until": ["x"]})])
    with pytest.raises(UserError, match="generation argument num_beams=4: momentum_lm has until"):
        ask(harness, "generate_until", [("good", {"num_beams": 4, "max_gen_toks": 5})])
    for name, value, message in (
        ("top_k", -1.0, "a whole number"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.1, "at most 1"),
    ):
        with pytest.raises(UserError, match=f"generation argument {name}={value}: give .*{message}"):
            ask(
                harness,
                "generate_until",
                [("good", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 5, name: value})],
            )
    with pytest.raises(UserError, match="the continuation '' has no tokens"):
        ask(harness, "loglikelihood", [("good", "")])
    with pytest.raises(UserError, match=r"a continuation has \d+ tokens, but .* takes 160"):
        ask(harness, "loglikelihood", [("good", " film" * 300)])
