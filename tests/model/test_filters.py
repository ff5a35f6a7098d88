"""Causal filters at every place of the decoder: causality, packing, caches, gates, gradients, and their equations."""

import io
import math

import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.model import Decoder, DecoderConfig, WindowFilter, register_filter
from momentum_lm.model.config import PLACES
from momentum_lm.model.filters import filter_class, heads_at, is_of_filter
from momentum_lm.model.marks import decayed
from momentum_lm.model.positions import document_ids
from momentum_lm.ops.naive import fir_naive

PAD, EOS = 1, 2
KINDS = {
    "ema": dict(momentum_kind="ema", momentum_learned=True),
    "multi_ema": dict(momentum_kind="multi_ema"),
    "fir": dict(momentum_kind="fir"),
    "fir_current": dict(momentum_kind="fir", momentum_taps=5, momentum_current=True),
    "largest": dict(momentum_kind="largest", momentum_taps=2),
}
FORMS = {
    "gpt": {},
    "llama": dict(norm="rms", ffn="gated", activation="silu", bias="none", position="rotary", heads=4, kv_heads=2),
}
CASES = [(kind, place) for kind in KINDS for place in PLACES if place != "depth"] + [("ema", "depth")]


@register_filter("largest")
class Largest(WindowFilter):
    """A kind of one's own, not linear: the largest of a token and those before it, times a learned factor."""

    def __init__(self, heads, size, config):
        super().__init__(heads, size, config)
        self.factor = torch.nn.Parameter(torch.full((heads, 1, size), 0.5))

    def window(self, x):
        return self.factor * x.amax(-2)


every_case = pytest.mark.parametrize("kind,place", CASES)
every_form = pytest.mark.parametrize("form", FORMS)


def build(form="gpt", **options):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, dim=16, ffn_dim=32, layers=2, heads=2, max_positions=64)
    decoder = Decoder(DecoderConfig(**shape | FORMS[form] | options)).double().eval()
    with torch.no_grad():  # make every path count
        for name, parameter in decoder.named_parameters():
            if "proj" in name or "fc" in name:
                parameter.mul_(3)
            if is_of_filter(name) and "gate" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return decoder


def random_tokens(batch=3, length=20, seed=1):
    return torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@every_case
@every_form
def test_no_logit_before_a_changed_token_changes_and_padding_changes_nothing(form, kind, place):
    decoder, tokens = build(form, **KINDS[kind], momentum_at=place), random_tokens(2)
    logits = decoder(tokens)
    changed = tokens.clone()
    changed[:, 7] = 4 + (changed[:, 7] - 3) % 46
    other = decoder(changed)
    assert torch.equal(logits[:, :7], other[:, :7]) and not torch.allclose(logits[:, 7:], other[:, 7:])
    alone = decoder(tokens[:1, :13])
    for where in (slice(7, None), slice(0, 13)):
        row = torch.full((1, 20), PAD)
        row[:, where] = tokens[:1, :13]
        close(decoder(torch.cat([row, tokens[1:]]))[:1, where], alone)


@every_case
@every_form
def test_packed_documents_get_the_logits_that_they_get_alone(form, kind, place):
    decoder, tokens = build(form, **KINDS[kind], momentum_at=place), random_tokens(1)
    tokens[0, [6, 9]] = EOS
    packed = decoder(tokens, segment_ids=document_ids(tokens, EOS))
    for start, end in ((0, 6), (6, 9), (9, 20)):
        close(packed[:, start:end], decoder(tokens[:, start:end]))


