"""What a momentum language model is, for Hugging Face ``transformers``. A copy of this file lies in every folder with
such a model.
"""

from typing import ClassVar

from transformers import PretrainedConfig


class MomentumLMConfig(PretrainedConfig):
    """Shapes and choices of a decoder with momentum attention (arXiv 2212.10559, section 5).

    ``position``: sinusoidal, learned or rotary. ``activation``: gelu, gelu_accurate (its tanh form) or relu.
    ``momentum_kind``: none; ema, which adds sum_{i<t} eta^(t-i) v_i to each head; or multi_ema, eight learned decays a
    channel. ``momentum_learned``: one decay a head is learned. ``momentum_normalize``: the weights are scaled to sum to
    1. ``momentum_gate``: none, or zero, a learned factor that starts at 0. ``absent_tokens``: ids that are never
    predicted. ``padding_idx`` and ``eos_idx``: the ids that the model was trained with. The first positions follow from
    ``padding_idx``, so it stays when ``pad_token_id`` is set to a token of one's own.
    """

    model_type = "momentum_lm"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {  # the names in momentum_lm, and in the config.json of earlier versions
        "dim": "hidden_size",
        "ffn_dim": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
    }

    vocab_size: int = 51200
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    bos_token_id: int | None = None
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    padding_idx: int = 1
    eos_idx: int = 2
    position: str = "sinusoidal"
    activation: str = "gelu"
    tie_word_embeddings: bool = True
    scale_embeddings: bool = True
    initializer_range: float = 0.02
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
