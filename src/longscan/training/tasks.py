"""Training on a task: data, forward, backward and update are one launch on a GPU.

Small models are bound by launches. Every batch is drawn on the device, so nothing has to be handed over between steps
and the whole step is one CUDA graph. Elsewhere the same step runs as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.errors import CheckpointError, ConfigError, TrainingError
from longscan.models import Classifier, ClassifierConfig, LanguageModel, LanguageModelConfig, Sashimi, SashimiConfig
from longscan.models.matching import match
from longscan.nn.capture import captured
from longscan.nn.mixer import SequenceMixer
from longscan.nn.storage import load_tensors, save_tensors
from longscan.tasks.task import Recipe, Task
from longscan.training.carried import CarriedStates
from longscan.training.objectives import log_cross_entropy
from longscan.training.optimizers import clip_gradients, parameter_groups
from longscan.training.task_schedules import is_over, rate_factor, stage_at

logger = logging.getLogger(__name__)

TaskModel = LanguageModel | Classifier | Sashimi

# Matched widths are multiples of this, as matrix units want.
_MULTIPLE = 8
# A captured step is compiled, and libraries allocate what they keep, before it is captured.
_WARM_UP = 3


def task_config(
    task: Task, mixer: str | tuple[str, ...], recipe: Recipe
) -> LanguageModelConfig | ClassifierConfig | SashimiConfig:
    """The configuration of the model that a task needs, as the recipe says.

    Tokens asked at the last places: a language model (or SaShiMi). Otherwise a classifier, which pools, or gives scores
    at every place.

    Raises:
        ConfigError: the mixer is not registered, an option is not known, or the recipe's model does not fit the task.
    """
    shared: dict[str, Any] = {
        "d_model": recipe.d_model,
        "n_layer": recipe.n_layer,
        "mixer": mixer,
        "mixer_options": recipe.mixer_options,
        "block": recipe.block,
        "block_options": recipe.block_options,
    }
    tokens_asked_last = task.inputs == "tokens" and task.readout == "last"
    if recipe.parameters and (recipe.model == "sashimi" or not tokens_asked_last):
        raise ConfigError(f"parameters: widths are matched for language models only; give d_model for {task.name}")
    if recipe.model == "sashimi":
        if not tokens_asked_last:
            raise ConfigError(
                f"model: sashimi reads tokens and is asked at the last places; {task.name} is not like that"
            )
        return SashimiConfig.from_dict({"vocab_size": task.vocabulary, **shared, **recipe.model_options})
    shared["d_intermediate"] = recipe.d_intermediate
    if tokens_asked_last:
        config = LanguageModelConfig.from_dict({"vocab_size": task.vocabulary, **shared, **recipe.model_options})
        return match(config, recipe.parameters, _MULTIPLE) if recipe.parameters else config
    reads = {"vocab_size": task.vocabulary} if task.inputs == "tokens" else {"d_input": task.channels}
    shared |= reads | {"n_outputs": task.outputs}
    if task.readout != "pooled":
        shared["pooling"] = "none"
    return ClassifierConfig.from_dict({**shared, **recipe.model_options})


def task_model(
    task: Task, mixer: str | tuple[str, ...], recipe: Recipe, *, seed: int, device: torch.device
) -> TaskModel:
    """The model of :func:`task_config`, initialised from ``seed``.

    Raises:
        ConfigError: as there.
    """
    config = task_config(task, mixer, recipe)
    kinds: dict[type, Any] = {
        LanguageModelConfig: LanguageModel,
        ClassifierConfig: Classifier,
        SashimiConfig: Sashimi,
    }
    random = torch.get_rng_state()
    torch.manual_seed(seed)
    # Initialised on the CPU: the same weights on every device.
    model: TaskModel = kinds[type(config)](config).to(device)
    torch.set_rng_state(random)
    return model


def task_scores(model: TaskModel, task: Task, inputs: Tensor, length: int | None = None) -> Tensor:
    """Scores where the task asks; the head of a language model sees no other places.

    Returns:
        (batch, answers, outputs), pooled (batch, outputs), or at every place (batch, places, outputs).
    """
    if isinstance(model, LanguageModel):
        hidden, _ = model.backbone(inputs)
        return model.head(hidden[:, -task.answers(length) :])
    scores = model(inputs)[0] if isinstance(model, Sashimi) else model(inputs, task.lengths(inputs))
    return scores[:, -task.answers(length) :] if task.readout == "last" else scores


@dataclasses.dataclass(frozen=True)
class Point:
    """Over the steps since the point before: mean loss, and the task's figure on each batch before it was learnt."""

    step: int
    loss: float
    figure: float


