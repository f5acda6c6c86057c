"""`longscan bench memory`: peak memory of training by batch, against a Transformer (the paper's table of it, 125M)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from longscan.bench.contest import OUT_OF_TIME, Settings, describe, failure, release
from longscan.bench.models import make_model, make_transformer, shapes_of
from longscan.bench.peers import mamba_ssm
from longscan.bench.report import Report, Row
from longscan.bench.timing import timed_with_memory
from longscan.bench.train import Loss, Trainer, compiled_loss, loss_by, make_batch
from longscan.errors import ArgumentError
from longscan.models import LanguageModel

AXES = "layers,d_model,vocabulary,batch,length"


def run(settings: Settings) -> Report:
    """GB at the peak of a training step: weights, gradients, AdamW's moments and activations.

    The 130M model at 2,048 tokens, batches 1 to 32, float32 weights under bfloat16's autocast; ours and the
    Transformer++ of about as many parameters, each eager and compiled (ours block by block), and mamba-ssm. What they
    compute is compared with the definition in `longscan bench train`.

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
            for size, same in groupby(shapes, key=lambda shape: shape[:3]):
                rows += measure(name, size, [shape[3:] for shape in same], dtype, settings)
    # Measured contender by contender, told batch by batch.
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


def _block_by_block(model: LanguageModel) -> LanguageModel:
    """As `longscan train --compile-blocks`: the first block's code serves all, where a whole model takes minutes."""
    for block in model.backbone.blocks:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    return model


_PEERS = ("mamba-ssm", "transformer++", "transformer++-compiled")

_TRAINEES = {
    "longscan": _Trainee("ours", make_model, lambda: loss_by("auto")),
    "longscan-compiled": _Trainee("peer", make_model, lambda: loss_by("auto"), _block_by_block),
    "mamba-ssm": _Trainee("peer", make_model, lambda: mamba_ssm.loss, mamba_ssm.language_model),
    "transformer++": _Trainee("other", make_transformer, lambda: loss_by("auto")),
    "transformer++-compiled": _Trainee("other", make_transformer, compiled_loss),
}


def measure(
    name: str, size: tuple[int, ...], loads: Sequence[tuple[int, ...]], dtype: str, settings: Settings
) -> list[Row]:
    """The rows of one contender at one size, for each (batch, length); none where it is not installed.

    One model takes them all, so that one that is compiled is compiled for any batch, not for each.
    """
    own = _TRAINEES[name]
    release(settings.device)
    before = torch.cuda.memory_allocated()
    trainer: Trainer | None = None
    rows = []
    for batch, length in loads:
        row = Row(
            describe((*size, batch, length), dtype),
            name,
            own.kind,
            note="something else: attention" if own.kind == "other" else "",
            series=f"{size[0]} layers of {size[1]}, {length} tokens, {dtype}",
            place=batch,
        )
        if settings.late():
            rows.append(replace(row, note=OUT_OF_TIME))
            continue
        settings.progress(f"{row.group}: {name}")
        try:
            if trainer is None:
                model = own.build(own.make(*size, torch.float32, settings.device, settings.seed))
                trainer = Trainer(model, own.loss(), size[2], dtype)
            peak = _peak(trainer, *make_batch(batch, length, size[2], settings), settings.device, before)
            rows.append(replace(row, value=peak / 1e9, memory=peak))
        except ImportError:
            return []
        except Exception as error:
            rows.append(replace(row, note=failure(error)))
        gc.collect()
        torch.cuda.empty_cache()
    del trainer
    release(settings.device)
    return rows


def _peak(trainer: Trainer, tokens: Tensor, targets: Tensor, device: str, before: int) -> int:
    # The first step compiles, and makes the moments that the second one finds.
    trainer.step(tokens, targets)
    _, peak = timed_with_memory(lambda: trainer.step(tokens, targets), device, before)
    assert peak is not None
    return peak
