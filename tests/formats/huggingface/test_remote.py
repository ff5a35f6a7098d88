"""Exported momentum models in transformers, against our own decoder with the same random weights."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from momentum_lm.errors import UserError  # noqa: E402
from momentum_lm.formats.families import MOMENTUM  # noqa: E402
from momentum_lm.formats.remote.configuration_momentum_lm import MomentumLMConfig  # noqa: E402
from momentum_lm.formats.remote.modeling_momentum_lm import CHUNK, MomentumLMForCausalLM  # noqa: E402
from momentum_lm.formats.to_huggingface import write_model  # noqa: E402
from momentum_lm.lm.huggingface import HuggingFaceLM, load_huggingface  # noqa: E402
from momentum_lm.model import Decoder, DecoderConfig  # noqa: E402
from momentum_lm.model.config import default, options  # noqa: E402

VOCAB, PAD = 61, 1
SHAPE = dict(vocab_size=VOCAB, dim=32, ffn_dim=48, layers=2, heads=4, max_positions=160)
MOMENTA = {
    "none": {},
    "ema": dict(momentum_kind="ema", momentum_eta=0.7),
    "ema_learned": dict(momentum_kind="ema", momentum_learned=True),
    "ema_normalized": dict(momentum_kind="ema", momentum_normalize=True),
    "ema_gated": dict(momentum_kind="ema", momentum_learned=True, momentum_normalize=True, momentum_gate="zero"),
    "multi_ema": dict(momentum_kind="multi_ema"),
    "multi_ema_gated": dict(momentum_kind="multi_ema", momentum_gate="zero"),
}
LLAMA = dict(
    kv_heads=2, head_dim=12, norm="rms", norm_eps=1e-6, ffn="gated", activation="silu", bias="qkv", qk_norm=True,
    position="rotary", rotary_base=500.0, rotary_fraction=0.5, rotary_scaling="llama3:8,1,4,64", scale_embeddings=False,
)  # fmt: skip
OTHERS = {
    "sinusoidal": {},
    "learned_untied": dict(position="learned", tie_embeddings=False, scale_embeddings=False, activation="relu"),
    "rotary": dict(position="rotary", scale_embeddings=False, activation="gelu_accurate"),
    "untied_absent": dict(tie_embeddings=False, absent_tokens=(0, 5)),
    "llama": LLAMA,
    "llama_untied": LLAMA | dict(tie_embeddings=False, kv_heads=1),
    "parallel": dict(position="none", parallel_residual=True, qk_norm=True, bias="none", kv_heads=2),
}
SOME = [
    MOMENTA["none"],
    MOMENTA["ema"] | OTHERS["rotary"],
    MOMENTA["ema_gated"] | OTHERS["untied_absent"],
    MOMENTA["multi_ema"] | OTHERS["learned_untied"],
    MOMENTA["ema_gated"] | OTHERS["llama"],
    MOMENTA["multi_ema"] | OTHERS["llama_untied"],
]
LATER = {  # what config.json had not in earlier versions
    "num_key_value_heads", "head_dim", "norm", "norm_eps", "ffn", "bias", "qk_norm", "parallel_residual",
    "rotary_base", "rotary_fraction", "rotary_scaling",
}  # fmt: skip
close = torch.testing.assert_close


def pair(**changes):
    """Our decoder, and the exported model with its weights."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**SHAPE, **changes})).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=0.3)
    return decoder, exported(decoder)


def configuration(decoder):
    """The exported model's, of a DecoderConfig."""
    return MomentumLMConfig(**MOMENTUM.config(decoder, decoder.vocab_size))


def exported(decoder):
    model = MomentumLMForCausalLM(configuration(decoder.config)).eval().requires_grad_(False)
    state = {
        "lm_head.weight" if name == "output_projection.weight" else f"model.{name}": tensor
        for name, tensor in decoder.state_dict().items()
    }
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def learned():
    return pair(**MOMENTA["ema_gated"])


