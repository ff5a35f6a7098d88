"""What checkpoints hold as a task's state, loaded by tasks of fairseq's older and newer kind."""

import argparse

import pytest
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask

from momentum_lm.errors import UserError
from momentum_lm.fairseq_plugin.tasks.icl_classification import IclClassificationTask
from momentum_lm.text.dictionary import DIGEST, symbols_digest


@pytest.mark.parametrize("kind", [IclClassificationTask, LanguageModelingTask])
def test_a_checkpoint_of_another_dictionary_is_refused_and_one_of_the_same_is_not(kind):
    options = argparse.Namespace(data="the/folder")
    if kind is LanguageModelingTask:
        task = kind(options, Dictionary())
    else:  # its own constructor reads a tokenizer
        task = object.__new__(kind)
        FairseqTask.__init__(task, options)
        task.dictionary = Dictionary()
    task.load_state_dict({})
    task.load_state_dict({DIGEST: symbols_digest(Dictionary().symbols), "other": 1})
    with pytest.raises(UserError, match="the dictionary of the/folder"):
        task.load_state_dict({DIGEST: symbols_digest(["a"])})
