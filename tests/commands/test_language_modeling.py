"""The flows of fairseq's own tests of language models (train, validate, eval-lm, generate, score, hub), with everything
of ours.
"""

import math
import random
import re

import pytest
import torch

OURS = ["--task", "momentum_language_modeling"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Binarised lines of random letters, as those tests have."""
    from fairseq import options
    from fairseq_cli import preprocess

    folder, draw = tmp_path_factory.mktemp("letters"), random.Random(0)
    for split, lines in (("train", 200), ("valid", 40), ("test", 40)):
        rows = (" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(1, 50))) for _ in range(lines))
        (folder / f"{split}.out").write_text("\n".join(rows) + "\n")
    words = [f"--{split}pref={folder}/{split}.out" for split in ("train", "valid", "test")]
    preprocess.main(options.get_preprocessing_parser().parse_args(["--only-source", *words, f"--destdir={folder}"]))
    return folder


@pytest.fixture(params=["momentum_lm_tiny", pytest.param("gpt_lm_tiny", marks=pytest.mark.nightly)])
def trained(request, corpus, train_here, tmp_path):
    """Trained and validated for an epoch with samples of 500 tokens, on text of about 5,000."""
    more = [
        "--arch",
        request.param,
        "--tokens-per-sample",
        "500",
        "--max-tokens",
        "500",
        "--max-epoch",
        "1",
        "--batch-size",
        "9",
    ]
    train_here(tmp_path, *more, folder=corpus, updates=100)
    return tmp_path / "checkpoint_best.pt"


def run(module, parser, words):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    return module.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(map(str, words)))))


def test_train_validate_evaluate_generate(corpus, trained, capsys):
    from fairseq import options
    from fairseq_cli import eval_lm, generate, validate

    run(
        validate,
        options.get_validation_parser(),
        [corpus, *OURS, "--path", trained, "--max-tokens", "500", "--valid-subset", "valid"],
    )
    for more in ([], ["--context-window", "25"]):
        words = [corpus, "--path", trained, "--tokens-per-sample", "500", "--cpu", "--gen-subset", "valid", *more]
        theirs, ours = (
            run(eval_lm, options.get_eval_lm_parser(), [*words, *task])["perplexity"] for task in ([], OURS)
        )
        assert theirs == ours and 2 < ours < 40
    capsys.readouterr()
    words = [
        corpus,
        *OURS,
        "--path",
        trained,
        "--sample-break-mode",
        "eos",
        "--max-tokens",
        "500",
        "--no-progress-bar",
        "--cpu",
    ]
    run(generate, options.get_generation_parser(), [*words, "--beam", "3", "--max-len-a", "1", "--max-len-b", "5"])
    assert len(re.findall("^H-", capsys.readouterr().out, re.M)) == 40
    run(generate, options.get_generation_parser(), [*words, "--score-reference"])
    positions = re.findall(r"^P-(\d+)\t(.*)$", capsys.readouterr().out, re.M)
    lines = (corpus / "test.out").read_text().splitlines()
    # with </s>
    assert len(positions) == 40 and all(
        len(scores.split()) == len(lines[int(i)].split()) + 1 for i, scores in positions
    )


def test_the_hub_interface_samples_and_scores(corpus, trained):
    from fairseq.models.transformer_lm import TransformerLanguageModel

    hub = TransformerLanguageModel.from_pretrained(str(trained.parent), trained.name, str(corpus))
    hub.eval()
    text = "a b c d e"
    found = hub.score(text)
    tokens = hub.encode(text)
    with torch.no_grad():
        inputs = torch.cat([torch.tensor([2]), tokens[:-1]])[None]
        expected = hub.models[0](inputs)[0].log_softmax(-1)[0].gather(1, tokens[:, None]).squeeze(1)
    assert found["tokens"].tolist() == tokens[: len(found["tokens"])].tolist()
    torch.testing.assert_close(found["positional_scores"], expected[: len(found["positional_scores"])])
    both = hub.score([text, "z y"])  # together
    assert math.isclose(both[0]["score"], found["score"], rel_tol=1e-5) and len(both) == 2
    assert isinstance(hub.sample("a b", beam=2, max_len_a=1, max_len_b=4), str)
