"""`longscan bench chunks`: memory of training on one long sequence, at once and chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from longscan.bench.contest import DTYPES, OUT_OF_TIME, Settings, describe, failure, release
from longscan.bench.kept import Kept
from longscan.bench.models import make_model, shapes_of
from longscan.bench.report import Report, Row
from longscan.bench.timing import timed_with_memory
from longscan.bench.train import make_batch
from longscan.models import LanguageModel, backward_in_chunks

AXES = "layers,d_model,vocabulary,length,chunk"


def run(settings: Settings) -> Report:
    """kB a token at the peak of a forward and backward pass over one sequence, beyond weights and gradients.

    On NVIDIA GPUs of the allocator; elsewhere of the tensors that autograd keeps. The whole sequence at once, and by
    chunks with full and with truncated gradients (:func:`longscan.models.backward_in_chunks`); a note has the speed.
    The first pass over a few tokens is not measured.
    """
    on_cpu = settings.device != "cuda"
    defaults = ((4, 256, 256, 4096, 4096), (4, 256, 256, 4096, 512))
    if not on_cpu:
        defaults = ((24, 768, 50277, 32768, 16384), (24, 768, 50277, 1048576, 16384))
    shapes = shapes_of(settings, AXES, *defaults)
    rows: list[Row] = []
    for dtype in settings.dtypes_of("float32" if on_cpu else "bfloat16"):
        for shape in shapes:
            rows += _measure(shape, dtype, settings)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes}
    return Report("chunks", "kB/token", higher_is_better=False, rows=rows, settings=about)


def _at_once(model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach()


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    layers, d_model, vocabulary, length, chunk = shape
    model = make_model(layers, d_model, vocabulary, torch.float32, settings.device, settings.seed)
    model.train().requires_grad_()
    tokens, targets = make_batch(1, length, vocabulary, settings)
    passes: dict[str, Callable[[LanguageModel, Tensor, Tensor], Tensor]] = {
        f"chunks, {gradients}": functools.partial(backward_in_chunks, chunk=chunk, gradients=gradients)
        for gradients in ("full", "truncated")
    }
    rows = []
    for name, call in {**passes, "at once": _at_once}.items():
        row = Row(
            describe(shape, dtype),
            name,
            "other" if name == "at once" else "ours",
            series=f"{layers} layers of {d_model}, chunks of {chunk}, {dtype}",
            place=length,
        )
        settings.progress(f"{row.group}: {name}")
        if settings.late():
            rows.append(replace(row, note=OUT_OF_TIME))
            continue
        release(settings.device)
        try:
            with torch.autocast(settings.device, DTYPES[dtype], enabled=dtype != "float32"):
                few = min(2 * chunk, length)
                call(model, tokens[:, :few], targets[:, :few])
                with Kept(model.parameters()) as kept:
                    seconds, memory = timed_with_memory(
                        functools.partial(call, model, tokens, targets), settings.device
                    )
            # Autograd does not know of the states at the borders.
            states = -(-length // chunk) * model.state_bytes() if name == "chunks, full" else 0
            peak = kept.peak + states if memory is None else memory
            note = f"{length / seconds:,.0f} tokens/s, {peak / 1e9:.3g} GB"
            rows.append(replace(row, value=peak / 1e3 / length, memory=memory, note=note))
        except Exception as error:
            rows.append(replace(row, note=failure(error)))
    return rows