class TaskTrainer:
    """Trains a model on a task, some steps at a time.

    Args:
        task: draws every batch.
        model: of :func:`task_model`, on ``device``; changed in place.
        recipe: batch, rates; that its ``steps`` are done is the caller's business.
        seed: of the data, and of dropout.
        device: where everything is.
        capture: whether the step may be captured as a CUDA graph.
    """

    def __init__(
        self,
        task: Task,
        model: TaskModel,
        recipe: Recipe,
        *,
        seed: int,
        device: torch.device,
        capture: bool = True,
    ) -> None:
        self.task, self.model, self.recipe = task, model, recipe
        self.steps_done = 0
        # How many of the recipe's easier stages are done with: shorter lengths, then its own without states carried;
        # and the steps that were done when the last of them was.
        self._mastered = self._since = 0
        self._device, self._seed = device, seed
        self._generator = torch.Generator(device).manual_seed(seed)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer, self._rates = self._new_optimizer()
        self._count = torch.zeros((), device=device)
        # Sums since the last look: loss, and the two that the metric is of.
        self._sums = torch.zeros(3, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        mixers = (module for module in model.modules() if isinstance(module, SequenceMixer))
        self._captures = capture and device.type == "cuda" and all(mixer.capturable for mixer in mixers)
        self._drops = any(getattr(module, "dropout", 0) for module in model.modules())
        self._carried = self._new_carried()
        # Of a GPU its number, too, which the draws will come with.
        task.to(self._generator.device)
        model.train()
        self._stage = stage_at(recipe, task.length, 0, 0)
        with self._own_dropout():
            self._rehearse()

    def _new_optimizer(self) -> tuple[torch.optim.Optimizer, list[tuple[Tensor, float]]]:
        """AdamW, and its learning rates, each with the highest that it takes."""
        recipe = self.recipe
        groups, rates = [], []
        fused = not any(parameter.is_complex() for parameter in self.model.parameters())
        cuda = self._device.type == "cuda"
        for kind, members in parameter_groups(self.model, muon=False).items():
            dynamics = [p for p in members.values() if recipe.dynamics_rate and getattr(p, "_keep_float32", False)]
            others = [p for p in members.values() if not any(p is q for q in dynamics)]
            for parameters, highest in ((others, recipe.learning_rate), (dynamics, recipe.dynamics_rate)):
                if parameters:
                    # A tensor, so that a captured step can change it.
                    rate = torch.tensor(highest, device=self._device)
                    decay = recipe.weight_decay * (kind == "decay")
                    groups.append({"params": parameters, "weight_decay": decay, "lr": rate})
                    rates.append((rate, highest))
        optimizer = torch.optim.AdamW(
            groups,
            betas=(recipe.betas[0], recipe.betas[1]),
            eps=recipe.eps,
            fused=fused,
            foreach=False if not fused and not cuda else None,
            capturable=cuda,
        )
        return optimizer, rates

    def _new_carried(self) -> CarriedStates | None:
        recipe = self.recipe
        if not recipe.carry_state:
            return None
        if not isinstance(self.model, LanguageModel):
            raise ConfigError(
                f"carry_state: only a language model's states are carried, not a {type(self.model).__name__}'s"
            )
        return CarriedStates(self.model, recipe.batch_size, recipe.steps, self._generator)

    def _rehearse(self) -> None:
        """Do steps and undo them: the optimiser makes its tensors, a GPU compiles and allocates for this stage."""
        model = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        moments = {id(tensor): tensor.clone() for state in self._optimizer.state.values() for tensor in state.values()}
        rest = [(tensor, tensor.clone()) for tensor in (self._sums, self._count, *self._kept())]
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
        self.model.load_state_dict(model)
        for state in self._optimizer.state.values():
            for tensor in state.values():
                if id(tensor) in moments:
                    tensor.copy_(moments[id(tensor)])
                else:
                    tensor.zero_()
        for tensor, before in rest:
            tensor.copy_(before)
        self._generator.set_state(random)

    def _enter_stage(self) -> int:
        """Go over to the stage that this step is of; gives the steps until it ends (at least 1)."""
        stage = stage_at(self.recipe, self.task.length, self.steps_done, self._mastered)
        if stage != self._stage:
            self._stage = stage
            if self._captures:
                random = self._generator.get_state()
                self._graph = None
                self._new_generator(random)
                with self._own_dropout():
                    self._rehearse()
        return stage.ends - self.steps_done if stage.ends is not None else 1 << 62

    def _new_generator(self, random: Tensor) -> None:
        """One that no graph has registered."""
        self._generator = torch.Generator(self._device)
        self._generator.set_state(random)
        if self._carried is not None:
            self._carried.generator = self._generator

    def _step(self) -> None:
        recipe = self.recipe
        self._optimizer.zero_grad(set_to_none=True)
        if recipe.warmup or recipe.schedule != "constant":
            self._count += 1
            factor = rate_factor(recipe, self._count)
            for rate, highest in self._rates:
                rate.copy_(factor * highest)
        stage = self._stage
        inputs, targets = self.task.sample(recipe.batch_size * stage.batches, self._generator, stage.length)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            scores = self._scores(inputs)
        loss = self.task.loss(scores, targets)
        lowered = log_cross_entropy(scores, targets) if recipe.objective == "log-loss" else loss
        lowered.backward()
        clip_gradients(self.model.parameters(), recipe.clip)
        self._optimizer.step()
        self._sums += torch.stack([loss.detach(), *self.task.judge(scores.detach(), targets)])

    def _scores(self, inputs: Tensor) -> Tensor:
        if self._carried is None or not self._stage.carries:
            return task_scores(self.model, self.task, inputs, self._stage.length)
        assert isinstance(self.model, LanguageModel)
        return self.model.head(self._carried.read(inputs)[:, -self.task.answers() :])

    def _kept(self) -> list[Tensor]:
        return [] if self._carried is None else self._carried.tensors

    def _capture(self) -> None:
        graph, random = torch.cuda.CUDAGraph(), self._generator.get_state()
        graph.register_generator_state(self._generator)
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with captured(graph):
                self._step()
        except RuntimeError as error:
            logger.warning("the step cannot be captured as a CUDA graph, it runs without: %s", error)
            self._captures = False
            self._optimizer.zero_grad(set_to_none=True)
            self._new_generator(random)
        else:
            self._graph = graph

    @property
    def at_last_stage(self) -> bool:
        """Whether all that the recipe puts first, such as shorter lengths, is done with."""
        return stage_at(self.recipe, self.task.length, self.steps_done, self._mastered).last

    def advance(self, steps: int) -> Point:
        """Do ``steps`` steps.

        Raises:
            TrainingError: the loss is no longer a number.
        """
        self._sums.zero_()
        left = steps
        while left:
            here = min(left, self._enter_stage())
            if self._captures and self._graph is None:
                self._capture()
            run = self._step if self._graph is None else self._graph.replay
            with self._own_dropout():
                for _ in range(here):
                    run()
            self.steps_done += here
            left -= here
        loss, *judged = self._sums.tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"before step {self.steps_done}: the loss is {loss / steps}; lower learning_rate or lengthen warmup"
            )
        point = Point(self.steps_done, loss / steps, self.task.metric.score(*judged))
        learnt = self.task.metric.reaches(point.figure, self.recipe.passed)
        if is_over(self.recipe, self._mastered, self.steps_done - self._since, learnt):
            self._mastered, self._since = self._mastered + 1, self.steps_done
        return point

    @contextlib.contextmanager
    def _own_dropout(self) -> Iterator[None]:
        """Dropout draws from PyTorch's own generators; what is drawn depends on the seed and the step alone."""
        if not self._drops:
            yield
            return
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(1_000_003 * self._seed + self.steps_done)
            yield

    def _buffers(self) -> dict[str, Tensor]:
        """What a step changes besides parameters: the running means of batch norms."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.BatchNorm1d)
            for key, tensor in module.named_buffers()
        }

    def save(self, path: Path, about: dict[str, Any]) -> Path:
        """Write all that goes on from here, and ``about``, as one file, atomically.

        Raises:
            StorageError: the disk refused.
        """
        tensors = {f"model/{name}": parameter.detach() for parameter, name in self._names.items()}
        for parameter, state in self._optimizer.state.items():
            for key, tensor in state.items():
                tensors[f"optimizer/{key}/{self._names[parameter]}"] = tensor
        tensors |= {f"buffer/{name}": tensor for name, tensor in self._buffers().items()}
        tensors |= {f"carried/{index}": tensor for index, tensor in enumerate(self._kept())}
        tensors |= {"count": self._count, "generator": self._generator.get_state()}
        own = {"steps": self.steps_done, "mastered": self._mastered, "since": self._since}
        metadata = {"longscan.synthetic": json.dumps(own | about)}
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
                for name, tensor in self._buffers().items():
                    _copy(tensor, tensors[f"buffer/{name}"], name)
                for index, tensor in enumerate(self._kept()):
                    _copy(tensor, tensors[f"carried/{index}"], "the carried state")
                for parameter, name in self._names.items():
                    _copy(parameter, tensors[f"model/{name}"], name)
                    for key, tensor in self._optimizer.state[parameter].items():
                        _copy(tensor, tensors[f"optimizer/{key}/{name}"], name)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is of another model, task or kind of device ({error}); remove it to start afresh"
            ) from error
        self.steps_done = int(about.pop("steps"))
        self._mastered, self._since = int(about.pop("mastered", 0)), int(about.pop("since", 0))
        return dict(about)


def _copy(target: Tensor, source: Tensor, name: str) -> None:
    if target.shape != source.shape:
        raise ValueError(f"{name} is {tuple(source.shape)} there and {tuple(target.shape)} here")
    target.copy_(source)
