"""The decoder as a function: causality, padding, packing, caches. Its parity with fairseq is tested in tests/models."""

import shutil
import sysconfig
from pathlib import Path
from unittest import mock

import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.formats.decoder_options import from_fairseq
from momentum_lm.model import Decoder, DecoderConfig, packed
from momentum_lm.model.positions import document_ids

KINDS = {
    "vanilla": {},
    "ema": dict(momentum_kind="ema"),
    "learned": dict(momentum_kind="ema", momentum_learned=True, momentum_normalize=True),
    "multi_ema": dict(momentum_kind="multi_ema"),
}
LLAMA = dict(norm="rms", ffn="gated", activation="silu", bias="none", position="rotary", scale_embeddings=False)
FORMS = {
    "sinusoidal": {},
    "learned": dict(position="learned"),
    "rotary": dict(position="rotary"),
    "none": dict(position="none"),
    "components": dict(norm="rms", ffn="gated", bias="qkv", parallel_residual=True, qk_norm=True, head_dim=10),
    "partial": dict(position="rotary", rotary_fraction=0.5, rotary_base=50.0, rotary_scaling="llama3:8,1,4,12"),
    "llama": LLAMA | dict(heads=4, kv_heads=2, qk_norm=True),
}
PAD, EOS = 1, 2


def build(kind="ema", form="sinusoidal", **options):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, dim=16, ffn_dim=32, layers=2, heads=2, max_positions=64)
    config = DecoderConfig(**shape | FORMS[form] | KINDS[kind] | options)
    decoder = Decoder(config).double().eval()
    with torch.no_grad():  # fairseq's initial weights are small: make every path count
        for name, parameter in decoder.named_parameters():
            if "proj" in name or "fc" in name:
                parameter.mul_(3)
    return decoder


def random_tokens(batch=3, length=20, seed=1):
    return torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)


@every_kind
@every_form
def test_no_logit_before_a_changed_token_changes(kind, form):
    decoder, tokens = build(kind, form), random_tokens(1)
    logits = decoder(tokens)
    for t in (0, 7, 19):
        changed = tokens.clone()
        changed[0, t] = 4 + (changed[0, t] - 3) % 46
        other = decoder(changed)
        assert torch.equal(logits[:, :t], other[:, :t])
        assert not torch.allclose(logits[:, t:], other[:, t:])


@every_kind
@every_form
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, form, side):
    decoder, tokens = build(kind, form), random_tokens(2)
    alone = decoder(tokens[:1, :13])
    row = torch.full((1, 20), PAD)
    where = slice(7, None) if side == "left" else slice(0, 13)
    row[:, where] = tokens[:1, :13]
    logits = decoder(torch.cat([row, tokens[1:]]))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[:1, where], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[1:], decoder(tokens[1:]), rtol=0, atol=1e-12)


@every_kind
@every_form
def test_packed_documents_get_the_logits_that_they_get_alone(kind, form):
    decoder, tokens = build(kind, form), random_tokens(2)
    starts = [(0, 6, 13), (0, 9)]
    for row, row_starts in enumerate(starts):
        for start in row_starts[1:]:
            tokens[row, start] = EOS
    packed = decoder(tokens, segment_ids=document_ids(tokens, EOS))
    for row, row_starts in enumerate(starts):
        for start, end in zip(row_starts, [*row_starts[1:], 20], strict=True):
            torch.testing.assert_close(
                packed[row : row + 1, start:end], decoder(tokens[row : row + 1, start:end]), rtol=0, atol=1e-12
            )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # on a CPU, where FlexAttention is one operation after another, it has no backward pass
