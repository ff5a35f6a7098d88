import pytest

from momentum_lm.errors import UserError
from momentum_lm.icl.datasets.loading import Example
from momentum_lm.icl.engine import Request
from momentum_lm.icl.prompts import PromptFormat, build, demonstration_text, fit, longest_query, special_notes
from momentum_lm.text.dictionary import BOS, EOS

FORMS = {
    "tokens": PromptFormat((BOS,), (EOS,)),
    "text": PromptFormat((), "\n\n"),
    "bos_text": PromptFormat((EOS,), " "),
}


def whole(lm, form, demonstrations, given):
    """The ids of a full prompt, put together the plain way."""
    texts = [demonstration_text(example) for example in demonstrations]
    if isinstance(form.separator, str):
        return [*form.bos, *lm.encode(["".join(text + form.separator for text in texts) + given])[0]]
    parts = [token for text in texts for token in [*lm.encode([text])[0], *form.separator]]
    return [*form.bos, *parts, *lm.encode([given])[0]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shots", [0, 1, 3])
@pytest.mark.parametrize("which", ["examples", "choices"])
def test_prefix_and_request_make_the_whole_prompt(lm, which, shots, form, request):
    questions, form = request.getfixturevalue(which), FORMS[form]
    demonstrations = request.getfixturevalue("examples")[:shots]
    prompts = build(lm, form, demonstrations, questions)
    assert prompts.shots == shots
    for example, query in zip(questions, prompts.queries, strict=True):
        assert len(query) == len(example.continuations)
        for choice, scored in enumerate(query):
            given, continuation = example.pair(choice)
            assert list(scored.tokens) == whole(lm, form, demonstrations, given + continuation)
            before = whole(lm, form, demonstrations, given)
            assert list(scored.context) == before  # with this tokenizer words are not joined
            assert len(scored.context) > prompts.shared, "something must be left to predict from"
            assert scored.context[: prompts.shared] == prompts.queries[0][0].context[: prompts.shared]
        assert len({id(scored.context) for scored in query}) == len(set(example.inputs)), "an input is held once"
    if which == "examples":  # all of these begin alike after the demonstrations, and that is shared too
        assert prompts.shared >= len(whole(lm, form, demonstrations, "Review:")) - 1


def test_what_is_shared_shrinks_as_queries_arrive(lm):
    labels = (" good",)
    many = [Example(i, ("the plot is thin",), labels, 0) for i in range(300)] + [
        Example(300, ("the actors are",), labels, 0)
    ]
    prompts = build(lm, FORMS["text"], [], many)
    assert lm.decode(prompts.queries[0][0].context[: prompts.shared]) == "the"
    assert lm.decode(prompts.queries[0][0].tokens) == "the plot is thin good"
    assert lm.decode(prompts.queries[300][0].tokens) == "the actors are good"


def test_a_continuation_that_joins_its_input(lm):
    """Without a space between them the tokens of input and continuation may not be theirs alone: all choices are scored
    from the first token that one of them changes."""
    example = Example(0, ("the act",), ("ors", " is"), 0)
    prompts = build(lm, FORMS["text"], [], [example])
    (joined, apart) = prompts.queries[0]
    assert joined.context == apart.context and lm.decode(joined.continuation) == " actors"
    assert lm.decode(apart.continuation) == " act is"
    whole = [list(request.tokens) for request in (joined, apart)]
    assert whole == [lm.encode(["the act" + text])[0] for text in example.continuations]
    # partial evaluation has an input for each choice, whose last token one continuation may join
    own = build(lm, FORMS["text"], [], [Example(0, ("the act", "the film"), (" is",) * 2, 0)]).queries[0]
    assert [lm.decode(request.continuation) for request in own] == [" is", " is"]


def test_fit_follows_the_authors_rule(make_lm, examples):
    lm, form = make_lm(max_positions=60), FORMS["tokens"]
    longest = longest_query(lm, examples)
    assert longest == max(len(lm.encode(["".join(e.pair(c))])[0]) for e in examples for c in range(4))
    size, expected = 1, 0
    for example in examples:
        size += len(lm.encode([demonstration_text(example)])[0]) + 1
        if size + longest >= 60:
            break
        expected += 1
    fitted = fit(lm, form, examples, longest)
    assert 0 < expected < len(examples) and fitted == examples[:expected]
    assert build(lm, form, fitted, examples).longest()[0] < 60


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            Example(7, ("long " * 200,), (" good",), 0),
            r"example 7 has a prompt of \d+ tokens, but .* takes 160; .*with shorten",
        ),
        (Example(7, ("",), (" good",), 0), "example 7 has no token before its continuation; .*with bos"),
        (Example(7, ("a film",), ("",), 0), "example 7 has a continuation without tokens"),
    ],
)
def test_what_cannot_be_asked(lm, example, message):
    with pytest.raises(UserError, match=message):
        build(lm, FORMS["text"], [], [example])


