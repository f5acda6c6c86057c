"""The tokenizer of a training run as one of Transformers', so that text goes in and out of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longscan.errors import DataError
from longscan.tasks.tokenizers import BYTES, TOKENIZER_FILE, load_tokenizer
from longscan.training.runs import read_run

# The border's name where a tokenizer has none of its own.
_BORDER = "<|endoftext|>"


def tokenizer_of(run: str | Path) -> Any:
    """The tokenizer that a run of `longscan train text` has used, as a ``PreTrainedTokenizerFast``.

    The token between documents begins every text, as in training, ends a generation, and pads, on the left.

    Args:
        run: the run's folder.

    Raises:
        ConfigError: the folder is no run.
        DataError: its tokenizer cannot be found or read.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    folder = Path(run)
    name = read_run(folder)["text"]["tokenizer"]
    own = folder / TOKENIZER_FILE
    if name == BYTES:
        tokenizer, border = _bytes(), 0
    else:
        # Looks for it, and says in words what is wrong.
        known = load_tokenizer(str(own) if own.is_file() else name)
        border = known.border
        tokenizer = Tokenizer.from_file(str(own)) if own.is_file() else Tokenizer.from_pretrained(name)
    if tokenizer.id_to_token(border) is None:
        tokenizer.add_special_tokens([_BORDER])
    word = tokenizer.id_to_token(border)
    if word is None:
        raise DataError(f"{folder}: its tokenizer has no token {border}, which stands between documents")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{word} $A", special_tokens=[(word, border)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=word, eos_token=word, pad_token=word, padding_side="left"
    )


def _bytes() -> Any:
    """One token per byte, by its number; byte 0, which text does not hold, is the border."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The characters by which these tokenizers write bytes: printable ones as they are, the others from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    alphabet = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocabulary = {_BORDER: 0, **{alphabet[byte]: byte for byte in range(1, 256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
