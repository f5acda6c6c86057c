"""What nothing can beat on this machine, measured in the same run: matrix products and memory reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from longscan.bench.timing import Timing, measure


def read_bandwidth(device: torch.device | str = "cpu", *, size: int = 2**28, repeats: int = 7) -> float:
    """Bytes per second of reading memory that no cache holds: the best of two ways PyTorch has to read it.

    Args:
        size: bytes of the array that is read.
    """
    numbers = torch.ones(size // 4, dtype=torch.float32, device=device)
    rows = numbers.view(-1, 1024)
    vector = torch.ones(1024, dtype=torch.float32, device=device)
    ways: list[Callable[[], torch.Tensor]] = [numbers.sum, lambda: rows @ vector]
    fastest = min(measure(way, device, repeats=repeats).low for way in ways)
    return size / fastest


def multiply_adds_per_second(
    device: torch.device | str = "cpu",
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
    repeats: int = 7,
) -> float:
    """Multiply-adds per second of a square matrix product, over all threads or the whole GPU.

    Args:
        size: of the square; by default 1,024 on the CPU and 8,192 elsewhere, which fills a GPU.
    """
    size = size or (1024 if torch.device(device).type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / measure(lambda: a @ b, device, repeats=repeats).low


class Rates:
    """What a device can do, measured once for many rows.

    Attributes:
        bandwidth: bytes read per second.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._multiply_adds: dict[torch.dtype, float] = {}
        self.bandwidth = read_bandwidth(device)

    def multiply_adds(self, dtype: torch.dtype) -> float:
        """Per second, of a large matrix product."""
        if dtype not in self._multiply_adds:
            self._multiply_adds[dtype] = multiply_adds_per_second(self._device, dtype=dtype)
        return self._multiply_adds[dtype]


def exponentials_per_second() -> float | None:
    """Exponentials (or reciprocals, logarithms) that the special-function units of the NVIDIA GPU here give.

    16 a cycle and multiprocessor (CUDA C++ Programming Guide, throughput of native arithmetic instructions) at the
    highest clock; None where the driver's bindings, which know the clock, are missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    clock = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    error, kilohertz = driver.cuDeviceGetAttribute(clock, torch.cuda.current_device())
    if int(error) != 0:
        return None
    units = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return 16.0 * units * kilohertz * 1e3


def matrix_products(
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    repeats: int = 5,
    budget: float = 10.0,
) -> Timing:
    """Time of products (m, k) x (k, n) one after another, each with weights of its own, as linear layers do them.

    Args:
        shapes: (m, k, n) of every product, repeated where a model repeats it.
        dtype: of both factors and the result.
    """
    inputs: dict[tuple[int, int], torch.Tensor] = {}
    factors = []
    for m, k, n in shapes:
        x = inputs.setdefault((m, k), torch.randn(m, k, device=device).to(dtype))
        factors.append((x, torch.randn(n, k, device=device).to(dtype)))

    def call() -> None:
        for x, weight in factors:
            torch.nn.functional.linear(x, weight)

    return measure(call, device, repeats=repeats, budget=budget)


def mamba_products(rows: int, d_model: int, d_state: int = 16, expand: int = 2) -> list[tuple[int, int, int]]:
    """(m, k, n) of the four linear layers of one Mamba block over `rows` tokens."""
    d_inner, dt_rank = expand * d_model, -(-d_model // 16)
    return [
        (rows, d_model, 2 * d_inner),
        (rows, d_inner, dt_rank + 2 * d_state),
        (rows, dt_rank, d_inner),
        (rows, d_inner, d_model),
    ]
