"""The weights of a whole model of Mamba layers and MLPs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops.checks import check_shape
from longscan.ops.mamba_step.matrices import KINDS, Matrix, Sizes, check_matrix, check_readable, private_float32
from longscan.ops.mamba_step.mlp_weights import MlpStepWeights
from longscan.ops.mamba_step.weights import MambaStepWeights

#: The weights of a layer.
StepWeights = MambaStepWeights | MlpStepWeights


@dataclass(frozen=True, eq=False)
class MambaModelWeights:
    """The weights of consecutive layers and, with a final norm, of a whole language model.

    Args: as `MambaDecoder`. Vectors are copied to float32.

    Raises:
        ArgumentError: no layers, layers of different sizes, or shapes that do not fit.
        BackendError: a dtype or layout that the compiled step cannot read, or tensors on several devices.
    """

    layers: tuple[StepWeights, ...]
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
            alike = sizes if isinstance(layer, MambaStepWeights) else Sizes(sizes.d_model)
            if layer.sizes != alike:
                raise ArgumentError(f"layers: layer {i} has {layer.sizes}, others have {alike}; expected the same")
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
        """Those of the first Mamba layer; of the first layer, if there is none."""
        return next((layer for layer in self.layers if isinstance(layer, MambaStepWeights)), self.layers[0]).sizes

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def matrices(self) -> list[Matrix]:
        """The layers' projections, and the head if there is one."""
        own = [matrix for layer in self.layers for matrix in layer.matrices]
        return own if self.head is None else [*own, self.head]

    @property
    def addresses(self) -> frozenset[int]:
        """Where the matrices lie that are no `Int8Matrix`."""
        return frozenset(matrix.data_ptr() for matrix in self.matrices if isinstance(matrix, Tensor))

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
        """Raise ArgumentError unless there is one (conv_state, ssm_state) per Mamba layer that the kernels can update.

        Args:
            states: see the package's docstring.
            batch: number of sequences.
            kinds: the dtypes a conv_state may have.
            ssm_kind: the dtype of every ssm_state.
        """
        s = self.sizes
        mambas = sum(isinstance(layer, MambaStepWeights) for layer in self.layers)
        if len(states) != mambas:
            raise ArgumentError(f"states: got {len(states)}, expected one for each of {mambas} layers of Mamba")
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
