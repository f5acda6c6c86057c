"""Training: batches, optimisers, schedules, the loop, checkpoints and the folder of a run."""

from __future__ import annotations

from longscan.training.batches import Batches
from longscan.training.config import TrainConfig
from longscan.training.distributed import Ranks, join
from longscan.training.loop import Observer, Trainer
from longscan.training.parallel import gather, shard
from longscan.training.runs import create_run, read_run
from longscan.training.stepper import Stepper

__all__ = [
    "Batches",
    "Observer",
    "Ranks",
    "Stepper",
    "TrainConfig",
    "Trainer",
    "create_run",
    "gather",
    "join",
    "read_run",
    "shard",
]
