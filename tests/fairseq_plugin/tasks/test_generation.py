"""Greedy and beam search with the incremental state are what running the whole decoder over every hypothesis gives."""

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import momentum_lm
from momentum_lm.errors import UserError

momentum_lm.register()

from momentum_lm.fairseq_plugin.models import MomentumLanguageModel  # noqa: E402
from momentum_lm.fairseq_plugin.models.language_model import FairseqDecoder  # noqa: E402
from momentum_lm.model import DecoderConfig  # noqa: E402

PROMPTS = [[5, 9, 9, 4], [7], [6, 15, 11, 8, 10, 4, 4], [13, 12]]


@pytest.fixture
def build(tmp_path):
    """build(*flags, **DecoderConfig's) -> (task, model, generator)"""
    dictionary = Dictionary()
    for i in range(12):
        dictionary.add_symbol(f"w{i}")
    dictionary.save(str(tmp_path / "dict.txt"))

    def build(*flags, **changes):
        words = [str(tmp_path), "--task", "momentum_language_modeling", "--path", "unused", *map(str, flags)]
        args = options.parse_args_and_arch(options.get_interactive_generation_parser(), words)
        cfg = convert_namespace_to_omegaconf(args)
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(0)
        decoder = FairseqDecoder(DecoderConfig(16, 16, 24, 2, 4, max_positions=32, **changes), task.dictionary)
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        decoder.layer_norm.bias.data += 2 * decoder.embed_tokens.weight.data[2]  # so that some hypotheses end early
        model = MomentumLanguageModel(decoder).eval()
        return task, model, task.build_generator([model], cfg.generation)

    return build


def sample(prompts):
    rows = [torch.tensor([2, *prompt]) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    return {"net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([len(row) for row in rows])}}


@torch.no_grad()
def search(decoder, prompt, beam, max_len):
    """fairseq's beam search, one hypothesis at a time, with nothing remembered: [(mean log-probability, tokens)], best
    first.
    """
    alive, done = [(0.0, [2])], []
    for step in range(max_len + 1):
        found = []
        for score, tokens in alive:
            log_probs = decoder(torch.tensor([tokens]))[0][0, -1].log_softmax(-1).tolist()
            possible = range(16) if len(prompt) <= step < max_len else [2] if step == max_len else [prompt[step]]
            found += [(score + log_probs[token], [*tokens, token]) for token in possible if token != 1]
        best = sorted(found, reverse=True)[: 2 * beam]
        done += [(score / (step + 1), tokens[1:]) for score, tokens in best[:beam] if tokens[-1] == 2]
        if len(done) >= beam:
            break
        alive = [hypothesis for hypothesis in best if hypothesis[1][-1] != 2][:beam]
    return sorted(done[:beam], reverse=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum_kind": "ema", "momentum_eta": 0.7},
        {
            "momentum_kind": "ema",
            "momentum_learned": True,
            "momentum_normalize": True,
            "momentum_gate": "zero",
            "position": "rotary",
        },
        {"momentum_kind": "multi_ema", "position": "learned"},
        {},
    ],
)
@pytest.mark.parametrize("beam", [1, 4])
def test_as_without_incremental_state(build, changes, beam):
    task, model, generator = build("--beam", beam, "--max-len-b", 12, **changes)
    found = task.inference_step(generator, [model], sample(PROMPTS))
    lengths = set()
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
        expected = search(model.decoder, prompt, beam, 12)
        assert [h["tokens"].tolist() for h in hypotheses] == [tokens for _, tokens in expected]
        assert [float(h["score"]) for h in hypotheses] == pytest.approx([score for score, _ in expected], abs=1e-4)
        assert all(tokens[: len(prompt)] == prompt for _, tokens in expected)
        lengths |= {len(tokens) for _, tokens in expected}
    assert len(lengths) > 1 or beam == 1  # some end early, and their rows leave the batch


def test_samples_begin_with_the_prompt(build):
    flags = [
        "--sampling",
        "--sampling-topp",
        "0.9",
        "--temperature",
        "0.8",
        "--beam",
        3,
        "--nbest",
        3,
        "--max-len-a",
        1,
        "--max-len-b",
        6,
    ]
    task, model, generator = build(*flags, momentum_kind="ema")
    torch.manual_seed(1)
    found = task.inference_step(generator, [model], sample(PROMPTS))
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
        assert len(hypotheses) == 3 and all(h["tokens"].tolist()[: len(prompt)] == prompt for h in hypotheses)
    assert len({tuple(h["tokens"].tolist()) for hypotheses in found for h in hypotheses}) > len(PROMPTS)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_prompt_gives_in_a_batch_what_it_gives_alone(build, beam):
    """To fairseq --max-len-b is what may be added to the longest prompt of a batch, and one more."""
    task, model, generator = build("--beam", beam, "--max-len-a", 1, "--max-len-b", 3, momentum_kind="ema")
    model.decoder.layer_norm.bias.data -= 4 * model.decoder.embed_tokens.weight.data[2]  # none ends early
    prompts = [*PROMPTS, [], [9, 4]]
    found = task.inference_step(generator, [model], sample(prompts))
    for prompt, hypotheses in zip(prompts, found, strict=True):
        if prompt:  # after an empty one fairseq asks for a token at least
            assert [h["tokens"].tolist() for h in hypotheses] == [
                ids for _, ids in search(model.decoder, prompt, beam, len(prompt) + 3)
            ]
        (alone,) = task.inference_step(generator, [model], sample([prompt]))
        assert [h["tokens"].tolist() for h in hypotheses] == [h["tokens"].tolist() for h in alone]
        assert len(hypotheses[0]["tokens"]) == len(prompt) + 4  # three and </s>


def test_a_prompt_that_the_model_does_not_take_is_an_error(build):
    task, _, _ = build()
    prompts = [torch.tensor([*prompt, 2]) for prompt in ([5] * 4, [6] * 32, [7])]

    def batches(**settings):
        dataset = task.build_dataset_for_inference(prompts, [len(prompt) for prompt in prompts])
        return task.get_batch_iterator(dataset, max_sentences=3, max_positions=32, **settings).next_epoch_itr(
            shuffle=False
        )

    with pytest.raises(
        UserError, match="sample 1 has 33 tokens, </s> or <s> included, and the model takes 32: shorten it, or"
    ):
        batches()
    (batch,) = batches(ignore_invalid_inputs=True)
    assert sorted(batch["id"].tolist()) == [0, 2]


def test_a_prompt_without_room_is_an_error(build):
    """fairseq would print the beginning of the prompt, and say nothing."""
    task, model, generator = build("--max-len-b", 7)
    with pytest.raises(
        UserError, match=r"a prompt of 7 tokens .*--max-len-a 0 --max-len-b 7 allow 7; give --max-len-a 1"
    ):
        task.inference_step(generator, [model], sample(PROMPTS))
    task.inference_step(
        generator, [model], sample(PROMPTS), prefix_tokens=sample(PROMPTS)["net_input"]["src_tokens"][:, 1:3]
    )
    task, model, generator = build("--max-len-a", 1, "--max-len-b", 40)
    with pytest.raises(
        UserError, match=r"a prompt of 31 tokens leaves no room for new ones: the model takes 32, .*; shorten it"
    ):
        task.inference_step(generator, [model], sample([[5] * 31]))
