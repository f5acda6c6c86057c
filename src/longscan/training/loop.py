"""The training loop: steps, looks at the loss, held-out estimates, checkpoints, and a way to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longscan.errors import CheckpointError, ConfigError, TrainingError
from longscan.training.checkpoint import Checkpoints
from longscan.training.config import TrainConfig
from longscan.training.distributed import Ranks
from longscan.training.metrics import Metrics
from longscan.training.schedules import learning_rate_factor
from longscan.training.stepper import Stepper

CHECKPOINTS_FOLDER = "checkpoints"


class Observer(Protocol):
    """Who wants to know how a run goes; only the first process tells."""

    def stepped(self, row: dict[str, Any]) -> None:
        """A row of the metrics was written."""
        ...

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint was written."""
        ...

    def warned(self, message: str) -> None:
        """Something is wrong, but the run goes on."""
        ...


class Trainer:
    """Trains from the newest sound checkpoint of a run folder, or from the start, to ``config.steps`` steps.

    Args:
        folder: the run; gets ``metrics.jsonl``, ``events`` and ``checkpoints``.
        config: with ``steps`` set.
        stepper: does the steps.
        bits_per_byte: bits per byte of text for one nat per token.
        estimate: quick held-out estimate of the model in bits per byte, or None.
        observer: is told what happens.
        should_stop: asked after every step; True saves and returns early.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        stepper: Stepper,
        *,
        ranks: Ranks,
        device: torch.device,
        bits_per_byte: float,
        observer: Observer,
        estimate: Callable[[], float] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if config.steps is None:
            raise ConfigError("steps must be fixed before training")
        self._folder = folder
        self._config = config
        self._steps = config.steps
        self._stepper = stepper
        self._ranks = ranks
        self._device = device
        self._bits_per_byte = bits_per_byte
        self._observer = observer
        self._estimate = estimate
        self._should_stop = should_stop
        self._pending: list[tuple[int, Tensor, Tensor, dict[str, Any]]] = []
        self._metrics: Metrics | None = None
        self._best: tuple[int, float] | None = None
        root = folder / CHECKPOINTS_FOLDER
        self._checkpoints = Checkpoints(root, ranks=ranks, keep=config.keep_checkpoints, saved=observer.saved)
        count = config.evaluations
        self._evaluate_after = {round(i * self._steps / count) for i in range(1, count + 1)} if count else set()

    def run(self) -> bool:
        """Train; True when all steps are done, False when stopped before (everything is saved then).

        Raises:
            TrainingError: the loss or the gradient is no longer a number.
            CheckpointError: the newest sound checkpoint is of another model.
            StorageError: the disk refused a file.
        """
        step, elapsed = self._restore()
        if step >= self._steps:
            return True
        if self._ranks.first:
            self._metrics = Metrics(self._folder, step)
        try:
            return self._train(step, elapsed)
        finally:
            self._checkpoints.finish()
            if self._metrics is not None:
                self._metrics.close()

    def _restore(self) -> tuple[int, float]:
        stepper = self._stepper
        found = self._checkpoints.restore(
            stepper.model,
            stepper.optimizers,
            device=self._device,
            accumulate=self._config.accumulate,
            warned=self._observer.warned,
        )
        if found is None:
            return 0, 0.0
        step, stepper.states, progress = found
        try:
            if stepper.guard is not None and "guard" in progress:
                stepper.guard.load(progress["guard"])
            if progress.get("best") is not None:
                self._best = int(progress["best"][0]), float(progress["best"][1])
            return step, float(progress["seconds"])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{self._folder / CHECKPOINTS_FOLDER}: the checkpoint of step {step} does not say how far the run was: "
                f"{error!r}"
            ) from error

    def _train(self, step: int, elapsed: float) -> bool:
        config = self._config
        begin = time.perf_counter() - elapsed
        saved_at = time.perf_counter()
        tokens = config.batch_size * config.sequence_length
        while step < self._steps:
            factor = learning_rate_factor(step, self._steps, config)
            loss, norm = self._stepper.step(step, factor)
            step += 1
            row = {"learning_rate": factor * config.learning_rate, "tokens": step * tokens}
            row["seconds"] = round(time.perf_counter() - begin, 3)
            if self._stepper.left_out:
                row["left_out"] = 1
            self._pending.append((step, loss, norm, row))
            better = False
            if step in self._evaluate_after and self._estimate is not None:
                row["held_out_bits_per_byte"] = estimate = self._ranks.broadcast(self._estimate(), self._device)
                better = config.keep_best and (self._best is None or estimate < self._best[1])
                if better:
                    self._best = step, estimate
            done = step == self._steps
            if done or step % config.log_every == 0:
                self._look()
            elif self._ranks.size > 1 and not better:
                continue  # Processes agree to stop or save at the same steps: where they look.
            stop = self._ranks.any(self._should_stop(), self._device)
            due = time.perf_counter() - saved_at >= config.checkpoint_minutes * 60
            if done or stop or better or self._ranks.any(due, self._device):
                self._look()
                self._save(step, time.perf_counter() - begin)
                saved_at = time.perf_counter()
            if stop and not done:
                return False
        return True

    def _look(self) -> None:
        """Fetch the losses since the last look, check them and write them down."""
        if not self._pending:
            return
        values = torch.stack([torch.stack([loss, norm]) for _, loss, norm, _ in self._pending]).tolist()
        rows: list[dict[str, Any]] = []
        for (step, _, _, row), (loss, norm) in zip(self._pending, values, strict=True):
            first = {"loss": loss, "bits_per_byte": loss * self._bits_per_byte, "gradient_norm": norm}
            if "left_out" in row:
                # JSON knows no other numbers.
                first = {name: value for name, value in first.items() if math.isfinite(value)}
            elif not (math.isfinite(loss) and math.isfinite(norm)):
                self._write(rows)
                raise TrainingError(
                    f"step {step}: the loss is {loss} and the gradient's norm {norm}; the checkpoints are from before. "
                    "Lower the learning rate, or lengthen the warm-up, and start again; or leave such updates out, "
                    "with leave_out_bad_steps"
                )
            rows.append({"step": step} | first | row)
        self._pending.clear()
        self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self._metrics is not None:
            self._metrics.append(rows)
            for row in rows:
                self._observer.stepped(row)

    def _save(self, step: int, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.sync()
        progress: dict[str, Any] = {"seconds": seconds, "best": self._best}
        if self._stepper.guard is not None:
            progress["guard"] = self._stepper.guard.state()
        self._checkpoints.save(
            step,
            self._stepper.model,
            self._stepper.optimizers,
            self._stepper.states,
            progress,
            best=None if self._best is None else self._best[0],
        )