def random_tokens(*shape, seed=1):
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths, seed=2):
    """Rows of tokens, and the batch of them with its mask."""
    rows = [random_tokens(length, seed=seed + i) for i, length in enumerate(lengths)]
    width = max(lengths)
    tokens = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    return rows, tokens, tokens.ne(PAD).long()


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_logits_are_those_of_the_decoder(momentum, other):
    decoder, model = pair(**MOMENTA[momentum], **OTHERS[other])
    for length in (1, 5, CHUNK, CHUNK + 1, 3 * CHUNK + 7):
        tokens = random_tokens(2, length)
        expected = decoder(tokens)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    whole, cache, start = model(tokens).logits, None, 0
    for step in (40, 1, 1, 9, 1, 31, 20):
        found = model(tokens[:, start : start + step], past_key_values=cache, use_cache=True)
        cache, logits = found.past_key_values, found.logits
        close(logits, whole[:, start : start + step], atol=1e-5, rtol=1e-5)
        start += step
    assert start == tokens.shape[1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [
        MOMENTA["ema"],
        MOMENTA["multi_ema"] | OTHERS["rotary"],
        MOMENTA["ema_gated"] | OTHERS["learned_untied"],
        MOMENTA["ema_gated"] | OTHERS["llama_untied"],
        MOMENTA["multi_ema"] | OTHERS["llama"],
    ],
)
def test_padding_changes_nothing(changes, implementation):
    """On the left, on the right, and between two calls."""
    decoder, model = pair(**changes)
    model.set_attn_implementation(implementation)
    rows, tokens, mask = left_padded([41, 1, 33])
    logits = model(tokens, attention_mask=mask).logits
    right = model(tokens.flip(1).masked_fill(mask.flip(1) == 0, PAD), attention_mask=mask.flip(1)).logits
    for i, row in enumerate(rows):
        alone = decoder(row[None])[0]
        close(logits[i, -len(row) :], alone, atol=1e-5, rtol=1e-5)
        close(right[i, : len(row)], decoder(row.flip(0)[None])[0], atol=1e-5, rtol=1e-5)
    more, others, other_mask = left_padded([2, 5, 4], seed=9)
    cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    logits = model(others, attention_mask=torch.cat([mask, other_mask], 1), past_key_values=cache).logits
    for i, (row, next_row) in enumerate(zip(rows, more, strict=True)):
        close(
            logits[i, -len(next_row) :], decoder(torch.cat([row, next_row])[None])[0, len(row) :], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("changes", SOME)
def test_generation(changes):
    """Greedy and with beams, in a padded batch, one by one, and without any cache by our decoder."""
    decoder, model = pair(**changes)
    rows, tokens, mask = left_padded([7, 3, 12])
    for beams in (1, 3):
        settings = dict(
            num_beams=beams, do_sample=False, max_new_tokens=40, suppress_tokens=[PAD]
        )  # to our decoder it is no token
        batch = model.generate(tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :]
        assert len({tuple(row.tolist()) for row in batch}) == 3
        for row, found in zip(rows, batch, strict=True):
            alone = model.generate(row[None], **settings)[0, len(row) :]
            assert found[: len(alone)].tolist() == alone.tolist() and found[len(alone) :].eq(PAD).all()
            plain = _Plain(model.config, decoder).generate(row[None], use_cache=False, **settings)[0, len(row) :]
            assert plain.tolist() == alone.tolist()
            if beams == 1:
                expected = row[None]
                for _ in range(len(alone)):
                    logits = decoder(expected)[:, -1:].index_fill(-1, torch.tensor([PAD]), -torch.inf)
                    expected = torch.cat([expected, logits.argmax(-1)], 1)
                assert expected[0, len(row) :].tolist() == alone.tolist()


class _Plain(MomentumLMForCausalLM):
    """The decoder's logits of whole rows."""

    def __init__(self, config, decoder):
        super().__init__(config)
        self.decoder = decoder

    def forward(self, input_ids, **unused):
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.decoder(input_ids))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [*SOME, MOMENTA["multi_ema_gated"] | OTHERS["rotary"]])
def test_packed_documents_do_not_see_each_other(changes, implementation):
    """As padding-free training has them: by positions that begin anew. To the last bit, through chunks of any place and
    length."""
    decoder, model = pair(**changes)
    model.set_attn_implementation(implementation)
    documents = [random_tokens(length, seed=length) for length in (5, CHUNK + 8, 1, CHUNK + 1, 2 * CHUNK + 6)]
    packed = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    alone = torch.cat([decoder(document[None])[0] for document in documents])
    everything = torch.ones_like(packed)
    for given in ({}, {"use_cache": False}, {"attention_mask": everything}):
        close(model(packed, position_ids=positions, **given).logits[0], alone, atol=2e-5, rtol=1e-5)
    others = packed.clone()
    others[0, : 5 + CHUNK + 8] = 7
    start = 5 + CHUNK + 8
    assert torch.equal(
        model(others, position_ids=positions).logits[0, start:], model(packed, position_ids=positions).logits[0, start:]
    )
    # with padding on the left, and in the middle
    padded = torch.nn.functional.pad(packed, (3, 0), value=PAD)
    padded = torch.cat([padded[:, :20], torch.full((1, 4), PAD), padded[:, 20:]], 1)
    mask = padded.ne(PAD).long()
    places = torch.zeros_like(padded)
    places[mask.bool()] = positions[0]
    close(model(padded, attention_mask=mask, position_ids=places).logits[mask.bool()], alone, atol=2e-5, rtol=1e-5)