@pytest.mark.parametrize("form", ["sinusoidal", "llama"])
def test_packed_documents_by_flex_attention_as_by_a_mask(form, monkeypatch):
    """As on a GPU. 300 tokens are three blocks."""
    decoder, tokens = build("learned", form, max_positions=300, head_dim=16).float(), random_tokens(2, 300)
    tokens[0, [7, 130, 131, 290]] = tokens[1, 200] = EOS
    ids = document_ids(tokens, EOS)
    results = []
    for flex in (False, True):
        monkeypatch.setattr(packed, "usable", lambda *given, flex=flex: flex)
        with mock.patch.object(packed, "attend", wraps=packed.attend) as attend:
            results.append(decoder(tokens, segment_ids=ids))
        assert attend.called == flex
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@every_kind
@every_form
def test_changing_document_one_changes_no_bit_of_document_two(kind, form):
    decoder, tokens = build(kind, form).float(), random_tokens(1)
    tokens[0, 9] = EOS
    changed = tokens.clone()
    changed[0, :9] = 4 + (changed[0, :9] - 3) % 46
    one, other = (decoder(x, segment_ids=document_ids(x, EOS)) for x in (tokens, changed))
    assert torch.equal(one[:, 9:], other[:, 9:]) and not torch.equal(one[:, :9], other[:, :9])


@every_kind
@every_form
@pytest.mark.parametrize("pieces", [[1] * 20, [5, 1, 1, 8, 5], [20]])
def test_incremental_equals_full(kind, form, pieces):
    decoder, tokens = build(kind, form), random_tokens()
    cache, logits = decoder.new_cache(), []
    for piece in tokens.split(pieces, 1):
        logits.append(decoder(piece, cache=cache))
    torch.testing.assert_close(torch.cat(logits, 1), decoder(tokens), rtol=0, atol=1e-12)
    assert cache.length == 20


@every_kind
@every_form
def test_incremental_equals_full_after_left_padding_with_beams_reordered_at_every_step(kind, form):
    decoder, tokens = build(kind, form), random_tokens(4)
    tokens[1, :3] = tokens[3, :6] = PAD
    generator = torch.Generator().manual_seed(3)
    cache = decoder.new_cache()
    decoder(tokens[:, :8], cache=cache)
    for t in range(8, 20):
        order = torch.randint(4, (4,), generator=generator)
        tokens = tokens[order]
        cache.select(order)
        step = decoder(tokens[:, t : t + 1], cache=cache)
        torch.testing.assert_close(step, decoder(tokens[:, : t + 1])[:, -1:], rtol=0, atol=1e-12)


@every_kind
@every_form
def test_queries_of_unequal_length_share_a_prefix(kind, form):
    decoder, tokens = build(kind, form), random_tokens(3)
    prefix, queries = tokens[:1, :9], tokens[:, 9:].clone()
    queries[1, :4] = PAD
    cache = decoder.new_cache()
    decoder(prefix, cache=cache)
    logits = decoder(queries, cache=cache.rows(3))
    for row, start in enumerate((0, 4, 0)):
        whole = torch.cat([prefix, queries[row : row + 1, start:]], 1)
        torch.testing.assert_close(logits[row, start:], decoder(whole)[0, 9:], rtol=0, atol=1e-12)
    assert cache.length == 9 and cache.layers[0].keys.shape[0] == 1  # the shared cache is as it was


@pytest.mark.parametrize("kind", ["ema", "learned", "multi_ema"])
def test_zero_gate_is_the_vanilla_model_bit_for_bit_and_learns(kind):
    vanilla, gated = build("vanilla"), build(kind, momentum_gate="zero")
    gated.load_state_dict(vanilla.state_dict())
    if kind != "ema":  # without a gate, momentum that has learned nothing would be a random addition
        with pytest.raises(RuntimeError, match="momentum"):
            build(kind).load_state_dict(vanilla.state_dict())
    tokens = random_tokens()
    assert torch.equal(gated(tokens), vanilla(tokens))
    gated.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(layer.self_attn.momentum.gate.grad.abs().sum() > 0 for layer in gated.layers)


