"""Our fairseq models beside stock fairseq ``transformer_lm_gpt``: same function, same checkpoints."""

import argparse

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.sequence_generator import SequenceGenerator

import momentum_lm
from momentum_lm.errors import UserError
from momentum_lm.formats.decoder_options import from_fairseq, training_words
from momentum_lm.formats.state_dict import extras
from momentum_lm.model import Decoder

momentum_lm.register()
SHAPE = [
    "--decoder-layers",
    "2",
    "--decoder-embed-dim",
    "32",
    "--decoder-ffn-embed-dim",
    "64",
    "--decoder-attention-heads",
    "4",
]
STOCK = ["--arch", "transformer_lm_gpt", *SHAPE, "--dropout", "0", "--attention-dropout", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    dictionary = Dictionary()
    for i in range(60):
        dictionary.add_symbol(f"w{i}")
    dictionary.save(str(folder / "dict.txt"))
    return folder


def build(data, *arguments, seed=0, task="language_modeling"):
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(
        parser, [str(data), "--task", task, "--tokens-per-sample", "24", "--criterion", "cross_entropy", *arguments]
    )
    cfg = convert_namespace_to_omegaconf(args)
    built_task = tasks.setup_task(cfg.task)
    torch.manual_seed(seed)
    return built_task.build_model(cfg.model).eval(), built_task, cfg


def tokens(rows=3, length=20):
    return torch.randint(4, 64, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("heads,groups", [(4, 4), (6, 3), (6, 6)])
def test_what_a_command_leaves_out_follows_from_what_it_gives(data, heads, groups):
    """momentum_lm_tiny has 3 heads of 64 dimensions; a command of another shape need not say so twice."""
    shape = ["--decoder-embed-dim", "24", "--decoder-attention-heads", str(heads)]
    grouped = [] if groups == heads else ["--decoder-kv-heads", str(groups)]
    config = build(data, "--arch", "momentum_lm_tiny", *shape, *grouped)[0].decoder.config
    assert (config.heads, config.kv_heads, config.head_dim) == (heads, groups, 24 // heads)
    words = training_words(config)
    assert build(data, *words)[0].decoder.config == config
    assert ("--decoder-kv-heads" in words) == (groups != heads) and "--decoder-head-dim" not in words


@pytest.mark.parametrize("arch", ["llama_lm_tiny", "momentum_llama_lm_tiny"])
def test_a_flag_that_an_architecture_sets_does_not_switch_it_off(data, arch):
    """fairseq makes the opposite of a flag whose default is True."""
    for words in ([], ["--no-scale-embedding"]):
        model, _, cfg = build(data, "--arch", arch, *words)
        assert not model.decoder.config.scale_embeddings
        assert from_fairseq({**cfg.model, "_name": arch}, 64) == model.decoder.config  # what a checkpoint holds
    config = build(data, "--arch", arch, "--norm-eps", "1e-6", "--rotary-base", "5e5", "--bias", "qkv")[
        0
    ].decoder.config
    assert build(data, *training_words(config))[0].decoder.config == config
    assert training_words(config)[1] == arch


@pytest.mark.parametrize("stock_flags,our_flags", [([], []), (["--decoder-learned-pos"], ["--position", "learned"])])
@pytest.mark.parametrize("tied", [True, False])
def test_same_logits_and_same_checkpoints_as_stock_fairseq(data, stock_flags, our_flags, tied):
    stock, _, _ = build(data, *STOCK, *stock_flags, *(["--share-decoder-input-output-embed"] if tied else []))
    ours, _, _ = build(
        data, "--arch", "gpt_lm_125m", *SHAPE, *our_flags, *([] if tied else ["--untie-embeddings"]), seed=1
    )
    x = tokens()
    x[1, 15:] = 1
    assert not torch.allclose(ours(x)[0], stock(x)[0], atol=1e-2)
    state = stock.state_dict()
    ours.load_state_dict(state, strict=True)
    real = x != 1
    torch.testing.assert_close(ours(x)[0][real], stock(x)[0][real], rtol=0, atol=1e-5)
    assert list(ours.state_dict()) != [] and set(ours.state_dict()) == set(state)
    build(data, *STOCK, *stock_flags, *(["--share-decoder-input-output-embed"] if tied else []), seed=2)[
        0
    ].load_state_dict(ours.state_dict(), strict=True)


def test_old_keys_and_missing_ties_are_handled(data):
    ours, _, _ = build(data, "--arch", "gpt_lm_tiny")
    state = ours.state_dict()
    assert state["decoder.version"].item() > 2
    for key in ("decoder.version", "decoder.embed_positions._float_tensor", "decoder.output_projection.weight"):
        del state[key]
    build(data, "--arch", "gpt_lm_tiny", seed=3)[0].load_state_dict(state, strict=True)
    state["decoder.surprise"] = torch.zeros(1)
    for error in (RuntimeError, UserError):  # torch's, for whoever expects it, and one line for a command
        with pytest.raises(
            error, match=r"^the checkpoint's tensors do not fit the model: Unexpected key\(s\) .*surprise[^\n]*$"
        ):
            ours.load_state_dict(state, strict=True)


def test_momentum_has_the_parameters_of_vanilla(data):
    vanilla, momentum = (build(data, "--arch", f"{name}_lm_tiny")[0] for name in ("gpt", "momentum"))
    for (name, a), (other, b) in zip(vanilla.named_parameters(), momentum.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    momentum.load_state_dict(vanilla.state_dict(), strict=True)


def test_every_size_has_its_published_shape():
    shapes = {
        "125m": (12, 768, 12),
        "350m": (24, 1024, 16),
        "1_3b": (24, 2048, 32),
        "2_7b": (32, 2560, 32),
        "6_7b": (32, 4096, 32),
        "13b": (40, 5120, 40),
    }
    for prefix, kind in (("gpt_lm", "none"), ("momentum_lm", "ema")):
        for size, (layers, width, heads) in shapes.items():
            config = getattr(ARCH_MODEL_REGISTRY[f"{prefix}_{size}"], "__dataclass")()
            assert (config.decoder_layers, config.decoder_embed_dim, config.decoder_attention_heads) == (
                layers,
                width,
                heads,
            )
            assert config.decoder_ffn_embed_dim == 4 * width and str(config.momentum_kind) == kind


def test_stock_and_our_configurations_describe_the_same_decoder(data):
    _, _, stock = build(data, *STOCK, "--share-decoder-input-output-embed")
    _, _, ours = build(data, "--arch", "gpt_lm_125m", *SHAPE)
    as_dict = [vars(c.model) if isinstance(c.model, argparse.Namespace) else dict(c.model) for c in (stock, ours)]
    assert from_fairseq(as_dict[0], 64) == from_fairseq(as_dict[1], 64)


@pytest.mark.parametrize(
    "name,value",
    [
        ("adaptive_softmax_cutoff", "10"),
        ("character_embeddings", True),
        ("decoder_normalize_before", False),
        ("layernorm_embedding", True),
        ("decoder_output_dim", 8),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}="):
        from_fairseq({"decoder_embed_dim": 32, name: value}, 64)


@pytest.mark.parametrize("arch", ["gpt_lm_tiny", "momentum_lm_tiny"])
@pytest.mark.parametrize(
    "flags",
    [[], ["--momentum-kind", "multi_ema"], ["--position", "rotary", "--momentum-kind", "ema", "--momentum-learned"]],
)
@pytest.mark.parametrize("beam", [1, 4])
def test_fairseq_generation_equals_search_without_cache(data, arch, flags, beam):
    """SequenceGenerator with incremental states and reordered beams finds what it finds by recomputing every prefix."""
    model, task, _ = build(data, "--arch", arch, *flags)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    prefix = tokens(3, 4)
    prefix[1, 2:] = 1
    sample = {"id": torch.arange(3), "net_input": {"src_tokens": prefix, "src_lengths": torch.tensor([4, 2, 4])}}
    found = []
    for incremental in (True, False):
        generator = SequenceGenerator([model], task.target_dictionary, beam_size=beam, max_len_b=12)
        if not incremental:
            generator.model.has_incremental = False
        found.append(generator.generate([model], sample, prefix_tokens=prefix, bos_token=2))
    for with_cache, without in zip(*found, strict=True):
        for a, b in zip(with_cache, without, strict=True):
            assert a["tokens"].tolist() == b["tokens"].tolist()
            torch.testing.assert_close(a["score"], b["score"], rtol=0, atol=1e-4)


def test_core_decoder_reads_the_adapters_weights(data):
    model, _, cfg = build(data, "--arch", "momentum_lm_tiny")
    core = Decoder(from_fairseq(dict(cfg.model), 64)).eval()
    state = {name.removeprefix("decoder."): tensor for name, tensor in model.state_dict().items()}
    core.load_state_dict({name: state[name] for name in state.keys() - extras(core.config)}, strict=True)
    assert torch.equal(core(tokens()), model(tokens())[0])


def test_eta_outside_zero_and_one_names_the_flag(data):
    with pytest.raises(UserError, match="--momentum-eta"):
        build(data, "--arch", "momentum_lm_tiny", "--momentum-eta", "1.5")
