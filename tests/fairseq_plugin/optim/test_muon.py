"""``--optimizer muon`` beside torch's own Muon and AdamW, each used by hand for its part of a copy of the model."""

import copy
import re

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import build_optimizer
from fairseq.optim.fp16_optimizer import FP16Optimizer

import momentum_lm
from momentum_lm.errors import UserError

momentum_lm.register()

from momentum_lm.fairseq_plugin.optim.muon import Muon  # noqa: E402

SHAPE = """--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 --decoder-attention-heads 4
--dropout 0 --attention-dropout 0""".split()
ATTENTION = r"decoder\.layers\.\d\.self_attn\.(q|k|v|out)_proj\.weight"
PLAIN = rf"{ATTENTION}|decoder\.layers\.\d\.fc[12]\.weight"
# model -> its words, and the names of its blocks' matrices
MODELS = {
    "ours": (["--arch", "momentum_lm_tiny", "--momentum-learned", "--momentum-gate", "zero"], PLAIN),
    "ours, untied": (["--arch", "gpt_lm_tiny", "--untie-embeddings", "--position", "learned"], PLAIN),
    "ours, eight decays": (["--arch", "momentum_lm_tiny", "--momentum-kind", "multi_ema"], PLAIN),
    "ours, gated": (
        ["--arch", "momentum_llama_lm_tiny", "--decoder-kv-heads", "2", "--qk-norm"],
        rf"{ATTENTION}|decoder\.layers\.\d\.(fc1|fc2|fc_gate)\.weight",
    ),
    "stock": (["--arch", "transformer_lm"], PLAIN),
    "stock, tied": (["--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed"], PLAIN),
    "stock, adaptive": (
        "--arch transformer_lm --adaptive-softmax-cutoff 20,40 --criterion adaptive_loss --adaptive-input "
        "--adaptive-input-cutoff 20,40".split(),
        PLAIN,
    ),
    "stock, characters": (["--arch", "transformer_lm", "--character-embeddings"], PLAIN),
    "stock, of other widths": ("--arch transformer_lm --decoder-input-dim 8 --decoder-output-dim 12".split(), PLAIN),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    dictionary = Dictionary()
    for i in range(60):
        dictionary.add_symbol(f"w{i}")
    dictionary.save(str(folder / "dict.txt"))
    return folder


@pytest.fixture
def build(data):
    """build(words) -> (fairseq's configuration, model)."""

    def make(*words):
        parser = options.get_training_parser()
        own = [data, "--task", "language_modeling", "--tokens-per-sample", "24", "--optimizer", "muon", *SHAPE]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(w) for w in [*own, *words]]))
        torch.manual_seed(0)
        return cfg, tasks.setup_task(cfg.task).build_model(cfg.model)

    return make


def loss_of(model):
    tokens = torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    hidden = model(tokens)
    if getattr(model, "adaptive_softmax", None) is not None:
        outputs, targets = model.adaptive_softmax(hidden[0], tokens.roll(-1, 1))
        return sum(
            torch.nn.functional.cross_entropy(o, t, reduction="sum")
            for o, t in zip(outputs, targets, strict=True)
            if o is not None
        )
    return torch.nn.functional.cross_entropy(hidden[0].flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum")


def make_optimizer(cfg, model):
    Muon.prepare(cfg, model)
    return build_optimizer(cfg.optimizer, list(model.parameters()))


def muons_of(optimizer):
    return [p for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]]


