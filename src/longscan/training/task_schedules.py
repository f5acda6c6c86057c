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
        carries: whether a batch goes on from the states that the last one ended with.
        ends: after so many steps of all training; None: not by their number.
        last: whether there is nothing after it.
    """

    length: int | None = None
    batches: int = 1
    carries: bool = False
    ends: int | None = None
    last: bool = False


def stages_to_master(recipe: Recipe) -> int:
    """How many stages end when the figure is good enough."""
    return len(recipe.lengths) + recipe.carry_state


def is_over(recipe: Recipe, mastered: int, steps: int, learnt: bool) -> bool:
    """Whether a stage that has lasted so many steps gives way to the next: it is learnt, or patience has ended."""
    shorter = mastered < len(recipe.lengths)
    return mastered < stages_to_master(recipe) and (learnt or (shorter and 0 < recipe.patience <= steps))


def stage_at(recipe: Recipe, length: int, step: int, mastered: int) -> Stage:
    """The stage that a step belongs to.

    Lengths double over stages of as many steps each, or are ``recipe.lengths`` until :func:`is_over`; then comes the
    task's own, without states carried and, once that is mastered, with them.

    Args:
        length: the task's own.
        step: counted from 0.
        mastered: how many of :func:`stages_to_master` are done with.
    """
    if recipe.shortest and recipe.shortest < length:
        doublings = math.ceil(math.log2(length / recipe.shortest))
        steps = max(doublings, recipe.length_warmup)
        doubled = step * doublings // steps
        if doubled < doublings:
            shorter = recipe.shortest << doubled
            return Stage(shorter, length // shorter, ends=-(-(doubled + 1) * steps // doublings))
    if mastered < len(recipe.lengths):
        return Stage(recipe.lengths[mastered])
    last = mastered >= stages_to_master(recipe)
    return Stage(carries=recipe.carry_state and last, last=last)
