import pytest
import torch
from fairseq.optim.adam import FairseqAdam
from fairseq.optim.fp16_optimizer import FP16Optimizer
from omegaconf import OmegaConf

import momentum_lm
from momentum_lm.errors import UserError
from momentum_lm.model import Decoder, DecoderConfig

momentum_lm.register()

from momentum_lm.fairseq_plugin.optim.fused_adamw import FusedAdamW, mark_parameters  # noqa: E402


def config(**changes):
    values = {
        "lr": [0.1],
        "adam_betas": "(0.9, 0.98)",
        "adam_eps": 1e-6,
        "weight_decay": 0.0,
        "momentum_lr": None,
        "adam_backend": "torch",
        "use_old_adam": False,
        "fp16_adam_stats": False,
        "tpu": False,
    }
    return OmegaConf.create(values | changes)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2))]


def step(optimizer, scale=1.0):
    loss = sum(((i + 1) * p.pow(3)).sum() for i, p in enumerate(optimizer.params_in_order))
    optimizer.zero_grad()
    optimizer.backward(loss)
    optimizer.multiply_grads(torch.tensor(scale))
    norm = optimizer.clip_grad_norm(1.0)
    optimizer.step()
    return norm


def make(kind, **changes):
    params = parameters()
    optimizer = kind(config(**changes), params)
    optimizer.params_in_order = params
    return optimizer


