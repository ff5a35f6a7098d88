"""``momentum-lm plan``: the same numbers in tables and JSON, a command that fairseq takes, mistakes in one line."""

import json
import re
import shlex

import pytest

from momentum_lm.cli.plan import main, number

SMALL = "--arch momentum_lm_125m --gpu h100 --tokens 2.5B --context 256 --checkpoint-activations".split()
LARGE = (
    "--arch momentum_lm_6_7b --gpus 16 --gpu a100-40gb --tokens 300B --context 256 --strategy fsdp "
    "--checkpoint-activations"
).split()


@pytest.mark.parametrize("argv", [SMALL, pytest.param(LARGE, marks=pytest.mark.nightly)])
def test_tables_and_json_say_the_same(argv, capsys):
    assert main([*argv, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert main(argv) == 0
    text = capsys.readouterr().out
    chosen = numbers["chosen"]
    rows = (re.split("  +", line) for line in text.split("on each GPU")[1].split("\n\n")[0].splitlines()[2:])
    table = {name: cells for name, *cells in rows}
    options = numbers["options"]
    assert table["all, GB"] == [f"{o['memory']['total'] / 1e9:.2f}" for o in options]
    assert table["activations, GB"] == [f"{o['memory']['activations'] / 1e9:.2f}" for o in options]
    assert table["largest micro-batch"] == [str(o["largest_micro_batch"]) for o in options]
    assert sum(v for k, v in chosen["memory"].items() if k != "total") == chosen["memory"]["total"]
    assert f"{numbers['parameters']['total']:,}" in text and f"{numbers['flops_per_token']:.3g} a token" in text
    assert (
        f"{chosen['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU" in text
        and f"{chosen['updates']:,} updates" in text
    )
    assert f"({numbers['momentum']['seconds'] / chosen['step_seconds']:.2%})" in text
    assert "assumed: MFU 45% of" in text and text.rstrip().endswith(numbers["command"])


@pytest.mark.parametrize(
    ("argv", "launch"),
    [
        ([*SMALL, "--position", "rotary", "--momentum-learned", "--compile"], []),
        pytest.param(
            LARGE,
            "torchrun --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python".split(),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            [*SMALL, "--gpus", "4", "--momentum-kind", "none"],
            "torchrun --nproc-per-node 4 --standalone --no-python".split(),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_the_command_is_one_that_fairseq_takes(argv, launch, capsys):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import momentum_lm

    assert main([*argv, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    words = shlex.split(numbers["command"])
    assert words[: len(launch) + 1] == [*launch, "fairseq-train"]
    momentum_lm.register()
    args = options.parse_args_and_arch(options.get_training_parser(), words[len(launch) + 1 :])
    train = convert_namespace_to_omegaconf(args)
    chosen, job, config = numbers["chosen"], numbers["job"], numbers["job"]["config"]
    assert (train.dataset.batch_size, train.optimization.update_freq) == (
        chosen["micro_batch"],
        [chosen["update_freq"]],
    )
    assert (train.optimization.max_update, train.task.tokens_per_sample) == (chosen["updates"], job["length"])
    assert train.model.checkpoint_activations == chosen["checkpointing"] and train.model.compile == (
        "--compile" in argv
    )
    assert train.distributed_training.ddp_backend == {"fsdp": "fully_sharded"}.get(chosen["strategy"], "pytorch_ddp")
    for name in ("momentum_kind", "momentum_learned", "position"):
        assert train.model[name] == config[name]
    assert (train.model._name, train.model.decoder_layers, train.model.decoder_embed_dim) == (
        argv[1],
        config["layers"],
        config["dim"],
    )


def test_it_needs_no_fairseq(run_cli):
    argv = [*SMALL, "--arch", "momentum_lm_tiny", "--context", "64"]
    code = f"import sys; from momentum_lm.cli.plan import main; main({argv!r}); print('fairseq' in sys.modules)"
    result = run_cli(["python", "-c", code], env={"FAIRSEQ_COMPAT": "0"})
    assert result.stdout.endswith("False\n"), result.stderr


def test_nothing_fits(capsys):
    argv = "--arch gpt_lm_13b --gpu l40s --gpus 2 --tokens 1B --context 256".split()
    assert main(argv) == 1
    text = capsys.readouterr().out
    said, hints = text.split("nothing fits in 45 of 48 GB. What would:\n")
    assert re.search(r"^fits +no +no +no +no$", said, re.MULTILINE) and "fairseq-train" not in text
    assert re.fullmatch(r"  --gpus \d+ --strategy fsdp --checkpoint-activations\n(  --gpu \w+ .*\n)+", hints)
    assert main([*argv, "--json"]) == 1
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["chosen"] is numbers["command"] is None and hints.split("\n")[0].strip() == numbers["hints"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "momentum_lm_1b"], "--arch momentum_lm_1b: choose one of gpt_lm_tiny, gpt_lm_125m, "),
        (["--gpu", "rtx"], "--gpu rtx: choose one of a100-40gb, a100-80gb, "),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "many"], "argument --gpus: invalid int value: 'many'"),
        (["--tokens", "300X"], "--tokens 300X: give a number, which may end in K, M, B or T, such as 300B"),
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--batch-tokens", "-5"], "--batch-tokens -5: give a number"),
        (["--batch-tokens", "1e6"], "--batch-tokens 1e6: give a number"),
        (["--context", "0"], "--context 0: must be at least 1"),
        (["--vocab-size", "3"], "--vocab-size 3: "),
        (["--mfu", "45"], "--mfu 45: must lie between 0 and 1, such as 0.45"),
        (["--position", "alibi"], "--position alibi: must be one of sinusoidal, learned, rotary"),
        (["--momentum-kind", "none", "--momentum-learned"], "--momentum-learned needs --momentum-kind ema, not none"),
        (["--strategy", "single"], "argument --strategy: invalid choice: 'single'"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    assert main([*SMALL, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_numbers():
    assert [number(text, "--tokens") for text in ("300B", "512K", "1.5t", "2000", "0.5M")] == [
        300 * 10**9,
        512_000,
        15 * 10**11,
        2000,
        500_000,
    ]
