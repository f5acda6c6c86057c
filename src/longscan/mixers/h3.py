r"""H3: two state space models between multiplications, one that recalls the last tokens and one that remembers.

Fu, Dao et al. 2022 (arXiv 2212.14052), section 3 and algorithm 1. With q, k and v projections of x, in heads of
head_dim channels:

.. math::
    \bar k_t &= \sum_{l < N} c_l\, k_{t-l} + d\, k_t \qquad\text{(shift SSM)} \\
    S_t &= \mathrm{SSM_{diag}}(\bar k\, v^\top)_t \qquad\text{(a diagonal SSM over every entry of the outer product)} \\
    y_t &= W_{out}\, (S_t^\top q_t)

The shift SSM's state is the last N inputs (A moves them on by one, B puts the newest first), so it is a filter with N
taps C. Entries of one head's outer product share one diagonal SSM. With head_dim 1 all products are of channels.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.diagonal_ssm import DiagonalSSM
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.recurrences import causal_conv1d
from longscan.nn.state import State
from longscan.ops import causal_conv1d_update
from longscan.statespace import diagonal, discretise, log_uniform_steps
from longscan.statespace.discretisation import METHODS


@dataclasses.dataclass(frozen=True)
class H3State(State):
    """The last keys (batch, d_shift - 1, d_model), and the diagonal states (batch, d_model * head_dim, d_state / 2)."""

    keys: Tensor
    ssm: Tensor


class H3(SequenceMixer):
    """H3 with its shift and diagonal SSM: ``y, _ = H3(d_model=256)(x)``.

    Its shape around any other inner system is a block of :mod:`longscan.nn.blocks`.

    Args:
        d_model: width of input and output.
        head_dim: width of a head, a divisor of d_model: 1 in the paper's models, 8 in Mamba's H3++.
        d_state: real numbers of state of a diagonal system, that is ``d_state / 2`` complex states.
        d_shift: states N of the shift SSM; default: d_state.
        a_init: of the diagonal SSM, see :func:`longscan.statespace.diagonal`.
        discretisation: "zoh" or "bilinear".
        dt_min, dt_max: steps start log-uniformly between the two.
        bias: whether the projections have biases.

    Attributes:
        The parameters of both SSMs stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: head_dim does not divide d_model, d_state is odd or below 2, d_shift is below 1, or there is no
            such ``a_init`` or discretisation.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int = 1,
        d_state: int = 64,
        d_shift: int | None = None,
        a_init: str = "s4d-lin",
        discretisation: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_shift = d_state if d_shift is None else d_shift
        if min(d_model, head_dim) < 1 or d_model % head_dim:
            raise ArgumentError(f"head_dim must divide d_model; got {head_dim} and {d_model}")
        if d_state < 2 or d_state % 2 or d_shift < 1:
            raise ArgumentError(
                f"d_state must be even and at least 2, d_shift at least 1; got d_state {d_state}, d_shift {d_shift}"
            )
        if discretisation not in METHODS:
            raise ArgumentError(f"discretisation must be one of {', '.join(METHODS)}; got {discretisation!r}")
        self.d_model, self.head_dim, self.n_heads = d_model, head_dim, d_model // head_dim
        self.d_state, self.d_shift, self.discretisation = d_state, d_shift, discretisation
        A = diagonal(a_init, d_state // 2).to(device=device, dtype=torch.complex64).expand(self.n_heads, -1)

        def system(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values.clone())))

        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.shift_C = system(torch.randn(d_model, d_shift, device=device))
        self.shift_D = system(torch.randn(d_model, device=device))
        self.log_dt = system(log_uniform_steps(self.n_heads, dt_min, dt_max, device))
        self.A_log = system(torch.log(-A.real))
        self.A_imag = system(A.imag)
        # Pairs of real numbers: optimisers and wrappers for distributed training treat them as any other tensor.
        self.C = system(torch.randn(self.n_heads, d_state // 2, 2, device=device) * math.sqrt(0.5))
        self.D = system(torch.randn(self.n_heads, device=device))
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def shift_kernel(self) -> Tensor:
        """The shift SSM as a convolution, its skip in the first tap: (d_model, d_shift)."""
        return torch.cat((self.shift_C[:, :1] + self.shift_D[:, None], self.shift_C[:, 1:]), dim=1)

    def system(self) -> DiagonalSSM:
        """The diagonal SSM of every head."""
        A = torch.complex(-torch.exp(self.A_log), self.A_imag)
        log_A_bar, B_bar = discretise(A, torch.exp(self.log_dt)[:, None], self.discretisation)
        return DiagonalSSM(log_A_bar, B_bar, torch.view_as_complex(self.C), self.D)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, H3State | None]:
        self.check_input(x, state, cu_seqlens, H3State)
        before = state if isinstance(state, H3State) else None
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        k, keys = causal_conv1d(
            k,
            self.shift_kernel().flip(1),
            None,
            None if before is None else before.keys.to(k.dtype),
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        ssm = None if before is None else before.ssm
        # Autocast is for matrix products: the system itself is computed in float32.
        with torch.autocast(x.device.type, enabled=False):
            memory = self._outer(k, v)
            after: Tensor | None
            if cu_seqlens is None:
                memory, after = self.system().convolve(memory, ssm)
            else:
                memory, after = self.system().scan(memory, ssm, cu_seqlens)
            y = self._read(memory, q)
        if before is None or after is None:
            return self.out_proj(y), None
        return self.out_proj(y), H3State(keys.to(before.keys.dtype), after)

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, H3State]:
        self.check_input(x.unsqueeze(1), state, None, H3State)
        assert isinstance(state, H3State)
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        k, keys = causal_conv1d_update(
            state.keys, k, self.shift_kernel().flip(1), inplace=inplace and state.keys.dtype == k.dtype
        )
        with torch.autocast(x.device.type, enabled=False):
            memory, ssm = self.system().step(self._outer(k, v), state.ssm, inplace=inplace)
            y = self._read(memory, q)
        return self.out_proj(y), H3State(keys.to(state.keys.dtype), ssm)

    def _outer(self, k: Tensor, v: Tensor) -> Tensor:
        """k v^T of every head, (..., n_heads * head_dim * head_dim), in the precision of the systems."""
        wide = torch.promote_types(k.dtype, self.D.dtype)
        k, v = (part.to(wide).unflatten(-1, (self.n_heads, self.head_dim)) for part in (k, v))
        return (k[..., :, None] * v[..., None, :]).flatten(-3)

    def _read(self, memory: Tensor, q: Tensor) -> Tensor:
        """S^T q of every head, (..., d_model) in q's dtype."""
        S = memory.unflatten(-1, (self.n_heads, self.head_dim, self.head_dim))
        heads = q.to(memory.dtype).unflatten(-1, (self.n_heads, self.head_dim))
        return (S * heads[..., None]).sum(-2).flatten(-2).to(q.dtype)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> H3State:
        check_batch(batch)
        weight = self.in_proj.weight
        device = device or weight.device
        wide = torch.promote_types(self.D.dtype, torch.complex64)
        return H3State(
            keys=torch.zeros(batch, self.d_shift - 1, self.d_model, device=device, dtype=dtype or weight.dtype),
            ssm=torch.zeros(batch, self.d_model * self.head_dim, self.d_state // 2, device=device, dtype=wide),
        )

    def extra_repr(self) -> str:
        return f"{self.d_model}, head_dim={self.head_dim}, d_state={self.d_state}, d_shift={self.d_shift}"
