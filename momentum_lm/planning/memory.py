"""How much memory a training step needs, found by going through the real step with tensors that have no data.

The decoder, the loss and autograd run as they do in training (torch's FakeTensorMode), and every tensor that they make
or let go is counted, so that nothing here repeats what a block keeps for its backward pass.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from momentum_lm.model import Decoder, DecoderConfig, chunked_cross_entropy
from momentum_lm.model.loss import default_chunk

from .costs import count_parameters

STRATEGIES = ("single", "ddp", "fsdp")
KINDS = ("gradients", "copies", "activations", "loss", "backward")
STAGES = ("last block forward", "loss", "last block backward", "from the first block backward")
LEFT_OUT: dict[str, tuple[str, ...]] = {"fresh": (), "accumulating": ("gradients",), "sharded": ("gradients", "copies")}
Moments = dict[str, Counter[str]]  # the fullest of each stage
SIMULATED_TOKENS = 8192  # fewer than these, and weights may be larger than what is computed with them


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the moment of a training step at which it holds the most."""

    weights: int  # fp32
    gradients: int
    optimizer: int  # Adam's two averages, fp32
    copies: int  # of the blocks' weights, in the precision of autocast
    activations: int  # what the blocks keep for their backward passes
    loss: int  # the logits of a chunk, and the gradients that the loss forms with them
    backward: int  # gradients under way, and what is computed again
    communication: int  # buckets of DDP; gathered weights and gradients to be summed of FSDP

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@functools.lru_cache(maxsize=256)
def step_memory(
    config: DecoderConfig,
    batch: int,
    length: int,
    bf16: bool = True,
    gpu: bool = True,
    accumulate: bool = True,
    strategy: str = "single",
    processes: int = 1,
) -> StepMemory:
    """Memory of forward pass, loss, backward pass and AdamW on ``batch`` sequences of ``length`` tokens, from the
    second step on.

    Args:
        bf16: autocast over fp32 weights; otherwise all is fp32.
        gpu: the loss takes the chunks, and scales its gradients, as on a GPU. Elsewhere both are as on a CPU; attention
            is the fused kernel either way, which keeps its inputs, its output and one number per query.
        accumulate: the gradients of earlier micro-batches (--update-freq above 1) are there from the beginning.
        strategy: "single"; "ddp", with a copy of the gradients in buckets; "fsdp" over ``processes``, which hold a part
            each, gather a block's weights (two at a time) and let its gradients go when they are summed.

    What is not here: the CUDA context, NCCL's buffers and the allocator's gaps. Raises ValueError for another strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    sharded = strategy == "fsdp"
    moments = _moments(
        config, batch, length, bf16, gpu, "sharded" if sharded else "accumulating" if accumulate else "fresh"
    )
    peak = max(moments.values(), key=lambda moment: moment.total()).copy()

    parameters = count_parameters(config)
    weights = 4 * parameters.total
    static = {"weights": weights, "optimizer": 2 * weights, "communication": weights if strategy == "ddp" else 0}
    if accumulate:
        peak["gradients"] = weights
    if sharded:
        static["weights"] = peak["gradients"] = -(-weights // processes)
        static["optimizer"] = 2 * static["weights"]
        width = 2 if bf16 else 4
        # A block's weights at work, the next one's arriving, and the buffer that they arrive in; the gradients of one
        # block, and those
        # of the one before on their way to be summed in fp32. The embeddings stay, in fp32, from their first use to
        # their last.
        in_blocks = config.layers * parameters.block
        static["communication"] = parameters.block * (3 * width + 2 * width + 4) + 4 * (parameters.total - in_blocks)
    return StepMemory(**static, **{kind: peak[kind] for kind in KINDS})


def _moments(config: DecoderConfig, batch: int, length: int, bf16: bool, gpu: bool, view: str) -> Moments:
    """The fullest moments of the step, of which only some sizes are simulated: every stage grows by the same with every
    block, and, once the loss has several chunks, with every sequence.
    """
    if config.layers > 2:
        one, two = (_moments(replace(config, layers=layers), batch, length, bf16, gpu, view) for layers in (1, 2))
        return _extended(one, two, config.layers - 2, 1)
    base = math.ceil(max(SIMULATED_TOKENS, 4 * default_chunk("cuda" if gpu else "cpu", config.vocab_size)) / length)
    if batch > 2 * base:
        once, twice = (_moments(config, sequences, length, bf16, gpu, view) for sequences in (base, 2 * base))
        return _extended(once, twice, batch - 2 * base, base)
    return _simulate(config, batch, length, bf16, gpu)[view]


def _extended(low: Moments, high: Moments, distance: int, step: int) -> Moments:
    """``high`` and ``distance / step`` times what it has more than ``low``."""
    return {
        stage: Counter(
            {kind: high[stage][kind] + (high[stage][kind] - low[stage][kind]) * distance // step for kind in KINDS}
        )
        for stage in STAGES
    }


@functools.lru_cache(maxsize=256)
def _simulate(config: DecoderConfig, batch: int, length: int, bf16: bool, gpu: bool) -> dict[str, Moments]:
    """What is held beside weights and the optimizer's state when it is the most, in each of ``STAGES``, and in three
    views: "fresh", all; "accumulating", where gradients are there anyway; and "sharded", where FSDP has them and the
    copies of the blocks' weights.

    Until the last block's forward pass activations only come; from its backward pass to the first block's they go and
    gradients come, so that one of the two ends holds the most.
    """
    with FakeTensorMode():
        decoder = Decoder(config)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        ledger = _Ledger(decoder, first_gradient_is_one=not gpu)
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = decoder.features(tokens, left_padded=False)
                ledger.part, ledger.now = "loss", {"loss"}
                rows = default_chunk("cuda" if gpu else "cpu", config.vocab_size)
                loss = chunked_cross_entropy(
                    hidden, decoder.output_projection.weight, tokens, config.padding_idx, "sum", rows
                )
                del hidden
            ledger.part, ledger.now = "backward", {"last block backward"}
            loss.backward()
    return ledger.views


class _Ledger(TorchDispatchMode):
    """Bytes of the tensors that are made while it is on, by the part of the step that made them, at the moments of
    :func:`_simulate`.

    ``first_gradient_is_one``: what the loss is told where it asks, as it does on a CPU.
    """

    def __init__(self, decoder: Decoder, first_gradient_is_one: bool) -> None:
        super().__init__()
        self.first_gradient_is_one = first_gradient_is_one
        self.part = "activations"
        self.held: Counter[str] = Counter()
        self.views: dict[str, Moments] = {view: {stage: Counter() for stage in STAGES} for view in LEFT_OUT}
        self.now: set[str] = set()  # stages
        self.kinds: dict[int, str] = {}  # of each living storage
        self.outside = {_key(tensor) for tensor in itertools.chain(decoder.parameters(), decoder.buffers())}
        for parameter in decoder.parameters():
            parameter.register_post_accumulate_grad_hook(self._is_gradient)
        self.block_weights = {_key(parameter) for parameter in decoder.layers.parameters()}
        _at_next_forward(decoder.layers[-1], lambda x: self.now.add("last block forward"))
        _at_next_forward(decoder.layers[-1], lambda x: x.register_hook(self._last_block_is_done))
        _at_next_forward([*decoder.layers, decoder.layer_norm][1], lambda x: x.register_hook(self._first_block_begins))

    def _last_block_is_done(self, gradient: Tensor) -> None:
        self.now.discard("last block backward")

    def _first_block_begins(self, gradient: Tensor) -> None:
        self.now.add("from the first block backward")
        self._look()

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key, size = _key(parameter.grad), parameter.grad.untyped_storage().nbytes()
        self.held[self.kinds[key]] -= size
        self.kinds[key] = "gradients"
        self.held["gradients"] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.first_gradient_is_one
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.kinds and key not in self.outside:
                    copies = func is torch.ops.aten._to_copy.default and _key(args[0]) in self.block_weights
                    self.kinds[key] = "copies" if copies else self.part
                    self.held[self.kinds[key]] += storage.nbytes()
                    weakref.finalize(storage, self._let_go, key, storage.nbytes())
        # inside, where no dispatch mode sees it, this kernel makes a tensor of its input's size
        self._look(args[0].nbytes if func is torch.ops.aten.logsumexp.default else 0)
        return out

    def _let_go(self, key: int, size: int) -> None:
        self.held[self.kinds.pop(key)] -= size

    def _look(self, inside: int = 0) -> None:
        held = self.held.copy()
        held[self.part] += inside
        for view, left_out in LEFT_OUT.items():
            size = held.total() - sum(held[kind] for kind in left_out)
            for stage in self.now:
                if size > self.views[view][stage].total():
                    self.views[view][stage] = Counter({kind: n for kind, n in held.items() if kind not in left_out})


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _at_next_forward(module: nn.Module, action: Callable[[Tensor], object]) -> None:
    """Calls ``action`` with the input of the module's next forward pass, and of no other: a checkpointed block runs
    again.
    """

    def call(module: nn.Module, args: tuple[Tensor]) -> None:
        handle.remove()
        action(args[0])

    handle = module.register_forward_pre_hook(call)