def test_what_the_collator_of_padding_free_training_makes():
    _, model = pair(**MOMENTA["ema"])
    rows = [random_tokens(length, seed=length).tolist() for length in (9, 4, 17)]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": row, "labels": row} for row in rows])
    losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
    close(model(**batch).loss, sum(losses) / sum(len(row) - 1 for row in rows))
    count = torch.tensor(7)
    close(model(**batch, num_items_in_batch=count).loss, sum(losses) / 7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [*SOME, MOMENTA["multi_ema_gated"] | OTHERS["rotary"]])
def test_a_mask_of_who_sees_whom(changes, implementation):
    """(B, 1, T, S), as bool or added: padding and documents are those of the mask of tokens."""
    _, model = pair(**changes)
    model.set_attn_implementation(implementation)
    _, tokens, mask = left_padded([41, 30])
    expected = model(tokens, attention_mask=mask).logits
    sees = torch.ones(41, 41, dtype=torch.bool).tril() & mask.bool()[:, None, None] | torch.eye(41, dtype=torch.bool)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in (sees, torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)):
        found = model(tokens, attention_mask=given, position_ids=positions).logits
        close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("momentum", ["ema_learned", "multi_ema_gated"])
def test_shared_heads_are_those_of_a_model_that_has_each_for_itself(momentum, implementation):
    """Also where each query head sees other tokens."""
    shared, several = pair(**MOMENTA[momentum], **LLAMA)[1], pair(**MOMENTA[momentum], **LLAMA | {"kv_heads": 4})[1]
    state = several.state_dict()
    for name, tensor in shared.state_dict().items():
        if tensor.shape != state[name].shape:  # rows of one head after another
            tensor = tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
            tensor = tensor * 2**0.5 if name.endswith("gamma") else tensor  # of which a model uses gamma / sqrt(rows)
        state[name] = tensor
    several.load_state_dict(state)
    for model in (shared, several):
        model.set_attn_implementation(implementation)
    tokens = random_tokens(2, 40)
    sees = torch.rand(2, 4, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    sees = sees.tril() | torch.eye(40, dtype=torch.bool)
    for given in ({}, {"attention_mask": sees}):
        found, expected = (model(tokens, **given).logits for model in (shared, several))
        close(found, expected, atol=2e-5, rtol=1e-5)
    assert (expected - several(tokens).logits).abs().max() > 0.1


@pytest.mark.parametrize("changes", [*SOME, MOMENTA["multi_ema_gated"] | OTHERS["rotary"]])
def test_a_cache_of_fixed_size(changes):
    """In generation of a padded batch, and step by step with and without a mask."""
    _, model = pair(**changes)
    _, tokens, mask = left_padded([7, 3, 12])
    settings = dict(do_sample=False, max_new_tokens=25, suppress_tokens=[PAD])
    expected = model.generate(tokens, attention_mask=mask, **settings)
    assert torch.equal(model.generate(tokens, attention_mask=mask, cache_implementation="static", **settings), expected)
    whole = model(tokens, attention_mask=mask).logits
    for masked in (True, False):
        cache, found, start = transformers.StaticCache(config=model.config, max_cache_len=40), [], 0
        for step in (8, 1, 3):
            given = {"attention_mask": mask[:, : start + step]} if masked else {}
            found.append(model(tokens[:, start : start + step], past_key_values=cache, **given).logits)
            start += step
        reference, seen = (whole, mask.bool()) if masked else (model(tokens).logits, torch.ones_like(mask).bool())
        close(torch.cat(found, 1)[seen], reference[seen], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="attention_mask has 41 columns"):
        model(
            tokens,
            attention_mask=torch.ones(3, 41),
            past_key_values=transformers.StaticCache(config=model.config, max_cache_len=40),
        )


@pytest.mark.parametrize("changes", [MOMENTA["ema_gated"] | OTHERS["rotary"], MOMENTA["multi_ema"]])
def test_a_step_looks_at_no_value(changes, monkeypatch):
    """Which would wait for a GPU at each token."""
    _, model = pair(**changes)
    _, tokens, mask = left_padded([7, 3, 12])
    cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    step, more, positions = (
        random_tokens(3, 1),
        torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1),
        mask.sum(1, keepdim=True),
    )

    def look(*args, **kwargs):
        raise AssertionError("a tensor's value was looked at")

    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, look)
    logits = model(step, attention_mask=more, position_ids=positions, past_key_values=cache).logits
    monkeypatch.undo()
    expected = model(torch.cat([tokens, step], 1), attention_mask=more).logits[:, -1:]
    close(logits, expected, atol=2e-5, rtol=1e-5)