@pytest.mark.parametrize("foreach", [True, False])
def test_follows_fairseqs_adam(foreach, monkeypatch):
    if not foreach:  # a torch that has it no more
        monkeypatch.delattr(torch, "_foreach_mul_")
    # fairseq adds epsilon before the bias correction of the second moment, torch after it: compare without epsilon
    ours, stock = make(FusedAdamW, adam_eps=1e-15), make(FairseqAdam, adam_eps=1e-15)
    for _ in range(10):
        torch.testing.assert_close(step(ours, 0.3), step(stock, 0.3), rtol=1e-4, atol=0)
    for a, b in zip(ours.params_in_order, stock.params_in_order, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weight_decay_is_for_matrices_alone():
    plain, decayed = make(FusedAdamW), make(FusedAdamW, weight_decay=0.5)
    step(plain), step(decayed)
    for a, b in zip(plain.params_in_order, decayed.params_in_order, strict=True):
        assert torch.equal(a, b) == (a.dim() == 1)


@pytest.mark.parametrize("copied", [False, True])
def test_weight_decay_leaves_momentum_alone(copied):
    """Also in fp32 copies of half-precision parameters, which keep no name."""
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(50, 8, 16, 1, 2, momentum_kind="multi_ema", momentum_gate="zero")
    )  # its matrices have 8 columns too
    if copied:
        model.bfloat16()
    mark_parameters(model)
    params = list(model.parameters())
    if copied:
        params = FP16Optimizer.build_fp32_params(config(), params, flatten=False)
    before = [p.detach().clone() for p in params]
    optimizer = FusedAdamW(config(weight_decay=0.5), params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {
        name
        for (name, _), old, new in zip(model.named_parameters(), before, params, strict=True)
        if not torch.equal(old, new)
    }
    assert (
        decayed == {name for name, p in model.named_parameters() if p.dim() == 2 and "momentum" not in name}
        and len(decayed) == 7
    )


KINDS = {
    "ema": {"momentum_kind": "ema", "momentum_learned": True, "momentum_gate": "zero"},
    "fir everywhere": {"momentum_kind": "fir", "momentum_at": "output,ffn,embedding", "momentum_current": True},
    "multi_ema": {"momentum_kind": "multi_ema"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [False, True])
def test_momentum_has_a_learning_rate_of_its_own(kind, copied):
    """Of torch's AdamW, its groups made by hand, through a schedule and a checkpoint; also of fp32 copies."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(50, 8, 16, 2, 2, **KINDS[kind]))
    mark_parameters(model)
    params = (
        FP16Optimizer.build_fp32_params(config(), list(model.parameters()), False) if copied else model.parameters()
    )
    named = dict(zip([name for name, _ in model.named_parameters()], params, strict=True))
    twin = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    optimizer = FusedAdamW(config(momentum_lr=0.5, weight_decay=0.25), list(named.values()))
    rates = [(1.0, {"weight_decay": 0.25}), (1.0, {"weight_decay": 0.0}), (5.0, {"weight_decay": 0.0})]
    members = [[], [], []]
    for name, p in twin.items():
        members[2 if "momentum" in name else int(p.dim() < 2)].append(p)
    assert all(members)
    groups = [{"params": some, **given} for some, (_, given) in zip(members, rates, strict=True)]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6)

    def schedule(rate):
        for group, (factor, _) in zip(reference.param_groups, rates, strict=True):
            group["lr"] = factor * rate

    schedule(0.1)
    for count in range(6):
        if count == 2:
            optimizer.set_lr(0.03), schedule(0.03)
        if count == 4:  # the command's rate is taken, not the checkpoint's
            state = optimizer.state_dict()
            optimizer = FusedAdamW(config(momentum_lr=0.5, weight_decay=0.25), list(named.values()))
            optimizer.load_state_dict(state, optimizer.optimizer_config)
            schedule(0.1)
        for a, b in zip(named.values(), twin.values(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step(), reference.step()
        assert optimizer.get_lr() == reference.param_groups[0]["lr"]
    for name in named:
        torch.testing.assert_close(named[name], twin[name], rtol=1e-5, atol=1e-6)


def test_state_continues_where_it_stopped_with_todays_flags():
    straight = make(FusedAdamW)
    for _ in range(4):
        step(straight)
    first = make(FusedAdamW)
    step(first), step(first)
    second = make(FusedAdamW)
    for p, q in zip(second.params_in_order, first.params_in_order, strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(first.state_dict(), second.optimizer_config)
    step(second), step(second)
    for a, b in zip(straight.params_in_order, second.params_in_order, strict=True):
        assert torch.equal(a, b)
    changed = make(FusedAdamW, weight_decay=0.25)
    changed.load_state_dict(first.state_dict(), {**changed.optimizer_config, "lr": 0.7})
    decays = {p.dim(): g["weight_decay"] for g in changed.param_groups for p in g["params"]}
    assert decays == {2: 0.25, 1: 0.0} and all(g["lr"] == 0.7 for g in changed.param_groups)


def test_no_clipping_only_measures():
    optimizer = make(FusedAdamW)
    optimizer.backward(sum(p.sum() for p in optimizer.params_in_order))
    assert float(optimizer.clip_grad_norm(0.0)) == pytest.approx((12 + 5 + 4) ** 0.5)
    assert all((p.grad == 1).all() for p in optimizer.params_in_order)


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"adam_betas": "(0.9,)"}, "--adam-betas"),
        ({"adam_betas": "(0.9, 1.5)"}, "--adam-betas"),
        ({"adam_betas": "__import__('os')"}, "--adam-betas"),
        ({"adam_backend": "apex"}, "apex"),
        ({"momentum_lr": 0.1}, "momentum_lr=0.1: this model's momentum learns nothing"),
        ({"momentum_lr": -0.1}, "momentum_lr=-0.1: must not be negative"),
        ({"momentum_lr": 0.1, "lr": [0.0]}, "lr=0.0: must be positive"),
    ],
)
def test_impossible_flags_are_named(changes, word):
    with pytest.raises(UserError, match=word):
        make(FusedAdamW, **changes)


def test_weight_decay_of_a_flat_fp16_buffer_is_refused():
    with pytest.raises(UserError, match="--fp16-no-flatten-grads"):
        FusedAdamW(config(weight_decay=0.1), [torch.nn.Parameter(torch.zeros(10))])
