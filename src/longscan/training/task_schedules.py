"""What changes over the steps of a task's training: its rate, and the length of its sequences."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from longscan.tasks.task import Recipe


def rate_factor(recipe: Recipe, step: Tensor) -> Tensor:
    """What the highest learning rate is multiplied with at a step, counted from 1."""
    rise = (step / recipe.warmup).clamp(max=1) if recipe.warmup else torch.ones_like(step)
    if recipe.schedule == "constant":
        return rise
    left = 1 - ((step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)).clamp(0, 1)
    if recipe.schedule == "cosine":
        left = 0.5 - 0.5 * torch.cos(math.pi * left)
    return rise * (recipe.floor + (1 - recipe.floor) * left)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training whose batches are of one shape.

    Args:
        length: of the sequences; None: the task's own.
        batches: how many times as many sequences are in a batch.
        ends: after so many steps of all training; None: never.
    """

    length: int | None
    batches: int
    ends: int | None


def stage_at(recipe: Recipe, length: int, step: int) -> Stage:
    """The stage that a step, counted from 0, belongs to; lengths double over stages of as many steps each.

    Args:
        length: the task's own.
    """
    if recipe.shortest and recipe.shortest < length:
        doublings = math.ceil(math.log2(length / recipe.shortest))
        stage = step * doublings // max(doublings, recipe.length_warmup)
        if stage < doublings:
            shorter = recipe.shortest << stage
            ends = -(-(stage + 1) * max(doublings, recipe.length_warmup) // doublings)
            return Stage(shorter, length // shorter, ends)
    return Stage(None, 1, None)