class Graph:
    """A compiler that compiles nothing, and counts the graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def check_program(model):
    """A program of ``torch.export`` gives the model's logits, of other rows of the same lengths too."""
    _, tokens, mask = left_padded([41, 30])
    graph = torch.export.export(
        model, (), {"input_ids": tokens, "attention_mask": mask, "use_cache": False}, strict=False
    )
    _, tokens, mask = left_padded([20, 41], seed=9)
    close(
        graph.module()(input_ids=tokens, attention_mask=mask, use_cache=False).logits,
        model(tokens, attention_mask=mask).logits,
    )


@pytest.mark.parametrize(
    "changes", [MOMENTA["ema_gated"] | OTHERS["rotary"], MOMENTA["multi_ema"], MOMENTA["ema_gated"] | OTHERS["llama"]]
)
def test_exported(changes):
    check_program(pair(**changes, layers=1)[1])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "changes",
    [
        MOMENTA["ema_gated"] | OTHERS["rotary"],
        MOMENTA["multi_ema"],
        MOMENTA["ema_gated"] | OTHERS["llama"],
        MOMENTA["multi_ema"] | OTHERS["llama_untied"],
    ],
)
def test_compiled_in_one_graph(changes):
    _, model = pair(**changes)
    torch.compiler.reset()
    backend = Graph()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    _, tokens, mask = left_padded([41, 30])
    close(
        compiled(tokens, attention_mask=mask, use_cache=False).logits,
        model(tokens, attention_mask=mask).logits,
        atol=2e-5,
        rtol=1e-5,
    )
    positions = torch.cat([torch.arange(25), torch.arange(16)])[None].repeat(2, 1)
    found = compiled(tokens, position_ids=positions, use_cache=False).logits
    close(found, model(tokens, position_ids=positions).logits, atol=2e-5, rtol=1e-5)
    assert backend.count == 2
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        MOMENTA["ema_gated"] | OTHERS["rotary"],
        MOMENTA["multi_ema"] | OTHERS["learned_untied"],
        MOMENTA["ema_gated"] | OTHERS["llama"],
    ],
)
@pytest.mark.nightly
def test_exported_with_rows_of_any_length(changes, strict):
    _, model = pair(**changes)
    _, tokens, mask = left_padded([50, 43])
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=150)
    packed = torch.cat([torch.arange(30), torch.arange(20)])[None].repeat(2, 1)
    for given in ({"attention_mask": mask}, {"position_ids": packed}):
        shapes = {name: {0: rows, 1: length} for name in ("input_ids", *given)} | {"use_cache": None}
        graph = torch.export.export(
            model, (), {"input_ids": tokens, **given, "use_cache": False}, dynamic_shapes=shapes, strict=strict
        )
        for size in (50, 33, 128, 5):
            others = random_tokens(3, size)
            seen = torch.ones(3, size, dtype=torch.bool)
            if "attention_mask" in given:
                seen[1, :3] = False
                name, value = "attention_mask", seen.long()
            else:
                name, value = "position_ids", torch.arange(size)[None].repeat(3, 1) % 30
            found = graph.module()(input_ids=others, **{name: value}, use_cache=False).logits
            close(found[seen], model(others, **{name: value}).logits[seen], atol=2e-5, rtol=1e-5)


