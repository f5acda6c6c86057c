"""The weights of a model of Mamba layers, checked once; those of a layer also as a row of addresses."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops.checks import check_shape
from longscan.ops.int8 import Int8Matrix

#: Numbers by which the compiled code knows the dtypes of weights and states.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MATRIX_KINDS = {**KINDS, torch.int8: 3}

#: A weight matrix as it lies in memory.
Matrix = Tensor | Int8Matrix


class Field(IntEnum):
    """Columns of the table of addresses; a kind is a value of `MATRIX_KINDS`, the address 0 stands for "none"."""

    NORM = 0
    IN_PROJ = 1
    IN_PROJ_KIND = 2
    IN_PROJ_SCALES = 3
    IN_PROJ_BIAS = 4
    CONV = 5
    CONV_BIAS = 6
    X_PROJ = 7
    X_PROJ_KIND = 8
    X_PROJ_SCALES = 9
    DT_PROJ = 10
    DT_PROJ_KIND = 11
    DT_PROJ_SCALES = 12
    DT_BIAS = 13
    A = 14
    D = 15
    OUT_PROJ = 16
    OUT_PROJ_KIND = 17
    OUT_PROJ_SCALES = 18
    OUT_PROJ_BIAS = 19


@dataclass(frozen=True)
class Sizes:
    """The sizes that the layers of one decoder share."""

    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int


_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True, eq=False)
class MambaStepWeights:
    """The weights of one pre-norm Mamba layer: add and RMSNorm, then the S6 block.

    Args:
        norm: (d_model,), weight of the RMSNorm before the block.
        in_proj: (2 d_inner, d_model), rows of x first, then those of the gate z.
        conv: (d_inner, d_conv), the last tap meets the present input.
        x_proj: (dt_rank + 2 d_state, d_inner), rows of dt, then B, then C.
        dt_proj: (d_inner, dt_rank).
        dt_bias: (d_inner,), added before the softplus.
        A: (d_inner, d_state), real, at most 0: minus exp(A_log).
        out_proj: (d_model, d_inner).
        D: (d_inner,), the skip.
        conv_bias: (d_inner,).
        in_proj_bias, out_proj_bias: (2 d_inner,), (d_model,).
        eps: of the norm.

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
    eps: float = 1e-5
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        for name in ("in_proj", "conv", "x_proj", "dt_proj", "A"):
            tensor: Any = getattr(self, name)
            if tensor.dim() != 2 or 0 in tensor.shape:
                raise ArgumentError(f"{name}: got shape {tuple(tensor.shape)}, expected two axes, each at least 1")
        (d_inner, d_state), d_model = self.A.shape, self.in_proj.shape[1]
        sizes = Sizes(d_model, d_inner, d_state, self.dt_proj.shape[1], self.conv.shape[1])
        shapes = {
            "norm": ((d_model,), "(d_model,)"),
            "in_proj": ((2 * d_inner, d_model), "(2 d_inner, d_model)"),
            "conv": ((d_inner, sizes.d_conv), "(d_inner, d_conv)"),
            "x_proj": ((sizes.dt_rank + 2 * d_state, d_inner), "(dt_rank + 2 d_state, d_inner)"),
            "dt_proj": ((d_inner, sizes.dt_rank), "(d_inner, dt_rank)"),
            "dt_bias": ((d_inner,), "(d_inner,)"),
            "out_proj": ((d_model, d_inner), "(d_model, d_inner)"),
            "D": ((d_inner,), "(d_inner,)"),
            "conv_bias": ((d_inner,), "(d_inner,)"),
            "in_proj_bias": ((2 * d_inner,), "(2 d_inner,)"),
            "out_proj_bias": ((d_model,), "(d_model,)"),
        }
        for name, (shape, meaning) in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                check_shape(name, tensor, shape, meaning)
                if name in _PROJECTIONS:
                    check_matrix(name, tensor)
                else:
                    check_readable(name, tensor)
        check_readable("A", self.A)
        if not self.eps >= 0:
            raise ArgumentError(f"eps: got {self.eps}, expected a number of at least 0")
        object.__setattr__(self, "sizes", sizes)
        for name in shapes:
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.device:
                raise BackendError(f"{name}: is on {tensor.device}, in_proj on {self.device}; move the layer to one")

    @property
    def device(self) -> torch.device:
        return self.in_proj.device

    @cached_property
    def row(self) -> np.ndarray[Any, Any]:
        """Addresses and kinds by `Field`, int64; what they point to lives as long as this object."""
        row = np.zeros(len(Field), dtype=np.int64)
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
            "IN_PROJ_BIAS": self.in_proj_bias,
            "OUT_PROJ_BIAS": self.out_proj_bias,
        }
        return {name: private_float32(tensor) for name, tensor in given.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class MambaModelWeights:
    """The weights of consecutive layers and, with a final norm, of a whole language model.

    Args: as `MambaDecoder`. Vectors are copied to float32.

    Raises:
        ArgumentError: no layers, layers of different sizes, or shapes that do not fit.
        BackendError: a dtype or layout that the compiled step cannot read, or tensors on several devices.
    """

    layers: tuple[MambaStepWeights, ...]
    embedding: Matrix | None
    final_norm: Tensor | None
    head: Matrix | None
    head_bias: Tensor | None
    eps: float

    def __post_init__(self) -> None:
        if not self.layers:
            raise ArgumentError("layers: got none, expected at least one")
        sizes = self.sizes
        for i, layer in enumerate(self.layers):
            if layer.sizes != sizes:
                raise ArgumentError(f"layers: layer {i} has {layer.sizes}, layer 0 has {sizes}; expected the same")
        if self.head is None:
            object.__setattr__(self, "head", self.embedding)
        for name, matrix in (("embedding", self.embedding), ("head", self.head)):
            if matrix is not None:
                if matrix.dim() != 2 or matrix.shape[1] != sizes.d_model:
                    raise ArgumentError(
                        f"{name}: got shape {tuple(matrix.shape)}, expected (vocabulary, {sizes.d_model})"
                    )
                check_matrix(name, matrix)
        if self.final_norm is not None:
            check_shape("final_norm", self.final_norm, (sizes.d_model,), "(d_model,)")
            check_readable("final_norm", self.final_norm)
            object.__setattr__(self, "final_norm", private_float32(self.final_norm))
        if self.head_bias is not None and self.head is not None:
            check_shape("head_bias", self.head_bias, (self.head.shape[0],), "(vocabulary,)")
            check_readable("head_bias", self.head_bias)
            object.__setattr__(self, "head_bias", private_float32(self.head_bias))
        for name, tensor in (("embedding", self.embedding), ("head", self.head), ("final_norm", self.final_norm)):
            if tensor is not None and tensor.device != self.device:
                raise BackendError(f"{name}: is on {tensor.device}, layer 0 on {self.device}; move the model to one")
        for i, layer in enumerate(self.layers):
            if layer.device != self.device:
                raise BackendError(f"layers: layer {i} is on {layer.device}, layer 0 on {self.device}")

    @property
    def sizes(self) -> Sizes:
        return self.layers[0].sizes

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def matrices(self) -> list[Matrix]:
        """The layers' projections, and the head if there is one."""
        own = [m for w in self.layers for m in (w.in_proj, w.x_proj, w.dt_proj, w.out_proj)]
        return own if self.head is None else [*own, self.head]

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ArgumentError unless the weights make a language model and tokens are (batch,), at least one."""
        if self.embedding is None or self.head is None or self.final_norm is None:
            raise ArgumentError("embedding, final_norm: this decoder was made without them; use step_hidden")
        if tokens.dim() != 1 or tokens.shape[0] == 0:
            raise ArgumentError(f"tokens: got shape {tuple(tokens.shape)}, expected (batch,) with at least one")

    def check_states(
        self,
        states: Sequence[tuple[Tensor, Tensor]],
        batch: int,
        kinds: Container[torch.dtype],
        ssm_kind: torch.dtype = torch.float32,
    ) -> None:
        """Raise ArgumentError unless there is one (conv_state, ssm_state) per layer that the kernels can update.

        Args:
            states: see the package's docstring.
            batch: number of sequences.
            kinds: the dtypes a conv_state may have.
            ssm_kind: the dtype of every ssm_state.
        """
        s = self.sizes
        if len(states) != len(self.layers):
            raise ArgumentError(f"states: got {len(states)}, expected one for each of {len(self.layers)} layers")
        conv_shape, ssm_shape = (batch, s.d_conv - 1, s.d_inner), (batch, s.d_inner, s.d_state)
        for i, (conv, ssm) in enumerate(states):
            if (
                conv.shape != conv_shape
                or conv.dtype not in kinds
                or not conv.is_contiguous()
                or conv.device != self.device
            ):
                raise ArgumentError(
                    f"states: conv_state of layer {i} is {conv.dtype} {tuple(conv.shape)} on {conv.device} with "
                    f"strides {conv.stride()}; expected {conv_shape} on {self.device}, contiguous, of "
                    f"{' or '.join(str(kind).removeprefix('torch.') for kind in KINDS if kind in kinds)}"
                )
            if ssm.shape != ssm_shape or ssm.dtype != ssm_kind or not ssm.is_contiguous() or ssm.device != self.device:
                raise ArgumentError(
                    f"states: ssm_state of layer {i} is {ssm.dtype} {tuple(ssm.shape)} on {ssm.device} with strides "
                    f"{ssm.stride()}; expected {str(ssm_kind).removeprefix('torch.')} {ssm_shape} on {self.device}, "
                    "contiguous"
                )


def private_float32(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy of its own memory."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def address_of(matrix: Matrix) -> tuple[int, int, int]:
    """Address and kind of a matrix, and the address of its scales, 0 where it has none."""
    if isinstance(matrix, Int8Matrix):
        return matrix.values.data_ptr(), MATRIX_KINDS[matrix.dtype], matrix.scales.data_ptr()
    return matrix.data_ptr(), MATRIX_KINDS[matrix.dtype], 0


def check_readable(name: str, tensor: Tensor) -> None:
    """Raises `BackendError` unless the compiled step can read such a tensor, if need be through a copy."""
    if tensor.dtype not in KINDS and tensor.dtype != torch.float64:
        raise BackendError(f"{name}: got {tensor.dtype}, the compiled step takes real floating-point weights")


def check_matrix(name: str, matrix: Matrix) -> None:
    """Raises `BackendError` unless the compiled step can read such a matrix where it lies."""
    parts = (matrix.values, matrix.scales) if isinstance(matrix, Int8Matrix) else (matrix,)
    if isinstance(matrix, Tensor) and matrix.dtype not in KINDS:
        raise BackendError(
            f"{name}: got {matrix.dtype}, the compiled step takes float32, bfloat16, float16 and int8 with scales"
        )
    for tensor in parts:
        if not tensor.is_contiguous():
            raise BackendError(f"{name}: strides {tensor.stride()} are not contiguous; call .contiguous() first")
