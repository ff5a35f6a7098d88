"""What a momentum language model is, for Hugging Face ``transformers``. A copy of this file lies in every folder with such a model."""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class MomentumLMConfig(PretrainedConfig):
    """Shapes and choices of a decoder with momentum attention (arXiv 2212.10559, section 5).

    ``position``: sinusoidal, learned or rotary. ``activation``: gelu, gelu_accurate (its tanh form) or relu. ``momentum_kind``: none;
    ema, which adds sum_{i<t} eta^(t-i) v_i to each head; or multi_ema, eight learned decays a channel. ``momentum_learned``: one decay a
    head is learned. ``momentum_normalize``: the weights are scaled to sum to 1. ``momentum_gate``: none, or zero, a learned factor that
    starts at 0. ``absent_tokens``: ids that are never predicted.
    """

    model_type = "momentum_lm"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "max_positions",
        "padding_idx": "pad_token_id",
        "eos_idx": "eos_token_id",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 51200
    dim: int = 768
    ffn_dim: int = 3072
    layers: int = 12
    heads: int = 12
    max_positions: int = 1024
    bos_token_id: int | None = None
    pad_token_id: int = 1
    eos_token_id: int = 2
    position: str = "sinusoidal"
    activation: str = "gelu"
    tie_embeddings: bool = True
    scale_embeddings: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    momentum_kind: str = "none"
    momentum_eta: float = 0.3
    momentum_learned: bool = False
    momentum_normalize: bool = False
    momentum_gate: str = "none"
    absent_tokens: list[int] | tuple[int, ...] = ()
    use_cache: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Every field, under its name in ``momentum_lm`` too, for what goes back there."""
        return {**super().to_dict(), "padding_idx": self.pad_token_id, "eos_idx": self.eos_token_id}
