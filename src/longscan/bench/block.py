"""`longscan bench block`: one Mamba block, forward, and forward with backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.bench import floors
from longscan.bench.contest import DTYPES, Call, Contender, Settings, beside, compare, describe, floor
from longscan.bench.peers import huggingface, mamba_ssm, mambapy
from longscan.bench.report import Report, Row
from longscan.mixers import Mamba

AXES = "batch,length,d_model"


def run(settings: Settings) -> Report:
    """A block of the paper's shape (N = 16, convolution over 4, expansion 2), in milliseconds."""
    on_cpu = settings.device == "cpu"
    shapes = settings.shapes_of(AXES, (1, 512, 768) if on_cpu else (8, 2048, 768))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in settings.dtypes_of("float32" if on_cpu else "bfloat16"):
            rows += _measure(shape, dtype, settings)
    return Report(
        "block",
        "ms",
        higher_is_better=False,
        rows=rows,
        settings={"device": settings.device, "axes": AXES, "shapes": shapes},
    )


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    batch, length, d_model = shape
    torch.manual_seed(settings.seed)
    mixer = Mamba(d_model).to(settings.device, DTYPES[dtype])
    x = torch.randn(batch, length, d_model).to(settings.device, DTYPES[dtype])
    exact = copy.deepcopy(mixer).float()
    rows = []
    for phase in ("forward", "forward and backward"):
        backward = phase != "forward"
        group = describe(shape, dtype, phase=phase).replace("phase ", "")
        truth = _call(_of(exact, "reference"), x.float(), backward)()
        contenders = [
            Contender(name, kind, _preparation(build, mixer, x, backward))
            for name, kind, build in _contestants(settings)
        ]
        # Weights, input and output; backward, the first two again, the output's gradient and theirs.
        weights = sum(parameter.numel() * parameter.element_size() for parameter in mixer.parameters())
        activations = x.numel() * x.element_size()
        moved = 3 * weights + 5 * activations if backward else weights + 2 * activations
        found = compare(group, contenders, truth, settings, dtype=DTYPES[dtype], to_value=_milliseconds, moved=moved)
        products = floors.mamba_products(batch * length, d_model)
        if backward:
            # Each product has two more behind it, for its input and for its weight.
            products += [(m, n, k) for m, k, n in products] + [(n, m, k) for m, k, n in products]
        timing = floors.matrix_products(products, DTYPES[dtype], settings.device, repeats=settings.repeats)
        rows += beside(found, [floor(group, "products", timing, _milliseconds, "its matrix products alone")])
    return rows


_Block = Callable[[Tensor], Tensor]
_Build = Callable[[Mamba], _Block]


def _contestants(settings: Settings) -> list[tuple[str, str, _Build]]:
    peers: dict[str, _Build] = {
        "reference": lambda mixer: _of(mixer, "reference"),
        "transformers": _first(huggingface.block),
        "mambapy": _first(mambapy.block),
        "mamba-ssm": _first(mamba_ssm.block),
    }
    asked = settings.peers_of(*peers, slow_on_gpu=("reference", "transformers"))
    found: list[tuple[str, str, _Build]] = [("longscan", "ours", lambda mixer: _of(mixer, "auto"))]
    return found + [(name, "peer", peers[name]) for name in asked]


def _of(mixer: Mamba, backend: str) -> _Block:
    def call(x: Tensor) -> Tensor:
        with ops.backend(backend):
            y: Tensor = mixer(x)[0]
        return y

    return call


def _first(build: Callable[[Mamba], nn.Module]) -> _Build:
    """A peer's block; some give a tuple whose first entry is the output."""

    def make(mixer: Mamba) -> _Block:
        peer = build(mixer)

        def call(x: Tensor) -> Tensor:
            y = peer(x)
            return y[0] if isinstance(y, tuple) else y

        return call

    return make


def _preparation(build: _Build, mixer: Mamba, x: Tensor, backward: bool) -> Callable[[], Call]:
    return lambda: _call(build(mixer), x, backward)


def _call(block: _Block, x: Tensor, backward: bool) -> Call:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (block(x),)

    def both() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = block(leaf)
        y.backward(torch.ones_like(y))
        assert leaf.grad is not None
        return (leaf.grad,)

    return both if backward else forward


def _milliseconds(seconds: float) -> float:
    return seconds * 1e3
