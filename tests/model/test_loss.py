import pytest
import torch
import torch.nn.functional as F

from momentum_lm.model import Decoder, DecoderConfig, chunked_cross_entropy


def inputs(dtype=torch.float64, rows=(3, 7), dim=5, vocab=11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*rows, dim, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, rows, generator=generator)
    targets[0, :3] = 1
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 4, 21, 1000])
@pytest.mark.parametrize("ignore", [1, -100])
def test_equals_torch_with_gradients(chunk, ignore):
    hidden, weight, targets = inputs()
    ours = 0.3 * chunked_cross_entropy(hidden, weight, targets, ignore, chunk_tokens=chunk)
    reference = 0.3 * F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=ignore, reduction="sum"
    )
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(reference, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_tokens_that_are_never_predicted(chunk):
    """The loss of a vocabulary without them, and no gradient for their rows."""
    hidden, weight, targets = inputs()
    absent, kept = torch.tensor([0, 1, 9]), torch.tensor([2, 3, 4, 5, 6, 7, 8, 10])
    places = torch.randint(len(kept), targets.shape, generator=torch.Generator().manual_seed(2))
    targets = kept[places].masked_fill(targets == 1, 1)
    ours = chunked_cross_entropy(hidden, weight, targets, 1, chunk_tokens=chunk, absent=absent)
    others = places.masked_fill(targets == 1, -100)
    reference = F.cross_entropy((hidden @ weight[kept].T).flatten(0, 1), others.flatten(), reduction="sum")
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, reference)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert (gradients[0][1][absent] == 0).all()
    each = chunked_cross_entropy(hidden, weight, targets, 1, reduction="none", chunk_tokens=chunk, absent=absent)
    torch.testing.assert_close(each.sum(), reference.detach(), rtol=0, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, 1, chunk_tokens=4), (hidden, weight)
    )


def test_each_token_alone_sums_to_the_total():
    hidden, weight, targets = inputs()
    each = chunked_cross_entropy(hidden, weight, targets, 1, reduction="none", chunk_tokens=4)
    assert each.shape == targets.shape and (each[targets == 1] == 0).all()
    torch.testing.assert_close(
        each.sum(), chunked_cross_entropy(hidden, weight, targets, 1).detach(), rtol=0, atol=1e-12
    )


def test_bf16_autocast_keeps_the_softmax_in_fp32():
    hidden, weight, targets = inputs(torch.float32, (64, 8), 64, 500)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 1)
        logits = F.linear(hidden, weight)
    assert loss.dtype == torch.float32
    reference = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=1, reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=0)
    gradient, exact = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, reference))
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_logits_are_never_whole(largest_tensor):
    """The largest tensor made is one chunk of logits, far below tokens x vocabulary."""
    hidden, weight, targets = inputs(torch.float32, (4, 100), 8, 1000)
    with largest_tensor() as largest:
        chunked_cross_entropy(hidden, weight, targets, 1, chunk_tokens=32).backward()
    assert largest.size == 32 * 1000


def test_ignored_rows_may_hold_anything():
    hidden, weight, targets = inputs()
    hidden = hidden.detach().clone()
    hidden[targets == 1] = float("nan")
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, targets, 1)
    assert torch.isfinite(loss)
    gradient, _ = torch.autograd.grad(loss, (hidden, weight))
    assert (gradient[targets == 1] == 0).all()


def test_wrong_arguments_are_named():
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        chunked_cross_entropy(hidden, weight, targets[:, 1:])
    with pytest.raises(ValueError, match="reduction"):
        chunked_cross_entropy(hidden, weight, targets, reduction="mean")


def test_an_adapter_on_the_output_projection_acts_in_the_loss():
    """Hooks and adapters see their call, gradients come through it, and a plain projection is still never called."""
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "dim": 16, "ffn_dim": 32, "layers": 1, "heads": 2}
    model = Decoder(DecoderConfig(**shape, tie_embeddings=False, absent_tokens=(3,))).double()
    tokens, targets = torch.randint(4, 40, (2, 2, 9))
    targets[0, :4] = model.config.padding_idx
    calls = []
    plain = model.loss(tokens, targets)
    with torch.no_grad():
        logits = 3 * model(tokens)
    model.output_projection.register_forward_hook(lambda module, inputs, output: calls.append(output) or 3 * output)
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=model.config.padding_idx, reduction="none"
    )
    loss = model.loss(tokens, targets)
    torch.testing.assert_close(loss, expected.sum())
    torch.testing.assert_close(model.loss(tokens, targets, reduction="none").flatten(), expected)
    assert calls and abs(float((loss - plain).detach())) > 1
    loss.backward()
    gradient = model.output_projection.weight.grad.clone()
    model.zero_grad()
    whole = F.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), ignore_index=model.config.padding_idx, reduction="sum"
    )
    whole.backward()
    torch.testing.assert_close(gradient, model.output_projection.weight.grad)


def test_gradients_of_each_sample_by_torch_func():
    from torch.func import functional_call, grad, vmap

    torch.manual_seed(0)
    shape = {"vocab_size": 40, "dim": 16, "ffn_dim": 32, "layers": 1, "heads": 2}
    model = Decoder(DecoderConfig(**shape, momentum_kind="ema", momentum_learned=True)).double()
    tokens, targets = torch.randint(4, 40, (2, 3, 9))
    parameters = dict(model.named_parameters())

    def loss(parameters, row, target):
        return functional_call(
            _Loss(model), {f"model.{name}": value for name, value in parameters.items()}, (row, target)
        )

    each = vmap(grad(loss), (None, 0, 0))(parameters, tokens, targets)
    for row in range(3):
        model.zero_grad()
        model.loss(tokens[row : row + 1], targets[row : row + 1], left_padded=False).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(each[name][row], parameter.grad)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, row, target):
        return self.model.loss(row[None], target[None], left_padded=False)


def test_shapes_of_a_step_on_meta():
    with torch.device("meta"):
        model = Decoder(DecoderConfig(vocab_size=40, dim=16, ffn_dim=32, layers=1, heads=2, momentum_kind="multi_ema"))
        tokens = torch.zeros(2, 9, dtype=torch.long)
    model.loss(tokens, tokens).backward()
    assert model.embed_tokens.weight.grad.shape == (40, 16) and model(tokens).shape == (2, 9, 40)
