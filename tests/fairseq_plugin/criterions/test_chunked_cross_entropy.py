import pytest
import torch
from fairseq import criterions, options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import momentum_lm
from momentum_lm.errors import UserError

momentum_lm.register()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    dictionary = Dictionary()
    for i in range(60):
        dictionary.add_symbol(f"w{i}")
    dictionary.save(str(folder / "dict.txt"))

    def build(arch, criterion):
        words = [
            str(folder),
            "--task",
            "language_modeling",
            "--tokens-per-sample",
            "24",
            "--arch",
            arch,
            "--criterion",
            criterion,
        ]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(0)
        return task.build_model(cfg.model), criterions.build_criterion(cfg.criterion, task)

    return build


def sample():
    tokens = torch.randint(4, 64, (3, 21), generator=torch.Generator().manual_seed(0))
    tokens[1, 12:] = 1
    source, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    lengths = source.ne(1).sum(1)
    return {
        "net_input": {"src_tokens": source, "src_lengths": lengths},
        "target": target,
        "ntokens": int(target.ne(1).sum()),
    }


def test_equals_stock_cross_entropy_with_gradients(build):
    results = []
    for criterion_name in ("cross_entropy", "chunked_cross_entropy"):
        model, criterion = build("momentum_lm_tiny", criterion_name)
        loss, size, log = criterion(model, sample())
        loss.backward()
        results.append(
            (loss.detach(), size, {k: float(v) for k, v in log.items()}, [p.grad for p in model.parameters()])
        )
    (loss, size, log, grads), (our_loss, our_size, our_log, our_grads) = results
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    assert our_size == size and our_log == pytest.approx(log, rel=1e-6)
    for ours, stock in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_other_models_are_refused_with_the_remedy(build):
    model, criterion = build("transformer_lm_gpt", "chunked_cross_entropy")
    with pytest.raises(UserError, match="--criterion cross_entropy"):
        criterion(model, sample())
