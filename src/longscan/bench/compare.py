"""`longscan compare`: several mixers trained alike at about one number of parameters, and what each costs."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan import diagnostics
from longscan.bench.contest import failure, release
from longscan.bench.timing import measure, synchronise
from longscan.bench.trials import Trial, make_trial
from longscan.errors import ArgumentError, DataError
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.models.matching import contestant, match, parameters
from longscan.nn.storage import write_text
from longscan.training.config import TrainConfig
from longscan.training.optimizers import Optimizers, clip_gradients
from longscan.training.schedules import learning_rate_factor

#: Steps that are timed to find how many fit in the minutes, after some that may compile.
_WARM, _TIMED = 2, 4

#: Points of the curve of the loss that are kept.
_POINTS = 100


@dataclass(frozen=True)
class Settings:
    """What is compared, and how it is trained; two results with the same settings belong in one table.

    Args:
        task: a name of :data:`longscan.bench.trials.NAMES`.
        d_model, n_layer, d_intermediate: of the first mixer's model, whose parameters the others match by their width.
        steps: optimiser steps of each.
        minutes: instead of steps, time to train for each.
        batch_size, length, learning_rate, weight_decay, seed: of the training; a length of None is the task's default.
        device: where.
        first: the mixer that the others are matched with.
    """

    task: str = "text"
    d_model: int = 64
    n_layer: int = 2
    d_intermediate: int = 0
    steps: int | None = 200
    minutes: float | None = None
    batch_size: int = 16
    length: int | None = None
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "cpu"
    first: str = "mamba"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ArgumentError(f"steps or minutes, one of the two; got {self.steps} and {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise ArgumentError(f"steps must be at least 1, got {self.steps}")
        if self.minutes is not None and not self.minutes > 0:
            raise ArgumentError(f"minutes must be a positive number, got {self.minutes}")


#: Is told the mixer, the step, how many there are, and the loss.
Progress = Callable[[str, int, int, float], None]


def run(
    settings: Settings, mixers: tuple[str, ...], path: Path, progress: Progress = lambda *told: None
) -> dict[str, Any]:
    """Train what is not in the file yet, one mixer after the other, and write the file after each.

    Returns:
        What the file holds: "settings", "data", "machine", "versions", "commit", and "rows", one a mixer, in the order
        of ``mixers`` (those of earlier calls behind them).

    Raises:
        ArgumentError: a mixer, a block or the task is unknown.
        DataError: the file is of other settings, or no comparison.
        StorageError: the file could not be written.
    """
    found = _read(path, settings)
    trial = make_trial(settings.task, settings.length, settings.batch_size, settings.seed, settings.device)
    shape = LanguageModelConfig(
        settings.d_model, settings.n_layer, trial.vocab_size, d_intermediate=settings.d_intermediate
    )
    target = parameters(contestant(settings.first, shape))
    # All of them before any is trained, so that a name that is wrong costs no time.
    shapes = {name: match(contestant(name, shape), target) for name in mixers}
    rows: dict[str, dict[str, Any]] = {row["mixer"]: row for row in found}
    result: dict[str, Any] = {}
    for name, config in shapes.items():
        if name not in rows:
            rows[name] = {"mixer": name, **_contest(config, target, trial, settings, name, progress)}
            release(settings.device)
        result = {
            "compare": settings.task,
            "settings": asdict(settings),
            "data": {**trial.describe(), "higher_is_better": trial.higher_is_better},
            "rows": [rows[key] for key in dict.fromkeys((*shapes, *rows)) if key in rows],
            "machine": diagnostics.describe_machine(),
            "versions": diagnostics.versions(),
            "commit": diagnostics.commit(),
        }
        write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def _read(path: Path, settings: Settings) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        before, rows = values["settings"], values["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a comparison: {type(error).__name__}: {error}") from error
    now = asdict(settings)
    if differing := [f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]]:
        raise DataError(f"{path} is of other settings ({'; '.join(differing)}); give another --output")
    # What has failed is tried again.
    return [row for row in rows if not row["note"]]


def _contest(
    config: LanguageModelConfig, target: int, trial: Trial, settings: Settings, name: str, progress: Progress
) -> dict[str, Any]:
    torch.manual_seed(settings.seed)
    model = LanguageModel(config, device=settings.device)
    size = model.num_parameters()
    row: dict[str, Any] = {
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "parameters": size,
        "off_target": size / target - 1,
        "note": "",
    }
    try:
        trained = _train(model, trial, settings, lambda *told: progress(name, *told))
        return {**row, **trained, "quality": trial.quality(model), **_costs(model, trial, settings)}
    except (RuntimeError, MemoryError, ValueError, FloatingPointError) as error:
        return {**row, "note": failure(error)}


def _train(
    model: LanguageModel, trial: Trial, settings: Settings, progress: Callable[[int, int, float], None]
) -> dict[str, Any]:
    steps = settings.steps or _steps_in(60 * (settings.minutes or 0), model, trial, settings)
    training = TrainConfig(steps=steps, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizers = Optimizers(model, training)
    seconds: list[float] = []
    losses: list[float] = []
    for step in range(steps):
        start = time.perf_counter()
        loss = trial.loss(model, *trial.batch(step))
        loss.backward()
        clip_gradients(model.parameters(), training.clip)
        optimizers.step(learning_rate_factor(step, steps, training))
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"step {step + 1}: the loss is {losses[-1]}")
        progress(step + 1, steps, losses[-1])
    every = -(-steps // _POINTS)
    return {
        "steps": steps,
        "tokens": steps * settings.batch_size * trial.places,
        "train_seconds": round(sum(seconds), 3),
        "train_tokens_per_second": settings.batch_size * trial.places / statistics.median(seconds[_WARM:] or seconds),
        # Each the mean over the steps since the last.
        "losses": [
            [end, statistics.fmean(losses[max(0, end - every) : end])]
            for end in range(min(every, steps), steps + 1, every)
        ],
    }


def _steps_in(seconds: float, model: LanguageModel, trial: Trial, settings: Settings) -> int:
    """How many steps fit, by the time of a few that change nothing; at least one."""
    taken = []
    for step in range(_WARM + _TIMED):
        start = time.perf_counter()
        trial.loss(model, *trial.batch(step)).backward()
        model.zero_grad(set_to_none=True)
        synchronise(settings.device)
        taken.append(time.perf_counter() - start)
    return max(1, round(seconds / statistics.median(taken[_WARM:])))


def _costs(model: LanguageModel, trial: Trial, settings: Settings) -> dict[str, Any]:
    """A step of decoding for one sequence as long as those of training, its state, and memory of a training step."""
    tokens, targets = trial.batch(0)
    with torch.no_grad():
        logits, state = model(tokens[:1], model.initial_state(1), last_only=True)
        token = logits.argmax(-1)
        assert state is not None
        held = state
        model.step(token, held)  # may compile
        timing = measure(lambda: model.step(token, held), settings.device, repeats=30, budget=2.0)
    with _memory(settings.device) as used:
        trial.loss(model, tokens, targets).backward()
    model.zero_grad(set_to_none=True)
    return {
        "step_ms": 1e3 * timing.median,
        "state_bytes": model.state_bytes(1, trial.places),
        "memory_bytes": used[0],
        "memory_is": "peak of a training step" if settings.device == "cuda" else "kept for the backward pass",
    }


@contextmanager
def _memory(device: str) -> Iterator[list[int]]:
    """Bytes at the peak beyond what was there before; elsewhere than on NVIDIA GPUs no allocator tells, and it is what
    the forward pass keeps for the backward pass, without the parameters."""
    used: list[int] = []
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield used
        torch.cuda.synchronize()
        used.append(torch.cuda.max_memory_allocated() - before)
        return
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Views of one memory count once; a parameter is there anyway.
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield used
    used.append(sum(kept.values()))
