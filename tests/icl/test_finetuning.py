"""Against torch.optim.SGD on a copy of the model."""

import copy

import pytest
import torch
import torch.nn.functional as F

from momentum_lm.errors import UserError
from momentum_lm.icl.finetuning import Diverged, Lesson, finetuned
from momentum_lm.lm.anatomy import anatomy
from momentum_lm.lm.tracing import AttentionTrace, tracing

LESSONS = [Lesson([0, 5, 9, 20, 31]), Lesson([0, 7, 7, 40, 12, 50, 61]), Lesson([0, 80, 3, 4])]


def huggingface(family):
    transformers = pytest.importorskip("transformers")
    common = dict(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
    )
    configs = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "llama": lambda: transformers.LlamaConfig(**common, intermediate_size=48, num_key_value_heads=2),
        "neox": lambda: transformers.GPTNeoXConfig(**common, intermediate_size=48),
        "mamba": lambda: transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[family]()).eval().requires_grad_(False)


@pytest.fixture(params=["ours", "gpt2", "llama", "neox"])
def model(request, make_lm):
    return make_lm().model if request.param == "ours" else huggingface(request.param)


def logits(model, tokens):
    out = model(torch.tensor([tokens]))
    return (out if isinstance(out, torch.Tensor) else out.logits)[0]


def is_key_or_value(name, parameter, grad):
    """The gradient with everything but keys and values set to zero, found from the layout of each family."""
    if "c_attn" in name:
        grad[..., :32] = 0
    elif "query_key_value" in name:
        grad.view(4, 3, 8, -1)[:, 0] = 0
    elif not ("k_proj" in name or "v_proj" in name):
        grad.zero_()


def sgd(model, lessons, rate, kv=True):
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for lesson in lessons:
        optimizer.zero_grad()
        out = logits(model, lesson.tokens)
        loss = F.cross_entropy(out[lesson.start - 1 : -1], torch.tensor(lesson.tokens[lesson.start :]))
        loss.backward()
        for name, parameter in model.named_parameters():
            if kv and parameter.grad is not None:
                is_key_or_value(name, parameter, parameter.grad)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("start", [1, 3])
def test_is_sgd_on_keys_and_values(model, start):
    lessons = [Lesson(lesson.tokens, start) for lesson in LESSONS]
    expected, losses = sgd(model, lessons, 0.1)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    with finetuned(model, lessons, 0.1) as done:
        assert done.losses == pytest.approx(losses, rel=1e-5)
        changed = 0
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), dict(expected.named_parameters())[name].detach(), atol=2e-6, rtol=1e-4
            )
            changed += not torch.equal(parameter, before[name])
            assert not parameter.requires_grad
        assert changed >= 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_all_parameters_and_names(model):
    expected, _ = sgd(model, LESSONS[:1], 0.05, kv=False)
    with finetuned(model, LESSONS[:1], 0.05, parameters="all"):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), dict(expected.named_parameters())[name].detach(), atol=2e-6, rtol=1e-4
            )
    first = next(name for name, _ in model.named_parameters() if "layers.0" in name or "h.0" in name)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with finetuned(model, LESSONS[:1], 0.5, parameters=first.replace(".", r"\.")):
        changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == [first]
    nonesuch = pytest.raises(UserError, match="parameters='nonesuch': no parameter has such a name")
    with nonesuch, finetuned(model, LESSONS, 0.1, parameters="nonesuch"):
        pass


def test_queries_are_those_before_each_step(model):
    with finetuned(model, LESSONS, 0.3, keep_queries=True) as done:
        pass
    assert [[layer.shape for layer in lesson] for lesson in done.queries] == [
        [(len(lesson.tokens), 32)] * 2 for lesson in LESSONS
    ]
    for count in range(3):
        trace = AttentionTrace()
        with finetuned(model, LESSONS[:count], 0.3), torch.no_grad(), tracing(model, trace):
            logits(model, LESSONS[count].tokens)
        for found, expected in zip(done.queries[count], trace.queries, strict=True):
            torch.testing.assert_close(found, expected[0], atol=1e-6, rtol=1e-5)


def test_layerwise_learns_in_each_block_alone(model):
    """The gradient of a block's loss by its own keys and values, with its input held fixed."""
    tokens, rate = torch.tensor([LESSONS[1].tokens]), 0.1
    expected = copy.deepcopy(model).requires_grad_(True)
    inputs = []
    for block in anatomy(expected).blocks:
        block.register_forward_pre_hook(lambda m, given, options: inputs.append((given, options)), with_kwargs=True)
    logits(expected, LESSONS[1].tokens)
    parent = (
        getattr(expected, "model", None)
        or getattr(expected, "transformer", None)
        or getattr(expected, "gpt_neox", None)
        or expected
    )
    norm = next(getattr(parent, n) for n in ("norm", "ln_f", "final_layer_norm", "layer_norm") if hasattr(parent, n))
    head = expected.output_projection if parent is expected else expected.get_output_embeddings()
    seen = list(inputs)
    for block, (given, options) in zip(anatomy(expected).blocks, seen, strict=True):
        given = [g.detach() if isinstance(g, torch.Tensor) else g for g in given]
        options = {k: v.detach() if k == "hidden_states" else v for k, v in options.items()}
        out = block(*given, **options)
        out = out[0] if isinstance(out, tuple) else out
        loss = F.cross_entropy(head(norm(out))[0, :-1], tokens[0, 1:])
        names = [(n, p) for n, p in block.named_parameters()]
        for (name, parameter), grad in zip(
            names, torch.autograd.grad(loss, [p for _, p in names], allow_unused=True), strict=True
        ):
            if grad is not None:
                is_key_or_value(name, parameter, grad)
                parameter.data -= rate * grad
    with finetuned(model, LESSONS[1:2], rate, layerwise=True):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), dict(expected.named_parameters())[name].detach(), atol=2e-6, rtol=1e-4
            )


def test_divergence_is_named_and_undone(model):
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    diverged = pytest.raises(Diverged, match=r"the loss is (nan|inf) after \d steps at learning rate inf")
    with diverged, finetuned(model, LESSONS, float("inf")):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_were_broken_before_are_told(model):
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(next(broken.parameters()), float("nan"))
    with (
        pytest.raises(UserError, match="loss is nan before it is finetuned: its weights are broken"),
        finetuned(broken, LESSONS, 0.1),
    ):
        pass


def test_projections_that_cannot_be_found():
    model = huggingface("mamba")
    message = r"MambaForCausalLM has no key and value projections under the names k_proj, .* with parameters "
    with pytest.raises(UserError, match=message), finetuned(model, LESSONS, 0.1):
        pass
