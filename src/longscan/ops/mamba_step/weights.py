"""The weights of a Mamba layer, checked once, and as a row of addresses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops.checks import check_shape
from longscan.ops.mamba_step.layout import FIELDS, Field, Layer
from longscan.ops.mamba_step.matrices import (
    Matrix,
    Sizes,
    address_of,
    check_eps,
    check_matrix,
    check_readable,
    check_together,
    private_float32,
)

_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True, eq=False)
class MambaStepWeights:
    """The weights of one pre-norm Mamba layer: add and RMSNorm, then the S6 block.

    Args:
        norm: (d_model,), weight of the RMSNorm before the block.
        in_proj: (2 d_inner, d_model), rows of x first, then those of the gate z.
        conv: (d_inner, d_conv), the last tap meets the present input.
        x_proj: (dt_rank + 2 d_state, d_inner), rows of dt, then B, then C; of several heads (heads (dt_rank +
            2 d_state), d_inner / heads), a head's rows after another's, each head of as many channels side by side.
        dt_proj: (d_inner, dt_rank).
        dt_bias: (d_inner,), added before the softplus.
        A: (d_inner, d_state), real, at most 0: minus exp(A_log).
        out_proj: (d_model, d_inner).
        D: (d_inner,), the skip.
        conv_bias: (d_inner,).
        in_proj_bias, out_proj_bias: (2 d_inner,), (d_model,).
        selection_norm: (dt_rank + 2 d_state,), weights of the RMS norms that dt, B and C pass, each its own.
        paired: rows of in_proj are x and z of one channel, then of the next.
        heads: each with a dt, B and C of its own.
        eps, selection_eps: of the norm, and of those of dt, B and C.

    The four projections are float32, bfloat16, float16 or an `Int8Matrix`, contiguous, and used where they lie;
    everything else is copied to float32 here.

    Raises:
        ArgumentError: shapes that do not fit together.
        BackendError: a device, dtype or layout the compiled step cannot read.
    """

    norm: Tensor
    in_proj: Matrix
    conv: Tensor
    x_proj: Matrix
    dt_proj: Matrix
    dt_bias: Tensor
    A: Tensor
    out_proj: Matrix
    D: Tensor | None = None
    conv_bias: Tensor | None = None
    in_proj_bias: Tensor | None = None
    out_proj_bias: Tensor | None = None
    selection_norm: Tensor | None = None
    paired: bool = False
    heads: int = 1
    eps: float = 1e-5
    selection_eps: float = 1e-5
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        for name in ("in_proj", "conv", "x_proj", "dt_proj", "A"):
            tensor: Any = getattr(self, name)
            if tensor.dim() != 2 or 0 in tensor.shape:
                raise ArgumentError(f"{name}: got shape {tuple(tensor.shape)}, expected two axes, each at least 1")
        (d_inner, d_state), d_model = self.A.shape, self.in_proj.shape[1]
        if self.heads < 1 or d_inner % self.heads:
            raise ArgumentError(f"heads: got {self.heads}, expected a divisor of d_inner ({d_inner})")
        sizes = Sizes(d_model, d_inner, d_state, self.dt_proj.shape[1], self.conv.shape[1], self.heads)
        width = d_inner // self.heads
        shapes = {
            "norm": ((d_model,), "(d_model,)"),
            "in_proj": ((2 * d_inner, d_model), "(2 d_inner, d_model)"),
            "conv": ((d_inner, sizes.d_conv), "(d_inner, d_conv)"),
            "x_proj": ((self.heads * sizes.mixed, width), "(heads (dt_rank + 2 d_state), d_inner / heads)"),
            "dt_proj": ((d_inner, sizes.dt_rank), "(d_inner, dt_rank)"),
            "dt_bias": ((d_inner,), "(d_inner,)"),
            "out_proj": ((d_model, d_inner), "(d_model, d_inner)"),
            "D": ((d_inner,), "(d_inner,)"),
            "conv_bias": ((d_inner,), "(d_inner,)"),
            "in_proj_bias": ((2 * d_inner,), "(2 d_inner,)"),
            "out_proj_bias": ((d_model,), "(d_model,)"),
            "selection_norm": ((sizes.mixed,), "(dt_rank + 2 d_state,)"),
        }
        for name, (shape, meaning) in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                check_shape(name, tensor, shape, meaning)
                (check_matrix if name in _PROJECTIONS else check_readable)(name, tensor)
        check_readable("A", self.A)
        for name in ("eps", "selection_eps"):
            check_eps(name, getattr(self, name))
        object.__setattr__(self, "sizes", sizes)
        check_together("in_proj", self.device, {name: getattr(self, name) for name in shapes})

    @property
    def device(self) -> torch.device:
        return self.in_proj.device

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.in_proj, self.x_proj, self.dt_proj, self.out_proj

    @cached_property
    def row(self) -> np.ndarray[Any, Any]:
        """Addresses and kinds by `Field`, int64; what they point to lives as long as this object."""
        row = np.zeros(FIELDS, dtype=np.int64)
        row[Field.LAYER], row[Field.IN_PROJ_PAIRED] = Layer.MAMBA, self.paired
        for name in _PROJECTIONS:
            matrix = address_of(getattr(self, name))
            row[Field[name.upper()]], row[Field[name.upper() + "_KIND"]], row[Field[name.upper() + "_SCALES"]] = matrix
        for name, vector in self.vectors.items():
            row[Field[name]] = vector.data_ptr()
        return row

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """What is no matrix, in float32, by the name of its `Field`; those that are absent are not there."""
        given = {
            "NORM": self.norm,
            # Taps outermost, so that a vector of channels is contiguous.
            "CONV": self.conv.t(),
            "CONV_BIAS": self.conv_bias,
            "DT_BIAS": self.dt_bias,
            # exp(delta A) is taken as a power of two.
            "A": self.A.detach().double() / math.log(2),
            "D": self.D,
            "IN_PROJ_BIAS": self._halved_bias(),
            "OUT_PROJ_BIAS": self.out_proj_bias,
            "SELECTION_NORM": self.selection_norm,
        }
        return {name: private_float32(tensor) for name, tensor in given.items() if tensor is not None}

    def _halved_bias(self) -> Tensor | None:
        """That of x, then that of z."""
        bias = self.in_proj_bias
        return bias.unflatten(0, (-1, 2)).t().flatten() if bias is not None and self.paired else bias
