"""The fastest way from one token to the next that a model has here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError, BackendError
from longscan.mixers.mamba import Mamba, MambaState
from longscan.models.chunks import copy_tensors
from longscan.nn.capture import captured
from longscan.nn.int8 import Int8Embedding, Int8Linear
from longscan.nn.linear import StepProjection, is_plain
from longscan.nn.mlp import GatedMLP
from longscan.nn.norms import AddRMSNorm
from longscan.nn.state import ModelState
from longscan.ops.int8 import Int8Matrix

if TYPE_CHECKING:
    from longscan.models.backbone import Block
    from longscan.models.language_model import LanguageModel
    from longscan.ops.mamba_step import CudaMambaDecoder, MambaDecoder, MambaStepWeights, MlpStepWeights


class Stepper(Protocol):
    """Takes one token per row; owns the state it is given and may update it in place."""

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """tokens (batch,) to logits (batch, vocab_size) and the next state; the next call may reuse their memory."""


def make_stepper(model: LanguageModel, *, short_states: bool = False) -> Stepper:
    """The fastest stepper for a model where it is.

    On the CPU one compiled call per token if the model is all Mamba; on a GPU a captured graph if the state does not
    grow; else module by module. The weights are read when it is made: make a new one after they have changed.

    Args:
        model: a language model.
        short_states: see :class:`GraphStepper`; elsewhere states stay as they are.
    """
    kind = model.device.type
    if kind in ("cpu", "cuda") and not torch.is_autocast_enabled(kind):
        try:
            return CompiledStepper(model) if kind == "cpu" else GraphStepper(model, short_states=short_states)
        except BackendError:
            pass
    return ModuleStepper(model)


class ModuleStepper:
    """Steps the modules one by one."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self._model.step(tokens, state, inplace=True)


class CompiledStepper:
    """All layers and the head of a real Mamba in one call (:mod:`longscan.ops.mamba_step`), on the CPU or a GPU.

    Raises:
        BackendError: the model has other mixers (on a GPU also inner norms or MLPs), weights that the compiled step
            cannot read, or modules that do more than their weights say (adapters, hooks).
    """

    def __init__(self, model: LanguageModel) -> None:
        from longscan.ops.mamba_step import CudaMambaDecoder, MambaDecoder

        backbone = model.backbone
        if backbone.positions is not None or not model.config.prenorm:
            raise BackendError("the compiled step knows no positions, and no norms but those before its layers")
        layers = [weights for block in backbone.blocks for weights in _weights(block)]
        _check_plain(backbone.embedding, backbone.norm_f, model.lm_head)
        head = None if model.config.tie_embeddings else _matrix(model.lm_head)
        make = CudaMambaDecoder if model.device.type == "cuda" else MambaDecoder
        decoder: CudaMambaDecoder | MambaDecoder = make(
            layers,
            embedding=_matrix(backbone.embedding),
            final_norm=backbone.norm_f.weight,
            eps=backbone.norm_f.eps,
            head=head,
        )
        self._stepper = DecoderStepper(decoder)
        self._vocab_size = model.config.vocab_size

    def reads_in_place(self) -> frozenset[int]:
        """Addresses of the matrices whose changes it sees by itself."""
        return self._stepper.reads_in_place()

    def shortened(self, state: ModelState, batch: int) -> ModelState:
        """See :meth:`DecoderStepper.shortened`."""
        return self._stepper.shortened(state, batch)

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        logits, state = self._stepper.step(tokens, state)
        return logits[:, : self._vocab_size], state


class DecoderStepper:
    """The compiled step over a state of Mamba layers."""

    def __init__(self, decoder: CudaMambaDecoder | MambaDecoder) -> None:
        self._decoder = decoder

    def reads_in_place(self) -> frozenset[int]:
        """Addresses of the matrices whose changes it sees by itself."""
        return self._decoder.weights.addresses

    def shortened(self, state: ModelState, batch: int) -> ModelState:
        """The state with ssm_states in the dtype of the weights, where a step of so many sequences takes them so."""
        from longscan.ops.mamba_step import CudaMambaDecoder

        assert isinstance(self._decoder, CudaMambaDecoder)
        dtype = torch.float32 if self._decoder.in_one_kernel(batch) else self._decoder.dtype
        return ModelState(
            tuple(replace(own, ssm=own.ssm.to(dtype)) for own in state.layers if isinstance(own, MambaState))
        )

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        states = [(own.conv, own.ssm) for own in state.layers if isinstance(own, MambaState)]
        return self._decoder.step(tokens, states), state


class GraphStepper:
    """A step captured as a CUDA graph: a token costs one launch.

    A graph is captured for each of a few batch sizes when it is first needed; rows that are missing are stepped for
    nothing. The state that comes back lies in the graph's own memory: hand it to the next call, or copy it.

    Args:
        model: a language model.
        short_states: keep the states of many sequences of a Mamba in the dtype of its weights instead of float32. Most
            of what a token of many sequences moves is states; what is added to a state in steps below a 256th of it
            (bfloat16) is lost.

    Raises:
        BackendError: the model is not on a GPU, a mixer of it cannot be captured, or a state grows with the sequence.
    """

    def __init__(self, model: LanguageModel, *, short_states: bool = False) -> None:
        if model.device.type != "cuda":
            raise BackendError(f"graphs are captured on GPUs, the model is on {model.device}")
        if not model.backbone.capturable:
            raise BackendError("a mixer of this model waits for the GPU within a step, which a graph cannot hold")
        if model.state_bytes(1, 1) != model.state_bytes(1, 2):
            raise BackendError("the state of this model grows with the sequence: its memory moves from step to step")
        try:
            compiled = CompiledStepper(model)
            stepper: Stepper = compiled
            shorten = compiled.shortened if short_states else None
        except BackendError:
            shorten = None
            stepper = ModuleStepper(model)
        self._graphs = Graphs(stepper, model.device, shorten)

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self._graphs.step(tokens, state)


