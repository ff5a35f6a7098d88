"""``--bpe momentum_lm``: text in, text out for ``fairseq-interactive`` and ``fairseq-generate``, with whatever
tokenizer the model has.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fairseq import utils
from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from momentum_lm.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


@dataclass
class ModelTokenizerConfig(FairseqDataclass):
    tokenizer_path: Optional[str] = field(
        default=None,
        metadata={"help": "tokenizer, or folder with it (default: in DATA, or else beside the checkpoint)"},
    )
    data: str = II("task.data")
    path: Optional[str] = II("common_eval.path")


@register_bpe("momentum_lm", dataclass=ModelTokenizerConfig)
class ModelTokenizer:
    """What ``load_tokenizer`` finds, between text and a line of the dictionary's symbols. Raises UserError where there
    is none.
    """

    def __init__(self, cfg: Any) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(cfg.tokenizer_path or _folder(cfg))

    def encode(self, text: str) -> str:
        """The symbols of ``text`` with blanks between."""
        symbols = self.tokenizer.dictionary.symbols
        return " ".join(symbols[i] for i in self.tokenizer.encode(text))

    def decode(self, line: str) -> str:
        """The text of symbols with blanks between. An unknown one gives U+FFFD."""
        return self.tokenizer.decode(self.tokenizer.dictionary.index(symbol) for symbol in line.split(" ") if symbol)


def _folder(cfg: Any) -> str:
    folders = [
        utils.split_paths(cfg.data)[0],
        *(str(Path(path).parent) for path in utils.split_paths(cfg.path or "")[:1]),
    ]
    return next(filter(has_tokenizer, folders), folders[0])