def test_a_decay_that_is_not_learned_is_the_options_and_not_the_checkpoints():
    """Checkpoints once had two entries for it."""
    loaded = build("ema", momentum_eta=0.2, momentum_normalize=True)
    state = build("ema", momentum_eta=0.7).state_dict()
    assert not any("momentum" in name for name in state)
    state |= {f"layers.{i}.self_attn.momentum.fixed_log_decay": torch.full((2,), -0.36) for i in (0, 1)}
    state |= {f"layers.{i}.self_attn.momentum.normalized": torch.ones(()) for i in (0, 1)}
    loaded.load_state_dict(dict(state))
    assert loaded.layers[1].self_attn.momentum.decays().tolist() == pytest.approx([0.2, 0.2])
    with pytest.raises(RuntimeError, match="fixed_log_decay"):
        build("vanilla").load_state_dict(state)


def test_same_seed_same_parameters_with_and_without_ema():
    vanilla, momentum = build("vanilla"), build("ema")
    assert [name for name, _ in vanilla.named_parameters()] == [name for name, _ in momentum.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(vanilla.parameters(), momentum.parameters(), strict=True))
    assert not torch.allclose(vanilla(random_tokens()), momentum(random_tokens()))


@pytest.mark.parametrize("normalize", [False, True])
def test_momentum_attention_is_the_papers_formula(normalize):
    """out_proj receives Attn + sum_{i<t} eta^(t-i) v_i, per head."""
    decoder = build("ema", momentum_eta=0.7, momentum_normalize=normalize)
    vanilla = build("vanilla")
    attention, plain = decoder.layers[0].self_attn, vanilla.layers[0].self_attn
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    values = attention.v_proj(x)
    expected = torch.zeros_like(values)
    for t in range(11):
        for i in range(t):
            expected[:, t] += 0.7 ** (t - i) * values[:, i] * (0.3 / 0.7 if normalize else 1)
    difference = attention(x) - plain(x)
    torch.testing.assert_close(difference, expected @ attention.out_proj.weight.T, rtol=0, atol=1e-6)  # decay: fp32


