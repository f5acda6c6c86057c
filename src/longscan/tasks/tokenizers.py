"""Text to tokens and back: plain bytes, or any tokenizer of the Hugging Face `tokenizers` package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longscan.errors import DataError

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"

# What tokenizers call the token between documents.
_BORDERS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class Tokenizer(Protocol):
    """Maps text to tokens ``0 .. vocab_size - 1`` and back."""

    vocab_size: int
    #: The token put before each document.
    border: int
    #: Changes whenever the same text could give other tokens.
    identity: str

    def encode(self, content: bytes) -> np.ndarray:
        """Tokens of a text: one-dimensional integers."""
        ...

    def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens of each of several texts, by all cores where that is worth it."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; what is no valid UTF-8 becomes U+FFFD."""
        ...

    def byte_length(self, content: bytes) -> int:
        """Bytes of the text that :meth:`encode` represents: the divisor of bits per byte."""
        ...

    def save(self, folder: Path) -> None:
        """Write what :func:`load_tokenizer` needs into a folder."""
        ...


class ByteTokenizer:
    """One token per byte. Byte 0, which text does not hold, marks the border between documents."""

    vocab_size = 256
    border = 0
    identity = BYTES

    def encode(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, dtype=np.uint8)

    def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(content) for content in contents]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def byte_length(self, content: bytes) -> int:
        return len(content)

    def save(self, folder: Path) -> None:
        """Bytes need no file."""


class HubTokenizer:
    """A tokenizer of the `tokenizers` package."""

    def __init__(self, tokenizer: Any) -> None:
        # A file may ask for texts that are cut short or filled up: those of a corpus are neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        known = (tokenizer.token_to_id(name) for name in _BORDERS)
        border = next((token for token in known if token is not None), None)
        if border is None:
            border = self.vocab_size
            self.vocab_size += 1
        self.border = border
        self.identity = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    def encode(self, content: bytes) -> np.ndarray:
        return self.encode_batch([content])[0]

    def encode_batch(self, contents: Sequence[bytes]) -> list[np.ndarray]:
        texts = [content.decode("utf-8", errors="replace") for content in contents]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in found]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode([t for t in tokens if t != self.border], skip_special_tokens=False))

    def byte_length(self, content: bytes) -> int:
        return len(content.decode("utf-8", errors="replace").encode())

    def save(self, folder: Path) -> None:
        from longscan.nn.storage import write_text

        write_text(folder / TOKENIZER_FILE, self._tokenizer.to_str())


def load_tokenizer(name: str) -> Tokenizer:
    """``"bytes"``, a ``tokenizer.json`` or a folder with one, or a name on the Hugging Face Hub.

    Raises:
        DataError: it cannot be found or read, or the package `tokenizers` is not installed.
    """
    if name == BYTES:
        return ByteTokenizer()
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"tokenizer: {name!r} needs the package `tokenizers`; install it with: pip install 'longscan[hub]'"
        ) from error
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / TOKENIZER_FILE
    try:
        if path.is_file():
            return HubTokenizer(tokenizers.Tokenizer.from_file(str(path)))
        return HubTokenizer(tokenizers.Tokenizer.from_pretrained(name))
    except Exception as error:  # the package raises bare Exception
        raise DataError(
            f"tokenizer: cannot load {name!r}: {error}; give {BYTES!r}, a {TOKENIZER_FILE}, a folder with one, "
            "or a name on the Hugging Face Hub"
        ) from error
