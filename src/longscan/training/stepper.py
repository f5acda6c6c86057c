"""One optimiser step: forward, backward, update, over micro-batches and processes."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import ConfigError
from longscan.models import LanguageModel
from longscan.nn.state import ModelState
from longscan.training.batches import Batches
from longscan.training.config import TrainConfig
from longscan.training.distributed import Ranks
from longscan.training.optimizers import Optimizers, clip_gradients


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a model runs at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class Loss(nn.Module):
    """A model's loss as a module's call: what wrappers of modules see."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState | None]:
        """Tokens, targets (batch, length) and the state before to the mean loss in nats, and the state after."""
        return self.model.loss_and_state(tokens, targets, state)


class Stepper:
    """Trains a model step by step.

    Args:
        model: on ``device``; changed in place.
        config: see there.
        batches: where the tokens come from.
        ranks: the processes that share each batch; each takes its slice.
        device: where to compute.

    Raises:
        ConfigError: the batch cannot be shared equally.
    """

    def __init__(
        self, model: LanguageModel, config: TrainConfig, batches: Batches, *, ranks: Ranks, device: torch.device
    ) -> None:
        parts = ranks.size * config.accumulate
        if config.batch_size % parts:
            raise ConfigError(
                f"batch_size {config.batch_size} must be a multiple of processes x accumulate = {ranks.size} x "
                f"{config.accumulate}"
            )
        self.model = model
        self.optimizers = Optimizers(model, config)
        self.states: list[ModelState] | None = None
        self._config = config
        self._batches = batches
        self._device = device
        rows = config.batch_size // parts
        first = ranks.rank * config.accumulate
        self._slices = [slice(part * rows, (part + 1) * rows) for part in range(first, first + config.accumulate)]
        self._ranks = ranks
        loss = Loss(model)
        self._net: Any = torch.compile(loss) if config.compile else loss
        if ranks.size > 1:
            self._net = torch.nn.parallel.DistributedDataParallel(self._net, broadcast_buffers=False)

    def step(self, step: int, factor: float) -> tuple[Tensor, Tensor]:
        """Do step ``step`` (from 0) at ``factor`` times the peak learning rates.

        Returns:
            The batch's mean loss in nats per token and the gradient's norm before clipping, both scalars on the device.
        """
        config = self._config
        carry = config.carry_state
        if carry and (self.states is None or self._batches.restarts(step)):
            self.states = [self.model.initial_state(s.stop - s.start) for s in self._slices]
        total = torch.zeros((), device=self._device)
        for index, rows in enumerate(self._slices):
            tokens, targets = (part.to(self._device) for part in self._batches.batch(step, rows))
            last = index == len(self._slices) - 1
            # Only the last micro-batch needs to exchange gradients.
            quiet = contextlib.nullcontext() if last or self._ranks.size == 1 else self._net.no_sync()
            with quiet:
                with autocast(self._device, config.precision):
                    loss, after = self._net(tokens, targets, self.states[index] if self.states is not None else None)
                loss = loss / len(self._slices)
                loss.backward()
            if self.states is not None:
                self.states[index] = after.detach()
            total += loss.detach()
        norm = clip_gradients(self.model.parameters(), config.clip)
        self.optimizers.step(factor)
        return self._ranks.mean(total), norm

    def measure(self, seconds: float = 4.0) -> float:
        """Seconds that one step takes here, after warm-up; the model is left as it was.

        Args:
            seconds: for how long to measure, at least; three steps are always taken.
        """
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        random = torch.get_rng_state()
        for step in range(2):  # kernels are compiled, memory is allocated
            self._timed(step)
        durations: list[float] = []
        begin = time.perf_counter()
        while len(durations) < 3 or self._ranks.broadcast(time.perf_counter() - begin, self._device) < seconds:
            durations.append(self._timed(2 + len(durations)))
        self.model.load_state_dict(before)
        self.optimizers = Optimizers(self.model, self._config)
        self.states = None
        torch.set_rng_state(random)
        typical = sorted(durations)[len(durations) // 2]
        return self._ranks.broadcast(typical, self._device)

    def _timed(self, step: int) -> float:
        begin = time.perf_counter()
        loss, _ = self.step(step, 0.01)
        loss.item()
        return time.perf_counter() - begin