def test_digest_tells_prompts_apart(lm, examples):
    base = build(lm, FORMS["tokens"], examples[:2], examples)
    assert base.sha256() == build(lm, FORMS["tokens"], examples[:2], examples).sha256()
    others = [build(lm, FORMS["text"], examples[:2], examples), build(lm, FORMS["tokens"], examples[1:3], examples)]
    others.append(build(lm, FORMS["tokens"], examples[:2], examples[:-1]))
    moved = [[Request(r.context[:-1], r.context[-1:] + r.continuation) for r in query] for query in base.queries]
    others.append(type(base)(moved, base.shots))
    assert len({base.sha256(), *(other.sha256() for other in others)}) == 5


# Tokenizers that join texts, or take them for special tokens


def hugging_face(tokenizer, **special):
    """A model that is scored for token ids alone."""
    transformers = pytest.importorskip("transformers")
    from momentum_lm.lm.huggingface import HuggingFaceLM

    config = transformers.GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1, n_positions=128)
    model = transformers.GPT2LMHeadModel(config)
    return HuggingFaceLM(model, transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), "tiny", "")


@pytest.fixture(scope="module")
def crossing():
    """A byte-level BPE that reads past spaces, with one token for " Answer: C" and none for the other answers."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["x Answer: C"] * 50, trainer)
    return hugging_face(tokenizer, eos_token="<end>")


def test_all_labels_of_a_query_are_scored_from_the_same_token_on(crossing):
    labels = (" A", " C", " B", " AC")
    for shots in (0, 2):
        examples = [Example(i, (f"{i} Answer:",), labels, 1) for i in range(3)]
        prompts = build(crossing, FORMS["text"], examples[:shots], examples)
        for example, query in zip(examples, prompts.queries, strict=True):
            assert len({tuple(request.context) for request in query}) == 1
            whole = [list(request.tokens) for request in query]
            texts = [crossing.decode(request.continuation) for request in query]
            (joined,) = {text.removesuffix(label) for text, label in zip(texts, labels, strict=True)}
            assert joined.endswith(":"), "what one label is joined with is scored before all of them"
            assert [crossing.decode(tokens) for tokens in whole] == [
                "".join(demonstration_text(e) + "\n\n" for e in examples[:shots]) + "".join(example.pair(c))
                for c in range(4)
            ]


def test_text_that_spells_a_special_token_is_text(crossing):
    (plain, special) = crossing.encode(["a <end> b", "<end>"])
    end = crossing.tokenizer.convert_tokens_to_ids("<end>")
    assert end not in plain + special and crossing.decode(plain) == "a <end> b"
    assert crossing.special_tokens == {"<end>": end}
    examples = [Example(0, ("a <end> b",), (" A", " C"), 1), Example(1, ("c",), (" A", " C"), 1)]
    assert list(special_notes(crossing, FORMS["text"], "{text}", examples)) == []
    spelled = PromptFormat((), "<end>")
    assert list(special_notes(crossing, spelled, "{text}<end>", examples)) == [
        "the template spells <end>, which is ordinary text to the model, not the special token",
        "the separator spells <end>, which is ordinary text to the model, not the special token",
    ]


def test_a_tokenizer_that_takes_text_for_special_tokens_is_told_of():
    """Words of a word-level tokenizer are what they are, whoever writes them."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<end>": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    lm = hugging_face(tokenizer, eos_token="<end>")
    examples = [Example(0, ("a <end> a",), (" a",) * 2, 1), Example(1, ("a a",), (" a",) * 2, 1)]
    (note,) = special_notes(lm, FORMS["text"], "{text}", examples)
    assert (
        note
        == "1 texts spell a special token, which the tokenizer of tiny takes for the token itself; change the texts"
    )


def test_fairseq_checkpoints_read_such_text_as_text_too(lm):
    assert EOS not in lm.encode(["a film </s> that is good"])[0]
    (note,) = special_notes(lm, PromptFormat((BOS,), "</s>"), "{text}", [Example(0, ("a </s>",), (" good", " bad"), 0)])
    assert note.startswith("the separator spells </s>")
