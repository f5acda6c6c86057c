r"""The block shapes around a mixer: of H3, of Mamba, and Mamba's without its gate.

Fu, Dao et al. 2022 (H3, arXiv 2212.14052, figure 1) and Gu and Dao 2023 (Mamba, arXiv 2312.00752, figure 3 and section
4.6.1). With any inner mixer M of the block's inner width:

.. math::
    \text{h3:} \quad & k, q, v = W_{in} x, \quad o = W_{out}\,(q \odot M(\mathrm{conv}(k) \odot v)) \\
    \text{mamba:} \quad & u, z = W_{in} x, \quad o = W_{out}\,(M(\sigma(\mathrm{conv}(u))) \odot \sigma(z)) \\
    \text{ungated:} \quad & u = W_{in} x, \quad o = W_{out}\, M(\sigma(\mathrm{conv}(u)))

with SiLU for sigma. The convolution is short, causal and of each channel by itself; H3's shift SSM is one. H3's heads
are one channel wide, so that k v is a product of channels.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch
from longscan.nn.recurrences import causal_conv1d
from longscan.nn.state import State
from longscan.ops import causal_conv1d_update


@dataclasses.dataclass(frozen=True)
class BlockState(State):
    """The last inputs of the convolution (batch, d_conv - 1, d_inner), and the state of the mixer inside."""

    conv: Tensor
    inner: State


class BlockShape(SequenceMixer):
    """A mixer inside a block; itself a mixer.

    Args:
        d_model: width of input and output.
        inner: the mixer inside, of any width.
        d_conv: width of the convolution.
        conv_bias, bias: whether the convolution and the two projections have biases.

    Raises:
        ArgumentError: a width is less than 1.
    """

    #: Branches of the input projection, the first of which is convolved.
    branches: ClassVar[int]
    #: Behind the convolution.
    activation: ClassVar[str | None] = "silu"

    def __init__(
        self,
        d_model: int,
        inner: SequenceMixer,
        *,
        d_conv: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, d_conv) < 1:
            raise ArgumentError(f"d_model and d_conv must be at least 1; got {d_model} and {d_conv}")
        self.d_model, self.d_inner, self.d_conv = d_model, inner.d_model, d_conv
        self.in_proj = nn.Linear(d_model, self.branches * self.d_inner, bias=bias, device=device, dtype=dtype)
        # Holds the weights; the operator does the work.
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias, device=device, dtype=dtype
        )
        self.inner = inner
        self.capturable, self.undivided = inner.capturable, inner.undivided
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)

    @abc.abstractmethod
    def enter(self, convolved: Tensor, others: Sequence[Tensor]) -> Tensor:
        """What the inner mixer is given, (..., d_inner), of the convolved branch and the others."""

    @abc.abstractmethod
    def leave(self, y: Tensor, others: Sequence[Tensor]) -> Tensor:
        """What is projected out, of the inner mixer's output and the other branches."""

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, BlockState | None]:
        self.check_input(x, state, cu_seqlens, BlockState)
        before = state if isinstance(state, BlockState) else None
        first, *others = self.in_proj(x).chunk(self.branches, dim=-1)
        convolved, conv = causal_conv1d(
            first,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            None if before is None else before.conv.to(first.dtype),
            activation=self.activation,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        entering = self.enter(convolved, others)
        y, inner = self.inner(entering, None if before is None else before.inner, cu_seqlens=cu_seqlens)
        after = None if before is None else BlockState(conv.to(before.conv.dtype), inner)
        return self.out_proj(self.leave(y, others)), after

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, BlockState]:
        self.check_input(x.unsqueeze(1), state, None, BlockState)
        assert isinstance(state, BlockState)
        first, *others = self.in_proj(x).chunk(self.branches, dim=-1)
        convolved, conv = causal_conv1d_update(
            state.conv,
            first,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation=self.activation,
            inplace=inplace and state.conv.dtype == first.dtype,
        )
        y, inner = self.inner.step(self.enter(convolved, others), state.inner, inplace=inplace)
        return self.out_proj(self.leave(y, others)), BlockState(conv.to(state.conv.dtype), inner)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BlockState:
        check_batch(batch)
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        conv = torch.zeros(batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype or weight.dtype)
        return BlockState(conv, self.inner.initial_state(batch, device, dtype))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        kept = batch * (self.d_conv - 1) * self.d_inner * self.in_proj.weight.element_size()
        return kept + self.inner.state_bytes(batch, length)

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_inner={self.d_inner}, d_conv={self.d_conv}"


class UngatedBlock(BlockShape):
    """Projection, convolution, SiLU, the mixer, projection."""

    branches = 1

    def enter(self, convolved: Tensor, others: Sequence[Tensor]) -> Tensor:
        return convolved

    def leave(self, y: Tensor, others: Sequence[Tensor]) -> Tensor:
        return y


class MambaBlock(UngatedBlock):
    """:class:`UngatedBlock` and, around all of it, a SiLU gate. With S6 inside it is :class:`longscan.Mamba`."""

    branches = 2

    def leave(self, y: Tensor, others: Sequence[Tensor]) -> Tensor:
        return y * F.silu(others[0])


class H3Block(BlockShape):
    """The mixer between two products: with a value before it, with a query after it."""

    branches = 3
    activation = None

    def enter(self, convolved: Tensor, others: Sequence[Tensor]) -> Tensor:
        return convolved * others[1]

    def leave(self, y: Tensor, others: Sequence[Tensor]) -> Tensor:
        return y * others[0]


#: Name in configurations -> class, and its inner width over d_model unless the configuration says another.
BLOCKS: dict[str, tuple[type[BlockShape], float]] = {
    "ungated": (UngatedBlock, 2),
    "h3": (H3Block, 1),
    "mamba": (MambaBlock, 2),
}
