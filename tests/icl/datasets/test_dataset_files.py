"""The data sets that come with the package: the exact text that each makes of a row as the hub has it."""

import re

import pytest

from momentum_lm.icl.datasets.definitions import FOLDER
from momentum_lm.icl.datasets.loading import available, load_spec

AGNEWS = "Classify the news articles into the categories of World, Sports, Business, and Technology."
ARC = {
    "id": "Mercury_1",
    "question": "Which is a liquid?",
    "choices": {"text": ["ice", "water", "steam", "sand"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}
# name: (a row of the hub, {template: input}, continuations, gold)
ROWS = {
    "sst2": (
        {"sentence": "a gem ", "label": 1, "idx": 0},
        {"paper": "Sentence: a gem \nLabel:", "code": "Sentence: a gem  Label:"},
        " Negative| Positive",
        1,
    ),
    "sst5": (
        {"text": "so-so .", "label": 2, "label_text": "neutral"},
        {"paper": "Sentence: so-so .\nLabel:", "code": "Sentence: so-so . Label:"},
        " terrible| bad| neutral| good| great",
        2,
    ),
    "mr": (
        {"text": "dull .", "label": 0},
        {"paper": "Review: dull .\nSentiment:", "code": "Review: dull . Sentiment:"},
        " Negative| Positive",
        0,
    ),
    "subj": (
        {"text": "he dies .", "label": 0, "label_text": "objective"},
        {"paper": "Input: he dies .\nType:", "code": "Input: he dies . Type:"},
        " objective| subjective",
        0,
    ),
    "agnews": (
        {"text": "Oil is up", "label": 2},
        {"paper": f"{AGNEWS}\nNews: Oil is up\nType:", "code": f"{AGNEWS} Article: Oil is up Answer:"},
        " World| Sports| Business| Technology",
        2,
    ),
    "bbc": (
        {"text": "goal wins cup", "label": 2, "label_text": "sport"},
        {"plain": "News: goal wins cup\nTopic:"},
        " Technology| Business| Sport| Entertainment| Politics",
        2,
    ),
    "cb": (
        {"premise": "It rained.", "hypothesis": "it was wet", "idx": 0, "label": 0},
        {
            "paper": "It rained.\nQuestion: it was wet True, False, or Neither?\nAnswer:",
            "code": "It rained. Question: it was wet. True, False, or Neither? Answer:",
        },
        " True| False| Neither",
        0,
    ),
    "rte": (
        {"sentence1": "It rained.", "sentence2": "It was dry.", "label": 1, "idx": 0},
        {"code": "Passage: It rained. Question: It was dry. Yes or No? Answer:"},
        " Yes| No",
        1,
    ),
    "boolq": (
        {"question": "is ice cold", "passage": "Ice is.", "idx": 0, "label": 1},
        {"code": "Passage: Ice is. Question: is ice cold? Answer:"},
        " No| Yes",
        1,
    ),
    "imdb": (
        {"text": "Loved it.<br />", "label": 1},
        {"code": "Review: Loved it.<br /> Is the review positive or negative?"},
        " Negative| Positive",
        1,
    ),
    "trec": (
        {"text": "Who is he ?", "coarse_label": 3, "fine_label": 29},
        {"code": "Question: Who is he ? Type:"},
        " Expression| Entity| Description| Person| Location| Number",
        3,
    ),
    "dbpedia": (
        {"label": 4, "title": "X", "content": " X was a senator."},
        {"code": "Input:  X was a senator. Type:"},
        " company| school| artist| athlete| politics| transportation| building| nature| village| animal| plant"
        "| album| film| book",
        4,
    ),
    "arce": (ARC, {"code": "Which is a liquid?"}, " ice| water| steam| sand", 1),
    "arcc": (ARC | {"answerKey": "4"}, {"code": "Which is a liquid?"}, " ice| water| steam| sand", 3),
    "obqa": (
        {
            "id": "7",
            "question_stem": "Ice is",
            "choices": {"text": ["hot", "red", "cold", "far"], "label": list("ABCD")},
            "answerKey": "C",
        },
        {"code": "Ice is"},
        " hot| red| cold| far",
        2,
    ),
    "piqa": (
        {"goal": "Open a jar", "sol1": "Twist the lid.", "sol2": "Sing.", "label": 0},
        {"code": "Open a jar"},
        " Twist the lid.| Sing.",
        0,
    ),
    "copa": (
        {"premise": "I ran.", "choice1": "It rained.", "choice2": "I sat.", "question": "cause", "idx": 0, "label": 0},
        {"code": "I ran because"},
        " it rained.| i sat.",
        0,
    ),
    "hellaswag": (
        {
            "ind": 1,
            "activity_label": "Running",
            "ctx_a": "A man",
            "ctx_b": "",
            "ctx": "A man",
            "endings": list("runs"),
            "label": "3",
        },
        {"code": "A man"},
        " r| u| n| s",
        3,
    ),
}


def test_every_file_is_tested_here():
    assert available() == sorted([*ROWS, "winogrande"])
    assert len(available()) == 19


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_the_prompts_of_paper_and_code(name):
    row, inputs, continuations, gold = ROWS[name]
    assert set(load_spec(name).templates) == set(inputs)
    for template, text in inputs.items():
        spec = load_spec(name, template)
        example = spec.render(row, 7, "here")
        assert (spec.template, example.index, example.gold) == (template, 7, gold)
        assert example.inputs == (text,)
        assert "|".join(example.continuations) == continuations
        assert example.pair(gold) == (text, continuations.split("|")[gold])
        assert "\n" not in text or template != "code"


def test_the_other_question_of_copa():
    row = ROWS["copa"][0] | {"question": "effect", "premise": "I ran"}
    assert load_spec("copa").render(row, 0, "").inputs == ("I ran so",)


def test_winogrande_scores_what_follows_the_blank():
    row = {"sentence": "The cup did not fit because the _ was big.", "option1": "cup", "option2": "bag", "answer": "2"}
    example = load_spec("winogrande").render(row, 0, "")
    before = "The cup did not fit because the "
    assert example.inputs == (f"{before}cup", f"{before}bag")
    assert example.continuations == (" was big.", " was big.")
    assert example.gold == 1 and "".join(example.pair(1)) == f"{before}bag was big."


def test_arc_without_four_choices_is_left_out():
    row = ARC | {"choices": {"text": ["ice", "water", "sand"], "label": ["A", "B", "C"]}}
    assert load_spec("arce").render(row, 0, "") is None
    listed = ARC | {"choices": [{"text": text, "label": "?"} for text in "wxyz"]}  # how some exports nest them
    assert load_spec("arce").render(listed, 0, "").continuations == (" w", " x", " y", " z")


@pytest.mark.parametrize(
    "name, template, premise",
    [
        ("mr", "paper", "Sentiment:"),
        ("mr", "code", "Sentiment:"),
        ("agnews", "code", "Answer:"),
        ("cb", "code", "True, False, or Neither? Answer:"),
        ("boolq", "code", "Answer:"),
        ("imdb", "code", "Is the review positive or negative?"),
        ("arce", "code", "the answer is:"),
        ("piqa", "code", ""),
        ("winogrande", "code", ""),
    ],
)
def test_domain_premise(name, template, premise):
    assert load_spec(name, template).domain_premise == premise


def test_content_free_inputs():
    assert load_spec("cb", "code").content_free("N/A") == "N/A Question: N/A. True, False, or Neither? Answer:"
    assert load_spec("agnews", "paper").content_free("") == f"{AGNEWS}\nNews: \nType:"
    with pytest.raises(ValueError, match="arce has no fixed labels"):
        load_spec("arce").content_free("N/A")


def test_shortening_touches_the_texts_of_the_row_alone():
    def shorten(text):
        return text[:2]

    assert (
        load_spec("cb", "code").render(ROWS["cb"][0], 0, "", shorten).inputs[0]
        == "It Question: it. True, False, or Neither? Answer:"
    )
    assert load_spec("copa").render(ROWS["copa"][0], 0, "", shorten).inputs == ("I  because",)
    row = {"sentence": "It is the _ now.", "option1": "cup", "option2": "bag", "answer": "1"}
    assert load_spec("winogrande").render(row, 0, "", shorten).continuations == (" now.", " now.")


def test_what_every_file_says():
    for name in available():
        spec = load_spec(name)
        assert spec.name == name and spec.hub and "/" in spec.hub.id
        assert spec.description and "\n" not in spec.description and spec.task and spec.licence
        assert (spec.labels is None) == (spec.task == "multiple choice")
        assert set(spec.templates) <= {"paper", "code", "plain"}


def test_the_readmes_example_is_a_data_set(tmp_path):
    text = (FOLDER / "README.md").read_text("utf-8")
    path = tmp_path / "tickets.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    example = load_spec(str(path)).render({"dept": "it", "subject": "Help", "body": "No screen."}, 0, "")
    assert example.inputs == ("Ticket: Help. No screen.\nDepartment:",)
    assert example.continuations == (" Money", " Technology") and example.gold == 1