@every_case
@every_form
def test_incremental_equals_full_with_left_padding_beams_and_a_shared_prefix(form, kind, place):
    decoder, tokens = build(form, **KINDS[kind], momentum_at=place), random_tokens(4)
    tokens[1, :3] = tokens[3, :6] = PAD
    cache = decoder.new_cache()
    decoder(tokens[:, :8], cache=cache)
    for t in range(8, 14):
        order = torch.tensor([[1, 0, 2, 3], [3, 3, 0, 1]][t % 2])
        tokens = tokens[order]
        cache.select(order)
        close(decoder(tokens[:, t : t + 1], cache=cache), decoder(tokens[:, : t + 1])[:, -1:])
    tokens = random_tokens(3)
    prefix, queries = tokens[:1, :9], tokens[:, 9:].clone()
    queries[1, :4] = PAD
    cache = decoder.new_cache()
    for piece in prefix.split([2, 7], 1):
        decoder(piece, cache=cache)
    logits = decoder(queries, cache=cache.rows(3))
    for row, start in enumerate((0, 4, 0)):
        close(logits[row, start:], decoder(torch.cat([prefix, queries[row : row + 1, start:]], 1))[0, 9:])
    going_on = cache.rows(3)
    decoder(queries, cache=going_on)  # what is left behind is each row's own
    more = random_tokens(3, 2, seed=9)
    logits = decoder(more, cache=going_on)
    for row, start in enumerate((0, 4, 0)):
        whole = torch.cat([prefix, queries[row : row + 1, start:], more[row : row + 1]], 1)
        close(logits[row], decoder(whole)[0, -2:])


@every_case
def test_a_gate_of_zero_is_the_vanilla_model_and_learns(kind, place):
    options = KINDS[kind] | dict(momentum_at=place, momentum_gate="zero")
    gated, vanilla, tokens = build(**options), build(), random_tokens()
    vanilla.load_state_dict({n: p for n, p in gated.state_dict().items() if not is_of_filter(n)})
    assert torch.equal(gated(tokens), vanilla(tokens))
    gated.load_state_dict(vanilla.state_dict())  # and a vanilla checkpoint gains the filters
    gated.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    gates = [p.grad for n, p in gated.named_parameters() if n.endswith(".gate")]
    assert gates and all(float(grad.abs().max()) > 0 for grad in gates)


