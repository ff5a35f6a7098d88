"""Each patch, on what fails without it. ``without`` puts fairseq's own piece back to see it fail."""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import fairseq_compat
from momentum_lm.errors import CheckpointError
from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.untrusted import plain_value

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fairseq():
    import fairseq

    return fairseq


# The hook


def test_fairseq_imports_with_the_hook_and_only_with_it(run_cli):
    code = "import fairseq, dataclasses; print(fairseq.__version__, dataclasses.dataclass.__module__)"
    result = run_cli(["python", "-c", code])
    assert result.stdout == "0.12.2 dataclasses\n", result.stderr
    off = run_cli(["python", "-c", code], env={"FAIRSEQ_COMPAT": "0"})
    assert off.returncode == 1 and "mutable default" in off.stderr


def test_hook_imports_nothing_at_python_start(run_cli):
    code = "import os, sys; before = set(sys.modules); import fairseq_compat; print(sorted(set(sys.modules) - before))"
    result = run_cli(["python", "-S", "-c", code], env={"PYTHONPATH": ROOT})
    assert result.stdout == "['__future__', 'fairseq_compat']\n", result.stderr


def test_hook_is_installed_once(run_cli):
    code = (
        "import sys, fairseq_compat as f; f.install(); print(sum(type(x).__name__ == '_Finder' for x in sys.meta_path))"
    )
    assert run_cli(["python", "-c", code]).stdout == "1\n"
    assert run_cli(["python", "-c", code], env={"FAIRSEQ_COMPAT": "0"}).stdout == "0\n"


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14", "3.15"])
def test_hook_runs_on_each_python(version):
    program = shutil.which(f"python{version}")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fairseq_compat; print(type(sys.meta_path[0]).__name__)"
    )
    if not program or subprocess.run([program, "-V"], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    result = subprocess.run([program, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "_Finder\n", result.stderr


def test_warnings_about_fairseqs_own_hydra_are_hidden(fairseq):
    from fairseq.dataclass.initialize import hydra_init

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        fairseq_compat._quiet(fairseq)
        warnings.warn("see https://hydra.cc/docs/upgrades", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        hydra_init()
    assert [str(w.message) for w in shown] == ["something else"]


# Names that NumPy removed


def whole_sentence_blocks():
    from fairseq.data import TokenBlockDataset

    data = [torch.arange(n) for n in (3, 1, 2)]
    return [len(x) for x in TokenBlockDataset(data, [3, 1, 2], block_size=None, pad=1, eos=2, break_mode="eos")]


def spans_without_overlap():
    from fairseq.data.data_utils import compute_mask_indices

    np.random.seed(0)
    return compute_mask_indices((2, 40), None, 0.3, 3, no_overlap=True).sum(1).tolist()


def buckets():
    from fairseq.data import Dictionary, LanguagePairDataset

    data = [torch.full((n,), 4) for n in (3, 3, 5)]
    sizes = np.array([3, 3, 5])
    return LanguagePairDataset(
        data, sizes, Dictionary(), data, sizes, Dictionary(), num_buckets=2
    ).bucketed_num_tokens.tolist()


def crf():
    from fairseq.modules import DynamicCRF

    torch.manual_seed(0)
    return list(DynamicCRF(12, beam_size=4)(torch.randn(2, 5, 12), torch.randint(12, (2, 5)), None).shape)


@pytest.mark.parametrize(
    ("module", "use", "expected"),
    [
        ("data.token_block_dataset", whole_sentence_blocks, [3, 1, 2]),
        ("data.data_utils", spans_without_overlap, [12, 12]),
        ("data.language_pair_dataset", buckets, [3, 3, 5]),
        ("modules.dynamic_crf_layer", crf, [2]),
    ],
)
def test_removed_numpy_names(module, use, expected, fairseq, monkeypatch):
    assert use() == expected
    monkeypatch.setattr(sys.modules[f"fairseq.{module}"], "np", np)
    with pytest.raises((AttributeError, TypeError), match=r"`np\.(int|float)`|compat|interpolation"):
        use()
    assert not hasattr(np, "compat") and "int" not in vars(np)  # everybody else's NumPy is untouched


# torch


def test_encoder_fast_path_takes_a_padding_mask(fairseq, monkeypatch):
    from fairseq.models.transformer import TransformerConfig
    from fairseq.modules import transformer_layer

    torch.manual_seed(0)
    config = TransformerConfig()
    config.encoder.embed_dim, config.encoder.ffn_embed_dim, config.encoder.attention_heads = 16, 32, 2
    config.dropout = config.attention_dropout = 0.0
    slow_layer, layer = (transformer_layer.TransformerEncoderLayerBase(config).eval() for _ in range(2))
    layer.load_state_dict(slow_layer.state_dict())  # this is what turns the fast path on
    assert layer.load_to_BT and layer.can_use_fastpath and not slow_layer.load_to_BT
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[2, 1:] = True
    with torch.no_grad():
        fast = layer(x, padding)  # batch first
        slow = slow_layer(x.transpose(0, 1), padding).transpose(0, 1)
        torch.testing.assert_close(fast[~padding], slow[~padding], atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(transformer_layer, "torch", torch)
        with pytest.raises(RuntimeError, match=r"[Mm]ask [Tt]ype"):
            layer(x, padding)


def test_fairseqs_own_transformers_go_through_torchscript(fairseq):
    """Encoder, decoder and beam search; the encoder's fast path too, with padding and without."""
    from fairseq.data import Dictionary
    from fairseq.models.transformer import TransformerModel, base_architecture
    from fairseq.sequence_generator import SequenceGenerator

    dictionary = Dictionary()
    for symbol in "abcdefgh":
        dictionary.add_symbol(symbol)
    sides = [
        f"{side}_{key}"
        for side in ("encoder", "decoder")
        for key in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
    ]
    shape = argparse.Namespace(**dict(zip(sides, [2, 16, 32, 2] * 2, strict=True)))
    base_architecture(shape)
    torch.manual_seed(0)
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = TransformerModel.build_model(shape, task)
    model.load_state_dict(model.state_dict())  # this is what turns the fast path on
    model.eval()
    scripted = torch.jit.script(model)
    tokens = torch.tensor([[4, 5, 6, 2], [4, 5, 2, 1]])
    with torch.no_grad():
        for rows in (tokens[:1], tokens):
            inputs = rows, rows.ne(1).sum(1), rows
            torch.testing.assert_close(scripted(*inputs)[0], model(*inputs)[0], atol=1e-5, rtol=1e-5)
    search = SequenceGenerator([model], dictionary, beam_size=2, max_len_b=4)
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([4, 3])}}
    found = [best[0]["tokens"].tolist() for best in search.generate([model], sample)]
    assert [best[0]["tokens"].tolist() for best in torch.jit.script(search)(sample)] == found


def test_pytorch_ddp_on_cpu(fairseq, monkeypatch, tmp_path):
    from fairseq.models import distributed_fairseq_model as module

    args = argparse.Namespace(
        tpu=False,
        ddp_backend="pytorch_ddp",
        device_id=0,
        broadcast_buffers=False,
        bucket_cap_mb=25,
        find_unused_parameters=False,
        gradient_as_bucket_view=False,
        ddp_comm_hook="none",
        heartbeat_timeout=-1,
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group, device = torch.distributed.group.WORLD, torch.device("cpu")
        model = module.DistributedFairseqModel(args, torch.nn.Linear(3, 2), group, device)
        model(torch.ones(1, 3)).sum().backward()
        assert model.module.module.weight.grad.tolist() == [[1.0] * 3] * 2
        monkeypatch.setattr(module, "DistributedDataParallel", torch.nn.parallel.DistributedDataParallel)
        with pytest.raises(ValueError, match="device_ids"):
            module.DistributedFairseqModel(args, torch.nn.Linear(3, 2), group, device)
    finally:
        torch.distributed.destroy_process_group()


BROADCAST = """
import os, sys
rank = int(os.fork() == 0)
import torch, fairseq
from fairseq.distributed import utils
from omegaconf import OmegaConf
if sys.argv[2] == "without":
    utils.torch = torch
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
state = {"cfg": OmegaConf.create({"lr": 0.5}), "model": torch.ones(2)} if rank == 0 else None
state = utils.broadcast_object(state, 0, torch.distributed.group.WORLD)
if rank:
    print("received", state["cfg"].lr, state["model"].tolist(), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.exit(rank == 0 and os.wait()[1] != 0)
"""


def test_broadcast_of_a_resumed_configuration(run_cli, tmp_path):
    result = run_cli(["python", "-c", BROADCAST, tmp_path / "a", "with"], warm=True)
    assert result.returncode == 0 and "received 0.5 [1.0, 1.0]" in result.stdout, result.stderr
    without = run_cli(["python", "-c", BROADCAST, tmp_path / "b", "without"], warm=True)
    assert without.returncode and "omegaconf" in without.stderr and "received" not in without.stdout


GATHER = """
import os, sys
rank = int(os.fork() == 0)
import torch, fairseq
from fairseq.distributed import utils
if sys.argv[2] == "without":
    utils.all_gather_list = utils.all_gather_list.__wrapped__
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
found = utils.all_gather_list([{"ncorrect": rank, "loss": 0.5}] * (1 + rank))
print(f"gathered {found}\\n", end="", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.exit(rank == 0 and os.wait()[1] != 0)
"""


def test_processes_of_a_command_import_nothing_from_the_current_folder(fairseq, monkeypatch):
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.distributed.utils import call_main

    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    cfg, seen = FairseqConfig(), []
    cfg.distributed_training.distributed_world_size = 1
    call_main(cfg, lambda cfg: seen.append(os.environ.get("PYTHONSAFEPATH")))
    assert seen == ["1"] and "PYTHONSAFEPATH" not in os.environ


def test_gathering_without_a_gpu(run_cli, tmp_path):
    result = run_cli(["python", "-c", GATHER, tmp_path / "a", "with"], warm=True, env={"CUDA_VISIBLE_DEVICES": ""})
    parts = [[{"ncorrect": 0, "loss": 0.5}], [{"ncorrect": 1, "loss": 0.5}] * 2]
    assert result.returncode == 0 and result.stdout.count(f"gathered {parts}") == 2, result.stderr
    without = run_cli(["python", "-c", GATHER, tmp_path / "b", "without"], warm=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert without.returncode and "gathered" not in without.stdout and re.search("cuda|CUDA|type torch", without.stderr)


# Options


def train_arguments(fairseq, *more):
    from fairseq import options

    words = ["data", "--arch", "transformer_lm", "--task", "language_modeling", *more]
    patched = options.parse_args_and_arch(options.get_training_parser(), words)
    return patched, options.parse_args_and_arch.__wrapped__(options.get_training_parser(), words)


def test_bf16_does_not_turn_on_tpu(fairseq):
    for flag in ("--bf16", "--memory-efficient-bf16"):
        ours, stock = train_arguments(fairseq, flag)
        assert ours.bf16 and not ours.tpu
        assert stock.tpu
    ours, _ = train_arguments(fairseq, "--bf16", "--tpu")
    assert ours.tpu


def test_asynchronous_checkpoints_are_refused_aloud(fairseq, capsys):
    ours, stock = train_arguments(fairseq, "--write-checkpoints-asynchronously")
    assert stock.write_checkpoints_asynchronously and not ours.write_checkpoints_asynchronously
    assert "--write-checkpoints-asynchronously: ignored" in capsys.readouterr().err


def test_trust_flag_leaves_no_trace_in_the_arguments(fairseq, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_TRUST_CHECKPOINT", "")
    ours, _ = train_arguments(fairseq, "--trust-checkpoint")
    assert os.environ["FAIRSEQ_TRUST_CHECKPOINT"] == "1"
    assert not any("trust" in name for name in vars(ours))


# Loading checkpoints


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def plain(tmp_path):
    """A checkpoint with everything that fairseq's trainer saves in one."""
    state = {
        "args": argparse.Namespace(arch="transformer_lm"),
        "model": {"weight": torch.arange(6.0).view(2, 3)},
        "best": np.float64(1.5),
        "counts": [np.int64(3), np.float32(0.5), np.bool_(True)],
    }
    path = tmp_path / "plain.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_load_checkpoint_takes_what_fairseq_saves(plain, mmap):
    state = load_checkpoint(plain, mmap=mmap)
    assert state["args"].arch == "transformer_lm" and state["best"] == 1.5 and state["counts"] == [3, 0.5, True]
    assert state["model"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_load_checkpoint_takes_the_format_of_old_torch(tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt", mmap=True)["model"].tolist() == [1, 1]


def test_stock_fairseq_loads_a_legacy_models_checkpoint(plain, fairseq, monkeypatch):
    from fairseq import checkpoint_utils

    with plain.open("rb") as file:
        assert checkpoint_utils.torch.load(file, map_location="cpu")["args"].arch == "transformer_lm"
    monkeypatch.setattr(checkpoint_utils, "torch", torch)
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        checkpoint_utils.load_checkpoint_to_cpu(str(plain))


@pytest.fixture(params=["cfg", "args"])
def trained(request, tmp_path):
    """A checkpoint of language modelling, in the present form and in the older one."""
    options = {"data": "old", "tokens_per_sample": 32, "add_bos_token": True}
    cfg = {
        "task": {**options, "_name": "language_modeling"},
        "criterion": {"_name": "cross_entropy"},
        "model": {"dropout": 0.1},
    }
    old = {
        "task": "language_modeling",
        "criterion": "cross_entropy",
        "arch": "transformer_lm",
        "max_target_positions": 32,
    }
    state = {"cfg": cfg} if request.param == "cfg" else {"args": argparse.Namespace(**options, **old)}
    history = [{"num_updates": 0, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}]
    torch.save(
        {"model": {}, "optimizer_history": history, "extra_state": {"epoch": 1}, **state}, tmp_path / "trained.pt"
    )
    return tmp_path / "trained.pt"


def test_a_task_for_any_checkpoint_replaces_the_checkpoints_own(trained, fairseq, monkeypatch):
    from fairseq import checkpoint_utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    def load(**overrides):
        state = checkpoint_utils.load_checkpoint_to_cpu(str(trained), {"data": "new", "dropout": 0.0, **overrides})
        cfg = convert_namespace_to_omegaconf(state["args"]) if "args" in state else state["cfg"]
        return cfg.task._name, cfg.task.data, cfg.task.add_bos_token, cfg.criterion._name

    ours = {"task": "icl_classification", "criterion": "icl_classification", "icl_shots": "4"}
    assert load(**ours) == ("icl_classification", "new", True, "icl_classification")
    assert load() == ("language_modeling", "new", True, "cross_entropy")
    if "cfg" in load_checkpoint(trained):
        other = {"task": "momentum_language_modeling", "criterion": "chunked_cross_entropy"}
        assert load(**other)[0] == "language_modeling"  # a task that trains stays what it was
        monkeypatch.setattr(
            checkpoint_utils, "overwrite_args_by_name", checkpoint_utils.overwrite_args_by_name.__wrapped__
        )
        assert load(**ours) == ("language_modeling", "new", True, "cross_entropy")


@pytest.mark.parametrize("trained", ["cfg"], indirect=True)
def test_options_that_name_others_are_read_as_stock_fairseq_reads_them(trained, fairseq):
    """Of a checkpoint of fairseq-hydra-train from the spring of 2021, when it did not write what they mean."""
    from fairseq import checkpoint_utils

    state = load_checkpoint(trained)
    state["cfg"] |= {
        "common": {"seed": 5},
        "optimization": {"lr": [0.1]},
        "lr_scheduler": {"_name": "fixed", "lr": "${optimization.lr}"},
    }
    state["cfg"]["task"]["seed"] = "${common.seed}"
    torch.save(state, trained)
    cfg = checkpoint_utils.load_checkpoint_to_cpu(str(trained))["cfg"]
    assert cfg.task.seed == 5 and cfg.lr_scheduler.lr == [0.1]


ODD = {
    "no options": ({"cfg": None}, "it has no options"),
    "options that are a text": ({"cfg": "a: 1"}, "its cfg is of type str, not a dict"),
    "options of a list": ({"cfg": {"task": [1]}}, "its cfg.task is of type list, not options"),
    "an option that looks elsewhere": ({"cfg": {"task": {"data": "${oc.env:HOME}"}}},
    "refers to something else: .{oc.env:HOME}"),
    "arguments that are a dict": ({"args": {"a": 1}}, "its args are of type dict"),
    "a model of numbers": ({"model": {"decoder.x": 5}}, "decoder.x is no tensor"),
    "a model with numbers for names": ({"model": {5: torch.ones(1)}}, "its model has a name of type int"),
    "no history": ({"optimizer_history": []}, "its optimizer_history is empty"),
    "a history of numbers": ({"optimizer_history": [5]}, "its optimizer_history is not a list of dicts"),
    "negative updates": ({"optimizer_history": [{"num_updates": -1}]}, "its number of updates is -1"),
    "endless updates": ({"optimizer_history": [{"num_updates": 10**30}]}, "its number of updates is 1000"),
    "a number for the optimizer": ({"optimizer_history": [{"optimizer_name": 5}]}, "its optimizer_name is not a name"),
    "a list for what is extra": ({"extra_state": [1]}, "its extra_state is of type list"),
    "a position that is a list": ({"extra_state": {"train_iterator": [1]}}, "its train_iterator is not a dict"),
    "a position that is a word": ({"extra_state": {"train_iterator": {"epoch": "x"}}},
    "its train_iterator's epoch is 'x'"),
    "an optimizer that is a list": ({"last_optimizer_state": [1]}, "its last_optimizer_state is of type list"),
    "an optimizer without groups": ({"last_optimizer_state": {"param_groups": 5}}, "no list of param_groups"),
    "an optimizer of numbers": ({"last_optimizer_state": {"param_groups": [], "state": {0: 5}}},
    "a state that is no dict of dicts"),
    "parts of a list": ({"fsdp_metadata": [1]}, "its fsdp_metadata is of type list"),
    "only its weights": (None, "it has no optimizer_history, so it is not a checkpoint of fairseq's trainer"),
    "ours with 10**9 layers": ({"cfg": {"model": {"position": "rotary", "decoder_layers": 10**9}}},
    "decoder_layers=1000000000: must be at most"),
    "ours with other layers": ({"cfg": {"model": {"position": "rotary", "decoder_layers": 9000}}},
    "0 layers in the checkpoint, 9000 by"),
    "ours with another width": ({"cfg": {"model": {"position": "rotary", "decoder_embed_dim": 1 << 20}}, "model": {
        "decoder.embed_tokens.weight": torch.ones(9, 4), **{f"decoder.layers.{i}.x": torch.ones(1) for i in range(6)}}},
        "is .9, 4. in the"),
    "ours with sparse numbers": ({"cfg": {"model": {"position": "rotary"}},
    "model": {"decoder.x": torch.ones(2).to_sparse()}}, "a sparse tensor"),
    "ours with whole numbers": ({"cfg": {"model": {"position": "rotary"}},
    "model": {"decoder.x": torch.ones(2).long()}}, "x is of int64"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_checkpoints_are_one_line_in_fairseq_too(case, trained, fairseq):
    from fairseq import checkpoint_utils

    entries, message = ODD[case]
    state = load_checkpoint(trained)
    torch.save(
        {"model": {}, "cfg": {}}
        if entries is None
        else {**state, "args": None, "cfg": {"task": {"_name": "language_modeling"}}, **entries},
        trained,
    )
    if "ours with" in case and "layers" in case:
        torch.save({**load_checkpoint(trained), "model": {"decoder.embed_tokens.weight": torch.ones(9, 512)}}, trained)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(trained))
    assert "trained.pt" in str(caught.value) and "\n" not in str(caught.value)


COMPONENTS = {
    "no task": ({"task": None}, "it has no options of its task"),
    "no name": ({"task": {}}, "it does not name its task"),
    "a number for a name": ({"task": {"_name": 5}}, "it does not name its task"),
    "an unknown task": ({"task": {"_name": "nowhere"}},
    "its task 'nowhere' is not known here; if a plugin has it, add --user-dir"),
    "an unknown option": ({"task": {"_name": "language_modeling", "x": 1}},
    "its task language_modeling has an option that it does not take: Key 'x'"),
    "an option of another type": (
        {"task": {"_name": "language_modeling", "tokens_per_sample": "many"}},
            "an option that it does not take: Value 'many'"),
    "an unknown model": ({"model": {"_name": "nothing"}}, "its model 'nothing' is not known here"),
    "a model's option of another type": ({"model": {"_name": "gpt_lm_tiny", "decoder_layers": None}},
        "its model gpt_lm_tiny has an option"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPONENTS)
def test_what_fairseq_does_not_know_is_said_before_it_is_made(case, trained, fairseq):
    from fairseq import checkpoint_utils

    sections, message = COMPONENTS[case]
    good = {
        "task": {"_name": "language_modeling", "data": "nowhere"},
        "model": {"_name": "gpt_lm_tiny"},
        "criterion": {"_name": "cross_entropy"},
    }
    torch.save(
        {
            **load_checkpoint(trained),
            "args": None,
            "cfg": {k: v for k, v in (good | sections).items() if v is not None},
        },
        trained,
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_utils.load_model_ensemble_and_task([str(trained)])
    assert "trained.pt" in str(caught.value) and "\n" not in str(caught.value)
    # training takes states and weights, and makes nothing of these
    checkpoint_utils.load_checkpoint_to_cpu(str(trained))


def test_odd_dictionaries_are_one_line_in_fairseq_too(fairseq, tmp_path):
    from fairseq.data import Dictionary

    from momentum_lm.errors import UserError

    for content, message in ((b"a b\n", "Incorrect dictionary format"), (b"a 1\na 1\n", "Duplicate word"),
        (b"\xff 1\n", "Incorrect encoding"),
                             (b"a " + b"9" * 5000, "Incorrect dictionary format")):  # fmt: skip
        (tmp_path / "dict.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read the dictionary .*dict.txt: {message}"):
            Dictionary.load(str(tmp_path / "dict.txt"))
    (tmp_path / "dict.txt").unlink()
    with pytest.raises(FileNotFoundError):
        Dictionary.load(str(tmp_path / "dict.txt"))


def test_errors_are_shown_without_control_characters(run_cli):
    code = "import fairseq; from momentum_lm.errors import UserError; raise UserError('a\\x1b[31m\\nb\\x9bc')"
    result = run_cli(["python", "-c", code])
    assert result.stderr.splitlines()[-1] == "error: a?[31m b?c"


def test_code_in_a_checkpoint_runs_only_on_request(tmp_path, monkeypatch):
    monkeypatch.delenv("FAIRSEQ_TRUST_CHECKPOINT", raising=False)
    marker, path = tmp_path / "owned", tmp_path / "hostile.pt"
    torch.save({"model": Hostile(marker)}, path)
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match=r"hostile.pt holds posix.system.* trust=True"):
            load_checkpoint(path, mmap=mmap)
    monkeypatch.setenv("FAIRSEQ_TRUST_CHECKPOINT", "0")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not marker.exists()
    load_checkpoint(path, trust=True)
    assert marker.exists()
    marker.unlink()
    monkeypatch.setenv("FAIRSEQ_TRUST_CHECKPOINT", "1")
    load_checkpoint(path)
    assert marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "[].append(1)",
        "x",
        "(lambda: 1)()",
        "",
        "9**9",
        "[0] * 'a'",
        "[" * 5000,
        "[0] * 10**12",
        "[0] * 1000000000",
        "'a' * 1000000000",
        "[[0] * 50000] * 50000",
        "+".join(["[0] * 99999"] * 100),
        "[" + "0," * 600_000 + "]",
        "[0] * (10 * 9",
    ],
)
def test_options_are_plain_values(text, fairseq, monkeypatch):
    monkeypatch.delenv("FAIRSEQ_TRUST_CHECKPOINT", raising=False)
    with pytest.raises(CheckpointError, match="trust=True") as caught:
        fairseq.utils.eval_str_list(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_options_that_fairseq_itself_evaluates_mean_what_they_meant(fairseq):
    """Those of every architecture, among them sums of repeated lists."""
    fields = [
        f
        for configuration in fairseq.models.MODEL_DATACLASS_REGISTRY.values()
        for f in dataclasses.fields(configuration)
    ]
    texts = {field.default for field in fields if isinstance(field.default, str)}
    for arch in ("fconv", "fconv_wmt_en_fr", "fconv_lm", "fconv_lm_dauphin_wikitext103", "fconv_self_att_wp"):
        args = argparse.Namespace()
        fairseq.models.ARCH_CONFIG_REGISTRY[arch](args)
        texts |= {value for value in vars(args).values() if isinstance(value, str)}
    lists = [text for text in texts if text.startswith("[")]
    assert len(lists) >= 10 and any("] * 2 + [" in text for text in lists)
    # a line of fairseq's CodeDataset
    units = str({"audio": "a.wav", "hubert_km100": " ".join(map(str, range(100))) * 100})
    for text in [*lists, units, "(0.9, 0.98)", "1e-3,2", "-1", "None", "True", "{'a': [1]}", " 3"]:
        assert plain_value(text) == eval(text)
    from fairseq import utils
    from fairseq.models import fconv

    assert fconv.eval is utils.eval is fairseq_compat._plain_value
    assert utils.eval_bool("True") is True and utils.eval_bool(True, default="stock") == "stock"


@pytest.mark.parametrize("kind", ["half", "tail", "empty", "text", "zeros", "pickle of a list", "absent", "folder"])
def test_what_is_no_checkpoint_is_named_in_one_line(kind, plain, tmp_path):
    whole = plain.read_bytes()
    path = tmp_path / "bad.pt"
    content = {"half": whole[: len(whole) // 2], "tail": whole[:-1], "empty": b"", "text": b"hello\n" * 99}
    if kind == "zeros":
        path.write_bytes(bytes(len(whole)))
    elif kind == "pickle of a list":
        torch.save([1], path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(content[kind])
    for mmap, trust in ((False, False), (True, False), (False, True)):
        with pytest.raises(CheckpointError, match=r"bad\.pt") as caught:
            load_checkpoint(path, mmap=mmap, trust=trust)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_checkpoint_error_is_a_user_error(capsys):
    from momentum_lm.errors import main_guard

    @main_guard
    def main(argv):
        return load_checkpoint("nowhere.pt") and 0

    assert main([]) == 2
    assert capsys.readouterr().err == "error: cannot read checkpoint nowhere.pt: No such file or directory\n"


# Writing checkpoints


def test_checkpoints_are_written_beside_and_renamed(fairseq, tmp_path, monkeypatch):
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("fsync", os.path.realpath(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", a, b)), replace(a, b)))
    names = ("checkpoint_1_2.pt", "checkpoint_best.pt", "checkpoint_last.pt")
    first, best, last = (str(tmp_path / name) for name in names)
    checkpoint_utils.torch_persistent_save({"model": torch.ones(2)}, first, async_write=True)
    assert PathManager.copy(first, best, overwrite=True) and PathManager.copy(first, last, overwrite=True)
    assert load_checkpoint(best)["model"].tolist() == load_checkpoint(last)["model"].tolist() == [1, 1]
    assert os.path.samefile(first, best)  # a copy is another name
    assert not os.path.samefile(first, last)  # but what tears the last one leaves the others whole
    expected = []
    for path in (first, best, last):
        expected += [("fsync", path + ".tmp")] * (path != best)
        expected += [("replace", path + ".tmp", path), ("fsync", str(tmp_path))]
    assert events == expected
    checkpoint_utils.torch_persistent_save(
        {"model": torch.zeros(2)}, first
    )  # and stays as it is when the first is written anew
    assert load_checkpoint(best)["model"].tolist() == [1, 1] and load_checkpoint(first)["model"].tolist() == [0, 0]
    assert sorted(os.listdir(tmp_path)) == sorted(names)


NO_LINK = """
def no_link(*names):
    raise OSError("this file system has no hard links")
"""
FULL_DISK = """
import os, resource, signal, sys, torch, fairseq
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save, copy = checkpoint_utils.torch_persistent_save, PathManager.copy
os.link = no_link
if sys.argv[1] == "stock":
    save, copy = save.__wrapped__, copy.__wrapped__
state = {"model": torch.zeros(100_000), "other": torch.zeros(10)}
save(state, "new.pt")
open("last.pt", "w").write("the old one")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for number, write in enumerate((lambda: save(state, "new.pt"), lambda: copy("new.pt", "last.pt", overwrite=True))):
    try:
        write()
    except Exception as error:
        print(number, getattr(error, "user_error", False), error)
raise error if len(sys.argv) > 2 else SystemExit
"""


NO_ROOM = """
import os, resource, signal, torch, fairseq
from fairseq.file_io import PathManager
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
torch.save({"model": torch.zeros(100_000)}, "new.pt")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
PathManager.copy("new.pt", "checkpoint_last.pt", overwrite=True)
print(os.path.samefile("new.pt", "checkpoint_last.pt"), sorted(os.listdir()))
"""


def test_the_last_checkpoint_is_another_name_where_the_disk_has_no_room_for_a_file(run_cli, tmp_path):
    result = run_cli(["python", "-c", NO_ROOM], warm=True, cwd=tmp_path)
    assert result.stdout == "True ['checkpoint_last.pt', 'new.pt']\n", result.stderr


def test_full_disk_is_an_error_and_leaves_the_old_checkpoint(run_cli, tmp_path):
    result = run_cli(["python", "-c", NO_LINK + FULL_DISK, "ours"], warm=True, cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("0 True cannot write checkpoint new.pt: [Errno 27] File too large")
    assert lines[1].startswith("1 True cannot write checkpoint last.pt: [Errno 27] File too large")
    assert (tmp_path / "last.pt").read_text() == "the old one"
    assert load_checkpoint(tmp_path / "new.pt")["model"].numel() == 100_000
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "new.pt"]

    run_cli(["python", "-c", NO_LINK + FULL_DISK, "stock"], warm=True, cwd=tmp_path)
    assert (tmp_path / "last.pt").read_bytes()[:11] != b"the old one"
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "last.pt")
    assert "new.pt.tmp" in os.listdir(tmp_path)


KILLED = """
import os, shutil, signal, sys, fairseq
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

def half(source, target, *rest):
    target.write(source.read(len(source.read()) and source.seek(0) or 400))
    target.flush()
    os.kill(os.getpid(), signal.SIGKILL)

copy = PathManager.copy
os.link = no_link
if sys.argv[1] == "stock":
    copy = copy.__wrapped__
    shutil._USE_CP_SENDFILE = shutil._USE_CP_COPY_FILE_RANGE = False
shutil.copyfileobj = half
copy("new.pt", "checkpoint_last.pt", overwrite=True)
"""


def test_killed_while_copying_the_last_checkpoint(run_cli, tmp_path):
    torch.save({"update": torch.ones(1)}, tmp_path / "new.pt")
    for kind in ("ours", "stock"):
        torch.save({"update": torch.zeros(1)}, tmp_path / "checkpoint_last.pt")
        result = run_cli(["python", "-c", NO_LINK + KILLED, kind], warm=True, cwd=tmp_path)
        assert result.returncode == -9, result.stderr
        if kind == "ours":
            assert load_checkpoint(tmp_path / "checkpoint_last.pt")["update"].tolist() == [0]
            assert (tmp_path / "checkpoint_last.pt.tmp").stat().st_size == 400
        else:
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path / "checkpoint_last.pt")


def test_a_leftover_is_never_taken_for_a_checkpoint(fairseq, tmp_path):
    from fairseq import checkpoint_utils

    for name in (
        "checkpoint1.pt",
        "checkpoint_1_20.pt",
        "checkpoint_1_30.pt.tmp",
        "checkpoint2.pt.tmp",
        "checkpoint_last.pt.tmp",
    ):
        (tmp_path / name).write_bytes(b"x")
    for pattern, found in (
        (r"checkpoint(\d+)\.pt", "checkpoint1.pt"),
        (r"checkpoint_\d+_(\d+)\.pt", "checkpoint_1_20.pt"),
    ):
        assert checkpoint_utils.checkpoint_paths(str(tmp_path), pattern) == [str(tmp_path / found)]
    checkpoint_utils.torch_persistent_save({"model": 1}, str(tmp_path / "checkpoint_last.pt"))
    assert load_checkpoint(tmp_path / "checkpoint_last.pt") == {"model": 1}
    assert not (tmp_path / "checkpoint_last.pt.tmp").exists()


# Commands


@pytest.fixture(scope="module")
def train(run_cli, tmp_path_factory):
    """train(*flags): one update of a stock model on ten lines, in half a second after fairseq's import."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "train.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 10)
    words = ["--only-source", "--trainpref", "train.txt", "--validpref", "train.txt", "--destdir", "data"]
    result = run_cli(["fairseq-preprocess", *words], cwd=folder)
    assert result.returncode == 0, result.stderr

    def run(*more, arch="transformer_lm", command=("fairseq-train",), **kwargs):
        shape = ["--decoder-layers", "1", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "16"]
        settings = [
            "--optimizer",
            "adam",
            "--lr",
            "1e-3",
            "--tokens-per-sample",
            "16",
            "--max-tokens",
            "64",
            "--max-update",
            "1",
        ]
        fixed = [
            folder / "data",
            "--task",
            "language_modeling",
            "--arch",
            arch,
            *shape,
            "--decoder-attention-heads",
            "2",
        ]
        return run_cli([*command, *fixed, *settings, "--cpu", "--disable-validation", *more], **kwargs)

    run.data = folder / "data"
    return run


def test_train_refuses_a_hostile_checkpoint_in_one_line(train, tmp_path):
    marker, path = tmp_path / "owned", tmp_path / "hostile.pt"
    torch.save({"model": Hostile(marker)}, path)
    refused = train("--restore-file", path, "--save-dir", tmp_path / "out")
    assert refused.returncode == 1 and not marker.exists()
    assert "Traceback" not in refused.stderr and refused.stderr.strip().splitlines()[-1].startswith("error: checkpoint")
    assert "posix.system" in refused.stderr
    train("--restore-file", path, "--save-dir", tmp_path / "out", "--trust-checkpoint")
    assert marker.exists()


def test_options_in_a_checkpoint_run_no_code(train, run_cli, tmp_path):
    trained = train("--save-dir", tmp_path / "out")
    assert trained.returncode == 0, trained.stderr
    state = load_checkpoint(tmp_path / "out/checkpoint_last.pt")
    assert state["cfg"]["model"]["_name"] == "transformer_lm"
    code = f"__import__('os').system('touch {tmp_path}/OWNED')"
    for changes in ({"character_embeddings": True, "character_filters": code}, {"adaptive_softmax_cutoff": code}):
        torch.save(
            {**state, "cfg": {**state["cfg"], "model": state["cfg"]["model"] | changes}}, tmp_path / "hostile.pt"
        )
        words = ["fairseq-eval-lm", train.data, "--path", tmp_path / "hostile.pt", "--cpu", "--gen-subset", "valid"]
        refused = run_cli(words)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert (
            refused.stderr.splitlines()[-1].startswith('error: "__import__') and "--trust-checkpoint" in refused.stderr
        )
        assert not (tmp_path / "OWNED").exists()
    run_cli([*words, "--trust-checkpoint"])
    assert (tmp_path / "OWNED").exists()


def test_a_state_of_training_that_does_not_fit_is_one_line(train, tmp_path):
    trained = train("--save-dir", tmp_path / "out")
    assert trained.returncode == 0, trained.stderr
    state = load_checkpoint(tmp_path / "out/checkpoint_last.pt")
    groups = [{**group, "params": group["params"][:1]} for group in state["last_optimizer_state"]["param_groups"]]
    torch.save(
        {**state, "last_optimizer_state": {**state["last_optimizer_state"], "param_groups": groups}},
        tmp_path / "odd.pt",
    )
    refused = train("--restore-file", tmp_path / "odd.pt", "--save-dir", tmp_path / "again")
    last = refused.stderr.splitlines()[-1]
    expected = f"error: the state of training in {tmp_path}/odd.pt does not fit this run (ValueError: "
    assert refused.returncode == 1 and last.startswith(expected)
    assert "Traceback" not in refused.stderr and "--reset-optimizer" in last


def test_train_names_a_torn_checkpoint_and_a_missing_one(train, tmp_path):
    save = ("--save-dir", tmp_path / "out")
    first = train(*save, arch="gpt_lm_tiny")
    assert first.returncode == 0, first.stderr
    last = tmp_path / "out/checkpoint_last.pt"
    torn = last.read_bytes()[:5000]
    for path in last.parent.glob("checkpoint*.pt"):
        path.write_bytes(torn)
    torn = train(*save, arch="gpt_lm_tiny")
    assert torn.returncode == 1
    line = torn.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: no checkpoint in {tmp_path / 'out'} is whole (checkpoint_last")
    for name in ("elsewhere.pt", "typo/checkpoint_last.pt"):
        missing = train("--restore-file", name, *save, arch="gpt_lm_tiny")
        assert missing.returncode == 1
        assert missing.stderr.strip().splitlines()[-1] == f"error: --restore-file {name} does not exist"
    assert last.stat().st_size == 5000
    # fairseq's own models start afresh
    assert train("--restore-file", "elsewhere.pt", "--save-dir", tmp_path / "other").returncode == 0
    torn = train(*save)
    line = torn.stderr.strip().splitlines()[-1]
    assert torn.returncode == 1 and line.startswith(f"error: {last} (5,000 bytes) is torn")


def test_weights_that_do_not_fit_are_explained_by_the_model(train, tmp_path):
    """fairseq's trainer says only that it cannot load them."""
    first = train("--save-dir", tmp_path / "a", "--untie-embeddings", arch="gpt_lm_tiny")
    assert first.returncode == 0, first.stderr
    tied = train("--save-dir", tmp_path / "b", "--restore-file", tmp_path / "a/checkpoint_last.pt", arch="gpt_lm_tiny")
    assert tied.returncode == 1 and "Traceback" not in tied.stderr
    assert tied.stderr.splitlines()[-1].startswith("error: ") and "--untie-embeddings" in tied.stderr.splitlines()[-1]


def test_wrong_arguments_are_one_line(train, tmp_path):
    result = train("--no-such-flag", "--save-dir", tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: unrecognized arguments: --no-such-flag; fairseq-train --help lists the options\n"


def test_module_command_says_how_to_use_it(run_cli):
    result = run_cli(["python", "-m", "fairseq_compat", "fairseq-nonsense"])
    assert result.returncode == 2 and result.stderr.startswith("usage: python -m fairseq_compat fairseq-")


# lm-evaluation-harness

REGISTER = """
import sys, lm_eval.models
from lm_eval.api.registry import model_registry as models
print("momentum_lm" in models, "hf" in models, sorted({"torch", "momentum_lm.harness"} & set(sys.modules)))
"""


def test_the_harness_is_told_of_our_model(run_cli):
    pytest.importorskip("lm_eval")
    result = run_cli(["python", "-c", REGISTER])
    assert result.stdout == "True True []\n", result.stderr
    assert run_cli(["python", "-c", REGISTER], env={"FAIRSEQ_COMPAT": "0"}).stdout == "False True []\n"
    again = "import importlib; importlib.reload(lm_eval.models); print(models.get('momentum_lm').__module__)"
    result = run_cli(["python", "-c", f"{REGISTER}print(models.get('momentum_lm').__name__); {again}"])
    assert result.stdout.splitlines()[1:] == ["MomentumLM", "momentum_lm.harness.lm_eval"], result.stderr


def test_a_harness_without_that_register_is_left_alone(run_cli, tmp_path):
    """As older versions; and nothing that fairseq needs reaches the harness's modules."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval/__init__.py").write_text("")
    (tmp_path / "lm_eval/models.py").write_text("import dataclasses, sys\nfound = dataclasses.dataclass.__module__\n")
    code = "import sys, lm_eval.models as m; print(m.found, 'eval' in vars(m), 'torch' in sys.modules)"
    result = run_cli(["python", "-c", code], env={"PYTHONPATH": tmp_path})
    assert result.stdout == "dataclasses False False\n", result.stderr


# Plugins


def write_plugin(folder, name, code):
    (folder / f"{name}.py").write_text(code)
    (folder / f"{name}-1.0.dist-info").mkdir()
    (folder / f"{name}-1.0.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / f"{name}-1.0.dist-info/entry_points.txt").write_text(f"[fairseq.plugins]\n{name} = {name}:register\n")


def test_plugins_register_and_a_broken_one_does_no_harm(run_cli, tmp_path):
    good = """
def register():
    from fairseq.models import ARCH_MODEL_REGISTRY, register_model_architecture
    register_model_architecture("transformer_lm", "good_arch")(lambda args: None)
"""
    write_plugin(tmp_path, "goodplugin", good)
    write_plugin(tmp_path, "brokenplugin", "import nonexistent_module\n")
    code = "from fairseq.models import ARCH_MODEL_REGISTRY as m; print('good_arch' in m, 'momentum_lm_tiny' in m)"
    result = run_cli(["python", "-c", code], env={"PYTHONPATH": tmp_path})
    assert result.stdout == "True True\n", result.stderr
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: fairseq plugin")]
    assert len(warned) == 1 and "brokenplugin" in warned[0] and "nonexistent_module" in warned[0]


def test_installed_plugin_needs_no_user_dir(train, tmp_path):
    result = train("--save-dir", tmp_path, arch="momentum_lm_tiny")
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "checkpoint_last.pt")["cfg"]["model"]["_name"] == "momentum_lm_tiny"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources that says so when it is imported."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "momentum_lm", folder / "momentum_lm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "fairseq_compat.py", folder)
    with (folder / "momentum_lm/__init__.py").open("a") as file:
        file.write("\nprint('the copy is in use')\n")
    return folder


@pytest.mark.nightly
def test_user_dir_from_a_checkout_beside_an_installation(train, checkout, tmp_path):
    result = train("--save-dir", tmp_path / "a", "--user-dir", "momentum_lm", arch="momentum_lm_tiny", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the copy is in use") == 1
    # The installed one's own folder, by its full name.
    result = train("--save-dir", tmp_path / "b", f"--user-dir={ROOT}/momentum_lm", arch="gpt_lm_tiny")
    assert result.returncode == 0 and "the copy is in use" not in result.stdout, result.stderr


def test_user_dir_from_a_checkout_alone(train, checkout, tmp_path):
    """An interpreter that has the requirements, but neither the hook's .pth file nor this package, in
    its environment.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not re.search("momentum_lm|fairseq_compat", entry.name):
            (requirements / entry.name).symlink_to(entry)
    path = {"PYTHONPATH": f"{checkout}:{requirements}"}
    command = (tmp_path / "bare/bin/python", "-m", "fairseq_compat", "fairseq-train")
    more = ["--save-dir", tmp_path, "--user-dir", "momentum_lm", "--criterion", "chunked_cross_entropy"]
    result = train(*more, arch="momentum_lm_tiny", command=command, cwd=checkout, env=path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the copy is in use") == 1
    assert load_checkpoint(tmp_path / "checkpoint_last.pt")["cfg"]["model"]["_name"] == "momentum_lm_tiny"


def test_registering_again_is_harmless(fairseq):
    from fairseq.models import ARCH_MODEL_REGISTRY

    import momentum_lm

    before = set(ARCH_MODEL_REGISTRY)
    momentum_lm.register()
    fairseq.utils.import_user_module(argparse.Namespace(user_dir=str(Path(momentum_lm.__file__).parent)))
    assert set(ARCH_MODEL_REGISTRY) == before and {"gpt_lm_tiny", "momentum_lm_350m"} <= before


def test_configuration_of_our_models_survives_omegaconf(fairseq):
    from fairseq.dataclass.initialize import add_defaults

    config = OmegaConf.create({"model": {"_name": "momentum_lm_tiny"}})
    add_defaults(config)
    assert config.model.momentum_kind in ("none", "ema", "multi_ema")


def test_options_take_the_type_of_an_optional_one(fairseq):
    """From Python 3.14 on, ``str(Optional[int])`` is ``int | None``, of which fairseq made no type."""
    from typing import Any, List, Optional, Union  # noqa: UP035

    from fairseq.dataclass.utils import interpret_dc_type

    expected = {
        Optional[int]: int,  # noqa: UP045
        Union[str, None]: str,  # noqa: UP007
        int | None: int,
        None | float: float,
        Any: str,
        int: int,
        List[int]: List[int],  # noqa: UP006
        Optional[List[str]]: List[str],  # noqa: UP006, UP045
    }
    assert {t: interpret_dc_type(t) for t in expected} == expected
    with pytest.raises(RuntimeError, match="field should be a type"):
        interpret_dc_type("int")


def test_groups_of_arguments_may_hold_groups(fairseq):
    """fairseq gives ``add_args`` a group when it scans a user directory; Python 3.14 refuses groups in it."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument_group("task").add_argument_group("prompts").add_argument("--shots", type=int)
    assert parser.parse_args(["--shots", "4"]).shots == 4


def test_workers_load_batches_of_what_cannot_be_pickled(fairseq):
    from fairseq.data import EpochBatchIterator, FairseqDataset

    class Local(FairseqDataset):  # no process but a forked one knows this class
        def __getitem__(self, index):
            return index

        def __len__(self):
            return 4

    batches = EpochBatchIterator(Local(), collate_fn=sorted, batch_sampler=[[0, 1], [3, 2]], num_workers=1)
    assert list(batches.next_epoch_itr(shuffle=False)) == [[0, 1], [2, 3]]