@every_kind
def test_loss_is_cross_entropy_of_the_logits(kind):
    decoder, tokens = build(kind), random_tokens()
    tokens[1, 15:] = PAD
    source, target = tokens[:, :-1], tokens[:, 1:]
    reference = torch.nn.functional.cross_entropy(
        decoder(source).flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="none"
    ).view(target.shape)
    torch.testing.assert_close(decoder.loss(source, target), reference.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(decoder.loss(source, target, reduction="none"), reference.detach(), rtol=0, atol=1e-12)


@every_kind
@pytest.mark.parametrize("form", ["sinusoidal", "llama"])
def test_activation_checkpointing_gives_the_same_gradients(kind, form):
    tokens, gradients = random_tokens(), []
    for flag in (False, True):
        decoder = build(kind, form, checkpoint_activations=flag).train()
        decoder.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ema", "learned", "multi_ema"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_decays_in_fp32(kind, dtype):
    eta = {} if kind == "multi_ema" else dict(momentum_eta=0.999)
    decoder = build(kind, **eta).float()
    before = decoder.layers[0].self_attn.momentum.decays().clone()
    decoder = decoder.to(dtype)
    assert decoder.embed_tokens.weight.dtype == dtype
    after = decoder.layers[0].self_attn.momentum.decays()
    assert after.dtype == torch.float32 and torch.equal(before, after)
    logits = decoder(random_tokens())
    assert logits.dtype == dtype and torch.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_rotary_angles_in_fp32(dtype):
    """bf16 frequencies are off by up to 0.4%, which at position 1,024 is a third of a turn."""
    decoder = build(form="rotary").float()
    positions = torch.arange(1025)[None]
    exact = positions[0, :, None].double() * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for rotary in (decoder.rotary, decoder.to(dtype).rotary):
        for ours, function in zip(rotary(positions), (torch.cos, torch.sin), strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours[0, 0].double(), function(exact), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["sinusoidal", "llama"])
def test_bf16_autocast_trains_close_to_fp32(form):
    tokens = random_tokens(4)
    gradients = []
    for enabled in (False, True):
        decoder = build("learned", form).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            decoder.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
        assert gradients[-1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.filterwarnings("ignore")  # of what torch.compile does
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++")))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
@pytest.mark.parametrize("form", [pytest.param("sinusoidal", marks=pytest.mark.nightly), "llama"])
def test_compiled_blocks_compute_the_same(form):
    decoder = build("learned", form).float()
    tokens = random_tokens()
    expected = decoder(tokens)
    names = list(decoder.state_dict())
    decoder.compile_blocks()
    torch.testing.assert_close(decoder(tokens), expected, rtol=1e-4, atol=1e-5)
    assert list(decoder.state_dict()) == names


def test_untied_and_tied_output():
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.output_projection.weight is tied.embed_tokens.weight
    assert untied.output_projection.weight is not untied.embed_tokens.weight


def test_absent_tokens_are_never_predicted_and_cost_nothing_to_others():
    plain, absent = build(), build(absent_tokens=(0, 1, 3, 40))
    absent.load_state_dict(plain.state_dict(), strict=True)
    assert plain.state_dict().keys() == absent.state_dict().keys() and plain.output_projection.absent is None
    tokens = random_tokens()
    logits, expected = absent(tokens), plain(tokens)
    kept = [i for i in range(expected.shape[-1]) if i not in (0, 1, 3, 40)]
    assert torch.equal(logits[..., kept], expected[..., kept]) and (logits[..., [0, 1, 3, 40]] == -torch.inf).all()
    targets = tokens.roll(-1, 1).masked_fill(torch.isin(tokens.roll(-1, 1), torch.tensor([0, 3, 40])), 5)
    whole = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum"
    )
    torch.testing.assert_close(absent.loss(tokens, targets), whole)
    absent.loss(tokens, targets).backward()
    assert all(parameter.grad.isfinite().all() for parameter in absent.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("given", ["0,1,3", [3, 1, 0], (0, 1, 3), "3, 1,0,", "0,1,1,3"])
def test_absent_tokens_of_a_checkpoint(given):
    assert from_fairseq({"absent_tokens": given}, 50).absent_tokens == (0, 1, 3)
    assert from_fairseq({}, 50).absent_tokens == from_fairseq({"absent_tokens": ""}, 50).absent_tokens == ()


@pytest.mark.parametrize("given", ["a", "0;1", 7, [None], "50", "-1"])
def test_absent_tokens_that_are_none(given):
    with pytest.raises(UserError, match="absent_tokens="):
        from_fairseq({"absent_tokens": given}, 50)


def test_the_weights_of_an_untied_model_do_not_go_into_a_tied_one():
    tied, untied = build(), build(tie_embeddings=False)
    before = tied.embed_tokens.weight.clone()
    with pytest.raises(UserError, match="needs tie_embeddings=False"):
        tied.load_state_dict(untied.state_dict())
    assert torch.equal(tied.embed_tokens.weight, before)
    with torch.no_grad():
        untied.output_projection.weight.copy_(untied.embed_tokens.weight)
        untied.embed_tokens.weight[7] = untied.output_projection.weight[7] = float("nan")
    tied.load_state_dict(untied.state_dict())
    assert tied.embed_tokens.weight[7].isnan().all() and tied.output_projection.weight is tied.embed_tokens.weight


def test_cache_misuse_is_refused():
    decoder, tokens = build(position="learned"), random_tokens(2)
    with pytest.raises(ValueError, match="packed"):
        decoder(tokens, cache=decoder.new_cache(), segment_ids=torch.zeros_like(tokens))
    tokens[0, -1] = PAD
    with pytest.raises(ValueError, match="left"):
        decoder(tokens, cache=decoder.new_cache())
    with pytest.raises(ValueError, match="64"):
        decoder(random_tokens(1, 65))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(momentum_kind="ema", momentum_eta=0.0), "momentum_eta="),
        (dict(momentum_kind="ema", momentum_eta=1.0), "momentum_eta="),
        (dict(momentum_kind="ema", momentum_eta=float("nan")), "momentum_eta="),
        (dict(momentum_kind="cubic"), "momentum_kind='cubic'"),
        (dict(momentum_learned=True), "momentum_learned=True needs momentum_kind='ema', not none"),
        (dict(momentum_gate="zero"), "momentum_gate='zero' needs"),
        (dict(position="circular"), "position='circular'"),
        (dict(activation="sin"), "activation='sin'"),
        (dict(heads=3), "dim=16 is not a multiple of heads=3"),
        (dict(layers=0), "layers=0: must be at least 1"),
        (dict(position="rotary", heads=16), "position='rotary' needs an even head size"),
        (dict(position="rotary", head_dim=7), "position='rotary' needs an even head size, and it is 7"),
        (dict(position="rotary", rotary_fraction=0.4), "an even head size, and 16 / 2 is 8, of which 0.4 is 3"),
        (dict(position="rotary", rotary_fraction=0.0), "rotary_fraction=0.0: must be more than 0 and at most 1"),
        (dict(position="rotary", rotary_base=0.5), "rotary_base=0.5: must be at least 1"),
        (dict(rotary_base=5e5), "rotary_base=500000.0 needs position='rotary', not sinusoidal"),
        (dict(heads=4, kv_heads=3), "heads=4 is not a multiple of kv_heads=3"),
        (dict(norm="batch"), "norm='batch'"),
        (dict(position="rotary", rotary_scaling="yarn:4"), "rotary_scaling='yarn:4': must be none, or llama3:FACTOR"),
        (dict(position="rotary", rotary_scaling="llama3:8,4,1,9"), "rotary_scaling='llama3:8,4,1,9': must be none"),
    ],
)
def test_impossible_configurations_name_their_field(options, message):
    shape = dict(vocab_size=50, dim=16, ffn_dim=32, layers=2, heads=2)
    with pytest.raises(UserError, match=message):
        DecoderConfig(**shape | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoder_layers": 10**9}, "decoder_layers=1000000000: must be at most 10,000"),
        ({"decoder_layers": True}, "decoder_layers=True: must be a whole number"),
        ({"decoder_layers": 2.5}, r"decoder_layers=2\.5: must be a whole number"),
        ({"decoder_layers": "9" * 5000}, "decoder_layers='9{78}…: must be a whole number"),
        ({"decoder_embed_dim": 1 << 30}, "decoder_embed_dim=1073741824: must be at most 1,048,576"),
        ({"max_target_positions": -5}, "max_target_positions=-5: must be at least 1"),
        ({"dropout": float("nan")}, "dropout=nan: must be a probability"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0\.1: must be a probability"),
        ({"position": "rotary", "untie_embeddings": "False"}, "untie_embeddings='False': must be True or False"),
        ({"momentum_learned": 2}, "momentum_learned=2: must be True or False"),
        ({"position": 5}, "position=5: must be a word"),
        ({"momentum_kind": "x" * 999}, "momentum_kind='x{78}…: must be a word"),
    ],
)
def test_options_have_types_and_bounds(options, message):
    with pytest.raises(UserError, match=message):
        from_fairseq(options, 50)


def test_options_may_be_numbers_of_other_kinds():
    config = from_fairseq(
        {"decoder_layers": 3.0, "decoder_embed_dim": "32", "untie_embeddings": 1, "position": "rotary", "dropout": 0},
        50,
    )
    assert (config.layers, config.dim, config.dropout) == (3, 32, 0.0) and from_fairseq({}, 50).layers == 6
    with pytest.raises(UserError, match="a dictionary of 2 entries lacks the special symbols"):
        from_fairseq({}, 2)
