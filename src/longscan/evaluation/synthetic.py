"""How well a model does a synthetic task, at any length: long sequences go through in chunks, the state carried."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.models import LanguageModel
from longscan.tasks.task import Task

# Tokens that go through a model at once, and that are drawn at once.
_CHUNK = {"cuda": 1 << 18, "cpu": 1 << 14}
_DRAWN = {"cuda": 1 << 26, "cpu": 1 << 20}
# Longer sequences are cut, the state carried; so are more of them in flight, for what computes step by step.
_WHOLE = 1 << 14


@torch.no_grad()
def accuracy(
    model: LanguageModel, task: Task, *, length: int | None = None, sequences: int = 512, seed: int = 0
) -> float:
    """The share of right answers.

    Args:
        model: over the task's vocabulary.
        length: of the task, instead of its own.
        sequences: how many to draw, at least; memory does not grow with them, nor with the length but for the tokens
            themselves and what the mixer has to keep (attention: everything).
        seed: of the data; no seed gives what another seed's training saw.
    """
    device = model.device
    length = length or task.length
    chunk, drawn = (sizes.get(device.type, sizes["cpu"]) for sizes in (_CHUNK, _DRAWN))
    batch = max(1, min(sequences, (chunk if length <= _WHOLE else drawn) // length))
    cut = None if length <= _WHOLE else max(1, chunk // batch)
    generator = torch.Generator(device).manual_seed(seed + (1 << 32))
    right = torch.zeros((), dtype=torch.int64, device=device)
    asked = torch.zeros_like(right)
    for _ in range(-(-sequences // batch)):
        tokens, targets = task.sample(batch, generator, length)
        found = task.judge(last_scores(model, tokens, task.answers(length), cut), targets)
        right += found[0]
        asked += found[1]
    return int(right) / int(asked)


def last_scores(model: LanguageModel, tokens: Tensor, answers: int, chunk: int | None) -> Tensor:
    """Scores (batch, answers, vocabulary) at the last places of tokens (batch, places), ``chunk`` places at a time
    (None: all at once)."""
    places = tokens.shape[1]
    if chunk is None:
        hidden, _ = model.backbone(tokens)
        return model.head(hidden[:, -answers:])
    state = model.initial_state(tokens.shape[0])
    kept = []
    for begin in range(0, places, chunk):
        hidden, after = model.backbone(tokens[:, begin : begin + chunk], state)
        assert after is not None
        state = after
        skip = max(0, places - answers - begin)
        if skip < hidden.shape[1]:
            kept.append(model.head(hidden[:, skip:]))
    return torch.cat(kept, dim=1)
