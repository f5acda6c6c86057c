"""`longscan bench train`: one step of training a language model, optimiser included."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.bench.contest import DTYPES, Call, Contender, Settings, beside, compare, describe, floor
from longscan.bench.floors import matrix_products
from longscan.bench.models import make_model, make_transformer, random_tokens, shapes_of, training_products
from longscan.bench.peers import huggingface, mamba_ssm, mambapy
from longscan.bench.report import Report, Row
from longscan.models import LanguageModel
from longscan.nn.state import ModelState
from longscan.training.graphs import CapturedPass

AXES = "layers,d_model,vocabulary,batch,length"

#: Of a model's scores for tokens, targets, and the size of the vocabulary.
Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]

#: From our model to whoever trains, with the same weights.
Build = Callable[[LanguageModel], nn.Module]


#: Rows and tokens at most of the batch whose loss and gradient are compared. The definition walks the time steps of
#: every layer one by one, which at the full shape would take minutes.
_CHECKED = (2, 128)


def run(settings: Settings) -> Report:
    """Forward, backward, clipping and fused AdamW over one batch, float32 weights, in tokens per second.

    A dtype other than float32 is autocast's. Loss and gradient are compared with the definition's on the batch's first
    rows and tokens (2 x 128); timed is the whole batch. Peak memory counts weights, gradients and optimiser as well.
    Beside it a Transformer++ of about as many parameters, eager and compiled.
    """
    on_cpu = settings.device == "cpu"
    shapes = shapes_of(settings, AXES, (4, 256, 256, 8, 256) if on_cpu else (24, 768, 50277, 8, 2048))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in settings.dtypes_of("float32" if on_cpu else "bfloat16"):
            rows += _measure(shape, dtype, settings)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes, "checked": _CHECKED}
    return Report("train", "tokens/s", higher_is_better=True, rows=rows, settings=about)


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    layers, d_model, vocabulary, batch, length = shape
    model = make_model(layers, d_model, vocabulary, torch.float32, settings.device, settings.seed)
    tokens, targets = make_batch(batch, length, vocabulary, settings)
    few_tokens, few_targets = (part[: _CHECKED[0], : _CHECKED[1]].contiguous() for part in (tokens, targets))
    whole, few = (tokens, targets), (few_tokens, few_targets)
    group = describe(shape, dtype)

    def to_value(seconds: float) -> float:
        return batch * length / seconds

    def step(build: Build, loss: Loss, data: tuple[Tensor, Tensor], precision: str = dtype) -> Callable[[], Call]:
        # A copy: whoever comes next starts from the same weights.
        return lambda: training_step(build(copy.deepcopy(model)), loss, *data, vocabulary, precision)

    def contender(name: str, kind: str, build: Build, loss: Loss) -> Contender:
        return Contender(name, kind, step(build, loss, whole), step(build, loss, few))

    truth = step(itself, loss_by("reference"), few, "float32")()()
    contenders = [contender("longscan", "ours", itself, loss_by("auto"))]
    if settings.device == "cuda":
        # The plain loop is what everyone else has; this one is what `longscan train` does.
        contenders.append(
            Contender(
                "longscan-captured",
                "ours",
                lambda: training_step(
                    copy.deepcopy(model), loss_by("auto"), *whole, vocabulary, dtype, CapturedTrainer
                ),
                lambda: training_step(copy.deepcopy(model), loss_by("auto"), *few, vocabulary, dtype, CapturedTrainer),
                note="forward and backward as one CUDA graph",
                own_memory=True,
            )
        )
    peers: dict[str, tuple[Build, Loss]] = {
        "reference": (itself, loss_by("reference")),
        "transformers": (huggingface.language_model, huggingface.loss),
        "transformers+longscan": (huggingface.language_model, huggingface.accelerated(huggingface.loss)),
        "mambapy": (mambapy.language_model, mambapy.loss),
        "mamba-ssm": (mamba_ssm.language_model, mamba_ssm.loss),
    }
    asked = settings.peers_of(*peers, slow_on_gpu=("reference", "transformers"))
    contenders += [contender(name, "peer", *peers[name]) for name in asked]
    contenders += _transformers(shape, whole, dtype, settings)
    rows = compare(group, contenders, truth, settings, dtype=DTYPES[dtype], to_value=to_value, whole=True)
    timing = matrix_products(training_products(model, batch * length), DTYPES[dtype], settings.device)
    return beside(rows, [floor(group, "products", timing, to_value, "its matrix products alone")])


def _transformers(
    shape: tuple[int, ...], batch: tuple[Tensor, Tensor], dtype: str, settings: Settings
) -> list[Contender]:
    layers, d_model, vocabulary, *_ = shape
    # Compiling for a CPU needs a compiler.
    on_request = ("transformer++-compiled",) if settings.device == "cpu" else ()
    found = []
    for name in settings.peers_of("transformer++", "transformer++-compiled", on_request=on_request):

        def prepare(name: str = name) -> Call:
            model = make_transformer(layers, d_model, vocabulary, torch.float32, settings.device, settings.seed)
            loss = compiled_loss() if name.endswith("compiled") else loss_by("auto")
            return Noted(training_step(model, loss, *batch, vocabulary, dtype), model)

        found.append(Contender(name, "other", prepare, note="something else: attention"))
    return found


class Noted:
    """A call that says how many parameters its model has."""

    def __init__(self, call: Call, model: LanguageModel) -> None:
        self._call, self.note = call, f"{model.num_parameters() / 1e6:.4g} million parameters"

    def __call__(self) -> tuple[Tensor, ...]:
        return self._call()


def make_batch(batch: int, length: int, vocabulary: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """Random tokens and targets (batch, length) on the device."""
    count = batch * (length + 1)
    numbers = random_tokens(count, vocabulary, settings.seed).view(batch, length + 1).to(settings.device)
    return numbers[:, :-1].contiguous(), numbers[:, 1:].contiguous()


def itself(model: LanguageModel) -> nn.Module:
    """Ours, as it is."""
    return model


def loss_by(backend: str) -> Loss:
    """The loss of our own model, its operators by a backend."""

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
        assert isinstance(model, LanguageModel)
        with ops.backend(backend):
            return model.loss(tokens, targets)

    return loss


def compiled_loss() -> Loss:
    """The loss of our own model through `torch.compile`."""

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
        assert isinstance(model, LanguageModel)
        return model.loss(tokens, targets)

    compiled: Loss = torch.compile(loss)
    return compiled


class Trainer:
    """A model under training: float32 weights, fused AdamW, gradients clipped at a norm of 1.

    Args:
        dtype: autocast's, unless it is float32.
    """

    def __init__(self, model: nn.Module, loss: Loss, vocabulary: int, dtype: str) -> None:
        self._model = model.train().requires_grad_()
        self._loss, self._vocabulary, self._dtype = loss, vocabulary, dtype
        self._parameters = list(model.parameters())
        fused = self._parameters[0].device.type in ("cpu", "cuda")
        self._optimiser = torch.optim.AdamW(self._parameters, lr=1e-4, fused=fused)

    def step(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step; gives the loss and the norm of the gradient, which the first pass is compared by."""
        value = self.gradients(tokens, targets)
        norm = nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        return value, norm.detach()

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward; gives the loss."""
        self._optimiser.zero_grad(set_to_none=True)
        value, _ = self.value(tokens, targets)
        value.backward()
        return value.detach()

    def value(self, tokens: Tensor, targets: Tensor, state: ModelState | None = None) -> tuple[Tensor, None]:
        """The loss; there is no state."""
        with torch.autocast(tokens.device.type, DTYPES[self._dtype], enabled=self._dtype != "float32"):
            return self._loss(self._model, tokens, targets, self._vocabulary), None


class CapturedTrainer(Trainer):
    """Forward and backward as one CUDA graph, as `longscan train` has them on one GPU."""

    _captured: CapturedPass | None = None

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self._captured is None:
            self._captured = CapturedPass(self.value, self._parameters, tokens, targets, None, adds=False)
        self._captured.begin()
        return self._captured.run(tokens, targets, None)[0]


def training_step(
    model: nn.Module,
    loss: Loss,
    tokens: Tensor,
    targets: Tensor,
    vocabulary: int,
    dtype: str,
    trainer: type[Trainer] = Trainer,
) -> Call:
    """One step after the other over the same batch."""
    own = trainer(model, loss, vocabulary, dtype)
    return lambda: own.step(tokens, targets)