@pytest.mark.parametrize("kind", MODELS)
def test_the_matrices_of_the_blocks_are_muons_and_everything_else_is_adamws(kind, build):
    words, matrices = MODELS[kind]
    cfg, model = build(*words, "--weight-decay", "0.1")
    optimizer = make_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    muons = {names[p] for p in muons_of(optimizer)}
    assert muons == {name for name in names.values() if re.fullmatch(matrices, name)} and len(muons) in (12, 14)
    rest = {names[p] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    assert rest == set(names.values()) - muons
    undecayed = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {
        name for p, name in names.items() if p.dim() < 2 or name.endswith(("momentum.delta", "momentum.gamma"))
    }


@pytest.mark.parametrize("kind", ["ours", "ours, eight decays", "stock", "stock, adaptive"])
@pytest.mark.parametrize("own_decay", [None, 0.3])
def test_equals_torchs_two_optimizers_used_by_hand(kind, own_decay, build):
    words, matrices = MODELS[kind]
    words = [*words, "--lr", "1e-2", "--muon-lr", "0.05", "--muon-momentum", "0.9", "--weight-decay", "0.1"]
    cfg, model = build(*words, *([] if own_decay is None else ["--muon-weight-decay", own_decay]))
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(cfg, model)
    named = dict(twin.named_parameters())
    blocks = [p for name, p in named.items() if re.fullmatch(matrices, name)]
    rest = [p for name, p in named.items() if not re.fullmatch(matrices, name)]
    decayed = {p for name, p in named.items() if p.dim() > 1 and not name.endswith(("delta", "gamma"))}
    groups = [
        {"params": [p for p in rest if p in decayed]},
        {"params": [p for p in rest if p not in decayed], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True)
    muon = torch.optim.Muon(blocks, lr=0.05, momentum=0.9, weight_decay=0.1 if own_decay is None else own_decay)
    losses = []
    for step in range(5):
        factor = (step + 1) / 5  # warm-up
        optimizer.set_lr(factor * 1e-2)
        for part, rate in ((adamw, 1e-2), (muon, 0.05)):
            for group in part.param_groups:
                group["lr"] = factor * rate
        optimizer.zero_grad()
        optimizer.backward(loss_of(model))
        optimizer.step()
        adamw.zero_grad(), muon.zero_grad()
        loss = loss_of(twin)
        loss.backward()
        adamw.step(), muon.step()
        losses.append(float(loss.detach()))
        assert optimizer.get_lr() == pytest.approx(factor * 1e-2)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=0, atol=1e-6)


def test_what_half_precision_trains_is_marked_too(build):
    """--bf16: fairseq's fp32 copies of the parameters, which keep no name."""
    cfg, model = build("--arch", "momentum_lm_tiny", "--bf16")
    Muon.prepare(cfg, model)
    model.bfloat16()
    named = dict(model.named_parameters())
    optimizer = FP16Optimizer.build_optimizer(cfg, list(named.values()))
    names = dict(zip(optimizer.fp32_params, named, strict=True))
    muons = {names[p] for p in muons_of(optimizer.fp32_optimizer)}
    assert muons == {name for name in named if re.fullmatch(PLAIN, name)}
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.backward(loss_of(model).float())
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    assert muons <= {name for name, p in named.items() if not torch.equal(p, before[name])}


def test_a_state_goes_on_bit_for_bit_and_with_todays_rates(build):
    words = [*MODELS["ours"][0], "--lr", "1e-2", "--weight-decay", "0.1"]

    def steps(optimizer, model, count):
        for _ in range(count):
            optimizer.zero_grad()
            optimizer.backward(loss_of(model))
            optimizer.step()

    cfg, model = build(*words)
    straight = make_optimizer(cfg, model)
    steps(straight, model, 4)
    cfg, first = build(*words)
    optimizer = make_optimizer(cfg, first)
    steps(optimizer, first, 2)
    cfg, second = build(*words)
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(cfg, second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()), resumed.optimizer_config)
    steps(resumed, second, 2)
    for (name, a), b in zip(model.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    changed, other = build(*words, "--muon-lr", "0.5")
    other = make_optimizer(changed, other)
    other.load_state_dict(optimizer.state_dict(), {"lr": 1e-3, "weight_decay": 0.25, "eps": 1e-3})
    found = [[group[name] for name in ("lr", "weight_decay", "eps")] for group in other.param_groups]
    assert found == [[1e-3, 0.25, 1e-3], [1e-3, 0.0, 1e-3], [pytest.approx(0.05), 0.25, 1e-7]]


def test_momentum_has_its_own_rate_here_too(build):
    cfg, model = build(*MODELS["ours"][0], "--lr", "1e-2", "--muon-lr", "0.05", "--momentum-lr", "0.03")
    optimizer = make_optimizer(cfg, model)
    optimizer.set_lr(1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        wanted = 5e-3 if re.fullmatch(PLAIN, name) else 3e-3 if "momentum" in name else 1e-3
        assert rates[id(parameter)] == pytest.approx(wanted), name


@pytest.mark.parametrize(
    "words,said",
    [
        (["--fp16"], "--fp16 does not go with --optimizer muon"),
        (["--fp16", "--memory-efficient-fp16"], "--memory-efficient-fp16 does not go with --optimizer muon"),
        (["--bf16", "--memory-efficient-bf16"], "--memory-efficient-bf16 does not go with --optimizer muon"),
        (["--amp"], "--amp does not go with --optimizer muon"),
        (["--use-bmuf"], "--use-bmuf does not go with --optimizer muon"),
        (["--zero-sharding", "os"], "--zero-sharding os does not go with --optimizer muon"),
        (["--ddp-backend", "fully_sharded"], "--ddp-backend fully_sharded does not go with --optimizer muon"),
        (["--ddp-backend", "slowmo"], "--ddp-backend slowmo does not go with --optimizer muon"),
        (["--muon-lr", "0"], "muon_lr=0.0: must be positive"),
        (["--muon-momentum", "1"], "muon_momentum=1.0: must be"),
        (["--muon-weight-decay=-1"], "muon_weight_decay=-1.0: must not be negative"),
        (["--lr", "0"], "lr=0.0: must be positive"),
        (["--adam-betas", "(0.9,)"], "--adam-betas"),
    ],
)
def test_what_does_not_go_with_it_is_named(words, said, build):
    cfg, model = build("--arch", "transformer_lm", *words)
    with pytest.raises(UserError, match=re.escape(said)):
        make_optimizer(cfg, model)


def test_an_older_torch_is_named(build, monkeypatch):
    cfg, model = build("--arch", "transformer_lm")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"torch 2\.9 or later, and this is"):
        make_optimizer(cfg, model)


def test_a_model_without_matrices_of_blocks_is_refused(build):
    """As is one whose parameters nobody marked, rather than trained by AdamW alone."""
    cfg, model = build("--arch", "transformer_lm")
    with pytest.raises(UserError, match="finds no matrices to train"):
        build_optimizer(cfg.optimizer, list(model.parameters()))
    linear = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    with pytest.raises(UserError, match="finds no matrices to train"):
        make_optimizer(cfg, linear)


def test_frozen_embeddings_leave_adamw_nothing(build):
    cfg, model = build("--arch", "transformer_lm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.fullmatch(PLAIN, name) is not None)
    optimizer = make_optimizer(cfg, model)
    before = copy.deepcopy(model)
    optimizer.backward(loss_of(model))
    optimizer.step()
    optimizer.set_lr(1e-3)
    assert optimizer.get_lr() == 1e-3
    changed = {
        name
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