class Graphs:
    """The graphs of a stepper that can be captured; see `GraphStepper`.

    Args:
        stepper: may be captured.
        device: a GPU.
        shorten: from a state and a batch size to the like of what a graph of that size keeps; by default the state.
    """

    def __init__(
        self,
        stepper: Stepper,
        device: torch.device,
        shorten: Callable[[ModelState, int], ModelState] | None = None,
    ) -> None:
        self._stepper, self._device, self._shorten = stepper, device, shorten
        self._graphs: dict[int, _Graph] = {}

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        size = _captured_size(tokens.shape[0])
        graph = self._graphs.get(size)
        if graph is None:
            like = state if self._shorten is None else self._shorten(state, size)
            with torch.cuda.device(self._device):
                graph = self._graphs[size] = _Graph(self._stepper, like, size)
        return graph.step(tokens, state)


class _Graph:
    def __init__(self, stepper: Stepper, like: ModelState, size: int) -> None:
        self._state = like.map(lambda tensor: tensor.new_zeros((size, *tensor.shape[1:])))
        self._tokens = torch.zeros(size, dtype=torch.int64, device=self._state.tensors()[0].device)
        self._kept = self._state.tensors()
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they keep
            stepper.step(self._tokens, self._state)
        torch.cuda.current_stream().wait_stream(side)
        with captured(self._graph):
            self._logits, after = stepper.step(self._tokens, self._state)
            for kept, new in zip(self._kept, after.tensors(), strict=True):
                if new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)
        self._given: ModelState | None = None

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        rows = tokens.shape[0]
        full = rows == self._tokens.shape[0]
        if state is not self._given:
            given = state.tensors()
            # Empty tensors all lie at address 0.
            if any(
                new.numel() > 0 and new.data_ptr() == kept.data_ptr()
                for kept, new in zip(self._kept, given, strict=True)
            ):
                raise ArgumentError("state: was given back before and has been overwritten since; clone it to keep")
            copy_tensors(self._kept if full else [kept[:rows] for kept in self._kept], given)
        self._tokens[:rows].copy_(tokens)
        self._graph.replay()
        if state is not self._given:
            # A new object every time: an older one stands for what has been overwritten.
            self._given = replace(self._state) if full else self._state.map(lambda tensor: tensor[:rows])
        assert self._given is not None
        return self._logits[:rows], self._given


def _captured_size(rows: int) -> int:
    """The batch size of the graph that steps so many rows: few sizes, so that rows that end cost few captures."""
    if rows <= 4:
        return rows
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def _weights(block: Block) -> Iterator[MambaStepWeights | MlpStepWeights]:
    from longscan.ops.mamba_step import MambaStepWeights, MlpStepWeights

    mixer = block.mixer
    if not isinstance(mixer, Mamba) or mixer.is_complex:
        raise BackendError(f"the compiled step serves Mamba with a real A, this layer is {mixer}")
    assert block.norm is not None
    _check_plain(block.norm, mixer.in_proj, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    inner: dict[str, Any] = {}
    if mixer.selection_norm_eps is not None:
        # Norms without weights.
        inner["selection_norm"] = mixer.D.new_ones(mixer.dt_rank + 2 * mixer.d_state)
        inner["selection_eps"] = mixer.selection_norm_eps
    yield MambaStepWeights(
        norm=block.norm.weight,
        eps=block.norm.eps,
        in_proj=_matrix(mixer.in_proj),
        in_proj_bias=mixer.in_proj.bias,
        conv=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        x_proj=_matrix(mixer.x_proj),
        dt_proj=_matrix(mixer.dt_proj),
        dt_bias=mixer.dt_proj.bias,
        A=mixer.A,
        D=mixer.D,
        out_proj=_matrix(mixer.out_proj),
        out_proj_bias=mixer.out_proj.bias,
        **inner,
    )
    if block.mlp is not None and block.norm2 is not None:
        if not isinstance(block.mlp, GatedMLP):
            raise BackendError(f"the compiled step serves gated MLPs, this one is {block.mlp}")
        _check_plain(block.norm2, block.mlp.fc1, block.mlp.fc2)
        up, gate = _halves(_matrix(block.mlp.fc1))
        yield MlpStepWeights(block.norm2.weight, gate, up, _matrix(block.mlp.fc2), eps=block.norm2.eps)


def _halves(matrix: Tensor | Int8Matrix) -> tuple[Any, ...]:
    """The upper and the lower half of its rows, where they lie."""
    if isinstance(matrix, Int8Matrix):
        parts = zip(matrix.values.chunk(2), matrix.scales.chunk(2), strict=True)
        return tuple(Int8Matrix(*part) for part in parts)
    return matrix.chunk(2)


def _matrix(layer: nn.Module) -> Any:
    """The weight of a plain layer, as it lies in memory."""
    return layer.matrix if isinstance(layer, (Int8Linear, Int8Embedding)) else layer.weight


def _check_plain(*modules: nn.Module) -> None:
    kinds = (nn.Linear, StepProjection, Int8Linear, nn.Conv1d, nn.Embedding, Int8Embedding, AddRMSNorm)
    for module in modules:
        if not is_plain(module, *kinds):
            raise BackendError(f"the compiled step reads plain weights, this is more than that: {module}")