def test_a_cropped_and_a_repeated_cache(learned):
    decoder, model = learned
    tokens = random_tokens(1, 20)
    cache = model(tokens, use_cache=True).past_key_values
    cache.crop(-6)
    cache.batch_repeat_interleave(3)
    more = random_tokens(3, 4, seed=7)
    expected = decoder(torch.cat([tokens[:, :14].expand(3, -1), more], 1))[:, 14:]
    close(model(more, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


def test_memory_is_linear_in_time(largest_tensor):
    """But for the matrices of one chunk."""
    for kind in ("ema", "multi_ema"):
        model = pair(momentum_kind=kind, max_positions=2048)[1]
        with torch.no_grad(), largest_tensor() as largest:
            model.model(random_tokens(1, 2048))
        assert largest.size <= 2048 * 48, kind  # the feed-forward's


@pytest.mark.parametrize("gate", [1e-6, 0.5])
def test_scores_after_a_shared_prefix_are_those_of_whole_rows(gate):
    """However little momentum there is, which a small trial would not notice: its past is in the prefix."""
    model = pair(momentum_kind="ema", momentum_eta=0.99, momentum_gate="zero")[1]
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, gate)
    lm = HuggingFaceLM(model, object(), "model", "")
    assert not lm._packs_rows
    prefix, rows = random_tokens(1, 120)[0], random_tokens(3, 6)
    place, last = torch.arange(3), torch.full((3,), 5)
    found, _ = lm.log_probs(
        rows, torch.zeros(3, 6, dtype=torch.bool), place, last, place + 4, lm.start(prefix.tolist())
    )
    whole = model(torch.cat([prefix.expand(3, -1), rows], 1), use_cache=False).logits[:, -1].log_softmax(-1)
    close(found, whole[place, place + 4], atol=2e-5, rtol=0)


def test_loads_where_neither_momentum_lm_nor_fairseq_is(make_lm, tmp_path):
    lm = make_lm(**MOMENTA["ema_gated"], **OTHERS["llama"], max_positions=64)
    (tmp_path / "exported").mkdir()
    write_model(lm, tmp_path / "exported", None, lambda count: None)
    with pytest.raises(UserError, match="exported' brings code of its own: add trust_remote_code=True"):
        load_huggingface(str(tmp_path / "exported"))
    tokens = random_tokens(2, 9)
    torch.save(tokens, tmp_path / "tokens.pt")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "momentum_lm", "fairseq_compat"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import torch, transformers
tokens = torch.load({str(tmp_path / "tokens.pt")!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "exported")!r}, trust_remote_code=True)
assert not {{"momentum_lm", "fairseq"}} & set(sys.modules)
base = transformers.AutoModel.from_pretrained({str(tmp_path / "exported")!r}, trust_remote_code=True)
hidden = base(tokens).last_hidden_state
assert type(base).__name__ == "MomentumLMModel" and torch.equal(model.lm_head(hidden), model(tokens).logits)
load = transformers.AutoModelForCausalLM.from_pretrained
short = load({str(tmp_path / "exported")!r}, trust_remote_code=True, num_hidden_layers=1)
assert len(short.model.layers) == short.config.num_hidden_layers == 1
generated = model.generate(tokens, max_new_tokens=8, do_sample=False)
torch.save([model(tokens).logits.detach(), generated], {str(tmp_path / "found.pt")!r})
model.save_pretrained({str(tmp_path / "again")!r})
settings = dict(trust_remote_code=True, dtype=torch.bfloat16)
half = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, **settings)
assert half.dtype == torch.bfloat16 and half.model.layers[0].self_attn.momentum.gate.dtype == torch.float32
assert half(tokens).logits.isfinite().all()
"""
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=300)
    logits, generated = torch.load(tmp_path / "found.pt")
    close(logits, lm.model(tokens), atol=1e-5, rtol=1e-5)
    assert torch.equal(generated, exported(lm.model).generate(tokens, max_new_tokens=8, do_sample=False))
    files = {"configuration_momentum_lm.py", "modeling_momentum_lm.py"}
    assert files <= {path.name for path in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        MOMENTA["ema_gated"],
        MOMENTA["multi_ema"] | OTHERS["untied_absent"],
        OTHERS["learned_untied"],
        MOMENTA["ema_gated"] | OTHERS["llama"],
        MOMENTA["multi_ema"] | OTHERS["llama_untied"],
        OTHERS["parallel"],
    ],
)
def test_saving_and_loading_changes_no_bit(changes, tmp_path):
    decoder, model = pair(**changes)
    model.save_pretrained(tmp_path)
    again, report = MomentumLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == decoder.config.tie_embeddings == again.config.tie_word_embeddings
    assert again.generation_config.pad_token_id == 1 and again.generation_config.eos_token_id == 2
    content = json.loads((tmp_path / "config.json").read_text())
    assert MOMENTUM.decoder_config(content, content["vocab_size"]) == decoder.config
    tokens = random_tokens(1, 12)
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_configurations_go_both_ways():
    """Each field, with a value that is not the default, under our name and theirs."""
    config = DecoderConfig(
        vocab_size=70, dim=24, ffn_dim=30, layers=3, heads=2, max_positions=33, padding_idx=3, eos_idx=4,
        position="rotary", rotary_base=500.0, rotary_fraction=0.5, rotary_scaling="llama3:8,1,4,64",
        norm="rms", norm_eps=1e-6, ffn="gated", kv_heads=1, head_dim=16, bias="qkv", qk_norm=True,
        parallel_residual=True,
        activation="relu", tie_embeddings=False, scale_embeddings=False, dropout=0.1, attention_dropout=0.2,
        activation_dropout=0.3,
        momentum_kind="ema", momentum_eta=0.9, momentum_learned=True, momentum_normalize=True, momentum_gate="zero",
        momentum_at="values,depth", absent_tokens=(6, 7), checkpoint_activations=True,
    )  # fmt: skip
    of_another_kind = {"momentum_taps", "momentum_current"}
    assert {name for name, _, _ in options() if getattr(config, name) == default(name)} == of_another_kind
    config = dataclasses.replace(config, checkpoint_activations=False)  # of training alone
    theirs = MomentumLMConfig(**json.loads(json.dumps(MOMENTUM.config(config, 70))))
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads) == (24, 3, 2)
    assert (theirs.num_key_value_heads, theirs.head_dim) == (1, 16)
    assert (theirs.max_position_embeddings, theirs.intermediate_size, theirs.padding_idx, theirs.eos_idx) == (
        33,
        30,
        3,
        4,
    )
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.tie_word_embeddings) == (3, 4, False)
    for content in (theirs.to_dict(), json.loads(theirs.to_json_string())):
        assert MOMENTUM.decoder_config(content, content["vocab_size"]) == config


def test_a_config_json_of_earlier_versions():
    """And the names that other tools look for, in ours; and one without the options that came later."""
    config = DecoderConfig(70, 24, 30, 3, 2, 33, momentum_kind="ema", tie_embeddings=False)
    content = MOMENTUM.config(config, 70)
    usual = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    assert [content[name] for name in usual] == [24, 30, 3, 2, 33]
    before = {MOMENTUM.earlier.get(name, name): value for name, value in content.items()}
    assert "dim" in before and "hidden_size" not in before
    assert MOMENTUM.decoder_config(before, 70) == MOMENTUM.decoder_config(content, 70) == config
    assert MomentumLMConfig(**before).to_dict() == MomentumLMConfig(**content).to_dict()
    without = {name: value for name, value in content.items() if name not in LATER}
    for fewer in (without, {MOMENTUM.earlier.get(name, name): value for name, value in without.items()}):
        assert len(fewer) == len(content) - len(LATER) and MOMENTUM.decoder_config(fewer, 70) == config
        assert MomentumLMConfig(**fewer).to_dict() == MomentumLMConfig(**content).to_dict()
    theirs = MomentumLMConfig(**content)
    theirs.num_hidden_layers = 1
    assert theirs.layers == 1 and len(MomentumLMForCausalLM(theirs).model.layers) == 1


def test_another_padding_token_leaves_the_positions():
    _, model = pair()
    tokens = random_tokens(1, 9)
    expected = model(tokens).logits
    model.config.pad_token_id = 60
    assert torch.equal(model(tokens).logits, expected)
    model.resize_token_embeddings(VOCAB + 2)
    close(model(tokens).logits[..., :VOCAB], expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.vocab_size == VOCAB + 2


@pytest.mark.parametrize("changes", [MOMENTA["ema_gated"], MOMENTA["ema_gated"] | OTHERS["llama"]])
def test_half_precision(changes):
    """Momentum's own parameters and sums stay in fp32."""
    decoder, model = pair(**changes)
    half, ours = exported(decoder).bfloat16(), Decoder(decoder.config).eval()
    ours.load_state_dict(decoder.state_dict())
    ours.bfloat16()
    assert half.model.layers[1].self_attn.momentum.decay_logit.dtype == torch.float32
    tokens = random_tokens(2, 50)
    logits, expected = half(tokens).logits, model(tokens).logits
    assert logits.dtype == torch.bfloat16
    error, our_error = ((x.float() - expected).norm() for x in (logits, ours(tokens).detach()))
    assert error < 1.3 * our_error and our_error < 0.1 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        error = (model(tokens).logits.float() - expected).norm()
    assert error < 1.3 * our_error


