"""How well a model does a task, at any length: long token sequences go through in chunks, the state carried."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.models import LanguageModel
from longscan.tasks.task import Task
from longscan.tasks.watching import tell
from longscan.training.stepper import autocast
from longscan.training.tasks import TaskModel, task_scores

# Places that go through a model at once, and that are drawn at once.
_CHUNK = {"cuda": 1 << 18, "cpu": 1 << 14}
_DRAWN = {"cuda": 1 << 26, "cpu": 1 << 20}
# Longer sequences are cut, the state carried; so are more of them in flight, for what computes step by step.
_WHOLE = 1 << 14


@torch.no_grad()
def evaluate_task(
    model: TaskModel,
    task: Task,
    *,
    length: int | None = None,
    sequences: int = 512,
    seed: int = 0,
    precision: str = "float32",
) -> float:
    """The figure of the task's metric.

    Args:
        model: of the task; whether it trains is as before afterwards.
        length: of the task, instead of its own, or another key that :meth:`Task.tests` takes.
        sequences: how many to draw, at least, or all that are held out; memory does not grow with them, nor, for a
            language model, with the length but for the tokens themselves and what the mixer has to keep (attention:
            everything).
        seed: of the data; no seed gives what another seed's training saw.
        precision: "float32" or "bfloat16" (autocast).
    """
    device = next(model.parameters()).device
    length = task.length if length is None else length
    places = max(length, task.length)
    chunk, drawn = (sizes.get(device.type, sizes["cpu"]) for sizes in (_CHUNK, _DRAWN))
    cuts = isinstance(model, LanguageModel) and places > _WHOLE
    batch = max(1, min(sequences, (drawn if cuts else chunk) // places))
    cut = max(1, chunk // batch) if cuts else None
    sums: tuple[Tensor, ...] = ()
    trains = model.training
    model.eval()
    done, whole, what = 0, task.held_out or sequences, f"testing at {task.axis} {length:,}"
    for inputs, targets in task.tests(length, sequences, batch, device, seed):
        tell(what, done, whole)
        with autocast(device, precision):
            if isinstance(model, LanguageModel):
                scores = last_scores(model, inputs, task.answers(length), cut)
            else:
                scores = task_scores(model, task, inputs, length)
        judged = [value if value.dtype == torch.int64 else value.double() for value in task.judge(scores, targets)]
        done += len(inputs)
        sums = tuple(old + new for old, new in zip(sums, judged, strict=True)) if sums else tuple(judged)
    model.train(trains)
    total, count = sums
    return task.metric.score(float(total), float(count))


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
