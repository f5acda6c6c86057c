"""What the selection does, drawn over one input of selective copying: dt, and what the states hold."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longscan.evaluation.selection import Selection, selections
from longscan.models import LanguageModel
from longscan.nn.storage import write_atomically
from longscan.tasks.task import Task

# Longer inputs are drawn at this length: each token stays visible.
_LONGEST = 96
_LEGEND = "token: data red, within the convolution of one light red, noise grey, markers (where answers are asked) blue"


def plot_selection(model: LanguageModel, task: Task, folder: Path, scale: str, *, seed: int = 0) -> list[Path]:
    """Two figures, ``selection-SCALE.png`` and ``states-SCALE.png``, with panels for each layer.

    The first has the mean of log10 dt over channels for each token, coloured by what it is, and all channels as an
    image. The second has the norms of each channel's states after each token, and how much of what was written at a
    token is left after the last one. Channels are sorted by how much larger their dt is at data than at noise.

    Args:
        model: of Mamba layers, trained on ``task``.
        task: selective copying, token 0 its noise.
        folder: for the figures.
        scale: of the experiment.
        seed: of the input.

    Raises:
        StorageError: a figure could not be written.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens, _ = task.sample(1, generator, min(task.length, _LONGEST))
    layers = selections(model, tokens)
    row = tokens[0].cpu().numpy()
    marker = row == task.vocabulary - 1
    data = (row != 0) & ~marker
    # The convolution before the selection still sees a token a few places later.
    near = np.convolve(data, np.ones(4))[: len(row)] > 0
    colours = np.select([data, marker, near], ["#c2405a", "#1f6fb4", "#eab4bd"], "0.75").tolist()
    orders = []
    for layer in layers:
        dt = _array(layer.dt).log10()
        orders.append((dt[~data & ~marker].mean(0) - dt[data].mean(0)).argsort().numpy())
    figures = {"selection": _steps(layers, orders, colours), "states": _states(layers, orders, colours)}
    return [
        write_atomically(folder / f"{name}-{scale}.png", functools.partial(figure.savefig, format="png", dpi=120))
        for name, figure in figures.items()
    ]


def _array(values: Tensor) -> Tensor:
    """Of the one sequence, on the CPU."""
    return values[0].cpu()


def _canvas(layers: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * layers), layout="constrained")
    panels = figure.subplots(2 * layers, 1, sharex=True, squeeze=False, height_ratios=[2, 1] * layers)[:, 0]
    panels[-1].set_xlabel(_LEGEND)
    figure.suptitle(title, fontsize=10)
    return figure, panels


def _steps(layers: list[Selection], orders: list[np.ndarray], colours: list[str]) -> Any:
    figure, panels = _canvas(
        len(layers), "step sizes that a trained Mamba gives the tokens of a selective-copying input"
    )
    for index, (layer, order) in enumerate(zip(layers, orders, strict=True)):
        dt = _array(layer.dt).log10().numpy()
        bars, image = panels[2 * index], panels[2 * index + 1]
        mean = dt.mean(-1)
        floor = mean.min() - 0.05 * np.ptp(mean)
        bars.bar(range(len(mean)), mean - floor, bottom=floor, color=colours, width=0.9)
        bars.set_title(f"layer {layer.layer + 1}", loc="left", fontsize=9)
        bars.set_ylabel("mean of log10 dt")
        image.imshow(dt[:, order].T, aspect="auto", cmap="viridis", interpolation="nearest")
        image.set_ylabel("channels")
    return figure


def _states(layers: list[Selection], orders: list[np.ndarray], colours: list[str]) -> Any:
    figure, panels = _canvas(len(layers), "what the states of a trained Mamba hold of a selective-copying input")
    for index, (layer, order) in enumerate(zip(layers, orders, strict=True)):
        kept, norms = _array(layer.kept).numpy(), _array(layer.norms).numpy()
        bars, image = panels[2 * index], panels[2 * index + 1]
        bars.bar(range(len(kept)), kept, color=colours, width=0.9)
        bars.set_title(f"layer {layer.layer + 1}", loc="left", fontsize=9)
        bars.set_ylabel("written here, left at the end")
        # Each channel beside its own largest norm: channels differ by orders of magnitude.
        shares = norms / np.maximum(norms.max(0), np.finfo(norms.dtype).tiny)
        image.imshow(shares[:, order].T, aspect="auto", cmap="magma", interpolation="nearest", vmin=0, vmax=1)
        image.set_ylabel("states' norms")
    return figure
