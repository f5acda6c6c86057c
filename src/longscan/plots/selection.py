"""What the selection does, drawn: dt over the tokens of one input of selective copying."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from longscan.evaluation.selection import step_sizes
from longscan.models import LanguageModel
from longscan.nn.storage import write_atomically
from longscan.tasks.task import Task

# Longer inputs are drawn at this length: each token stays visible.
_LONGEST = 96


def plot_selection(model: LanguageModel, task: Task, path: Path, *, seed: int = 0) -> Path:
    """A panel per layer: the mean of log10 dt over channels for each token, coloured by what it is.

    Below it are all channels as an image, sorted by how much larger their dt is at data than at noise.

    Args:
        model: of Mamba layers, trained on ``task``.
        task: selective copying, token 0 its noise.
        path: a PNG file.
        seed: of the input.

    Raises:
        StorageError: the figure could not be written.
    """
    from matplotlib.figure import Figure

    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens, _ = task.sample(1, generator, min(task.length, _LONGEST))
    layers = [dt[0].log10().cpu().numpy() for dt in step_sizes(model, tokens)]
    row = tokens[0].cpu().numpy()
    marker = row == task.vocabulary - 1
    data = (row != 0) & ~marker
    # The convolution before the selection still sees a token a few places later.
    near = np.convolve(data, np.ones(4))[: len(row)] > 0
    colours = np.select([data, marker, near], ["#c2405a", "#1f6fb4", "#eab4bd"], "0.75").tolist()
    figure = Figure(figsize=(10, 3.6 * len(layers)), layout="constrained")
    panels = figure.subplots(2 * len(layers), 1, sharex=True, squeeze=False, height_ratios=[2, 1] * len(layers))[:, 0]
    for index, dt in enumerate(layers):
        bars, image = panels[2 * index], panels[2 * index + 1]
        mean = dt.mean(-1)
        floor = mean.min() - 0.05 * np.ptp(mean)
        bars.bar(range(len(row)), mean - floor, bottom=floor, color=colours, width=0.9)
        bars.set_title(f"layer {index + 1}", loc="left", fontsize=9)
        bars.set_ylabel("mean of log10 dt")
        order = (dt[~data & ~marker].mean(0) - dt[data].mean(0)).argsort()
        image.imshow(dt[:, order].T, aspect="auto", cmap="viridis", interpolation="nearest")
        image.set_ylabel("channels")
    panels[-1].set_xlabel(
        "token: data red, within the convolution of one light red, noise grey, markers (where answers are asked) blue"
    )
    figure.suptitle("step sizes that a trained Mamba gives the tokens of a selective-copying input", fontsize=10)
    return write_atomically(path, functools.partial(figure.savefig, format="png", dpi=120))
