"""`longscan bench memory`: peak memory of training by batch, against a Transformer (the paper's table of it, 125M)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from longscan.bench.contest import Settings, describe, failure, release
from longscan.bench.models import make_model, make_transformer, shapes_of
from longscan.bench.peers import mamba_ssm
from longscan.bench.report import Report, Row
from longscan.bench.timing import timed_with_memory
from longscan.bench.train import Loss, compiled_loss, loss_by, make_batch, training_step
from longscan.errors import ArgumentError
from longscan.models import LanguageModel

AXES = "layers,d_model,vocabulary,batch,length"


def run(settings: Settings) -> Report:
    """GB at the peak of a training step: weights, gradients, AdamW's moments and activations.

    The 130M model at 2,048 tokens, batches 1 to 32, float32 weights under bfloat16's autocast; ours and the
    Transformer++ of about as many parameters, each eager and compiled, and mamba-ssm. What they compute is compared
    with the definition in `longscan bench train`.

    Raises:
        ArgumentError: the device is no NVIDIA GPU.
    """
    if settings.device != "cuda":
        raise ArgumentError(
            f"device: got {settings.device!r}; peak memory of training is read from the allocator of NVIDIA GPUs (cuda)"
        )
    shapes = shapes_of(settings, AXES, *((24, 768, 50277, 2**power, 2048) for power in range(6)))
    rows: list[Row] = []
    for dtype in settings.dtypes_of("bfloat16"):
        for name in ("longscan", "longscan-compiled", *settings.peers_of(*_PEERS)):
            for shape in shapes:
                rows += measure(name, shape, dtype, settings)
    # Measured contender by contender, so that each size of a compiled one follows the last; told batch by batch.
    groups = list(dict.fromkeys(row.group for row in rows))
    rows.sort(key=lambda row: groups.index(row.group))
    about = {"device": settings.device, "axes": AXES, "shapes": shapes}
    return Report("memory", "GB", higher_is_better=False, rows=rows, settings=about)


@dataclass(frozen=True)
class _Trainee:
    kind: str
    make: Callable[..., LanguageModel]
    loss: Callable[[], Loss]
    build: Callable[[LanguageModel], nn.Module] = lambda model: model


_PEERS = ("mamba-ssm", "transformer++", "transformer++-compiled")

_TRAINEES = {
    "longscan": _Trainee("ours", make_model, lambda: loss_by("auto")),
    "longscan-compiled": _Trainee("peer", make_model, compiled_loss),
    "mamba-ssm": _Trainee("peer", make_model, lambda: mamba_ssm.loss, mamba_ssm.language_model),
    "transformer++": _Trainee("other", make_transformer, lambda: loss_by("auto")),
    "transformer++-compiled": _Trainee("other", make_transformer, compiled_loss),
}


def measure(name: str, shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    """The row of one contender at one shape, or none where it is not installed."""
    *size, batch, length = shape
    own, group = _TRAINEES[name], describe(shape, dtype)
    series = f"{size[0]} layers of {size[1]}, {length} tokens, {dtype}"
    settings.progress(f"{group}: {name}")
    release(settings.device)
    try:
        peak = _peak(own, size, batch, length, dtype, settings)
    except ImportError:
        return []
    except Exception as error:
        return [Row(group, name, own.kind, note=failure(error), series=series, place=batch)]
    finally:
        release(settings.device)
    note = "something else: attention" if own.kind == "other" else ""
    return [Row(group, name, own.kind, value=peak / 1e9, note=note, memory=peak, series=series, place=batch)]


def _peak(own: _Trainee, size: list[int], batch: int, length: int, dtype: str, settings: Settings) -> int:
    before = torch.cuda.memory_allocated()
    model = own.build(own.make(*size, torch.float32, settings.device, settings.seed))
    tokens, targets = make_batch(batch, length, size[2], settings)
    step = training_step(model, own.loss(), tokens, targets, size[2], dtype)
    # The first step compiles, and makes the moments that the second one finds.
    step()
    _, peak = timed_with_memory(step, settings.device, before)
    assert peak is not None
    return peak
