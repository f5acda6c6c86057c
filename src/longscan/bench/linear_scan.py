"""`longscan bench linear-scan`: first-order recurrences, one a channel, real and complex."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from longscan.bench.contest import DTYPES, Call, Contender, Settings, compare, describe
from longscan.bench.report import Report, Row
from longscan.bench.unfused import parallel_scan
from longscan.ops import linear_scan

AXES = "batch,length,channels"

_NUMBERS = ("real", "complex")

_PHASES = ("forward", "forward and backward")

#: Steps over which outputs and gradients are compared with the definition's, which walks them one by one.
_CHECKED = 256


def run(settings: Settings) -> Report:
    """Milliseconds a pass over decays and inputs of every step; beside it, plain PyTorch in chunks and as a parallel
    scan of pairs."""
    on_cpu = settings.device == "cpu"
    shapes = settings.shapes_of(AXES, *(((4, 2048, 256),) if on_cpu else ((8, 4096, 1024),)))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in settings.dtypes_of("float32"):
            for numbers in _NUMBERS if dtype == "float32" else _NUMBERS[:1]:
                rows += _measure(shape, dtype, numbers, settings)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes, "checked": _CHECKED}
    return Report("linear-scan", "ms", higher_is_better=False, rows=rows, settings=about)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, numbers: str, device: str, seed: int) -> list[Tensor]:
    """a and b, each of the whole shape, a of a modulus between 0.9 and 1."""
    generator = torch.Generator().manual_seed(seed)
    a, b = 1 - 0.1 * torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    if numbers == "complex":
        a = torch.polar(a, torch.randn(shape, generator=generator))
        return [a.to(device), torch.complex(b, torch.randn(shape, generator=generator)).to(device)]
    return [a.to(device, dtype), b.to(device, dtype)]


def _measure(shape: tuple[int, ...], dtype: str, numbers: str, settings: Settings) -> list[Row]:
    inputs = make_inputs(shape, DTYPES[dtype], numbers, settings.device, settings.seed)
    short = (shape[0], min(shape[1], _CHECKED), shape[2])
    few = make_inputs(short, DTYPES[dtype], numbers, settings.device, settings.seed)
    exact = [tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) for tensor in few]
    size = inputs[0].numel() * inputs[0].element_size()
    rows = []
    for phase in _PHASES:
        contenders = [Contender("longscan", "ours", _pass(inputs, phase, linear_scan), _pass(few, phase, linear_scan))]
        for name in settings.peers_of("reference", "chunked", "unfused", slow_on_gpu=("reference",)):
            scan = parallel_scan if name == "unfused" else partial(linear_scan, backend=name)
            contenders.append(Contender(name, "peer", _pass(inputs, phase, scan), _pass(few, phase, scan)))
        rows += compare(
            describe(shape, dtype, numbers=numbers, phase=phase).replace("numbers ", "").replace("phase ", ""),
            contenders,
            _pass(exact, phase, partial(linear_scan, backend="reference"))()(),
            settings,
            dtype=DTYPES[dtype],
            to_value=lambda seconds: seconds * 1e3,
            graphs=True,
            # Forward reads a and b and writes h; backward reads a, h and h's gradient, and writes those of a and b.
            moved=3 * size if phase == "forward" else 8 * size,
        )
    return rows


def _pass(inputs: list[Tensor], phase: str, scan: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> Callable[[], Call]:
    """Forward gives h; with backward it gives the gradients of a and b."""

    def prepare() -> Call:
        leaves = [tensor.detach().requires_grad_(phase != "forward") for tensor in inputs]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                h = scan(*leaves)
            assert isinstance(h, Tensor)
            return _real(h)

        def both() -> tuple[Tensor, ...]:
            h = scan(*leaves)
            assert isinstance(h, Tensor)
            return _real(*torch.autograd.grad(h, leaves, torch.ones_like(h)))

        return forward if phase == "forward" else both

    return prepare


def _real(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Complex numbers as pairs, for the comparison with the definition's."""
    return tuple(torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors)
