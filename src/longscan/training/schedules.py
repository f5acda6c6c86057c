"""Learning rates over a run: a linear rise, then a fall."""

from __future__ import annotations

import math

from longscan.training.config import TrainConfig


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of a step as a fraction of the peak.

    Rises linearly over ``config.warmup * steps`` steps (the first step is above 0), then falls along a cosine or a line
    to ``config.final_learning_rate`` just after the last step.

    Args:
        step: 0 .. steps - 1.
        steps: length of the run.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_learning_rate + (1 - config.final_learning_rate) * fall
