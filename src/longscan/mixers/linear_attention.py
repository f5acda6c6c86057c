r"""Linear attention: the softmax replaced by a product of positive features, so that the memory is one matrix a head.

Katharopoulos, Vyas, Pappas and Fleuret 2020 (arXiv 2006.16236), equations 16-20, with :math:`\phi = \mathrm{elu} + 1`
(equation 7):

.. math::
    q, k, v = W_{in} x, \qquad S_t = S_{t-1} + \phi(k_t) v_t^\top, \qquad z_t = z_{t-1} + \phi(k_t), \qquad
    y_t = W_{out} \frac{S_t^\top \phi(q_t)}{\phi(q_t) \cdot z_t + \epsilon}

Nothing decays, and nothing here tells positions apart: the paper adds position embeddings to the model's input, as
``LanguageModelConfig(positions=...)`` does. Without them order reaches a layer through what its prefix holds.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch
from longscan.nn.recurrences import decay_attention
from longscan.nn.state import State
from longscan.ops import decay_attention_update


@dataclasses.dataclass(frozen=True)
class LinearAttentionState(State):
    """S with z as its last column, (batch, heads, head_dim, head_dim + 1), float32."""

    memory: Tensor


class LinearAttention(SequenceMixer):
    """Causal linear attention: ``y, _ = LinearAttention(d_model=256, n_heads=4)(x)``.

    Trained in chunks of matrix products, generated from a state of d_model (head_dim + 1) numbers. Projections start as
    PyTorch's linear layers do, as in the authors' code.

    Args:
        d_model: width of input and output.
        n_heads: heads, a divisor of d_model; default: d_model / 64, at least 1.
        eps: added to the sum of weights.
        bias: whether the projections have biases.

    Raises:
        ArgumentError: n_heads does not divide d_model, or eps is not positive.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_heads = max(1, d_model // 64) if n_heads is None else n_heads
        if min(d_model, n_heads) < 1 or d_model % n_heads:
            raise ArgumentError(f"n_heads must divide d_model, both at least 1; got {n_heads} and {d_model}")
        if not eps > 0:
            raise ArgumentError(f"eps must be a positive number, got {eps!r}")
        self.d_model, self.n_heads, self.head_dim, self.eps = d_model, n_heads, d_model // n_heads, eps
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        self.check_input(x, state, cu_seqlens, LinearAttentionState)
        before = state.memory if isinstance(state, LinearAttentionState) else None
        y, after = decay_attention(
            *self._project(x),
            initial_state=before,
            normalise=True,
            eps=self.eps,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return self.out_proj(y.flatten(-2)), None if before is None else LinearAttentionState(after)

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, LinearAttentionState]:
        self.check_input(x.unsqueeze(1), state, None, LinearAttentionState)
        assert isinstance(state, LinearAttentionState)
        y, memory = decay_attention_update(
            state.memory, *self._project(x), normalise=True, eps=self.eps, inplace=inplace
        )
        return self.out_proj(y.flatten(-2)), LinearAttentionState(memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., d_model) to the features of queries and keys, and values, each (..., heads, head_dim)."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)
        return F.elu(q) + 1, F.elu(k) + 1, v

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LinearAttentionState:
        check_batch(batch)
        weight = self.in_proj.weight
        shape = (batch, self.n_heads, self.head_dim, self.head_dim + 1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return LinearAttentionState(torch.zeros(shape, device=device or weight.device, dtype=wide))

    def extra_repr(self) -> str:
        return f"{self.d_model}, n_heads={self.n_heads}, head_dim={self.head_dim}"
