"""The attention layers of hybrids for one token on the CPU: their projections as compiled products, their own cache.

The projections are what takes the time; PyTorch's are made for matrices.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.ops.mamba_step import VectorProducts


@dataclasses.dataclass(frozen=True)
class Token:
    """What attention wants to know of a token.

    Attributes:
        embedded: (batch, d_model).
        mask: (batch, 1, 1, past + 1), what is added to the scores; None: nothing is padding.
        cache: the model's.
    """

    embedded: Tensor
    mask: Tensor | None
    cache: Any


class Attend(abc.ABC):
    """An attention layer of a hybrid."""

    #: What it reads where it lies.
    matrices: tuple[Tensor, ...]

    @abc.abstractmethod
    def __call__(
        self, hidden: Tensor, residual: Tensor | None, token: Token
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """From (hidden, residual) to (hidden, residual, aside), what a compiled step takes in; the cache is moved on.

        All are (batch, d_model) in float32.
        """


class JambaAttention(Attend):
    """Attention between two sums with the stream.

    Args:
        layer: of Transformers.
        matrix: gives the weight of a linear layer.
    """

    def __init__(self, layer: Any, matrix: Callable[[Any], Tensor]) -> None:
        self._norm = layer.input_layernorm
        self._attention = _Attention(layer.self_attn, matrix, layer.self_attn.layer_idx)
        self.matrices = self._attention.matrices

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, token: Token
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        stream = hidden if residual is None else residual + hidden
        return self._attention(self._norm(stream), token), stream, None


class ZambaAttention(Attend):
    """The shared Transformer, which sees the stream beside the embedding; what it gives goes beside the stream.

    Args:
        layer: of Transformers.
        matrix: gives the weight of a linear layer.
        index: of the layer.
    """

    def __init__(self, layer: Any, matrix: Callable[[Any], Tensor], index: int) -> None:
        shared = layer.shared_transf
        mlp = shared.feed_forward
        self._norms, self._act = (shared.input_layernorm, shared.pre_ff_layernorm), mlp.act_fn
        self._attention = _Attention(shared.self_attn, matrix, index)
        self._inwards = VectorProducts([matrix(mlp.gate_proj), matrix(mlp.up_proj)])
        self._outwards, self._last = VectorProducts([matrix(mlp.down_proj)]), VectorProducts([matrix(layer.linear)])
        parts = (self._attention, self._inwards, self._outwards, self._last)
        self.matrices = tuple(weight for part in parts for weight in part.matrices)

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, token: Token
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        stream = hidden if residual is None else residual + hidden
        before, after = self._norms
        x = self._attention(before(torch.cat([stream, token.embedded.float()], dim=-1)), token)
        gate, up = self._inwards(after(x))
        (x,) = self._outwards(self._act(gate) * up)
        (aside,) = self._last(x)
        return stream, None, aside


class _Attention:
    """Queries, keys and values of a token, the cache of the latter two, and what comes out."""

    def __init__(self, attention: Any, matrix: Callable[[Any], Tensor], index: int) -> None:
        self._head, self._scaling, self._index = attention.head_dim, attention.scaling, index
        self._inwards = VectorProducts([matrix(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")])
        self._outwards = VectorProducts([matrix(attention.o_proj)])
        self.matrices = (*self._inwards.matrices, *self._outwards.matrices)

    def __call__(self, x: Tensor, token: Token) -> Tensor:
        dtype = token.embedded.dtype
        q, k, v = (part.to(dtype).unflatten(1, (-1, self._head)) for part in self._inwards(x))
        keys, values = token.cache.update(k[:, :, None], v[:, :, None], self._index)
        # Heads that share keys and values stand where several queries of one head would.
        q = q.unflatten(1, (keys.shape[1], -1))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=token.mask, scale=self._scaling)
        return self._outwards(y.flatten(1))[0]