@every_case
@every_form
def test_training_goes_on_bitwise(form, kind, place):
    """Four updates are two, what a checkpoint holds of model and optimizer, and two more."""

    def train(decoder, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            tokens = random_tokens(seed=step)
            decoder.loss(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
        return decoder

    def start(seed):
        decoder = build(form, **KINDS[kind], momentum_at=place).float().train()
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.mul_(seed)
        return decoder, torch.optim.AdamW(decoder.parameters(), lr=1e-2)

    whole = train(*start(1), range(4))
    decoder, optimizer = start(1)
    train(decoder, optimizer, range(2))
    file = io.BytesIO()
    torch.save((decoder.state_dict(), optimizer.state_dict()), file)
    model_state, optimizer_state = torch.load(io.BytesIO(file.getvalue()))
    decoder, optimizer = start(2)
    decoder.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    train(decoder, optimizer, range(2, 4))
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, decoder.state_dict()[name]), name


@every_case
def test_activation_checkpointing_gives_the_same_gradients(kind, place):
    tokens, gradients = random_tokens(), []
    for flag in (False, True):
        decoder = build(**KINDS[kind], momentum_at=place, checkpoint_activations=flag).train()
        decoder.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@pytest.mark.parametrize("place", ["values", "keys", "queries", "input", "ffn", "embedding"])
def test_a_filter_is_added_to_what_it_filters(place):
    """The same logits as of a vanilla decoder into which the sum is put by a hook."""
    decoder, vanilla = build(momentum_kind="fir", momentum_at=place), build()
    vanilla.load_state_dict({n: p for n, p in decoder.state_dict().items() if not is_of_filter(n)})
    owners = {"input": "self_attn_layer_norm", "ffn": "final_layer_norm", "values": "self_attn.v_proj",
              "keys": "self_attn.k_proj", "queries": "self_attn.q_proj"}  # fmt: skip

    def put(module, weights):
        def added(_, given, out):
            heads, size = weights.shape[1:]
            x = out.unflatten(-1, (heads, size)).transpose(1, 2)
            return fir_naive(x, weights.double(), addend=x)[0].transpose(1, 2).flatten(2)

        module.register_forward_hook(added)

    if place == "embedding":  # scaled afterwards, which a sum of weights does not notice
        put(vanilla.embed_tokens, decoder.momentum_embedding.weights)
    for ours, theirs in zip(decoder.layers, vanilla.layers, strict=True) if place in owners else ():
        holder = ours if place in ("input", "ffn") else ours.self_attn
        put(theirs.get_submodule(owners[place]), getattr(holder, f"momentum_{place}").weights)
    tokens = random_tokens()
    close(decoder(tokens), vanilla(tokens))


def test_depth_adds_the_average_of_the_layers_below():
    decoder = build(momentum_kind="ema", momentum_learned=True, momentum_at="depth", layers=3)
    seen = []
    for layer in decoder.layers:
        layer.self_attn.out_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    plain = build(layers=3)
    plain.load_state_dict({n: p for n, p in decoder.state_dict().items() if not is_of_filter(n)})
    alone = []
    for layer in plain.layers:
        layer.self_attn.out_proj.register_forward_pre_hook(lambda module, given: alone.append(given[0]))
    tokens = random_tokens()
    decoder(tokens), plain(tokens)
    close(seen[0], alone[0])
    assert decoder.layers[0].self_attn.momentum_depth is None  # nothing is below it
    weight = decoder.layers[1].self_attn.momentum_depth.decays().double().repeat_interleave(8)
    close(seen[1], alone_of(decoder, 1, tokens) + weight * seen[0])


def alone_of(decoder, layer, tokens):
    """Attention's output before its projection in one layer, without what is below."""
    found = []
    attention = decoder.layers[layer].self_attn
    depth, attention.momentum_depth = attention.momentum_depth, None
    handle = attention.out_proj.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    decoder(tokens)
    handle.remove()
    attention.momentum_depth = depth
    return found[0]


def test_taps_that_fall_as_powers_are_the_moving_average():
    fir = build(momentum_kind="fir", momentum_taps=40, momentum_eta=0.3)
    ema = build(momentum_kind="ema", momentum_eta=0.3)
    lags = 0.3 ** torch.arange(1, 41, dtype=torch.float64)
    for layer in fir.layers:
        layer.self_attn.momentum.weights = torch.nn.Parameter(lags[:, None, None].expand(-1, 2, 8).clone())
    ema.load_state_dict({n: p for n, p in fir.state_dict().items() if not is_of_filter(n)})
    for layer in ema.layers:
        layer.self_attn.momentum.fixed_log_decay = torch.full((2,), math.log(0.3), dtype=torch.float64)
    torch.testing.assert_close(fir(random_tokens()), ema(random_tokens()), rtol=0, atol=1e-10)


def test_parameters_of_sixteen_taps_are_those_of_multi_ema():
    count = {
        kind: sum(p.numel() for n, p in build(**given).named_parameters() if is_of_filter(n))
        for kind, given in {"fir": dict(momentum_kind="fir", momentum_taps=16), "multi_ema": KINDS["multi_ema"]}.items()
    }
    assert count["fir"] == count["multi_ema"] == 2 * 16 * 16


def test_weights_begin_as_powers_of_eta():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(50, 16, 32, 1, 2, momentum_kind="fir", momentum_current=True, momentum_eta=0.5))
    weights = decoder.layers[0].self_attn.momentum.weights
    torch.testing.assert_close(weights[:, 1, 3], torch.tensor([0.5, 0.25, 0.125]))
    assert not decoder.layers[0].self_attn.momentum.current.any()


