"""The simulated step against real ones: memory of the process, what autograd keeps, and the whole depth simulated."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.planning import memory
from momentum_lm.planning.costs import count_parameters
from momentum_lm.planning.memory import step_memory
from momentum_lm.planning.traffic import kernel_traffic, torch_traffic

# Trains in a process of its own and prints by how much its memory grew at most. Steps of another shape come first, so
# that libraries
# and their buffers are not counted, then one small step of this shape, which makes Adam's averages.
TRAIN = """
import json, os, sys, torch
from dataclasses import replace
from momentum_lm.cpu import map_large_tensors, return_memory
from momentum_lm.model import Decoder, DecoderConfig

def train(config, batches, length, bf16, micro_batches):
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for batch in batches:
        optimizer.zero_grad()
        for _ in range(micro_batches):
            tokens = torch.randint(4, config.vocab_size, (batch, length if batch > 1 else 32))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model.loss(tokens, tokens, left_padded=False)
            loss.backward()
            del loss
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()

torch.set_num_threads(1)
map_large_tensors()
shape, batch, length, bf16, micro_batches = json.loads(sys.argv[1])
config = DecoderConfig(**shape)
small = replace(config, dim=32, ffn_dim=64, heads=2, kv_heads=2, head_dim=16, layers=1, vocab_size=64)
train(small, (2, 2), 32, bf16, 1)
return_memory()
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
train(config, (1, batch), length, bf16, micro_batches)
with open("/proc/self/status") as file:  # this program's own: ru_maxrss is at least its parent's
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(peak - before)
"""
SMALL = {"vocab_size": 4096, "dim": 256, "ffn_dim": 1024, "layers": 4, "heads": 4}
WIDER = {**SMALL, "dim": 512, "ffn_dim": 2048, "heads": 8}
MOMENTUM = {**SMALL, "momentum_kind": "ema"}
CHECKPOINTED = {**MOMENTUM, "layers": 6, "checkpoint_activations": True}


@pytest.mark.parametrize(
    ("shape", "batch", "length", "bf16", "micro_batches"),
    [
        pytest.param(SMALL, 8, 512, False, 1, id="vanilla"),
        pytest.param(MOMENTUM, 8, 512, True, 1, id="momentum-bf16", marks=pytest.mark.nightly),
        pytest.param(WIDER, 4, 512, True, 2, id="wider-accumulated", marks=pytest.mark.nightly),
        pytest.param({**MOMENTUM, "momentum_learned": True}, 8, 512, False, 1, id="learned", marks=pytest.mark.nightly),
        pytest.param(
            {**SMALL, "momentum_kind": "multi_ema"}, 8, 512, False, 1, id="multi_ema", marks=pytest.mark.nightly
        ),
        pytest.param(CHECKPOINTED, 16, 512, False, 1, id="checkpointed", marks=pytest.mark.nightly),
        pytest.param(CHECKPOINTED, 32, 512, True, 1, id="checkpointed-bf16", marks=pytest.mark.nightly),
    ],
)
def test_memory_is_that_of_a_real_training_process(shape, batch, length, bf16, micro_batches, run_cli):
    result = run_cli(["python", "-c", TRAIN, json.dumps([shape, batch, length, bf16, micro_batches])])
    assert result.returncode == 0, result.stderr[-2000:]
    measured = int(result.stdout)
    planned = step_memory(DecoderConfig(**shape), batch, length, bf16, gpu=False, accumulate=micro_batches > 1).total
    assert measured > 200e6  # far above what else a process takes
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "checkpoint,accumulate,bf16",
    [
        pytest.param(*ways, marks=() if len(set(ways)) == 1 else pytest.mark.nightly)
        for ways in itertools.product([False, True], repeat=3)
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"momentum_kind": "ema"},
        {"momentum_kind": "multi_ema", "position": "rotary"},
        {"tie_embeddings": False, "layers": 1},
    ],
)
def test_memory_is_what_torch_allocates_in_a_real_step(kind, checkpoint, accumulate, bf16):
    """By the allocator's own record, which has neither the C library's gaps nor the buffers of other libraries."""
    shape = {
        "vocab_size": 1500,
        "dim": 128,
        "ffn_dim": 512,
        "layers": 4,
        "heads": 2,
        "checkpoint_activations": checkpoint,
        **kind,
    }
    config = DecoderConfig(**shape)
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(4, 1500, (4, 192))

    def backward():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(tokens, tokens, left_padded=False)
        loss.backward()

    backward()
    optimizer.step()
    if not accumulate:
        optimizer.zero_grad()
    held = sum(
        t.nbytes
        for p in model.parameters()
        for t in (p, p.grad, *optimizer.state[p].values())
        if t is not None and t.dim()
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        backward()
        optimizer.step()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    peak = held + max(itertools.accumulate(size for _, size in changes))
    planned = step_memory(config, 4, 192, bf16, gpu=False, accumulate=accumulate)
    assert planned.total == pytest.approx(peak, rel=0.04)
    assert planned.weights + planned.optimizer + accumulate * planned.gradients == held


@pytest.mark.parametrize("kind", ["none", "ema", "multi_ema"])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps_of_a_block(kind, bf16):
    """With real tensors, counted by autograd itself."""
    config = DecoderConfig(50, 64, 256, 3, 2, momentum_kind=kind)
    block = Decoder(config).layers[1]
    own = {p.untyped_storage().data_ptr() for p in [*block.parameters(), *block.buffers()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(3, 96, 64, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = block(x)
    sizes = [
        t.untyped_storage().nbytes()
        for pointer, t in kept.items()
        if pointer not in own and t.dim() > 1 and t.shape != (64, 64)  # copies of weights are counted apart
        and tuple(t.shape) not in {tuple(s) for p in block.parameters() for s in (p.shape, p.shape[::-1])}
    ]  # fmt: skip
    deep, deeper = (step_memory(replace(config, layers=n), 3, 96, bf16, gpu=False).activations for n in (5, 6))
    assert out.shape == x.shape
    assert deeper - deep == pytest.approx(sum(sizes), rel=0.02)


@pytest.mark.parametrize(
    "changes", [{}, {"checkpoint_activations": True}, {"vocab_size": 20000, "tie_embeddings": False}]
)
@pytest.mark.parametrize("view", ["fresh", "accumulating", "sharded"])
def test_one_and_two_blocks_tell_what_seven_need(changes, view):
    config = DecoderConfig(
        **{"vocab_size": 300, "dim": 64, "ffn_dim": 256, "layers": 7, "heads": 2, "momentum_kind": "ema", **changes}
    )
    told = memory._moments(config, 4, 160, True, True, view)
    seven = memory._simulate(config, 4, 160, True, True)[view]
    assert max(m.total() for m in told.values()) == pytest.approx(max(m.total() for m in seven.values()), rel=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["none", "ema"])
def test_two_batches_tell_what_larger_ones_need(checkpoint, kind):
    """Micro-batches of 5 to 25 chunks of the loss; those of up to 8 are simulated."""
    config = DecoderConfig(51200, 768, 3072, 2, 12, momentum_kind=kind, checkpoint_activations=checkpoint)
    for batch in (13, 29, 64):
        told = memory._moments(config, batch, 2048, True, True, "fresh")
        real = memory._simulate(config, batch, 2048, True, True)["fresh"]
        assert max(m.total() for m in told.values()) == pytest.approx(max(m.total() for m in real.values()), rel=1e-3)


def test_strategies_divide_what_they_say():
    config = DecoderConfig(300, 64, 256, 4, 2)
    weights = 4 * count_parameters(config).total
    single, ddp = (step_memory(config, 2, 64, strategy=s, processes=2) for s in ("single", "ddp"))
    assert (single.weights, single.gradients, single.optimizer, single.communication) == (
        weights,
        weights,
        2 * weights,
        0,
    )
    assert ddp.communication == weights and ddp.total == single.total + weights
    two, eight = (step_memory(config, 2, 64, strategy="fsdp", processes=n) for n in (2, 8))
    assert two.weights + two.gradients + two.optimizer == 2 * weights and two.copies == 0
    assert two.total - eight.total == pytest.approx(4 * weights * (1 / 2 - 1 / 8), abs=100)
    assert two.activations == single.activations
    with pytest.raises(ValueError, match="strategy must be one of single, ddp, fsdp"):
        step_memory(config, 2, 64, strategy="zero")


def test_checkpointing_keeps_one_tensor_a_block():
    shape = DecoderConfig(300, 64, 256, 4, 2, checkpoint_activations=True)
    deep, deeper = (step_memory(replace(shape, layers=n), 8, 128).activations for n in (10, 11))
    assert deeper - deep == pytest.approx(8 * 128 * 64 * 4, rel=0.01)


def test_a_long_context_costs_no_quadratic_memory():
    shape = DecoderConfig(300, 64, 256, 3, 2, momentum_kind="ema")
    short, long = (step_memory(shape, 1, length).activations for length in (1024, 4096))
    assert long == pytest.approx(4 * short, rel=0.01)


def test_traffic_of_momentum():
    shape = DecoderConfig(300, 64, 256, 3, 2, momentum_kind="ema")
    tensor = 2 * 256 * 64 * 2
    assert kernel_traffic(shape, 512) == 8 * tensor and kernel_traffic(shape, 512, bf16=False) == 16 * tensor
    assert kernel_traffic(replace(shape, momentum_learned=True, checkpoint_activations=True), 512) == 12 * tensor
    apart = torch_traffic(shape, 2, 256)
    assert 3 * kernel_traffic(shape, 512) < apart < 30 * kernel_traffic(shape, 512)
    double, triple = torch_traffic(shape, 4, 256), torch_traffic(shape, 6, 256)
    assert triple - double == double - apart  # the weights of a chunk are there once, however large the batch
    assert torch_traffic(shape, 4, 1024) == pytest.approx(2 * torch_traffic(shape, 2, 1024), rel=0.02)
    assert torch_traffic(replace(shape, momentum_kind="multi_ema"), 2, 256) > apart
    fir = replace(shape, momentum_kind="fir")
    assert kernel_traffic(fir, 512) == 9 * tensor  # its weights learn
    once = replace(fir, momentum_at="embedding")
    assert torch_traffic(replace(once, layers=6), 2, 256) == pytest.approx(torch_traffic(once, 2, 256) / 2, abs=1)
    between = replace(shape, momentum_at="depth")
    assert 2 * torch_traffic(replace(between, layers=1), 2, 256) < torch_traffic(between, 2, 256)
