"""Models as graphs that run elsewhere: ``torch.export`` programs (pt2) and ONNX.

The state goes in and comes out, so a runtime holds it between calls. There are two kinds of graph:

- with our operators, for PyTorch where longscan is installed: a step for any batch, a prefill for any batch and length;
- ``plain``, of ATen alone, for other runtimes: the step of Mamba models (a graph has no loop over time).
"""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from longscan.errors import ArgumentError, CheckpointError
from longscan.mixers.mamba import Mamba
from longscan.models.language_model import LanguageModel
from longscan.nn.state import ModelState
from longscan.nn.storage import write_atomically
from longscan.ops.decompositions import one_step

# Sizes of the example that a graph is traced with; 0 and 1 would be taken as constants.
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 3, 5


class _Step(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self.model.step(tokens, state)


class _PlainStep(nn.Module):
    """Takes and gives the state as a list: its own type would be asked for where longscan is not."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        with torch.device("meta"):
            self.spec = pytree.tree_structure(model.initial_state(1))

    def forward(self, tokens: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        # The operators over sequences, unlike those of a step, change nothing in place, so they can be taken apart.
        logits, after = self.model(tokens[:, None], pytree.tree_unflatten(state, self.spec), last_only=True)
        return logits, after.tensors()


class _Prefill(nn.Module):
    def __init__(self, model: LanguageModel, last_only: bool) -> None:
        super().__init__()
        self.model = model
        self.last_only = last_only

    def forward(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState | None]:
        logits, after = self.model(tokens, state, last_only=self.last_only)
        return logits, after


def export_step(model: LanguageModel, *, batch: int | None = None, plain: bool = False) -> ExportedProgram:
    """One token per sequence, as :meth:`LanguageModel.step`: ``logits, state = program.module()(tokens, state)``.

    Args:
        model: a model whose state has one size for good (no attention).
        batch: a fixed number of sequences; None: any.
        plain: of ATen alone; Mamba layers only. The state is then the list of its tensors, ``state.tensors()``, so that
            the program loads and runs without longscan.

    Returns:
        A program of tokens (batch,) int64 and a state, as ``model.initial_state(batch)`` gives it, to logits (batch,
        vocab_size) and the next state. It shares the model's weights, and records no gradients.

    Raises:
        ArgumentError: the model's state grows, or ``plain`` and a layer is not Mamba.
    """
    _check_state(model)
    if plain:
        _check_mamba(model, "a graph of ATen alone")
    tokens = torch.zeros(batch or _EXAMPLE_BATCH, dtype=torch.int64, device=model.device)
    state = model.initial_state(len(tokens))
    if not plain:
        return _export(_Step(_frozen(model)), tokens, state, [_batch_axis(batch)])
    program = _export(_PlainStep(_frozen(model)), tokens, state.tensors(), [_batch_axis(batch)])
    return program.run_decompositions(one_step())


def export_prefill(model: LanguageModel, *, batch: int | None = None, last_only: bool = True) -> ExportedProgram:
    """A whole prompt, or a piece of one, as :meth:`LanguageModel.forward`, for any length from 1.

    Args:
        model: a model of Mamba layers.
        batch: a fixed number of sequences; None: any.
        last_only: logits after the last token only.

    Returns:
        A program of tokens (batch, length) int64 and a state to logits (batch, vocab_size), or (batch, length,
        vocab_size) without ``last_only``, and the state after them. It calls our operators: to load and run it, import
        longscan, or use :func:`load_program`.

    Raises:
        ArgumentError: a layer is not Mamba: others' graphs depend on the length.
    """
    _check_mamba(model, "a graph for any length")
    tokens = torch.zeros(batch or _EXAMPLE_BATCH, _EXAMPLE_LENGTH, dtype=torch.int64, device=model.device)
    state = model.initial_state(len(tokens))
    return _export(_Prefill(_frozen(model), last_only), tokens, state, [_batch_axis(batch), Dim("length", min=1)])


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Write a program as one file (pt2); a write that fails leaves an old file untouched.

    Raises:
        StorageError: the file could not be written.
    """
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def load_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """Read what :func:`save_program` wrote. Only from those you trust: PyTorch may unpickle parts of the file.

    Raises:
        CheckpointError: the file is missing, damaged, or no program.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return torch.export.load(path)
    except Exception as error:  # of the archive, its JSON and its tensors: of many kinds
        raise CheckpointError(f"{path} is damaged or no exported program: {error}") from error


def export_onnx(model: LanguageModel, path: str | os.PathLike[str], *, batch: int | None = None) -> Path:
    """Write the step as an ONNX file (weights inside), with ONNX's own operators only.

    Inputs are ``tokens`` (batch,) int64 and the state's tensors ``state.layers.0.conv``, ``state.layers.0.ssm``, ...;
    outputs are ``logits`` (batch, vocab_size) and ``next.layers.0.conv``, ... A sequence begins with zeros. A prompt is
    taken token by token.

    Args:
        model: a model of Mamba layers with a real A.
        path: the file.
        batch: a fixed number of sequences; None: any.

    Raises:
        ArgumentError: another layer, a complex A, or the packages of the extra ``onnx`` are not installed.
        StorageError: the file could not be written.
    """
    if any(isinstance(block.mixer, Mamba) and block.mixer.is_complex for block in model.backbone.blocks):
        raise ArgumentError("model: ONNX's operators take no complex numbers, this model's A is complex")
    try:
        import onnx
        import onnxscript  # noqa: F401 (what torch.onnx translates with)
    except ImportError as error:
        raise ArgumentError(
            f"onnx: cannot be imported ({error}); install it with: pip install 'longscan[onnx]'"
        ) from error
    program = export_step(model, batch=batch, plain=True)
    names = state_names(model)
    translated = torch.onnx.export(
        program,
        input_names=["tokens", *(f"state.{name}" for name in names)],
        output_names=["logits", *(f"next.{name}" for name in names)],
        dynamo=True,
        verbose=False,
    )
    assert translated is not None
    proto = translated.model_proto
    try:
        content = proto.SerializeToString()
    except ValueError as error:
        raise ArgumentError(f"model: an ONNX file holds at most 2 GiB of weights: {error}") from error
    onnx.checker.check_model(content)
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))


def state_names(model: LanguageModel) -> list[str]:
    """A name per tensor of the model's state (``layers.0.conv``, ...), in the order of ``state.tensors()``."""
    with torch.device("meta"):
        paths, _ = pytree.tree_flatten_with_path(model.initial_state(1))
    return [".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path) for path, _ in paths]


def _export(wrapper: nn.Module, tokens: Tensor, state: Any, axes: list[Any]) -> ExportedProgram:
    shapes = {"tokens": dict(enumerate(axes)), "state": _shapes(state, {0: axes[0]})}
    with torch.no_grad():
        return torch.export.export(wrapper.eval(), (tokens, state), dynamic_shapes=shapes)


def _frozen(model: LanguageModel) -> LanguageModel:
    """A twin on the same memory that asks for no gradients: a program keeps the parameters it was traced with."""
    twins: dict[int, Any] = {}
    for parameter in model.parameters():
        twin = nn.Parameter(parameter.detach(), requires_grad=False)
        vars(twin).update(vars(parameter))
        twins[id(parameter)] = twin
    return copy.deepcopy(model, twins)


def _batch_axis(batch: int | None) -> Any:
    if batch is not None and batch < 1:
        raise ArgumentError(f"batch must be at least 1, or None for any; got {batch}")
    return Dim("batch", min=1) if batch is None else Dim.STATIC


def _shapes(value: Any, axes: dict[int, Any]) -> Any:
    """``axes`` for every tensor of a state, in the shape that torch.export wants: a list per dataclass."""
    if isinstance(value, Tensor):
        return axes
    if isinstance(value, list):
        return [axes] * len(value)
    children = [_shapes(child, axes) for child in pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]]
    return tuple(children) if isinstance(value, tuple) else children


def _check_state(model: LanguageModel) -> None:
    if model.state_bytes(1, 2) > model.state_bytes(1, 1):
        raise ArgumentError(
            f"model: its state grows with every token ({', '.join(model.config.mixer_names)}); "
            "a graph needs one of a fixed size, so attention cannot be exported"
        )


def _check_mamba(model: LanguageModel, what: str) -> None:
    others = sorted({type(b.mixer).__name__ for b in model.backbone.blocks if not isinstance(b.mixer, Mamba)})
    if others:
        raise ArgumentError(f"model: {what} exists for Mamba layers only, this model has {', '.join(others)}")