@pytest.mark.parametrize("place", PLACES)
def test_heads_of_a_place(place):
    config = DecoderConfig(50, 18, 32, 2, 3, kv_heads=1, head_dim=4, momentum_kind="ema", momentum_at=place)
    expected = {"output": (1, 4), "values": (1, 4), "keys": (1, 4), "queries": (3, 4), "depth": (3, 4),
                "input": (3, 6), "ffn": (3, 6), "embedding": (3, 6), "ffn_hidden": (1, 32)}  # fmt: skip
    assert heads_at(config, place) == expected[place]


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(momentum_at="values"), "momentum_at='values' needs momentum_kind"),
        (
            dict(momentum_kind="ema", momentum_at="values,heads"),
            "momentum_at='values,heads': 'heads' is none of output",
        ),
        (dict(momentum_kind="fir", momentum_at="depth"), "depth is an average over layers, which needs"),
        (dict(momentum_kind="ema", momentum_taps=4), "momentum_taps=4 needs momentum_kind='fir', not ema"),
        (dict(momentum_current=True), "momentum_current=True needs momentum_kind='fir', not none"),
        (dict(momentum_kind="fir", momentum_taps=0), "momentum_taps=0: must be at least 1"),
        (dict(momentum_kind="fir", momentum_learned=True), "momentum_learned=True needs momentum_kind='ema', not fir"),
    ],
)
def test_impossible_filters_name_their_field(options, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig(50, 16, 32, 2, 2, **options)


def test_places_have_one_order():
    config = DecoderConfig(50, 16, 32, 2, 2, momentum_kind="fir", momentum_at="values, output,values")
    assert config.momentum_at == "output,values" and config.places == ("output", "values")


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_tells_what_to_log_of_it(kind):
    (layer,) = Decoder(DecoderConfig(50, 16, 32, 1, 2, **KINDS[kind])).layers
    logged = layer.self_attn.momentum.logged()
    lags = KINDS[kind].get("momentum_taps", 3)
    names = [f"weight_of_lag_{lag}" for lag in range(1, lags + 1)] if "fir" in kind else ["decay"]
    names = [] if kind == "largest" else names
    assert list(logged) == names and all(value.dim() == 1 and not value.requires_grad for value in logged.values())


def test_a_kind_of_ones_own_is_what_its_window_says():
    decoder, x = build(momentum_kind="largest", momentum_taps=2), torch.randn(2, 2, 9, 8).double()
    filtered, state = decoder.layers[0].self_attn.momentum(x)
    factor = decoder.layers[0].self_attn.momentum.factor
    for t in range(9):
        seen = torch.cat([torch.zeros(2, 2, 2, 8).double(), x], 2)[:, :, t : t + 3]
        close(filtered[:, :, t], factor[:, 0] * seen.amax(2))
    assert torch.equal(state, x[:, :, -2:])


def test_padding_on_either_side_of_rows_of_one_batch_after_a_prefix():
    """A shared prefix that is only read, and rows that are padded left, right and within."""
    for kind in ("fir", "fir_current", "largest", "ema", "multi_ema"):
        decoder, prefix = build(**KINDS[kind]), random_tokens(1, 6)
        cache = decoder.new_cache()
        decoder(prefix, cache=cache)
        rows = torch.tensor([[PAD, PAD, 9, 10], [9, 10, PAD, PAD]])
        logits = decoder(rows, cache=cache.rows(2, frozen=True))
        alone = decoder(torch.cat([prefix, torch.tensor([[9, 10]])], 1))[0, 6:]
        close(logits[0, 2:], alone)
        close(logits[1, :2], alone)


def test_a_window_in_half_precision_is_computed_in_fp32():
    @register_filter("layered")
    class Layered(WindowFilter):
        def __init__(self, heads, size, config):
            super().__init__(heads, size, config)
            self.layer = torch.nn.Linear(size, size)

        def window(self, x):
            assert x.dtype == torch.float32
            return self.layer(x[..., -2, :])

    decoder = Decoder(DecoderConfig(50, 16, 32, 2, 2, momentum_kind="layered", momentum_at="output,values")).bfloat16()
    assert decoder(random_tokens()).dtype == torch.bfloat16
    assert decoder.layers[0].self_attn.momentum.layer.weight.dtype == torch.float32
    assert not any(is_of_filter(name) and on for name, on in decayed(decoder).items())


def test_names_of_kinds():
    copy = type("MomentumEMA", (WindowFilter,), {"__module__": "copied"})  # a copy of ours, with our name
    with pytest.raises(ValueError, match="'ema': must be a Python identifier that is not the name of another"):
        register_filter("ema")(copy)
    exported = type("Largest", (WindowFilter,), {"__module__": "transformers_modules.somewhere"})
    assert register_filter("largest")(exported) is exported and filter_class(DecoderConfig(
        50, 16, 32, 2, 2, momentum_kind="largest")) is Largest  # fmt: skip
    for name in ("ema", "none", "two words", ""):
        with pytest.raises(ValueError, match="must be a Python identifier that is not the name of another"):
            register_filter(name)(type("Other", (WindowFilter,), {}))
    with pytest.raises(TypeError, match="is no subclass of MomentumFilter"):
        register_filter("module")(torch.nn.Module)
    register_filter("largest")(Largest)  # a module that is imported again
    with pytest.raises(
        UserError, match=r"momentum_kind='mine': must be one of none, ema, .*largest.*; one of your own"
    ):
        DecoderConfig(vocab_size=50, momentum_kind="mine", dim=16, ffn_dim=32, heads=2, layers=1)
