"""The paper's identities hold to rounding in float64."""

import pytest
import torch

from momentum_lm.analysis import dual_form as df

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 3

    d, head_dim = 7, 5
    return {
        "w_v": draw(head_dim, d),
        "w_k": draw(head_dim, d),
        "delta_v": draw(head_dim, d),
        "delta_k": draw(head_dim, d),
        "demos": draw(d, 11),
        "context": draw(d, 4),
        "query": draw(head_dim),
    }


def test_relaxed_attention_is_zero_shot_plus_icl_update(head):
    w_v, w_k, demos, context, query = (head[k] for k in ("w_v", "w_k", "demos", "context", "query"))
    whole = df.relaxed_attention(w_v, w_k, demos, context, query)
    literal = torch.zeros(5, dtype=torch.float64)
    for x in [*demos.T, *context.T]:
        literal += (w_v @ x) * ((w_k @ x) @ query)
    torch.testing.assert_close(whole, literal, **EXACT)
    dual = (df.zero_shot_weight(w_v, w_k, context) + df.icl_update(w_v, w_k, demos)) @ query
    torch.testing.assert_close(whole, dual, **EXACT)


def test_several_queries_at_once(head):
    queries = torch.randn(5, 3, dtype=torch.float64)
    w_v, w_k, demos, context = (head[k] for k in ("w_v", "w_k", "demos", "context"))
    together = df.relaxed_attention(w_v, w_k, demos, context, queries)
    for i in range(3):
        torch.testing.assert_close(
            together[:, i], df.relaxed_attention(w_v, w_k, demos, context, queries[:, i]), **EXACT
        )


def test_icl_update_is_additive_and_order_free(head):
    w_v, w_k, demos = head["w_v"], head["w_k"], head["demos"]
    whole = df.icl_update(w_v, w_k, demos)
    torch.testing.assert_close(whole, df.icl_update(w_v, w_k, demos[:, torch.randperm(11)]), **EXACT)
    torch.testing.assert_close(
        whole, df.icl_update(w_v, w_k, demos[:, :4]) + df.icl_update(w_v, w_k, demos[:, 4:]), **EXACT
    )
    one_by_one = sum(torch.outer(w_v @ x, w_k @ x) for x in demos.T)
    torch.testing.assert_close(whole, one_by_one, **EXACT)
    assert df.icl_update(w_v, w_k, demos[:, :0]).abs().sum() == 0
    assert whole.abs().max() > 0.1  # not trivially equal


def test_finetuned_attention_is_zero_shot_plus_finetuning_update(head):
    w_v, w_k, delta_v, delta_k, context, query = (
        head[k] for k in ("w_v", "w_k", "delta_v", "delta_k", "context", "query")
    )
    update = df.finetuning_update(w_v, w_k, delta_v, delta_k, context)
    literal = (w_v + delta_v) @ context @ context.T @ (w_k + delta_k).T - w_v @ context @ context.T @ w_k.T
    torch.testing.assert_close(update, literal, **EXACT)
    torch.testing.assert_close(
        df.finetuned_attention(w_v, w_k, delta_v, delta_k, context, query),
        (df.zero_shot_weight(w_v, w_k, context) + update) @ query,
        **EXACT,
    )
    assert df.finetuning_update(w_v, w_k, 0 * delta_v, 0 * delta_k, context).abs().sum() == 0


def squared_error(outputs):
    return (outputs - torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).square().sum() / 2


def cross_entropy(outputs):
    return torch.nn.functional.cross_entropy(outputs.T, torch.arange(outputs.shape[1]) % outputs.shape[0])


def coupled(outputs):
    """Not a sum over examples: the identity needs only that the loss sees the layer's outputs."""
    return torch.logsumexp(outputs.flatten(), 0) * outputs.square().mean()


@pytest.mark.parametrize("loss", [squared_error, cross_entropy, coupled])
@pytest.mark.parametrize("examples", [1, 9])
def test_sgd_step_is_linear_attention_over_the_training_examples(loss, examples):
    torch.manual_seed(1)
    layer = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    inputs = torch.randn(6, examples, dtype=torch.float64)
    query = torch.randn(6, 3, dtype=torch.float64)
    start = layer.weight.detach().clone()
    predicted = df.sgd_step_as_attention(start, inputs, loss, 0.3, query)

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    loss(layer(inputs.T).T).backward()
    optimizer.step()
    torch.testing.assert_close(predicted, layer(query.T).T.detach(), **EXACT)
    assert (predicted - start @ query).abs().max() > 1e-3  # the step moved something


@pytest.mark.parametrize("eta", [0.01, 0.5, 0.999])
def test_momentum_sgd_is_the_exponential_average_of_gradients(eta):
    torch.manual_seed(2)
    target = torch.randn(3, 2, dtype=torch.float64)
    start = torch.randn(3, 2, dtype=torch.float64)

    def gradient(theta):
        return theta - target + 0.1 * theta**3

    lr, steps = 0.05, 6
    end, gradients = df.momentum_sgd(start, gradient, lr, eta, steps)
    assert gradients.shape == (steps, 3, 2)
    # the paper's sum, term by term
    theta = start
    for t in range(2, steps + 2):
        theta = theta - lr * sum(eta ** (t - i) * gradients[i - 1] for i in range(1, t))
        torch.testing.assert_close(
            df.exponential_average(gradients[: t - 1], eta),
            sum(eta ** (t - i) * gradients[i - 1] for i in range(1, t)),
            **EXACT,
        )
    torch.testing.assert_close(end, theta, **EXACT)
    # torch's optimizer: its buffer is b_t = eta b_{t-1} + g_t, ours is eta times that
    parameter = start.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([parameter], lr=lr * eta, momentum=eta)
    for _ in range(steps):
        parameter.grad = gradient(parameter.detach())
        optimizer.step()
    torch.testing.assert_close(end, parameter.detach(), **EXACT)


def test_exponential_average_refuses_bad_input():
    with pytest.raises(ValueError, match="between 0 and 1"):
        df.exponential_average(torch.ones(2, 2), 1.0)
    with pytest.raises(ValueError, match="empty"):
        df.exponential_average(torch.ones(0, 2), 0.5)
    single = df.exponential_average([torch.full((2,), 3.0)], 0.5)
    assert single.tolist() == [1.5, 1.5]
