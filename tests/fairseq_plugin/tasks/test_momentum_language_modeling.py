"""One training step: what runs under autocast and what does not."""

import pytest
import torch
from fairseq import criterions, options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import FairseqOptimizer

import momentum_lm

momentum_lm.register()


@pytest.fixture
def build(tmp_path):
    """build(*flags) -> (task, model, criterion)."""
    dictionary = Dictionary()
    for i in range(60):
        dictionary.add_symbol(f"w{i}")
    dictionary.save(str(tmp_path / "dict.txt"))

    def build(*flags):
        words = [
            str(tmp_path),
            "--task",
            "momentum_language_modeling",
            "--arch",
            "momentum_lm_tiny",
            "--momentum-kind",
            "multi_ema",
        ]
        words += ["--criterion", "chunked_cross_entropy", "--tokens-per-sample", "24", *flags]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(0)
        return task, task.build_model(cfg.model), criterions.build_criterion(cfg.criterion, task)

    return build


def sample():
    tokens = torch.randint(4, 64, (3, 21), generator=torch.Generator().manual_seed(0))
    source, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return {
        "net_input": {"src_tokens": source, "src_lengths": source.ne(1).sum(1)},
        "target": target,
        "ntokens": target.numel(),
    }


class Spy(torch.autograd.Function):
    """The identity; writes down whether autocast is on in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        seen.append(("forward", torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), x.dtype))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(("backward", torch.is_autocast_enabled("cpu")))
        return gradient, None


def train_step(task, model, criterion, ignore_grad=False):
    """(what Spy saw of the first feed-forward layer, loss, gradients)"""
    seen = []
    model.zero_grad()
    hook = model.decoder.layers[0].fc1.register_forward_hook(lambda module, inputs, out: Spy.apply(out, seen))
    loss, size, _ = task.train_step(sample(), model, criterion, FairseqOptimizer(None), 1, ignore_grad)
    hook.remove()
    assert size == 60
    return seen, loss.detach(), [p.grad for p in model.parameters()]


def test_forward_under_autocast_and_backward_outside_it(build):
    (seen, loss, plain), (seen_cast, loss_cast, cast) = (
        train_step(*build("--autocast", kind)) for kind in ("none", "bf16")
    )
    assert seen == [("forward", False, False, torch.float32), ("backward", False)]
    assert seen_cast == [("forward", True, False, torch.bfloat16), ("backward", False)]
    assert loss != loss_cast and loss_cast == pytest.approx(float(loss), rel=0.01)
    assert all(gradient.dtype == torch.float32 for gradient in cast)
    assert (
        torch.nn.functional.cosine_similarity(*(torch.cat([g.flatten() for g in x]) for x in (plain, cast)), dim=0)
        > 0.99
    )


def test_autocast_of_a_gpu_reaches_the_model(build):
    """fairseq's own train_step switches it off."""
    built = build("--autocast", "none")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert train_step(*built)[0][0] == ("forward", False, True, torch.float32)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_ignored_gradients_are_zero_and_so_is_the_loss(build):
    _, loss, gradients = train_step(*build(), ignore_grad=True)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("emulated", [False, True])
def test_auto_means_bf16_only_where_the_gpu_computes_it(emulated, build, monkeypatch):
    """What this machine lacks is a GPU, so its answer is given here; before Ampere it is True for emulation alone."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    task, _, _ = build("--autocast", "auto")
    assert isinstance(task._precision("cuda"), torch.autocast) is not emulated
    assert not isinstance(task._precision("cpu"), torch.autocast)
