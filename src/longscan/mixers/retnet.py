r"""RetNet: multi-scale retention, an outer-product memory that fades at a rate of its own in every head.

Sun et al. 2023 (arXiv 2307.08621), equations 1-8. With :math:`\Theta_t` the rotation of pairs of features by angles
that grow with the position t, and one decay :math:`\gamma` a head:

.. math::
    q_t &= \Theta_t W_Q x_t / \sqrt{d_k}, \qquad k_t = \Theta_t W_K x_t, \qquad v_t = W_V x_t \\
    S_t &= \gamma S_{t-1} + k_t v_t^\top, \qquad r_t = S_t^\top q_t \\
    y_t &= W_{out} \big(\mathrm{swish}(W_G x_t) \odot \mathrm{GroupNorm}(r_t)\big)

The group norm, one group a head, has no weights, as in the authors' code. It takes out any scale of a head, and with it
the three normalisations of section 2.4: the one of the scores is kept (it sets what epsilon means), the other two only
keep float16 from overflowing, where states here are float32.

The paper's block is this layer and a two-layer feed-forward network of width 2 d_model, each behind a layer norm:
``LanguageModelConfig(mixer="retnet", norm="layer", mlp="gelu", d_intermediate=...)``. RMS norms and a gated MLP, the
defaults, are in the authors' later code; 4/3 d_model gives it as many parameters. Angles run over base^(-2 i / d_k);
the authors' code spreads them so that the last is 1 / base exactly.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch
from longscan.nn.recurrences import decay_attention
from longscan.nn.rotary import rotate
from longscan.nn.sequence_parallel import first_position
from longscan.nn.state import State
from longscan.ops import decay_attention_update

GAMMAS = ("powers", "paper")


@dataclasses.dataclass(frozen=True)
class RetNetState(State):
    """S, (batch, heads, d_k, d_v) float32, and how many tokens came before, (batch,)."""

    memory: Tensor
    lengths: Tensor


class RetNet(SequenceMixer):
    """Multi-scale retention: ``y, _ = RetNet(d_model=512, n_heads=2)(x)``.

    Trained in chunks of matrix products, generated from a state of expand d_model^2 / n_heads numbers.

    Args:
        d_model: width of input and output.
        n_heads: heads; default: d_model / 256, at least 1.
        expand: width of the values over d_model.
        gamma: decays of the heads h = 0, 1, ...: "powers" 1 - 2^(-5 - h) (section 2.1), or "paper", of its experiments:
            1 - e^l, with l evenly spaced from log(1/32) to log(1/512).
        rotary_base: the longest wavelength of the rotation over 2 pi.
        norm_eps: of the group norm.

    Raises:
        ArgumentError: heads do not divide the widths, a head of the queries is odd, or ``gamma`` or an epsilon is none.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand: float = 2,
        gamma: str = "powers",
        rotary_base: float = 10_000.0,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_heads = max(1, d_model // 256) if n_heads is None else n_heads
        d_inner = int(expand * d_model)
        if min(d_model, n_heads, d_inner) < 1 or d_model % (2 * n_heads) or d_inner % n_heads:
            raise ArgumentError(
                "n_heads must divide expand * d_model, and d_model into even parts for the rotation; got n_heads "
                f"{n_heads}, d_model {d_model}, expand {expand}"
            )
        if gamma not in GAMMAS:
            raise ArgumentError(f"gamma must be one of {', '.join(GAMMAS)}; got {gamma!r}")
        if not norm_eps > 0:
            raise ArgumentError(f"norm_eps must be a positive number, got {norm_eps!r}")
        self.d_model, self.d_inner, self.n_heads = d_model, d_inner, n_heads
        self.d_k, self.d_v = d_model // n_heads, d_inner // n_heads
        self.gamma, self.rotary_base, self.norm_eps = gamma, rotary_base, norm_eps
        self.in_proj = nn.Linear(d_model, 2 * d_model + 2 * d_inner, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, device=device, dtype=dtype)
        for part in self.in_proj.weight.detach().split([d_model, d_model, d_inner, d_inner]):
            nn.init.xavier_uniform_(part, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def log_decay(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """log gamma of every head, (heads,)."""
        if self.gamma == "powers":
            return torch.log1p(-torch.exp2(-5 - torch.arange(self.n_heads, device=device, dtype=dtype)))
        places = torch.linspace(math.log(1 / 32), math.log(1 / 512), self.n_heads, device=device, dtype=dtype)
        return torch.log1p(-places.exp())

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RetNetState | None]:
        self.check_input(x, state, cu_seqlens, RetNetState)
        before = state if isinstance(state, RetNetState) else None
        steps = first_position() + torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is None:
            lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
            positions = steps[None] if before is None else before.lengths[:, None] + steps
        else:
            lengths = cu_seqlens.diff()
            # Each place's sequence: the last one that starts at or before it, so that empty ones are passed over.
            own = torch.searchsorted(cu_seqlens[:-1].contiguous(), steps.to(cu_seqlens.dtype), right=True) - 1
            own = own.clamp(min=0)
            positions = (steps - cu_seqlens[own] + (0 if before is None else before.lengths[own]))[None]
        q, k, v, gate = self._project(x, positions)
        y, memory = decay_attention(
            q,
            k,
            v,
            self.log_decay(x.device, torch.promote_types(x.dtype, torch.float32)),
            None if before is None else before.memory,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return self._merge(y, gate), None if before is None else RetNetState(memory, before.lengths + lengths)

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, RetNetState]:
        self.check_input(x.unsqueeze(1), state, None, RetNetState)
        assert isinstance(state, RetNetState)
        q, k, v, gate = self._project(x[:, None], state.lengths[:, None])
        log_decay = self.log_decay(x.device, torch.promote_types(x.dtype, torch.float32))
        y, memory = decay_attention_update(state.memory, q[:, 0], k[:, 0], v[:, 0], log_decay, inplace=inplace)
        lengths = state.lengths.add_(1) if inplace else state.lengths + 1
        return self._merge(y, gate[:, 0]), RetNetState(memory, lengths)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (batch, length, d_model) to q, k (both turned), v, each (batch, length, heads, ...), and the gate."""
        q, k, v, gate = self.in_proj(x).split([self.d_model, self.d_model, self.d_inner, self.d_inner], dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in (q, k, v))
        q, k = (rotate(part.transpose(1, 2), positions, self.rotary_base).transpose(1, 2) for part in (q, k))
        return q * self.d_k**-0.5, k, v, gate

    def _merge(self, y: Tensor, gate: Tensor) -> Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        normed = F.layer_norm(wide, (self.d_v,), eps=self.norm_eps).to(gate.dtype).flatten(-2)
        return self.out_proj(F.silu(gate) * normed)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RetNetState:
        check_batch(batch)
        weight = self.in_proj.weight
        device = device or weight.device
        wide = torch.promote_types(weight.dtype, torch.float32)
        return RetNetState(
            memory=torch.zeros(batch, self.n_heads, self.d_k, self.d_v, device=device, dtype=wide),
            lengths=torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def extra_repr(self) -> str:
        return f"{self.d_model}, n_heads={self.n_heads}, d_k={self.d_k}, d_v={self.d_v}, gamma={self.gamma!r}"
