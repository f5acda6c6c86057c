"""Training on a synthetic task: data, forward, backward and update are one launch on a GPU.

Small models are bound by launches. Every batch is drawn on the device, so nothing has to be handed over between steps
and the whole step is one CUDA graph. Elsewhere the same step runs as it is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.errors import CheckpointError, TrainingError
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.nn.storage import load_tensors, save_tensors
from longscan.tasks.task import Recipe, Task
from longscan.training.optimizers import clip_gradients, parameter_groups

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.999)
# A captured step is compiled, and libraries allocate what they keep, before it is captured.
_WARM_UP = 3


def task_model(
    task: Task, mixer: str | tuple[str, ...], recipe: Recipe, *, seed: int, device: torch.device
) -> LanguageModel:
    """A :class:`longscan.LanguageModel` over the task's vocabulary, as the recipe says, initialised from ``seed``.

    Raises:
        ConfigError: the mixer is not registered or does not know an option.
    """
    config = LanguageModelConfig(
        d_model=recipe.d_model,
        n_layer=recipe.n_layer,
        d_intermediate=recipe.d_intermediate,
        vocab_size=task.vocabulary,
        mixer=mixer,
        mixer_options=recipe.mixer_options,
        block=recipe.block,
        block_options=recipe.block_options,
    )
    random = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LanguageModel(config).to(device)  # initialised on the CPU: the same weights on every device
    torch.set_rng_state(random)
    return model


def answer_scores(model: LanguageModel, task: Task, tokens: Tensor, length: int | None = None) -> Tensor:
    """Scores (batch, answers, vocabulary) at the places where answers are asked; the head sees no others."""
    hidden, _ = model.backbone(tokens)
    return model.head(hidden[:, -task.answers(length) :])


@dataclasses.dataclass(frozen=True)
class Point:
    """Means over the steps since the point before: of the loss, and of the accuracy on data never seen."""

    step: int
    loss: float
    accuracy: float


class SyntheticTrainer:
    """Trains a model on a task, some steps at a time.

    Args:
        task: draws every batch afresh.
        model: over the task's vocabulary, on ``device``; changed in place.
        recipe: batch, rates; its ``steps`` are the caller's business.
        seed: of the data.
        device: where everything is.
        capture: whether the step may be captured as a CUDA graph.
    """

    def __init__(
        self,
        task: Task,
        model: LanguageModel,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        capture: bool = True,
    ) -> None:
        self.task, self.model, self.recipe = task, model, recipe
        self.steps_done = 0
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer, self._rate = self._new_optimizer()
        self._count = torch.zeros((), device=device)
        # Sums since the last look: loss, right answers, answers.
        self._sums = torch.zeros(3, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = capture and device.type == "cuda" and model.backbone.capturable
        self._make_state()

    def _new_optimizer(self) -> tuple[torch.optim.Optimizer, Tensor]:
        groups = parameter_groups(self.model, muon=False)
        fused = not any(parameter.is_complex() for parameter in self.model.parameters())
        cuda = self._device.type == "cuda"
        # A tensor, so that a captured step can change it.
        rate = torch.tensor(self.recipe.learning_rate, device=self._device)
        optimizer = torch.optim.AdamW(
            [
                {"params": list(members.values()), "weight_decay": self.recipe.weight_decay * (kind == "decay")}
                for kind, members in groups.items()
            ],
            lr=rate,
            betas=_BETAS,
            fused=fused,
            foreach=False if not fused and not cuda else None,
            capturable=cuda,
        )
        return optimizer, rate

    def _make_state(self) -> None:
        """Let the optimiser make its tensors, and a GPU compile and allocate; then all is as before."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        random = self._generator.get_state()
        if self._captures:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            self._step()
        self.model.load_state_dict(before)
        for state in self._optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self._sums.zero_()
        self._count.zero_()
        self._generator.set_state(random)

    def _step(self) -> None:
        recipe = self.recipe
        self._optimizer.zero_grad(set_to_none=True)
        if recipe.warmup:
            self._count += 1
            self._rate.copy_((self._count / recipe.warmup).clamp(max=1) * recipe.learning_rate)
        tokens, targets = self.task.sample(recipe.batch_size, self._generator)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            scores = answer_scores(self.model, self.task, tokens)
        loss = self.task.loss(scores, targets)
        loss.backward()
        clip_gradients(self.model.parameters(), recipe.clip)
        self._optimizer.step()
        right, asked = self.task.judge(scores.detach(), targets)
        self._sums += torch.stack([loss.detach(), right, asked])

    def _capture(self) -> None:
        graph, random = torch.cuda.CUDAGraph(), self._generator.get_state()
        graph.register_generator_state(self._generator)
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            logger.warning("the step cannot be captured as a CUDA graph, it runs without: %s", error)
            self._captures = False
            self._optimizer.zero_grad(set_to_none=True)
            # The old one is still the broken graph's.
            self._generator = torch.Generator(self._device)
            self._generator.set_state(random)
        else:
            self._graph = graph

    def advance(self, steps: int) -> Point:
        """Do ``steps`` steps.

        Raises:
            TrainingError: the loss is no longer a number.
        """
        if self._captures and self._graph is None:
            self._capture()
        run = self._step if self._graph is None else self._graph.replay
        self._sums.zero_()
        for _ in range(steps):
            run()
        self.steps_done += steps
        loss, right, asked = self._sums.tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"before step {self.steps_done}: the loss is {loss / steps}; lower learning_rate or lengthen warmup"
            )
        return Point(self.steps_done, loss / steps, right / asked)

    def save(self, path: Path, about: dict[str, Any]) -> Path:
        """Write all that goes on from here, and ``about``, as one file, atomically.

        Raises:
            StorageError: the disk refused.
        """
        tensors = {f"model/{name}": parameter.detach() for parameter, name in self._names.items()}
        for parameter, state in self._optimizer.state.items():
            for key, tensor in state.items():
                tensors[f"optimizer/{key}/{self._names[parameter]}"] = tensor
        tensors |= {"count": self._count, "generator": self._generator.get_state()}
        metadata = {"longscan.synthetic": json.dumps({"steps": self.steps_done, **about})}
        return save_tensors(path, tensors, metadata)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from what :meth:`save` wrote; gives ``about`` back.

        Raises:
            CheckpointError: the file is damaged, or of another model or kind of device.
        """
        tensors, metadata = load_tensors(path)
        try:
            about = json.loads(metadata["longscan.synthetic"])
            self._generator.set_state(tensors["generator"])
            with torch.no_grad():
                self._count.copy_(tensors["count"])
                for parameter, name in self._names.items():
                    _copy(parameter, tensors[f"model/{name}"], name)
                    for key, tensor in self._optimizer.state[parameter].items():
                        _copy(tensor, tensors[f"optimizer/{key}/{name}"], name)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is of another model, task or kind of device ({error}); remove it to start afresh"
            ) from error
        self.steps_done = int(about.pop("steps"))
        return dict(about)


def _copy(target: Tensor, source: Tensor, name: str) -> None:
    if target.shape != source.shape:
        raise ValueError(f"{name} is {tuple(source.shape)} there and {tuple(target.shape)} here")
    target.copy_(source)
