"""`longscan bench train`: one step of training a language model, optimiser included."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.bench.contest import DTYPES, Call, Contender, Settings, compare, describe, floor
from longscan.bench.floors import matrix_products
from longscan.bench.models import make_model, products, random_tokens
from longscan.bench.peers import huggingface, mamba_ssm, mambapy
from longscan.bench.report import Report, Row
from longscan.models import LanguageModel

AXES = "layers,d_model,vocabulary,batch,length"

#: Of a model's scores for tokens, targets, and the size of the vocabulary.
Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def run(settings: Settings) -> Report:
    """Forward, backward, clipping and fused AdamW over one batch, float32 weights, in tokens per second.

    A dtype other than float32 is autocast's.
    """
    on_cpu = settings.device == "cpu"
    shapes = settings.shapes_of(AXES, (4, 256, 256, 8, 256) if on_cpu else (24, 768, 50277, 8, 2048))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in settings.dtypes_of("float32" if on_cpu else "bfloat16"):
            rows += _measure(shape, dtype, settings)
    return Report(
        "train",
        "tokens/s",
        higher_is_better=True,
        rows=rows,
        settings={"device": settings.device, "axes": AXES, "shapes": shapes},
    )


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    layers, d_model, vocabulary, batch, length = shape
    model = make_model(layers, d_model, vocabulary, torch.float32, settings.device, settings.seed).requires_grad_()
    numbers = random_tokens(batch * (length + 1), vocabulary, settings.seed).view(batch, length + 1).to(settings.device)
    tokens, targets = numbers[:, :-1].contiguous(), numbers[:, 1:].contiguous()
    group = describe(shape, dtype)

    def to_value(seconds: float) -> float:
        return batch * length / seconds

    def step(build: Callable[[LanguageModel], nn.Module], loss: Loss, precision: str = dtype) -> Callable[[], Call]:
        # A copy: whoever comes next starts from the same weights.
        return lambda: _step(build(copy.deepcopy(model)).train(), loss, tokens, targets, vocabulary, precision)

    truth = step(_itself, _loss("reference"), "float32")()()
    contenders = [Contender("longscan", "ours", step(_itself, _loss("auto")))]
    peers: dict[str, Callable[[], Call]] = {
        "reference": step(_itself, _loss("reference")),
        "transformers": step(huggingface.language_model, huggingface.loss),
        "mambapy": step(mambapy.language_model, mambapy.loss),
        "mamba-ssm": step(mamba_ssm.language_model, mamba_ssm.loss),
    }
    contenders += [Contender(name, "peer", peers[name]) for name in settings.peers if name in peers]
    rows = compare(group, contenders, truth, settings, dtype=DTYPES[dtype], to_value=to_value)
    # The head runs for every token here, and each product has two more behind it, for its input and for its weight.
    forward = [*products(model, batch * length)[:-1], (batch * length, d_model, model.config.padded_vocab_size)]
    backward = [(m, n, k) for m, k, n in forward] + [(n, m, k) for m, k, n in forward]
    timing = matrix_products([*forward, *backward], DTYPES[dtype], settings.device)
    return [*rows, floor(group, "products", timing, to_value, "its matrix products alone")]


def _itself(model: LanguageModel) -> nn.Module:
    return model


def _loss(backend: str) -> Loss:
    def loss(model: nn.Module, tokens: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
        assert isinstance(model, LanguageModel)
        with ops.backend(backend):
            return model.loss(tokens, targets)

    return loss


def _step(model: nn.Module, loss: Loss, tokens: Tensor, targets: Tensor, vocabulary: int, dtype: str) -> Call:
    """One step; gives the loss and the norm of the gradient, which the first pass is compared by."""
    model.requires_grad_()
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=tokens.device.type in ("cpu", "cuda"))

    def call() -> tuple[Tensor, ...]:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, DTYPES[dtype], enabled=dtype != "float32"):
            value = loss(model, tokens, targets, vocabulary)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return value.detach(), norm.detach()

    return call
