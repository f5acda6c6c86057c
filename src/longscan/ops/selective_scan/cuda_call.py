"""What the CUDA kernels of the selective scan are given: a call's tensors as they read them, its sizes and macros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from longscan.ops import nvrtc
from longscan.ops.nvrtc import FORMATS, addresses, rows

_FOLDER = Path(__file__).parent


@cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def steps(*tensors: Tensor | None) -> tuple[int, ...]:
    """Strides of each tensor between rows and between steps."""
    return tuple(stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2]))


def _coefficient(tensor: Tensor) -> Tensor:
    """B or C as the kernels read it: states next to one another; a constant in float32."""
    if tensor.dim() == 4:
        return rows(tensor.resolve_conj())
    return dense(tensor if tensor.is_complex() else tensor.float())


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous and begins at a multiple of 16 bytes, which is what a thread moves at a
    time; else (a view of a larger one need not) a copy."""
    tensor = tensor.resolve_conj().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else dense(tensor)


def _coefficient_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of B or C between rows, steps and groups, in real numbers; none for a constant."""
    if tensor.dim() != 4:
        return 0, 0, 0
    scale = 2 if tensor.is_complex() else 1
    row, step, group, _ = tensor.stride()
    return row * scale, step * scale, group * scale


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row starts, and its length is, a multiple of 16 bytes."""
    size = tensor.element_size()
    return not (
        tensor.data_ptr() % 16
        or tensor.shape[-1] * size % 16
        or any(stride * size % 16 for stride in tensor.stride()[:-1])
    )


@cache
def _kernel(source: str, name: str, options: tuple[tuple[str, int], ...], device: int) -> nvrtc.Kernel:
    return nvrtc.kernel(_FOLDER / source, name, nvrtc.macros(dict(options)), device)


@dataclass(frozen=True)
class Call:
    """The arguments of a scan, as its kernels read them."""

    x: Tensor
    dt: Tensor
    z: Tensor | None
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial: Tensor | None
    offsets: Tensor | None
    softplus: bool
    #: These are some of the states only: outputs are summands, in float32.
    partial: bool

    @staticmethod
    def of(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        partial: bool,
    ) -> Call:
        return Call(
            rows(x),
            rows(dt),
            None if z is None else rows(z),
            dense(A),
            _coefficient(B),
            _coefficient(C),
            _dense(D),
            _dense(dt_bias),
            _dense(initial_state),
            _dense(cu_seqlens),
            dt_softplus,
            partial,
        )

    @cached_property
    def device(self) -> int:
        return self.x.device.index or 0

    @cached_property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    @cached_property
    def channels(self) -> int:
        return self.x.shape[2]

    @cached_property
    def states(self) -> int:
        return self.A.shape[1]

    @cached_property
    def planes(self) -> int:
        """Real numbers of a number of the state."""
        return 2 if self.A.is_complex() else 1

    @cached_property
    def sequences(self) -> int:
        return self.x.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @cached_property
    def b_groups(self) -> int:
        return self.B.shape[2] if self.B.dim() == 4 else 1

    @cached_property
    def c_groups(self) -> int:
        return self.C.shape[2] if self.C.dim() == 4 else 1

    @cached_property
    def groups(self) -> int:
        """Groups of channels that share both their B and their C."""
        return math.lcm(self.b_groups, self.c_groups)

    @cached_property
    def size(self) -> tuple[int, int, int, int, int]:
        """What a plan is made from."""
        return self.sequences, self.tokens, self.channels, self.states * self.planes, multiprocessors(self.device)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of B and C."""
        return *_coefficient_strides(self.B), *_coefficient_strides(self.C)

    def blocks(self, width: int) -> int:
        """Blocks of `width` channels in a group."""
        return -(-self.channels // self.groups // width)

    def pieces(self, size: int) -> int:
        """Pieces of `size` steps that the sequences are cut into, at most; size 0: they are not cut."""
        packed = None if self.offsets is None else self.sequences
        return nvrtc.pieces(self.x.shape[0], self.x.shape[1], packed, size) if size else self.sequences

    def sizes(self, blocks: int) -> tuple[int, ...]:
        """What every scanning kernel is told, in its order."""
        shares = self.groups // self.b_groups, self.groups // self.c_groups
        return self.sequences, self.x.shape[1], self.channels, self.states, self.groups, blocks, *shares

    def lanes(self, numbers: int) -> tuple[int, int]:
        """LANES and STATES: how a channel's states are spread when a lane takes so many real numbers."""
        width = 1 << (self.states - 1).bit_length()
        each = max(1, min(width, numbers // self.planes))
        return width // each, each

    def options(self, lanes: int, each: int, *more: Tensor | None) -> dict[str, int]:
        """Macros of scan_common.cuh; `more` are tensors that are read or written in rows, too."""
        steps = [tensor for tensor in (self.B, self.C) if tensor.dim() == 4]
        row_wise = [tensor for tensor in (self.x, self.dt, self.z, *more, *steps) if tensor is not None]
        aligned = all(map(_is_aligned, row_wise)) and self.channels // self.groups * self.x.element_size() % 16 == 0
        return {
            "FORMAT": FORMATS[self.x.dtype],
            "COMPLEX": self.A.is_complex(),
            "B_STEP": self.B.dim() == 4,
            "C_STEP": self.C.dim() == 4,
            "HAS_Z": self.z is not None,
            "SOFTPLUS": self.softplus,
            "PACKED": self.offsets is not None,
            "ALIGNED": aligned,
            "LANES": lanes,
            "STATES": each,
            "WHOLE": lanes * each == self.states,
            "PARTIAL": self.partial,
        }

    def kernel(self, source: str, name: str, options: dict[str, int]) -> nvrtc.Kernel:
        return _kernel(source, name, tuple(options.items()), self.device)

    def new_result(self) -> Tensor:
        """Room for what is written once per channel and step."""
        dtype = torch.float32 if self.partial else self.x.dtype
        return torch.empty(self.x.shape, dtype=dtype, device=self.x.device)

    def new_states(self, count: int) -> Tensor:
        """Room for the states of `count` pieces."""
        return torch.empty((count, self.channels, self.states), dtype=self.A.dtype, device=self.x.device)

    def new_sums(self, count: int) -> Tensor:
        """Room for a number per channel of `count` pieces."""
        return torch.empty((count, self.channels), dtype=torch.float32, device=self.x.device)

    def chain(
        self, options: dict[str, int], local: Tensor, sums: Tensor, edge: Tensor | None, span: int, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """From what pieces of `span` steps give from zero: what goes into each, and what comes out of each sequence."""
        borders, last = torch.empty_like(local), self.new_states(self.sequences)
        run = self.kernel("scan_chain.cu", "scan_chain", {**options, "REVERSE": reverse})
        tensors = addresses(local, sums, self.A, borders, edge, last, self.offsets)
        sizes = (self.sequences, self.x.shape[1], self.channels, self.states, span)
        run.launch(-(-self.sequences * self.channels * self.states // 128), 128, (*tensors, *sizes))
        return borders, last
