"""The weights of a gated MLP, or of a mixture of them, checked once, and as a row of addresses."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops.checks import check_shape
from longscan.ops.int8 import Int8Matrix
from longscan.ops.mamba_step.layout import FIELDS, Layer, MlpField
from longscan.ops.mamba_step.matrices import (
    KINDS,
    Matrix,
    Sizes,
    address_of,
    check_eps,
    check_matrix,
    check_readable,
    check_together,
    private_float32,
)


@dataclass(frozen=True, eq=False)
class MlpStepWeights:
    """The weights of one pre-norm gated MLP, ``down (up(x) * silu(gate(x)))``, or of a mixture of such experts.

    Args:
        norm: (d_model,), weight of the RMSNorm before it.
        gate, up: (d_intermediate, d_model). Of experts the (experts, d_intermediate, d_model) parts of one tensor, each
            expert's gate before its up.
        down: (d_model, d_intermediate), or (experts, d_model, d_intermediate).
        router: (experts, d_model). A sequence passes the `chosen` experts that it scores highest, each weighted by the
            softmax over all scores.
        chosen: how many.
        eps: of the norm.

    Matrices as in `MambaStepWeights`; those of experts are no `Int8Matrix`.

    Raises:
        ArgumentError: shapes that do not fit together.
        BackendError: a device, dtype or layout the compiled step cannot read.
    """

    norm: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix
    router: Tensor | None = None
    chosen: int = 1
    eps: float = 1e-5
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        experts: tuple[int, ...] = () if self.router is None else (self.router.shape[0],)
        if self.gate.dim() != 2 + len(experts) or 0 in self.gate.shape:
            raise ArgumentError(
                f"gate: got shape {tuple(self.gate.shape)}, expected ([experts,] d_intermediate, d_model)"
            )
        width, d_model = self.gate.shape[-2:]
        inwards, outwards = (*experts, width, d_model), (*experts, d_model, width)
        check_shape("norm", self.norm, (d_model,), "(d_model,)")
        for name, shape, meaning in (
            ("up", inwards, "([experts,] d_intermediate, d_model)"),
            ("down", outwards, "([experts,] d_model, d_intermediate)"),
        ):
            matrix: Any = getattr(self, name)
            check_shape(name, matrix, shape, meaning)
        check_readable("norm", self.norm)
        check_eps("eps", self.eps)
        if self.router is None:
            for name in ("gate", "up", "down"):
                check_matrix(name, getattr(self, name))
        else:
            self._check_experts(self.router)
        object.__setattr__(self, "sizes", Sizes(d_model))
        check_together("gate", self.device, {name: getattr(self, name) for name in ("norm", "up", "down", "router")})

    def _check_experts(self, router: Tensor) -> None:
        gate, up, down = self.gate, self.up, self.down
        for name, matrix in (("router", router), ("down", down)):
            check_matrix(name, matrix)
        check_shape("router", router, (gate.shape[0], gate.shape[-1]), "(experts, d_model)")
        if not 1 <= self.chosen <= gate.shape[0]:
            raise ArgumentError(f"chosen: got {self.chosen}, allowed are 1 to {gate.shape[0]}, the number of experts")
        if isinstance(gate, Int8Matrix) or isinstance(up, Int8Matrix):
            raise BackendError("gate, up: of experts the compiled step reads no int8")
        size = gate.shape[1] * gate.shape[2]
        strides = (2 * size, gate.shape[2], 1)
        together = up.data_ptr() == gate.data_ptr() + size * gate.element_size() and up.dtype == gate.dtype
        if not together or gate.stride() != strides or up.stride() != strides or gate.dtype not in KINDS:
            raise BackendError("gate, up: expected the two halves of each expert of one contiguous tensor")

    @property
    def device(self) -> torch.device:
        return self.gate.device

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        own = (self.gate, self.up, self.down)
        return own if self.router is None else (*own, self.router)

    @cached_property
    def row(self) -> np.ndarray[Any, Any]:
        """Addresses and kinds by `MlpField`, int64; what they point to lives as long as this object."""
        row = np.zeros(FIELDS, dtype=np.int64)
        row[MlpField.LAYER] = Layer.MLP if self.router is None else Layer.EXPERTS
        row[MlpField.NORM] = self._norm.data_ptr()
        row[MlpField.GATE : MlpField.GATE + 3] = address_of(self.gate)
        row[MlpField.UP : MlpField.UP + 3] = address_of(self.up)
        row[MlpField.DOWN : MlpField.DOWN + 3] = address_of(self.down)
        row[MlpField.INTERMEDIATE], row[MlpField.CHOSEN] = self.d_intermediate, self.chosen
        if self.router is not None:
            row[MlpField.ROUTER], row[MlpField.ROUTER_KIND], _ = address_of(self.router)
            row[MlpField.NUMBER] = self.router.shape[0]
        return row

    @property
    def d_intermediate(self) -> int:
        return self.gate.shape[-2]

    @cached_property
    def _norm(self) -> Tensor:
        return private_float32(self.norm)
