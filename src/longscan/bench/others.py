"""What else maps a sequence to one of the same shape: attention and a long convolution, without their projections.

They compute something else than the scan, so that only their times can be compared (Gu and Dao 2023, section 4.5:
attention without projections, the convolution without the making of its kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longscan.bench.contest import Call
from longscan.bench.timing import timed

#: Of PyTorch's attention, those that may be fastest.
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True)
class Pass:
    """A pass that is timed; `note` is said beside its figure, `backend` is the one of PyTorch's attention."""

    call: Call
    note: str
    backend: SDPBackend | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        return self.call()


def attention_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """What attention is timed in: half precision on accelerators, where its fast kernels take nothing else."""
    return torch.bfloat16 if device != "cpu" and dtype == torch.float32 else dtype


def head_width(channels: int) -> int:
    """64, as in the paper, where heads of it make up the width; else one head."""
    return 64 if channels % 64 == 0 else channels


def attention(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, phase: str, backend: SDPBackend | None = None
) -> Pass:
    """Causal softmax attention by PyTorch, heads of 64.

    Args:
        shape: (batch, length, channels, ...).
        phase: "forward", "backward", or "forward and backward".
        backend: of PyTorch's attention; None: the fastest here, each tried.
    """
    batch, length, channels = shape[:3]
    width = head_width(channels)
    dtype = attention_dtype(device, dtype)
    axes = (batch, channels // width, length, width)
    query, key, value = leaves = [
        torch.randn(axes, device=device).to(dtype).requires_grad_(phase != "forward") for _ in range(3)
    ]

    def by(one: SDPBackend) -> Call:
        def forward() -> Tensor:
            with sdpa_kernel(one):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        return _pass(forward, leaves, phase)

    if backend is None:
        backend = _fastest(by, device)
    return Pass(by(backend), f"{backend_name(backend)}, {str(dtype).removeprefix('torch.')}", backend)


def backend_name(backend: SDPBackend) -> str:
    """As it stands in notes."""
    return str(backend.name).removesuffix("_ATTENTION").lower()


def _fastest(by: Callable[[SDPBackend], Call], device: str) -> SDPBackend:
    seconds: dict[SDPBackend, float] = {}
    for backend in BACKENDS:
        if backend == SDPBackend.MATH and seconds:
            break  # It writes down every score: the last resort.
        try:
            call = by(backend)
            call()
            seconds[backend] = timed(call, device)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # Not for this device, dtype or width.
    if not seconds:
        raise RuntimeError("no backend of PyTorch's attention serves this device, dtype and width")
    return min(seconds, key=lambda backend: seconds[backend])


def convolution(shape: tuple[int, ...], device: str, phase: str) -> Pass:
    """A kernel of its own for every channel, as long as the sequence, by one real FFT of twice the length; float32.

    Arguments as those of :func:`attention`.
    """
    batch, length, channels = shape[:3]
    grad = phase != "forward"
    inputs = torch.randn(batch, channels, length, device=device).requires_grad_(grad)
    kernel = (torch.randn(channels, length, device=device) / length**0.5).requires_grad_(grad)

    def forward() -> Tensor:
        return long_convolution(inputs, kernel)

    return Pass(_pass(forward, [inputs, kernel], phase), "float32")


def long_convolution(inputs: Tensor, kernel: Tensor) -> Tensor:
    """Causal, of inputs (batch, channels, length) with a kernel (channels, length) from the left."""
    length = inputs.shape[-1]
    spectrum = torch.fft.rfft(inputs, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


def attention_moved(shape: tuple[int, ...], dtype: torch.dtype, device: str, phase: str) -> float:
    """Bytes: queries, keys, values and the output; backward, those again, the output's gradient and theirs."""
    batch, length, channels = shape[:3]
    tensors = {"forward": 4, "backward": 8, "forward and backward": 12}[phase]
    return tensors * batch * length * channels * attention_dtype(device, dtype).itemsize


def attention_work(shape: tuple[int, ...], phase: str) -> float:
    """Multiply-adds of its products over the causal half: two forward; backward the scores again and four more."""
    batch, length, channels = shape[:3]
    return {"forward": 2, "backward": 5, "forward and backward": 7}[phase] * batch * length**2 / 2 * channels


def convolution_moved(shape: tuple[int, ...], phase: str) -> float:
    """Bytes: inputs, kernels and the output; backward, inputs, kernels, the output's gradient and theirs."""
    batch, length, channels = shape[:3]
    rows = {"forward": 2 * batch + 1, "backward": 3 * batch + 2, "forward and backward": 5 * batch + 3}[phase]
    return 4.0 * rows * length * channels


def _pass(forward: Callable[[], Tensor], leaves: list[Tensor], phase: str) -> Call:
    before = forward() if phase == "backward" else None
    gradient: list[Tensor] = []

    def only_forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(),)

    def gradients() -> tuple[Tensor, ...]:
        y = forward() if before is None else before
        if not gradient:
            gradient.append(torch.ones_like(y))
        return torch.autograd.grad(y, leaves, gradient[0], retain_graph=before is not None)

    return only_forward if phase == "forward" else gradients
