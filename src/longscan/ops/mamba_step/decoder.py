"""The objects that hold a model's weights for decoding, and hand one token at a time to the compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops.checks import check_shape
from longscan.ops.int8 import Int8Matrix
from longscan.ops.mamba_step.matrices import KINDS, Matrix, private_float32
from longscan.ops.mamba_step.model_weights import MambaModelWeights, StepWeights
from longscan.ops.mamba_step.pages import use_large_pages
from longscan.ops.mamba_step.weights import MambaStepWeights

if TYPE_CHECKING:
    from longscan.ops.mamba_step.workspace import Workspace

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Head:
    """The last phase of a step: the final norm, and the head's product to `logits`."""

    logits: Tensor
    matrix: Matrix
    bias: Tensor | None
    norm: Tensor


class MambaDecoder:
    """Consecutive layers of Mamba and MLPs, and with a final norm and a head the end of a language model, one token a
    call.

    Args:
        layers: at least one, those of Mamba all of the same sizes.
        embedding: (vocabulary, d_model), float32, bfloat16, float16 or an `Int8Matrix`; needed by `step`.
        final_norm: (d_model,), the RMSNorm before the head; needed by `step` and `step_to_logits`.
        head: (vocabulary, d_model); None ties it to the embedding.
        head_bias: (vocabulary,).
        eps: of the final norm.

    Raises:
        ArgumentError: no layers, layers of different sizes, or shapes that do not fit.
        BackendError: a device, dtype or layout it cannot serve, or no Numba.

    An object serves one call at a time: its workspace is its own.
    """

    def __init__(
        self,
        layers: Sequence[StepWeights],
        *,
        embedding: Matrix | None = None,
        final_norm: Tensor | None = None,
        head: Matrix | None = None,
        head_bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        self.weights = MambaModelWeights(tuple(layers), embedding, final_norm, head, head_bias, eps)
        self.layers, self.sizes = self.weights.layers, self.weights.sizes
        if self.weights.device.type != "cpu":
            raise BackendError(f"layers: this compiled step runs on the CPU, they are on {self.weights.device}")
        self._table = np.stack([layer.row for layer in layers])
        pairs = [(layer.eps, layer.selection_eps if isinstance(layer, MambaStepWeights) else 0) for layer in layers]
        self._eps = np.array([*pairs, (eps, 0)], dtype=np.float32)
        self._mambas = [i for i, layer in enumerate(layers) if isinstance(layer, MambaStepWeights)]
        self._workspace: Workspace | None = None
        try:
            self._reserve(1)
        except ImportError as error:
            raise BackendError(f"the compiled step needs Numba, which cannot be imported here ({error})") from error
        self._check_float16()
        use_large_pages(self.weights.matrices)

    @torch.no_grad()
    def step(self, tokens: Tensor, states: Sequence[State]) -> Tensor:
        """One token of each sequence of a batch.

        Args:
            tokens: (batch,) integers below the vocabulary.
            states: one (conv_state, ssm_state) per Mamba layer, updated in place; see the package's docstring.

        Returns:
            logits (batch, vocabulary), float32.

        Raises:
            ArgumentError: a token outside the vocabulary, states that do not fit, or a decoder made without embedding
                or final norm.
        """
        weights = self.weights
        weights.check_tokens(tokens)
        assert weights.embedding is not None
        assert weights.head is not None
        vocabulary = weights.embedding.shape[0]
        if not all(0 <= token < vocabulary for token in tokens.tolist()):
            raise ArgumentError(f"tokens: got {tokens.tolist()}, allowed are 0 to {vocabulary - 1}")
        embedding = weights.embedding
        hidden = embedding.rows(tokens) if isinstance(embedding, Int8Matrix) else embedding[tokens].float()
        logits = torch.empty(tokens.shape[0], weights.head.shape[0])
        self._run(hidden, None, states, logits)
        return logits

    @torch.no_grad()
    def step_hidden(
        self, hidden: Tensor, residual: Tensor | None, states: Sequence[State], aside: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layers alone: what a block before them gave, and the residual stream before that was added.

        Args:
            hidden: (batch, d_model), any floating dtype.
            residual: (batch, d_model), or None at the first layer.
            states: one (conv_state, ssm_state) per Mamba layer, updated in place.
            aside: (batch, d_model), what the first layer takes in beside the stream; it does not become part of that.

        Returns:
            (hidden, residual): the last layer's output in hidden's dtype, not yet added to the stream, and the stream
            in float32.
        """
        out = self._check_hidden(hidden, residual, aside)
        stream = self._run(out, residual, states, None, aside)
        return out.to(hidden.dtype), stream.clone()

    @torch.no_grad()
    def step_to_logits(
        self, hidden: Tensor, residual: Tensor | None, states: Sequence[State], aside: Tensor | None = None
    ) -> Tensor:
        """As `step_hidden`, and the final norm and the head: logits (batch, vocabulary), float32."""
        if self.weights.head is None or self.weights.final_norm is None:
            raise ArgumentError("head, final_norm: this decoder was made without them; use step_hidden")
        out = self._check_hidden(hidden, residual, aside)
        logits = torch.empty(hidden.shape[0], self.weights.head.shape[0])
        self._run(out, residual, states, logits, aside)
        return logits

    def check_states(self, states: Sequence[State], batch: int) -> None:
        """Raise ArgumentError unless a step of so many sequences can update the states."""
        self.weights.check_states(states, batch, KINDS)

    def _check_hidden(self, hidden: Tensor, residual: Tensor | None, aside: Tensor | None) -> Tensor:
        """A copy of hidden, for a step to overwrite."""
        if hidden.dim() != 2 or hidden.shape[0] == 0 or hidden.shape[1] != self.sizes.d_model:
            raise ArgumentError(f"hidden: got shape {tuple(hidden.shape)}, expected (batch, {self.sizes.d_model})")
        for name, tensor in (("residual", residual), ("aside", aside)):
            if tensor is not None:
                check_shape(name, tensor, tuple(hidden.shape), "(batch, d_model) like hidden")
        return private_float32(hidden)

    def _run(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        states: Sequence[State],
        logits: Tensor | None,
        aside: Tensor | None = None,
    ) -> Tensor:
        """Runs the compiled step; overwrites `hidden` and returns the stream, a view of the workspace."""
        batch = hidden.shape[0]
        addresses = self._state_addresses(states, batch)
        work = self._reserve(batch)
        if residual is None:
            work.streams[0].zero_()
        else:
            work.streams[0].copy_(residual)
        head = None
        own = self.weights
        if logits is not None and own.head is not None and own.final_norm is not None:
            head = Head(logits, own.head, own.head_bias, own.final_norm)
        aside = None if aside is None else private_float32(aside)
        work.run(hidden, aside, self._table, addresses, self._eps, head)
        return work.streams[len(self.layers) % 2]

    def _reserve(self, batch: int) -> Workspace:
        """The workspace for this batch and torch's present number of threads."""
        from longscan.ops.jit import threads
        from longscan.ops.mamba_step.workspace import Workspace

        work = self._workspace
        if work is None or (work.batch, work.threads) != (batch, threads()):
            work = self._workspace = Workspace(self.sizes, self.layers, batch, threads())
        return work

    def _check_float16(self) -> None:
        from longscan.ops.simd import HAS_FLOAT16

        if not HAS_FLOAT16 and any(matrix.dtype == torch.float16 for matrix in self.weights.matrices):
            raise BackendError("layers, head: got torch.float16, which this processor does not convert; use bfloat16")

    def _state_addresses(self, states: Sequence[State], batch: int) -> np.ndarray[Any, Any]:
        """(layers, 3) int64: of each Mamba layer the conv state's address and kind, and the SSM state's address."""
        self.check_states(states, batch)
        rows = np.zeros((len(self.layers), 3), dtype=np.int64)
        for row, (conv, ssm) in zip(self._mambas, states, strict=True):
            rows[row] = conv.data_ptr(), KINDS[conv.dtype], ssm.data_ptr()
        return rows


def mamba_block_step(
    hidden: Tensor, residual: Tensor | None, weights: MambaStepWeights, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One Mamba layer, one token: for models that mix in layers of other kinds.

    Args:
        hidden: (batch, d_model), what the block before gave.
        residual: (batch, d_model), the stream before that is added; None at the first layer.
        weights: of the layer.
        conv_state, ssm_state: of the layer, updated in place.

    Returns:
        (hidden, residual), as `MambaDecoder.step_hidden`.
    """
    decoder = weights.__dict__.get("_decoder")
    if decoder is None:
        decoder = weights.__dict__["_decoder"] = MambaDecoder([weights])
    return decoder.step_hidden(hidden, residual, [(conv_state, ssm_state)])
