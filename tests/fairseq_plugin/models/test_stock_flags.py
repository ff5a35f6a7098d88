"""A command line for stock ``--arch transformer_lm_gpt`` works with ``--arch gpt_lm_*`` in its place, or
says why not.
"""

import dataclasses

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModelConfig

import momentum_lm
from momentum_lm.errors import UserError
from momentum_lm.formats.decoder_options import REFUSED, TRANSLATED, WITHOUT_EFFECT, from_fairseq, table

momentum_lm.register()
STOCK = {f.name: f for f in dataclasses.fields(TransformerLanguageModelConfig) if f.name != "_name"}
ELSEWHERE = ("add_bos_token", "tokens_per_sample", "max_target_positions", "tpu")  # of the task and of common
WITH_VALUE = {  # something else than the default
    "activation_fn": "relu",
    "decoder_output_dim": 192,
    "decoder_input_dim": 192,
    "decoder_layers_to_keep": "0,1",
    "adaptive_softmax_cutoff": "10,20",
    "adaptive_input_cutoff": "10,20",
    "character_filters": "[(1, 2)]",
    "decoder_xformers_att_config": "{}",
}


def changed(name):
    if name in WITH_VALUE:
        return WITH_VALUE[name]
    plain = STOCK[name].default
    return (
        (not plain) if isinstance(plain, bool) else type(plain)(plain + 0.5) if isinstance(plain, float) else plain + 1
    )


@pytest.fixture
def task(tmp_path):
    dictionary = Dictionary()
    for i in range(60):
        dictionary.add_symbol(f"w{i}")
    dictionary.save(str(tmp_path / "dict.txt"))

    def build(*words):
        words = [str(tmp_path), "--task", "language_modeling", "--tokens-per-sample", "24", *words]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
        torch.manual_seed(0)
        return tasks.setup_task(cfg.task).build_model(cfg.model).eval()

    return build


@pytest.mark.parametrize("name", [name for name in STOCK if name not in ELSEWHERE])
def test_every_option_of_stock_is_accepted_or_refused_by_name(name):
    ours = {f.name: f for f in dataclasses.fields(getattr(ARCH_MODEL_REGISTRY["gpt_lm_tiny"], "__dataclass"))}
    assert name in ours  # so it is a flag
    assert sum(name in names for names in (REFUSED, TRANSLATED, WITHOUT_EFFECT, table())) == 1
    plain = {n: f.default for n, f in ours.items() if n not in ELSEWHERE}
    config = from_fairseq(plain, 64)
    given = {**plain, name: changed(name)}
    if name == "decoder_embed_dim":
        given[name] = 96
    if name == "decoder_attention_heads":
        given[name] = 6
    if name in REFUSED:
        with pytest.raises(UserError, match=f"^{name}=.*: (this|every) decoder('s)? "):
            from_fairseq(given, 64)
    else:
        same = {
            "share_decoder_input_output_embed",
            "decoder_normalize_before",
            "decoder_input_dim",
            "decoder_output_dim",
        }
        assert (from_fairseq(given, 64) == config) == (name in {*same, *WITHOUT_EFFECT})


SHAPE = "--decoder-layers 2 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 4".split()
EXISTING = [*SHAPE, *"--dropout 0.1 --attention-dropout 0.2 --relu-dropout 0.1 --decoder-normalize-before".split(),
            *"--decoder-input-dim 32 --decoder-output-dim 32 --min-params-to-wrap 1000 --max-target-positions "
            "24".split(),
            *"--share-decoder-input-output-embed --base-shuffle 0 --quant-noise-pq-block-size 4".split()]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--decoder-learned-pos", "--no-scale-embedding", "--activation-fn", "relu"]])
def test_an_existing_command_line_gives_the_same_model(task, more):
    stock = task("--arch", "transformer_lm_gpt", *EXISTING, *more)
    ours = task("--arch", "gpt_lm_125m", *EXISTING, *more)
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randint(4, 64, (3, 20), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours(x)[0], stock(x)[0], rtol=0, atol=1e-5)
    config = ours.decoder.config
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.2, 0.1)
    assert config.position == ("learned" if more else "sinusoidal") and config.scale_embeddings != bool(more)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--adaptive-softmax-cutoff 10", "--adaptive-softmax-cutoff 10: this decoder has one softmax; to save its "
        "memory use "
         "--criterion chunked_cross_entropy; leave it out, or choose --arch transformer_lm_gpt"),
        ("--character-embeddings", "--character-embeddings: this decoder embeds tokens"),
        ("--offload-activations", "to save memory use --checkpoint-activations; leave it out"),
        ("--decoder-output-dim 8", "--decoder-output-dim 8: this decoder has no projection to another width than "
        "--decoder-embed-dim 192"),
        ("--share-decoder-input-output-embed --untie-embeddings", "--share-decoder-input-output-embed contradicts "
        "--untie-embeddings"),
        ("--decoder-learned-pos --position rotary", "--decoder-learned-pos contradicts --position rotary"),
        ("--decoder-attention-heads 5", "--decoder-embed-dim 192 is not a multiple of --decoder-attention-heads 5"),
        ("--momentum-gate zero", "--momentum-gate zero needs --momentum-kind ema, multi_ema or fir"),
    ],
)  # fmt: skip
def test_what_cannot_be_names_the_flag(task, words, message):
    with pytest.raises(UserError) as raised:
        task("--arch", "gpt_lm_tiny", *words.split())
    assert message in str(raised.value)
