"""Language modelling on text: which data, measured in held-out bits per byte, and what to train by default."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from longscan.errors import DataError
from longscan.tasks.bpe import PREFIX, learn_bpe
from longscan.tasks.corpus import MANIFEST, Corpus, Progress, build_corpus, open_corpus, read_manifest, silent
from longscan.tasks.sources import STDLIB, open_source
from longscan.tasks.tokenizers import BYTES, TOKENIZER_FILE, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What text to learn."""

    data: str = STDLIB
    """"stdlib" (the Python files of this interpreter's standard library), a text file, a folder, a .jsonl file,
    hf:NAME[:CONFIG] (a data set of the Hugging Face Hub, streamed), or a folder that `longscan prepare` has written,
    whose tokenizer and held-out part are those it was written with."""
    tokenizer: str = BYTES
    """"bytes", a tokenizer.json, a folder with one, a name on the Hugging Face Hub, or bpe:4096, which is learnt from
    the text."""
    field: str = "text"
    """Field of a JSON line or data-set row that holds the text."""
    max_bytes: int | None = None
    """Stop reading after this many bytes of text."""
    held_out: float = 0.05
    """Fraction of the documents held out, chosen by the hash of their names."""


def prepare(
    config: TextConfig,
    tokenizer: Tokenizer | None = None,
    *,
    out: Path | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Progress = silent,
) -> tuple[Corpus, Tokenizer]:
    """Read, split and tokenize, or find all that in the cache.

    Args:
        config: the text.
        tokenizer: instead of the one that ``config`` names.
        out, share, progress: see :func:`longscan.tasks.corpus.build_corpus`.

    Raises:
        DataError: the text or the tokenizer cannot be used.
        StorageError: the cache cannot be written.
    """
    prepared = Path(config.data).expanduser()
    if (prepared / MANIFEST).is_file() and out is None:
        own = load_tokenizer(str(prepared) if (prepared / TOKENIZER_FILE).is_file() else BYTES)
        found = {own.identity, tokenizer.identity if tokenizer is not None else own.identity}
        if found != {read_manifest(prepared)["tokenizer"]}:
            raise DataError(
                f"data: {prepared} was prepared with another tokenizer; prepare the text anew with this one"
            )
        return open_corpus(prepared, share=share, progress=progress), own
    source = open_source(config.data, field=config.field, max_bytes=config.max_bytes)
    if tokenizer is None and config.tokenizer.startswith(PREFIX):
        tokenizer = learn_bpe(config.tokenizer, source, held_out=config.held_out)
    tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
    corpus = build_corpus(source, tokenizer, held_out=config.held_out, out=out, share=share, progress=progress)
    return corpus, tokenizer


def recipe(device: str) -> dict[str, dict[str, Any]]:
    """Default model and training options for a kind of device ("cpu", "cuda", ...), as plain values.

    The CPU's are for about six minutes in all on two cores, the GPU's for two to six on one GPU. bfloat16 is
    chosen where the processor multiplies it natively.
    """
    chosen = _RECIPES["cpu" if device == "cpu" else "gpu"]
    precision = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    return {**chosen, "training": {**chosen["training"], "precision": precision}}


def _multiplies_bfloat16(device: str) -> bool:
    import torch

    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


_RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "model": {"d_model": 192, "n_layer": 4},
        "training": {
            "minutes": 3.9,
            "batch_size": 8,
            "sequence_length": 256,
            "optimizer": "muon",
            "schedule": "linear",
        },
    },
    "gpu": {
        "model": {"d_model": 640, "n_layer": 16},
        # More passes at this size only learn the small corpus by heart: with eight of them, what was held out cost 1.70
        # bits per byte, with 4.7 of them 1.30 (results/text).
        "training": {
            "minutes": 4.0,
            "passes": 4.5,
            "batch_size": 32,
            "sequence_length": 2048,
            "log_every": 10,
        },
    },
}