@pytest.mark.parametrize("changes", [MOMENTA["ema_gated"], *SOME[-2:]])
def test_training(changes):
    """Loss and gradients, with and without recomputed activations, are those of the decoder."""
    decoder = pair(**changes)[0].train().requires_grad_(True)
    tokens = random_tokens(2, 45)
    decoder.loss(tokens[:, :-1], tokens[:, 1:]).div(2 * 44).backward()
    for recompute in (False, True):
        model = exported(decoder).train().requires_grad_(True)
        if recompute:
            model.gradient_checkpointing_enable()
        found = model(tokens, labels=tokens)
        found.loss.backward()
        for name, parameter in decoder.named_parameters():
            theirs = model.get_parameter("lm_head.weight" if name == "output_projection.weight" else f"model.{name}")
            close(theirs.grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_new_model_starts_as_ours_does():
    for changes in (MOMENTA["ema_gated"], MOMENTA["multi_ema_gated"]):
        config = configuration(DecoderConfig(**{**SHAPE, **changes}))
        torch.manual_seed(0)
        model = MomentumLMForCausalLM(config)
        vanilla = MomentumLMForCausalLM(configuration(DecoderConfig(**SHAPE)))
        vanilla.load_state_dict(
            {name: tensor for name, tensor in model.state_dict().items() if ".momentum." not in name}
        )
        tokens = random_tokens(1, 9)
        assert torch.equal(model.eval()(tokens).logits, vanilla.eval()(tokens).logits)
        momentum = model.model.layers[0].self_attn.momentum
        if momentum.several:
            assert 0.15 < momentum.delta.std() < 0.25 and 0.8 < momentum.gamma.std() < 1.2
        else:
            close(momentum.decay_logit.sigmoid(), torch.full((4,), 0.3))


def test_momentum_begins_at_a_gate_of_zero_in_a_model_that_had_none(tmp_path):
    vanilla = pair()[1]
    vanilla.save_pretrained(tmp_path)
    changes = dict(momentum_kind="ema", momentum_learned=True, momentum_gate="zero")
    model, report = MomentumLMForCausalLM.from_pretrained(tmp_path, **changes, output_loading_info=True)
    assert report["missing_keys"] and all(".momentum." in name for name in report["missing_keys"])
    tokens = random_tokens(2, 9)
    assert torch.equal(model(tokens).logits, vanilla(tokens).logits)
    momentum = model.model.layers[1].self_attn.momentum
    close(momentum.decay_logit.sigmoid(), torch.full((4,), 0.3))
    torch.nn.init.ones_(momentum.gate)
    assert (model(tokens).logits - vanilla(tokens).logits).abs().max() > 0.1


def test_hidden_states_attentions_and_embeddings(learned):
    _, model = learned
    tokens = random_tokens(2, 6)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    close(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:])
    model.set_attn_implementation("eager")
    found = model(tokens, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert len(found.hidden_states) == 3 and torch.equal(model.lm_head(found.hidden_states[-1]), found.logits)
    close(torch.stack(found.attentions).sum(-1), torch.ones(2, 2, 4, 6))


def test_bad_input(learned):
    _, model = learned
    tokens = random_tokens(1, 5)
    with pytest.raises(ValueError, match="attention_mask has 3 columns for 0 tokens seen and 5 new ones"):
        model(tokens, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="which continuous batching does not keep: use generate"):
        model(tokens)
    model.config._attn_implementation = "sdpa"
    limited = pair(position="learned", max_positions=8)[1]
    with pytest.raises(ValueError, match="9 tokens exceed the 8 learned positions"):
        limited(random_tokens(1, 9))


def test_the_names_of_options_are_those_of_the_exported_configuration():
    """The file that travels with a model stands alone, so it has a list of its own."""
    assert {theirs: ours for ours, theirs in MomentumLMConfig.attribute_map.items()} == MOMENTUM.earlier
