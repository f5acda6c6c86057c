r"""S5: one diagonal state space model with many inputs and many outputs, shared by all channels.

Smith, Warrington and Linderman 2022 (arXiv 2208.04933), equations 2, 5 and 6 and section 3. With P real numbers of
state as P / 2 complex ones, each for a conjugate pair, and a step Delta for each:

.. math::
    h_t = \bar\Lambda h_{t-1} + \bar B u_t, \qquad y_t = 2 \mathrm{Re}(C h_t) + D \odot u_t

where B (P / 2, d_model) and C (d_model, P / 2) mix the channels. S4D has a state for every channel and a convolution;
S5 has one for all and a scan, forward and backward, of one cost a step at any length. :math:`\Lambda` starts as the
eigenvalues of HiPPO-N, the normal part of HiPPO-LegS, in J equal blocks (section 3.3), and B and C start in the basis
of its eigenvectors.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.recurrences import linear_scan
from longscan.nn.state import State
from longscan.statespace import discretise, log_uniform_steps, nplr
from longscan.statespace.discretisation import METHODS


@dataclasses.dataclass(frozen=True)
class S5State(State):
    """The state (batch, d_state / 2), complex64."""

    ssm: Tensor


class S5(SequenceMixer):
    """S5 with GELU and a gate: ``y, _ = S5(d_model=256)(x)``.

    Args:
        d_model: width.
        d_state: P, real numbers of state in all.
        blocks: J, of HiPPO-N at the start; ``d_state / blocks`` must be even.
        discretisation: "zoh" or "bilinear".
        dt_min, dt_max: steps, one a state, start log-uniformly between the two.
        glu: the output with ``g = gelu(y)``: "half" is ``g * sigmoid(W g)``, as in the paper, "full" the authors' other
            choice, ``V g * sigmoid(W g)``.
        bidirectional: a second C reads the same system run from the end. Whole sequences only: there is no state.

    Attributes:
        log_dt, A_log, A_imag, B, C and D stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: d_model is below 1, d_state is no multiple of twice the blocks, or there is no such
            discretisation or ``glu``.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        blocks: int = 1,
        discretisation: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        glu: str = "half",
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or blocks < 1 or d_state < 2 * blocks or d_state % (2 * blocks):
            raise ArgumentError(
                "d_model must be at least 1 and d_state a multiple of twice the blocks; "
                f"got {d_model}, {d_state} and {blocks} blocks"
            )
        if discretisation not in METHODS:
            raise ArgumentError(f"discretisation must be one of {', '.join(METHODS)}; got {discretisation!r}")
        if glu not in ("half", "full"):
            raise ArgumentError(f"glu must be 'half' or 'full'; got {glu!r}")
        self.d_model, self.d_state, self.num_states = d_model, d_state, d_state // 2
        self.discretisation, self.bidirectional = discretisation, bidirectional
        self.undivided = "a bidirectional S5 reads the future too" if bidirectional else None
        size = d_state // blocks
        form = nplr("legs", size)
        eigenvalues = form.w[: size // 2].repeat(blocks)
        # Columns of V: a conjugate pair's first stands for both.
        basis = torch.block_diag(*[form.V[:, : size // 2]] * blocks).to(torch.complex64)

        def system(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values.to(device=device, dtype=torch.float32))))

        self.log_dt = system(log_uniform_steps(self.num_states, dt_min, dt_max, device))
        self.A_log = system(torch.log(-eigenvalues.real))
        self.A_imag = system(eigenvalues.imag.clone())
        # Pairs of real numbers: optimisers and wrappers for distributed training treat them as any other tensor.
        B = basis.mH @ (torch.randn(d_state, d_model) / math.sqrt(d_model)).to(basis.dtype)
        outputs = (2 if bidirectional else 1) * d_model
        C = (torch.randn(outputs, d_state) / math.sqrt(d_state)).to(basis.dtype) @ basis
        self.B = system(torch.view_as_real(B))
        self.C = system(torch.view_as_real(C.reshape(-1, d_model, self.num_states)))
        self.D = system(torch.randn(d_model))
        self.gate = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype) if glu == "full" else nn.Identity()

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """A_bar (N,), B_bar (N, d_model) and C (directions, d_model, N), complex."""
        A = torch.complex(-torch.exp(self.A_log), self.A_imag)
        log_A_bar, scale = discretise(A, torch.exp(self.log_dt), self.discretisation)
        return torch.exp(log_A_bar), scale[:, None] * torch.view_as_complex(self.B), torch.view_as_complex(self.C)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S5State | None]:
        self.check_input(x, state, cu_seqlens, S5State)
        if self.bidirectional and state is not None:
            raise ArgumentError("state: a bidirectional S5 reads whole sequences; pass state=None")
        before = state.ssm if isinstance(state, S5State) else None
        # Autocast is for matrix products: the system itself is computed in float32.
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, self.D.dtype))
            A_bar, B_bar, C = self.system()
            driven = torch.complex(u @ B_bar.real.T, u @ B_bar.imag.T)
            h, after = linear_scan(A_bar, driven, before, cu_seqlens=cu_seqlens, return_final_state=True)
            y = _read(h, C[0]) + self.D * u
            if self.bidirectional:
                ends = None if cu_seqlens is None else x.shape[1] - cu_seqlens.flip(0)
                backward = linear_scan(A_bar, driven.flip(1), cu_seqlens=ends)
                assert isinstance(backward, Tensor)
                y = y + _read(backward.flip(1), C[1])
        y = F.gelu(y.to(x.dtype))
        y = (self.out_proj(y) * torch.sigmoid(self.gate(y))).to(x.dtype)
        return y, None if before is None else S5State(after)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S5State:
        check_batch(batch)
        if self.bidirectional:
            raise ArgumentError("a bidirectional S5 reads whole sequences: it has no state to carry")
        wide = torch.promote_types(self.D.dtype, torch.complex64)
        return S5State(torch.zeros(batch, self.num_states, device=device or self.D.device, dtype=wide))

    def convolution_kernel(self, length: int) -> Tensor:
        raise ArgumentError("S5 mixes channels: its kernel is a matrix at every step, not one number a channel")

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, discretisation={self.discretisation!r}"


def _read(h: Tensor, C: Tensor) -> Tensor:
    """2 Re(C h): h (batch, length, N), C (channels, N)."""
    return 2 * (h.real @ C.real.T - h.imag @ C.imag.T)
