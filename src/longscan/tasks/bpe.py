"""A tokenizer learnt from the text itself: byte-level BPE (Sennrich et al. 2016), no download."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from longscan.errors import DataError
from longscan.nn.storage import write_text
from longscan.tasks.corpus import build_corpus, cache_folder
from longscan.tasks.shards import Tokens
from longscan.tasks.sources import Source
from longscan.tasks.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

#: ``bpe:4096`` is a tokenizer of 4096 tokens.
PREFIX = "bpe:"

_BORDER = "<|endoftext|>"
# A border and the 256 bytes.
_SMALLEST = 257
_PIECE = 1 << 20


def learn_bpe(name: str, source: Source, *, held_out: float, cache: Path | None = None) -> Tokenizer:
    """The tokenizer that a name such as ``bpe:4096`` means for a text, learnt from its training part or, if that was
    done before, from the cache.

    Args:
        name: ``bpe:`` and the number of tokens, which a short text may not need.
        source, held_out, cache: as for :func:`longscan.tasks.corpus.build_corpus`.

    Raises:
        DataError: the number is none or too small, the text cannot be used, or `tokenizers` is not installed.
    """
    count = name.removeprefix(PREFIX)
    if not count.isdecimal() or int(count) < _SMALLEST:
        raise DataError(f"tokenizer: {name!r} must be {PREFIX} and a number of at least {_SMALLEST}")
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"tokenizer: {name!r} needs the package `tokenizers`; install it with: pip install 'longscan[hub]'"
        ) from error
    cache = cache_folder() if cache is None else cache
    corpus = build_corpus(source, ByteTokenizer(), held_out=held_out, cache=cache)
    path = cache / "tokenizers" / f"{corpus.key}-{count}.json"
    if not path.is_file():
        learnt = tokenizers.Tokenizer(tokenizers.models.BPE())
        learnt.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        learnt.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=int(count), special_tokens=[_BORDER], initial_alphabet=alphabet, show_progress=False
        )
        learnt.train_from_iterator(_documents(corpus.train), trainer)
        write_text(path, learnt.to_str())
    return load_tokenizer(os.fspath(path))


def _documents(text: Tokens) -> Iterator[str]:
    """Documents in pieces of at most a length, read one after the other."""
    rest = b""
    for begin in range(0, len(text), _PIECE):
        *whole, rest = (rest + bytes(text[begin : begin + _PIECE])).split(bytes([ByteTokenizer.border]))
        for document in whole:
            for start in range(0, len(document), _PIECE):
                yield document[start : start + _PIECE].decode("utf-8", errors="replace")
        while len(rest) > _PIECE:
            yield rest[:_PIECE].decode("utf-8", errors="replace")
            rest = rest[_PIECE:]
    if rest:
        yield rest.decode("utf-8", errors="replace")
