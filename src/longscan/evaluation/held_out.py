"""Loss of a language model on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import DataError
from longscan.models import LanguageModel
from longscan.nn.state import ModelState
from longscan.training.stepper import autocast

_IGNORED = -100


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Bits per byte of text from a sum of losses in nats."""
    return nats / math.log(2) / text_bytes


@torch.no_grad()
def stream_nats(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    rows: int = 16,
    chunk: int = 1024,
    precision: str = "float32",
    progress: Callable[[float], None] | None = None,
) -> float:
    """The summed loss of every token but the first, each predicted from what comes before it.

    The tokens are cut in ``rows`` equal parts that are read side by side in chunks, the state carried from chunk to
    chunk, across the borders of documents too. Before its first token that counts, each part but the first has read the
    ``chunk`` tokens in front of it; so every token is predicted from all of the text before it within its part, and
    from at least ``chunk`` tokens (or all there are). For a model whose state grows (attention), every chunk is instead
    predicted with a fresh state that has read the chunk before it.

    Args:
        tokens: (tokens,) integers.
        rows: most parts.
        chunk: tokens per part taken at once.
        precision: "float32" or "bfloat16" (autocast).
        progress: is given the fraction done after each chunk; what it raises ends the evaluation.

    Returns:
        Nats, summed.
    """
    count = len(tokens) - 1
    if count < 1:
        raise DataError(f"held-out part: at least two tokens are needed, got {len(tokens)}")
    if model.state_bytes(1, 2) > model.state_bytes(1, 1):
        return _windowed(model, tokens, rows, chunk, precision, progress)
    rows = max(1, min(rows, count // (4 * chunk)))
    size = -(-count // rows)
    starts = np.arange(rows) * size
    device = model.device
    state: ModelState = model.initial_state(1)
    with autocast(device, precision):
        if rows > 1:
            context = np.stack([tokens[start - chunk : start] for start in starts[1:]]).astype(np.int64)
            _, primed = model(torch.from_numpy(context).to(device), model.initial_state(rows - 1), last_only=True)
            state = ModelState.cat([state, primed])
    total = 0.0
    for offset in range(0, size, chunk):
        length = min(chunk, size - offset)
        index = starts[:, None] + offset + np.arange(length)
        inputs = torch.from_numpy(tokens[np.minimum(index, count)].astype(np.int64))
        targets = tokens[np.minimum(index + 1, count)].astype(np.int64)
        targets[index + 1 > count] = _IGNORED
        with autocast(device, precision):
            logits, after = model(inputs.to(device), state)
        assert after is not None
        state = after
        total += _nats(logits, torch.from_numpy(targets).to(device)).sum(dtype=torch.float64).item()
        if progress is not None:
            progress((offset + length) / size)
    return total


def _windowed(
    model: LanguageModel,
    tokens: np.ndarray,
    rows: int,
    chunk: int,
    precision: str,
    progress: Callable[[float], None] | None,
) -> float:
    count = len(tokens) - 1
    starts = np.arange(0, count, chunk)
    total = 0.0
    for first in range(0, len(starts), rows):
        here = starts[first : first + rows]
        begin = np.maximum(here - chunk, 0)
        index = begin[:, None] + np.arange(min(2 * chunk, count))
        inputs = torch.from_numpy(tokens[np.minimum(index, count)].astype(np.int64))
        targets = tokens[np.minimum(index + 1, count)].astype(np.int64)
        targets[(index < here[:, None]) | (index >= here[:, None] + chunk) | (index + 1 > count)] = _IGNORED
        with autocast(model.device, precision):
            logits, _ = model(inputs.to(model.device))
        total += _nats(logits, torch.from_numpy(targets).to(model.device)).sum(dtype=torch.float64).item()
        if progress is not None:
            progress(min(1.0, (first + rows) / len(starts)))
    return total


@torch.no_grad()
def nats_by_position(
    model: LanguageModel,
    tokens: np.ndarray,
    *,
    windows: int,
    length: int,
    rows: int = 16,
    precision: str = "float32",
) -> Tensor:
    """Mean loss at each position of windows that start afresh at evenly spaced places.

    Args:
        windows: most windows; fewer if the tokens do not hold so many.
        length: tokens per window; shorter if there are fewer tokens.
        rows: windows taken at once.

    Returns:
        (length,) float64 on the CPU: nats of the token at position 1, 2, ... of a window.
    """
    count = len(tokens) - 1
    if count < 1:
        raise DataError(f"held-out part: at least two tokens are needed, got {len(tokens)}")
    length = min(length, count)
    windows = max(1, min(windows, count // length))
    starts = np.linspace(0, count - length, windows).astype(np.int64)
    total = torch.zeros(length, dtype=torch.float64)
    for first in range(0, windows, rows):
        pieces = np.stack([tokens[s : s + length + 1] for s in starts[first : first + rows]]).astype(np.int64)
        both = torch.from_numpy(pieces).to(model.device)
        with autocast(model.device, precision):
            logits, _ = model(both[:, :-1])
        total += _nats(logits, both[:, 1:]).sum(0, dtype=torch.float64).cpu()
    return total / windows


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="none")
    return losses.view(targets.shape)
