"""`longscan bench decay`: outer-product recurrences without decay, with one a head and with one a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longscan.bench import others
from longscan.bench.contest import DTYPES, Call, Contender, Settings, compare, describe
from longscan.bench.peers import linear_attention
from longscan.bench.report import Report, Row
from longscan.ops import decay_attention

AXES = "batch,length,heads,d_k,d_v"

_DECAYS = ("none", "head", "step")

_PEERS = {"fla": linear_attention.fla, "mamba-ssm": linear_attention.ssd}

_PHASES = ("forward", "forward and backward")

#: Steps over which outputs and gradients are compared with the definition's, which walks them one by one.
_CHECKED = 256


def run(settings: Settings) -> Report:
    """Milliseconds a pass; beside it, others' kernels, and causal attention of as many heads times d_v channels."""
    on_cpu = settings.device == "cpu"
    shapes = settings.shapes_of(AXES, *(((4, 1024, 8, 64, 64),) if on_cpu else ((8, 2048, 16, 64, 64),)))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in settings.dtypes_of("float32" if on_cpu else "bfloat16"):
            for decay in _DECAYS:
                rows += _measure(shape, dtype, decay, settings)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes, "checked": _CHECKED}
    return Report("decay", "ms", higher_is_better=False, rows=rows, settings=about)


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, decay: str, device: str, seed: int) -> dict[str, Tensor]:
    """q, k, v and, if there is a decay, its logarithm, by name."""
    batch, length, heads, d_k, d_v = shape
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(batch, length, heads, width, generator=generator).to(device, dtype)
        for name, width in (("q", d_k), ("k", d_k), ("v", d_v))
    }
    inputs["q"] *= d_k**-0.5
    if decay != "none":
        size = (heads,) if decay == "head" else (batch, length, heads)
        inputs["log_decay"] = -0.1 * torch.rand(size, generator=generator).to(device)
    return inputs


def _measure(shape: tuple[int, ...], dtype: str, decay: str, settings: Settings) -> list[Row]:
    inputs = make_inputs(shape, DTYPES[dtype], decay, settings.device, settings.seed)
    short = (1, min(shape[1], _CHECKED), *shape[2:])
    few = make_inputs(short, DTYPES[dtype], decay, settings.device, settings.seed)
    exact = {name: tensor.double() for name, tensor in few.items()}
    channels = (*shape[:2], shape[2] * shape[4])
    rows = []
    for phase in _PHASES:
        contenders = [
            Contender("longscan", "ours", _prepare(inputs, phase, None), check=_prepare(few, phase, None)),
        ]
        # On the CPU ours is the one in chunks.
        backends = ("reference",) if settings.device == "cpu" else ("chunked", "reference")
        for name in settings.peers_of(*backends, *_PEERS, "attention", slow_on_gpu=("reference",)):
            if name == "attention":
                contenders.append(_attention(channels, phase, DTYPES[dtype], settings.device))
            elif name in _PEERS:
                contenders.append(
                    Contender(name, "peer", _prepare_peer(inputs, phase, name), _prepare_peer(few, phase, name, True))
                )
            else:
                contenders.append(
                    Contender(name, "peer", _prepare(inputs, phase, name), check=_prepare(few, phase, name))
                )
        rows += compare(
            describe(shape, dtype, decay=decay, phase=phase).replace("phase ", ""),
            contenders,
            _prepare(exact, phase, "reference")()(),
            settings,
            dtype=DTYPES[dtype],
            to_value=lambda seconds: seconds * 1e3,
            graphs=True,
            moved=_bytes_moved(inputs, phase),
        )
    return rows


def _attention(channels: tuple[int, ...], phase: str, dtype: torch.dtype, device: str) -> Contender:
    return Contender(
        "attention",
        "other",
        lambda: others.attention(channels, dtype, device, phase),
        moved=others.attention_moved(channels, dtype, device, phase),
        note=f"something else: causal softmax attention, heads of {others.head_width(channels[2])}",
    )


def _prepare(inputs: dict[str, Tensor], phase: str, backend: str | None) -> Callable[[], Call]:
    """Our pass that is timed. Forward gives y; with backward it gives the gradients of q, k and v."""
    return lambda: _pass(inputs, phase, partial(decay_attention, backend=backend))


def _prepare_peer(inputs: dict[str, Tensor], phase: str, name: str, compared: bool = False) -> Callable[[], Call]:
    """The same of a peer; where it is `compared`, with the gradient of our v."""

    def prepare() -> Call:
        peer = _PEERS[name](inputs)
        call = _pass(peer.inputs, phase, peer.call)
        scale = peer.scale
        if not compared or scale is None or phase == "forward":
            return call

        def scaled() -> tuple[Tensor, ...]:
            dq, dk, dv = call()
            return dq, dk, dv / scale

        return scaled

    return prepare


def _pass(inputs: dict[str, Tensor], phase: str, function: Callable[..., Any]) -> Call:
    leaves: dict[str, Any] = {
        name: tensor.detach().requires_grad_(phase != "forward") for name, tensor in inputs.items()
    }

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = function(**leaves)
        return (y,)

    def both() -> tuple[Tensor, ...]:
        y = function(**leaves)
        return torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))[:3]

    return forward if phase == "forward" else both


def _bytes_moved(inputs: dict[str, Tensor], phase: str) -> int:
    """Forward reads the inputs and writes y; backward reads them and y's gradient, and writes theirs."""
    output = inputs["v"].numel() * inputs["v"].element_size()
    everything = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
    forward, backward = everything + output, 2 * everything + output
    return forward if phase == "forward" else forward + backward
