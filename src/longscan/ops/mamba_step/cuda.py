"""One token through a whole Mamba on an NVIDIA GPU: the launches of step.cu and batch.cu, made for CUDA graphs.

A few sequences cost the reading of the weights: one kernel takes a token from the embedding to the logits and hardly
ever stops reading. More sequences than that are matrix products, which are the BLAS library's, with what lies between
them in three kernels; so are float32 weights, and sizes that the one kernel's tiles do not fit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from longscan.errors import BackendError
from longscan.ops import nvrtc
from longscan.ops.mamba_step.matrices import Matrix
from longscan.ops.mamba_step.model_weights import MambaModelWeights, StepWeights
from longscan.ops.mamba_step.weights import MambaStepWeights
from longscan.ops.nvrtc import FORMATS, addresses

_FOLDER = Path(__file__).parent

#: Most sequences that the one kernel takes.
FEW = 4

# Of step.cu: threads of a block; bytes of a tile, of a layer's addresses, and at most of its other static arrays.
_THREADS, _TILE, _LAYER, _STATIC = 512, 2048, 14 * 8, 4096
# Threads of a block of batch.cu.
_BATCH = 256

State = tuple[Tensor, Tensor]


class CudaMambaDecoder:
    """Consecutive Mamba layers, a final norm and a head, one token a call.

    The states are updated in place. Nothing waits for the GPU and nothing depends on values, so that a call can be
    captured in a CUDA graph; the same inputs give the same bits.

    Args:
        layers: at least one, all of the same sizes.
        embedding: (vocabulary, d_model).
        final_norm: (d_model,), the RMSNorm before the head.
        head: (vocabulary, d_model); None ties it to the embedding.
        head_bias: (vocabulary,).
        eps: of the final norm.

    Raises:
        ArgumentError: no layers, layers of different sizes, or shapes that do not fit.
        BackendError: no NVIDIA GPU of compute capability 8.0, no cuda-core, matrices of several dtypes, or layers other
            than Mamba's as it was published: MLPs, heads, norms of what is selected.
    """

    def __init__(
        self,
        layers: Sequence[StepWeights],
        *,
        embedding: Tensor,
        final_norm: Tensor,
        head: Tensor | None = None,
        head_bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        self.weights = MambaModelWeights(tuple(layers), embedding, final_norm, head, head_bias, eps)
        device = self.weights.device
        if device.type != "cuda":
            raise BackendError(f"layers: this compiled step runs on NVIDIA GPUs, they are on {device}")
        self._index = device.index or 0
        reason = nvrtc.refuse_device(self._index) or nvrtc.refuse_imports()
        if reason is not None:
            raise BackendError(f"the compiled step cannot run here: {reason}")
        dtypes = {matrix.dtype for matrix in (*self.weights.matrices, embedding)}
        if torch.int8 in dtypes:
            raise BackendError("layers, head: got int8 weights, which the compiled step reads on the CPU only")
        if len(dtypes) > 1:
            raise BackendError(f"layers, head: got matrices of {sorted(map(str, dtypes))}, expected one dtype")
        (self.dtype,) = dtypes
        self._layers = tuple(Layer.of(layer) for layer in self.weights.layers)
        self._kernels: dict[int, nvrtc.Kernel | None] = {}
        self._tables: dict[tuple[int, ...], Tensor] = {}
        # How often blocks have met; what is selected, as messages. Zeros are none.
        self._meetings = torch.zeros((), dtype=torch.int64, device=device)
        s = self.weights.sizes
        self._selected = torch.zeros(FEW, s.dt_rank + 2 * s.d_state, dtype=torch.int64, device=device)

    def in_one_kernel(self, batch: int) -> bool:
        """Whether so many sequences go through the one kernel."""
        return self._step_kernel(batch) is not None

    @torch.no_grad()
    def step(self, tokens: Tensor, states: Sequence[State]) -> Tensor:
        """One token of each sequence of a batch.

        Args:
            tokens: (batch,) integers below the vocabulary, on the GPU; values are not looked at.
            states: one (conv_state, ssm_state) per layer: (batch, d_conv - 1, d_inner) in the matrices' dtype and
                (batch, d_inner, d_state) in float32 or, all of them, in the matrices' dtype, contiguous. Updated in
                place.

        Returns:
            logits (batch, vocabulary), float32 where the one kernel serves, else in the matrices' dtype.
        """
        self.weights.check_tokens(tokens)
        # Kernels read them where they lie.
        tokens = tokens.long().contiguous()
        batch = tokens.shape[0]
        short = states[0][1].dtype == self.dtype != torch.float32 if states else False
        self.weights.check_states(states, batch, (self.dtype,), self.dtype if short else torch.float32)
        with torch.cuda.device(self._index):
            kernel = None if short else self._step_kernel(batch)
            return self._many(tokens, states) if kernel is None else self._few(tokens, states, kernel)

    def _few(self, tokens: Tensor, states: Sequence[State], kernel: nvrtc.Kernel) -> Tensor:
        w, s = self.weights, self.weights.sizes
        assert w.head is not None
        batch, vocabulary = tokens.shape[0], w.head.shape[0]

        def new(size: int) -> Tensor:
            return torch.empty(batch, size, dtype=torch.float32, device=w.device)

        logits = new(vocabulary)
        hidden, x, z, y = new(s.d_model), new(s.d_inner), new(s.d_inner), new(s.d_inner)
        tensors = (
            tokens, self._table(states), _dense(w.embedding), w.final_norm, _dense(w.head), w.head_bias,
            hidden, x, z, self._selected, y, logits, self._meetings,
        )  # fmt: skip
        numbers = (batch, vocabulary, _bits(self._layers[0].eps), _bits(w.eps))
        arguments = (*addresses(*tensors), *numbers)
        kernel.launch(self._multiprocessors, _THREADS, arguments, together=True)
        return logits

    def _table(self, states: Sequence[State]) -> Tensor:
        """Addresses of the layers' weights and states, as step.cu reads them; kept, for a graph cannot copy them."""
        key = tuple(address for state in states for address in addresses(*state))
        if key not in self._tables:
            if len(self._tables) > 100:
                self._tables.clear()
            rows = [(*layer.addresses, *addresses(*own)) for layer, own in zip(self._layers, states, strict=True)]
            self._tables[key] = torch.tensor(rows, dtype=torch.int64).to(self.weights.device)
        return self._tables[key]

    def _step_kernel(self, batch: int) -> nvrtc.Kernel | None:
        """The kernel that takes so many sequences, if it can be had on this GPU for such sizes."""
        if batch > FEW:
            return None
        rows = 1 << (batch - 1).bit_length()
        if rows not in self._kernels:
            self._kernels[rows] = self._make_kernel(rows)
        return self._kernels[rows]

    def _make_kernel(self, rows: int) -> nvrtc.Kernel | None:
        s = self.weights.sizes
        aligned = all(_dense(matrix).data_ptr() % 16 == 0 for matrix in self.weights.matrices)
        if not aligned or s.d_model % 256 or s.d_inner % 256 or s.dt_rank % 8 or self.dtype == torch.float32:
            return None
        if len({layer.eps for layer in self._layers}) > 1:
            return None
        # As step.cu lays them out: columns, partial sums, the layers' addresses, static arrays.
        columns = {1: 3, 2: 6, 4: 8}[rows]
        taken = columns * (-(-max(s.d_model, s.d_inner) // 64) * 64 + 32) * 2 + 4 * 16 * 16 * columns * 4
        taken += len(self._layers) * _LAYER + rows * (s.dt_rank + 2 * s.d_state + 4) * 4 + _STATIC
        tiles = min(16, (nvrtc.shared_memory(self._index) - taken) // (_THREADS // 32 * _TILE))
        if tiles < 2:
            return None
        options = {
            "FORMAT": FORMATS[self.dtype], "ROWS": rows, "MODEL": s.d_model, "INNER": s.d_inner, "STATES": s.d_state,
            "RANK": s.dt_rank, "WIDTH": s.d_conv, "TILES": tiles, "LAYERS": len(self._layers),
            "BLOCKS": self._multiprocessors,
        }  # fmt: skip
        return nvrtc.kernel(_FOLDER / "step.cu", "step", nvrtc.macros(options), self._index)

    def _many(self, tokens: Tensor, states: Sequence[State]) -> Tensor:
        w, s = self.weights, self.weights.sizes
        assert w.embedding is not None
        assert w.head is not None
        batch, rank = tokens.shape[0], s.dt_rank
        even = s.d_inner % 2 == 0
        short = states[0][1].dtype != torch.float32
        # A lane's states are 16 bytes where that divides them.
        lanes = 1 if s.d_state < 4 else 2 if short and s.d_state == 16 else 4
        options = {
            "FORMAT": FORMATS[self.dtype], "SHORT": short, "MODEL": s.d_model, "STATES": s.d_state, "WIDTH": s.d_conv,
            "THREADS": _BATCH, "LANES": lanes, "EVEN": even,
        }  # fmt: skip
        source = _FOLDER / "batch.cu"
        norm, conv_step, state_step = (
            nvrtc.kernel(source, f"batch_{name}", nvrtc.macros(options), self._index)
            for name in ("norm", "conv", "state")
        )

        def new(*shape: int) -> Tensor:
            return torch.empty(batch, *shape, dtype=self.dtype, device=w.device)

        def normalise(
            hidden: Tensor, stream: Tensor | None, weight: Tensor | None, eps: float
        ) -> tuple[Tensor, Tensor]:
            normed, total = new(s.d_model), torch.empty(batch, s.d_model, dtype=torch.float32, device=w.device)
            norm.launch(batch, _BATCH, (*addresses(hidden, stream, weight, normed, total), _bits(eps)))
            return normed, total

        hidden = torch.index_select(_dense(w.embedding), 0, tokens)
        stream: Tensor | None = None
        for layer, (conv, ssm) in zip(self._layers, states, strict=True):
            normed, stream = normalise(hidden, stream, layer.norm, layer.eps)
            xz = torch.nn.functional.linear(normed, layer.in_proj, _as(layer.in_proj_bias, self.dtype))
            x, y = new(s.d_inner), new(s.d_inner)
            tensors = addresses(xz, layer.conv, layer.conv_bias, conv, x)
            conv_step.launch((-(-s.d_inner // (_BATCH << even)), batch), _BATCH, (*tensors, s.d_inner))
            selected = torch.nn.functional.linear(x, layer.x_proj)
            dt = torch.nn.functional.linear(selected[:, :rank], layer.dt_proj)
            tensors = addresses(selected, dt, x, xz, layer.dt_bias, layer.A, layer.D, ssm, y)
            state_step.launch((-(-s.d_inner * lanes // _BATCH), batch), _BATCH, (*tensors, s.d_inner, rank))
            hidden = torch.nn.functional.linear(y, layer.out_proj, _as(layer.out_proj_bias, self.dtype))
        normed, _ = normalise(hidden, stream, w.final_norm, w.eps)
        return torch.nn.functional.linear(normed, _dense(w.head), _as(w.head_bias, self.dtype))

    @cached_property
    def _multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self._index).multi_processor_count


@dataclass(frozen=True, eq=False)
class Layer:
    """What the kernels read of a layer: matrices as they lie, everything else in float32."""

    norm: Tensor
    in_proj: Tensor
    conv: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    out_proj: Tensor
    D: Tensor | None
    conv_bias: Tensor | None
    in_proj_bias: Tensor | None
    out_proj_bias: Tensor | None
    eps: float

    @property
    def addresses(self) -> tuple[int, ...]:
        """In the order of step.cu's `Layer`; the states' follow."""
        return addresses(
            self.norm, self.in_proj, self.in_proj_bias, self.conv, self.conv_bias, self.x_proj, self.dt_proj,
            self.dt_bias, self.A, self.D, self.out_proj, self.out_proj_bias,
        )  # fmt: skip

    @staticmethod
    def of(weights: StepWeights) -> Layer:
        if not isinstance(weights, MambaStepWeights):
            raise BackendError("layers: got an MLP, which the compiled step takes on the CPU only")
        if weights.selection_norm is not None or weights.paired or weights.heads > 1:
            raise BackendError(
                "layers: got inner norms or several heads, which the compiled step takes on the CPU only"
            )
        vectors = weights.vectors
        return Layer(
            norm=vectors["NORM"],
            in_proj=_dense(weights.in_proj),
            conv=vectors["CONV"],
            x_proj=_dense(weights.x_proj),
            dt_proj=_dense(weights.dt_proj),
            dt_bias=vectors["DT_BIAS"],
            A=vectors["A"],
            out_proj=_dense(weights.out_proj),
            D=vectors.get("D"),
            conv_bias=vectors.get("CONV_BIAS"),
            in_proj_bias=vectors.get("IN_PROJ_BIAS"),
            out_proj_bias=vectors.get("OUT_PROJ_BIAS"),
            eps=weights.eps,
        )


def _dense(matrix: Matrix | None) -> Tensor:
    """A matrix that is there; int8 has been refused."""
    assert isinstance(matrix, Tensor)
    return matrix


def _bits(value: float) -> int:
    """A float32 as the integer of the same bits: kernels take integers only."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
