"""What a momentum language model is, for Hugging Face ``transformers``. A copy of this file lies in every folder with
such a model.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class MomentumLMConfig(PretrainedConfig):
    """Shapes and choices of a decoder with momentum attention (arXiv 2212.10559, section 5).

    ``num_key_value_heads``: heads of keys and values, each shared by as many query heads; 0: as many as query heads.
    ``head_dim``: 0, the width divided by the number of heads. ``position``: sinusoidal, learned, rotary or none.
    ``rotary_base``, and ``rotary_fraction``, the share of a head's dimensions that turn. ``rotary_scaling``: none, or
    llama3:FACTOR,LOW,HIGH,ORIGINAL, the rope_scaling of Llama 3. ``norm``: layer, or rms without a bias; ``norm_eps``
    is added to the variance. ``ffn``: plain, or gated, fc2(activation(fc_gate(x)) * fc1(x)). ``activation``: gelu,
    gelu_accurate (its tanh form), relu or silu. ``bias``: which projections have one, all, qkv or none. ``qk_norm``:
    each head's queries and keys are normalised before positions turn them. ``parallel_residual``: attention and
    feed-forward layer are both of the block's input.

    ``momentum_kind``: none; ema, which adds sum_{i<t} eta^(t-i) v_i to each head; multi_ema, eight learned decays a
    channel of the values; or fir, a learned weight a channel for each of the last ``momentum_taps`` tokens, and with
    ``momentum_current`` for the token itself. ``momentum_at``: where, with commas between: output, of the heads, from
    their values; values, keys, queries, input, ffn, ffn_hidden, embedding, which gain what is filtered of themselves;
    depth, across layers (ema). ``momentum_learned``: one decay a head is learned. ``momentum_normalize``: the weights
    are scaled to sum to 1. ``momentum_gate``: none, or zero, a learned factor that starts at 0.
    ``absent_tokens``: ids that are never predicted. ``padding_idx`` and ``eos_idx``: the ids that the model was trained
    with. The first positions follow from ``padding_idx``, so it stays when ``pad_token_id`` is set to a token of one's
    own.
    """

    model_type = "momentum_lm"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {  # the names in momentum_lm, and in the config.json of earlier versions
        "dim": "hidden_size",
        "ffn_dim": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "max_positions": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
    }

    vocab_size: int = 51200
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 1024
    bos_token_id: int | None = None
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    padding_idx: int = 1
    eos_idx: int = 2
    position: str = "sinusoidal"
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_scaling: str = "none"
    norm: str = "layer"
    norm_eps: float = 1e-5
    ffn: str = "plain"
    activation: str = "gelu"
    bias: str = "all"
    qk_norm: bool = False
    parallel_residual: bool = False
    tie_word_embeddings: bool = True
    scale_embeddings: bool = True
    initializer_range: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    momentum_kind: str = "none"
    momentum_at: str = "output"
    momentum_taps: int = 3
    momentum_current: bool = False
    momentum_eta: float = 0.3
    momentum_learned: bool = False
    momentum_normalize: bool = False
    momentum_gate: str = "none"
    absent_tokens: list[int] | tuple[int, ...] = ()
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # sets what is given under the names of earlier versions
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def places(self) -> tuple[str, ...]:
        """Where there is momentum."""
        return () if self.momentum_kind == "none" else tuple(self.momentum_at.replace(" ", "").split(","))

    @property
    def over_tokens(self) -> tuple[str, ...]:
        """Those of them where a token's filter looks at others."""
        return tuple(place for place in self.places if place != "depth")
