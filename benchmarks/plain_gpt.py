"""What train_step.py compares with: a GPT of the same shape as one would write it in plain torch, and its matrix
products alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """Learned positions, pre-norm, tied embeddings; calling it gives the summed cross entropy."""

    def __init__(self, vocab: int, length: int, layers: int, dim: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)

    def head(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    def compile_blocks(self) -> None:
        """Each block and the head by themselves."""
        for block in self.blocks:
            block.compile()
        self.head = torch.compile(self.head)  # type: ignore[method-assign]


class MatrixProducts:
    """The products of a step's forward and backward pass, attention's two included, on random matrices; calling it
    computes them once.
    """

    def __init__(
        self, vocab: int, length: int, layers: int, dim: int, heads: int, batch: int, device: str, dtype: torch.dtype
    ) -> None:
        rows = batch * length
        self.linear = []
        in_a_block = ((dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim))
        for inner, outer, times in [*((*shape, layers) for shape in in_a_block), (dim, vocab, 1)]:
            x, w, g = (
                torch.randn(*shape, device=device, dtype=dtype)
                for shape in ((rows, inner), (outer, inner), (rows, outer))
            )
            self.linear.append((x, w, g, times))
        self.layers = layers
        self.qkv = [
            torch.randn(batch, heads, length, dim // heads, device=device, dtype=dtype, requires_grad=True)
            for _ in range(3)
        ]
        self.upstream = torch.randn_like(self.qkv[0])

    def __call__(self) -> None:
        for x, w, g, times in self.linear:
            for _ in range(times):
                x @ w.T, g @ w, g.T @ x
        for _ in range(self.layers):
            torch.autograd.grad(F.scaled_dot_product_attention(*self.qkv, is_causal=True), self.qkv, self.upstream)
