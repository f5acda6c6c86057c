"""The page of figures about memories: bases, what is remembered, kernels, eigenvalues; computed, not measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.nn.storage import write_atomically
from longscan.statespace import diagonal, discretise_dense, nplr, transition
from longscan.statespace.reconstruction import basis, lipschitz_bound, memorise, reconstruct

_COLOURS = ("#1f6fb4", "#d9822b", "#3a9a5b", "#7d5ba6", "#c2405a", "#6b7683")


def plot_statespace(folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every figure of docs/statespace.md as a PNG file in ``folder``.

    Raises:
        StorageError: a figure could not be written.
    """
    figures: dict[str, Callable[[], Any]] = {
        "basis": _basis,
        "memory": _memory,
        "errors": _errors,
        "kernels": _kernels,
        "eigenvalues": _eigenvalues,
    }
    written = []
    for name, draw in figures.items():
        figure = draw()
        path = Path(folder) / f"{name}.png"
        written.append(write_atomically(path, lambda temporary, figure=figure: _save(figure, temporary)))  # type: ignore[misc]
    return written


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", dpi=80)


def _canvas(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
    return figure, panels


def _signal(length: int) -> Tensor:
    """A sum of waves that grow faster towards the end, of amplitude about 1."""
    time = torch.arange(length, dtype=torch.float64) / length
    return 0.5 * torch.sin(9 * time) + 0.35 * torch.sin(21 * time + 1) + 0.25 * torch.sin(60 * time**2)


def _basis() -> Any:
    """The first functions of each basis, over the time ago."""
    figure, panels = _canvas(10, 4.6, 2, 2)
    titles = {
        "legs": "legs: all of the past (0 now, 1 the start)",
        "lmu": "lmu: a window, not normalised",
        "lagt": "lagt: fading past, times the root of its weight",
        "fourier": "fourier: a window, periodic",
    }
    for panel, (measure, title) in zip(panels.flat, titles.items(), strict=True):
        ago = torch.linspace(0, 12 if measure == "lagt" else 1, 400, dtype=torch.float64)
        values = basis(measure, 6, ago)
        if measure == "lagt":
            values = values * torch.exp(-ago / 2)[:, None]
        for n, colour in enumerate(_COLOURS):
            if not (measure == "fourier" and n == 1):
                panel.plot(ago, values[:, n], color=colour, linewidth=1.3, label=f"n = {n}")
        panel.set_title(title, fontsize=9, loc="left")
    panels[0, 0].legend(fontsize=7, ncols=2)
    for panel in panels[1]:
        panel.set_xlabel("time ago", fontsize=8)
    return figure


def _memory() -> Any:
    """A signal as it was, and as each memory of 32 numbers has it after 1000 steps."""
    length, window, size = 1000, 400, 32
    signal = _signal(length)
    figure, panels = _canvas(10, 6, 4, 1, sharex=True, sharey=True)
    memories = [("legs", None), ("legt", window), ("fourier", window), ("lagt", window / 8)]
    for panel, (measure, scale) in zip(panels[:, 0], memories, strict=True):
        panel.plot(signal, color="0.75", linewidth=3, label="signal")
        for order, colour in ((8, _COLOURS[1]), (size, _COLOURS[0])):
            state = memorise(signal, measure, order, window=scale)[-1]
            ago = torch.linspace(0, 1, 500, dtype=torch.float64) * (8 if measure == "lagt" else 1)
            span = length if scale is None else scale
            panel.plot(
                length - span * ago, reconstruct(state, measure, ago), color=colour, linewidth=1.2, label=f"N = {order}"
            )
        panel.set_ylim(-1.6, 1.6)
        words = {"legs": "all of the past", "lagt": f"time constant of {window // 8} steps"}
        panel.set_title(f"{measure}: {words.get(measure, f'a window of {window} steps')}", fontsize=9, loc="left")
    panels[0, 0].legend(fontsize=7, ncols=3, loc="lower left")
    panels[-1, 0].set_xlabel("step", fontsize=8)
    return figure


def _errors() -> Any:
    """Error of the past by number of coefficients, and LegS's bound."""
    length, window = 1000, 400
    signal = _signal(length)
    sizes = [2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    held = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    figure, panels = _canvas(6.5, 4, 1, 1)
    panel = panels[0, 0]
    for (measure, scale), colour in zip(
        (("legs", None), ("legt", window), ("fourier", window)), _COLOURS, strict=False
    ):
        span = length if scale is None else scale
        ago = held[: span * length // length] * length / span
        past = signal.flip(0)[: len(ago)]
        errors = [
            (reconstruct(memorise(signal, measure, size, window=scale)[-1], measure, ago) - past).square().mean().sqrt()
            for size in sizes
        ]
        panel.plot(sizes, errors, "o-", color=colour, markersize=3, label=measure)
    slope = signal.diff().abs().max().item()
    panel.plot(
        sizes, [lipschitz_bound(size, slope, length) for size in sizes], "--", color="0.4", label="bound of legs"
    )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("coefficients N", fontsize=8)
    panel.set_ylabel("error, root mean square over the past", fontsize=8)
    panel.legend(fontsize=7)
    return figure


def _kernels() -> Any:
    """Impulse responses: each state of the memories over the steps since an impulse."""
    length = 300
    figure, panels = _canvas(10, 4.6, 2, 2, sharex=True)
    for panel, (measure, scale) in zip(
        panels.flat, (("legs", 50.0), ("legt", 200.0), ("lagt", 25.0), ("fourier", 200.0)), strict=True
    ):
        A_bar, B_bar = discretise_dense(*transition(measure, 64), 1 / scale, "zoh")
        column, columns = B_bar, []
        for _ in range(length):
            columns.append(column[:6])
            column = A_bar @ column
        responses = torch.stack(columns) * scale
        for n, colour in enumerate(_COLOURS):
            if not (measure == "fourier" and n == 1):
                panel.plot(responses[:, n], color=colour, linewidth=1.2, label=f"n = {n}")
        panel.set_title(f"{measure}, N = 64, 1 / dt = {scale:g}", fontsize=9, loc="left")
    panels[0, 0].legend(fontsize=7, ncols=2)
    for panel in panels[1]:
        panel.set_xlabel("steps since the impulse", fontsize=8)
    return figure


def _eigenvalues() -> Any:
    """Of the normal parts of the measures, of S4D's initialisations, and of the discrete LMU."""
    figure, panels = _canvas(10, 3.8, 1, 3)
    size = 32
    for measure, colour in zip(("legs", "legt", "fourier", "lagt"), _COLOURS, strict=False):
        frequencies = nplr(measure, size).w.imag[: size // 2]
        panels[0, 0].plot(frequencies + 1e-3, "o", color=colour, markersize=3, label=measure)
    panels[0, 0].set_title(f"Im w of A + PP*, N = {size}", fontsize=9, loc="left")
    for kind, colour in zip(("s4d-legs", "s4d-inv", "s4d-lin"), _COLOURS, strict=False):
        panels[0, 1].plot(diagonal(kind, size // 2).imag, "o", color=colour, markersize=3, label=kind)
    panels[0, 1].set_title(f"Im of S4D's initialisations, N = {size}", fontsize=9, loc="left")
    for panel in panels[0, :2]:
        panel.set_yscale("symlog", linthresh=1)
        panel.set_xlabel("n, one of each conjugate pair", fontsize=8)
    circle = torch.polar(torch.ones(200, dtype=torch.float64), torch.linspace(0, 6.2832, 200, dtype=torch.float64))
    panels[0, 2].plot(circle.real, circle.imag, color="0.6", linewidth=1)
    for theta, colour in zip((32, 64, 256), _COLOURS, strict=False):
        A_bar, _ = discretise_dense(*transition("lmu", 16), 1 / theta, "zoh")
        values = torch.linalg.eigvals(A_bar)
        panels[0, 2].plot(values.real, values.imag, "o", color=colour, markersize=3, label=f"theta = {theta}")
    panels[0, 2].set_aspect("equal")
    panels[0, 2].set_title("eigenvalues of the LMU's A_bar, N = 16", fontsize=9, loc="left")
    for panel in panels[0]:
        panel.legend(fontsize=7)
    return figure
