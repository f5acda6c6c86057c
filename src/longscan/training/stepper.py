"""One optimiser step: forward, backward, update, over micro-batches and processes."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import torch
from torch import Tensor

from longscan.errors import ConfigError
from longscan.models import LanguageModel
from longscan.nn.sequence_parallel import SequencePart, sequence_parallel
from longscan.nn.state import ModelState
from longscan.training.batches import Batches
from longscan.training.config import TrainConfig
from longscan.training.distributed import Ranks
from longscan.training.graphs import CapturedPass
from longscan.training.guard import Guard
from longscan.training.optimizers import Optimizers, clip_gradients
from longscan.training.parallel import lay_out, sequence_group

logger = logging.getLogger(__name__)


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which a model runs at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class Stepper:
    """Trains a model step by step.

    Args:
        model: on ``device``; changed in place.
        config: see there.
        batches: where the tokens come from.
        ranks: the processes that share each batch; each takes its slice, or its part of a slice's sequences, or its
            channels of all.
        device: where to compute.

    Raises:
        ConfigError: the batch cannot be shared equally.
    """

    def __init__(
        self, model: LanguageModel, config: TrainConfig, batches: Batches, *, ranks: Ranks, device: torch.device
    ) -> None:
        self._group = sequence_group(ranks, config)
        same_rows = config.sequence_parallel * config.tensor_parallel
        sharers = ranks.size // same_rows
        parts = sharers * config.accumulate
        if config.batch_size % parts:
            raise ConfigError(
                f"batch_size {config.batch_size} must be a multiple of processes x accumulate = {sharers} x "
                f"{config.accumulate}"
            )
        self.model = model
        self._net = lay_out(model, config, ranks, device)
        self.optimizers = Optimizers(model, config)
        self.states: list[ModelState] | None = None
        #: Decides which updates are made; None: all are.
        self.guard = Guard(config.spike) if config.leave_out_bad_steps else None
        #: Whether the last step's update was not made.
        self.left_out = False
        self._config = config
        self._batches = batches
        self._device = device
        rows = config.batch_size // parts
        first = ranks.rank // same_rows * config.accumulate
        self._slices = [slice(part * rows, (part + 1) * rows) for part in range(first, first + config.accumulate)]
        self._ranks = ranks
        self._captured: CapturedPass | None = None
        plain = ranks.size == 1 and not (config.compile or config.compile_blocks or config.recompute)
        self._captures = config.cuda_graph and device.type == "cuda" and plain and model.backbone.capturable

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
            state = self.states[index] if self.states is not None else None
            loss, after = self._captured_pass(index, tokens, targets, state) or self._pass(
                index, tokens, targets, state
            )
            if self.states is not None:
                assert after is not None
                # Every slice of the batch has a state of its own, the graph only one.
                self.states[index] = after.detach() if len(self._slices) == 1 else after.detach().clone()
            total += loss
        norm = clip_gradients(self.model.parameters(), config.clip)
        loss = self._ranks.mean(total)
        self.left_out = self.guard is not None and not self.guard.accepts(*self._agreed(loss, norm))
        if self.left_out:
            self.optimizers.discard()
            self.states = None  # what made the gradient bad may be in them
        else:
            self.optimizers.step(factor)
        return loss, norm

    def _agreed(self, *values: Tensor) -> list[float]:
        """Numbers, of the last bit the same in all processes."""
        return [self._ranks.broadcast(value.item(), self._device) for value in values]

    def _pass(
        self, index: int, tokens: Tensor, targets: Tensor, state: ModelState | None
    ) -> tuple[Tensor, ModelState | None]:
        """Forward and backward of one micro-batch: its part of the mean loss, and the state after it."""
        last = index == len(self._slices) - 1
        # Replicas need to exchange gradients only after the last micro-batch; shards do after each, for the memory.
        replicas = isinstance(self._net, torch.nn.parallel.DistributedDataParallel)
        quiet = self._net.no_sync() if replicas and not last else contextlib.nullcontext()
        with quiet, self._sequence_part() as part:
            if part is not None:
                tokens, targets = part.take(tokens), part.take(targets)
            loss, after = self._loss(tokens, targets, state)
            loss.backward()
        return loss.detach(), after

    def _sequence_part(self) -> contextlib.AbstractContextManager[SequencePart | None]:
        if self._group is None:
            return contextlib.nullcontext()
        return sequence_parallel(self._group, length=self._config.sequence_length)

    def _loss(self, tokens: Tensor, targets: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState | None]:
        with autocast(self._device, self._config.precision):
            loss, after = self._net(tokens, targets, state)
        return loss / len(self._slices), after

    def _captured_pass(
        self, index: int, tokens: Tensor, targets: Tensor, state: ModelState | None
    ) -> tuple[Tensor, ModelState | None] | None:
        """:meth:`_pass` as one launch, where it can be captured; None where it cannot."""
        if not self._captures:
            return None
        if self._captured is None:
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            adds = len(self._slices) > 1
            try:
                self._captured = CapturedPass(self._loss, parameters, tokens, targets, state, adds=adds)
            except RuntimeError as error:
                logger.warning("the step cannot be captured as a CUDA graph, it runs without: %s", error)
                self._captures = False
                for parameter in parameters:
                    parameter.grad = None
                return None
        if index == 0:
            self._captured.begin()
        return self._captured.run(tokens, targets, state)

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
        self.guard = Guard(self._config.spike) if self.guard is not None else None
        torch.set_rng_state(random)
        typical = sorted(durations)[len(durations) // 2]
        return self._ranks.broadcast(typical, self._device)

    def _timed(self, step: int) -> float:
        begin = time.perf_counter()
        loss, _ = self.step(step, 0.01)
        loss.item()
        return time.perf_counter() - begin
