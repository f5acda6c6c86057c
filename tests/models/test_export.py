"""Exported graphs, saved and read again, against the model itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.utils._pytree as pytree

from longscan.errors import ArgumentError, CheckpointError
from longscan.models import LanguageModel
from longscan.models.export import (
    export_onnx,
    export_prefill,
    export_step,
    load_program,
    save_program,
    state_names,
)
from longscan.nn.state import ModelState
from tests.models.small import VOCABULARY, make

pytestmark = pytest.mark.compile


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(sum(shape)))


def reload(program: Any, path: Path) -> Any:
    return load_program(save_program(program, path)).module()


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def with_lists(program: Any) -> Any:
    """A plain program, which takes the state as a list, behind the interface of the others."""

    def step(token: torch.Tensor, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        logits, tensors = program(token, state.tensors())
        _, spec = pytree.tree_flatten(state)
        return logits, pytree.tree_unflatten(tensors, spec)

    return step


def check_steps(step: Any, model: LanguageModel, batches: tuple[int, ...] = (1, 2, 5)) -> None:
    """Several tokens, each from the exported state before it."""
    for batch in batches:
        state, expected_state = model.initial_state(batch), model.initial_state(batch)
        for token in tokens(4, batch):
            before = state.clone()
            logits, after = step(token, state)
            expected, expected_state = model.step(token, expected_state)
            close(logits, expected)
            assert isinstance(after, ModelState)
            for left, right in zip(after.tensors(), expected_state.tensors(), strict=True):
                close(left, right)
            # Nothing was changed in place.
            assert all(map(torch.equal, state.tensors(), before.tensors()))
            state = after


@pytest.fixture(params=["mamba", "complex"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(request.param, n_layer=1).eval()


def test_step(model: LanguageModel, tmp_path: Path) -> None:
    check_steps(reload(export_step(model), tmp_path / "step.pt2"), model)


def test_plain_step_is_aten_alone(model: LanguageModel, tmp_path: Path) -> None:
    program = export_step(model, plain=True)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    operators = {target for target in called if isinstance(target, torch._ops.OpOverload)}
    assert {operator.namespace for operator in operators} == {"aten"}
    # The rest is Python's arithmetic of sizes and indexing of tuples.
    assert {target.__module__ for target in called - operators} <= {"_operator"}
    check_steps(with_lists(reload(program, tmp_path / "plain.pt2")), model)


def test_plain_step_runs_without_longscan(tmp_path: Path) -> None:
    model = make(n_layer=1).eval()
    save_program(export_step(model, plain=True), tmp_path / "plain.pt2")
    state = model.initial_state(2)
    torch.save((tokens(2), state.tensors()), tmp_path / "given.pt")
    code = """
import sys, torch
step = torch.export.load("plain.pt2").module()
logits, state = step(*torch.load("given.pt"))
assert "longscan" not in sys.modules
torch.save([logits, *state], "got.pt")
"""
    # -I leaves PYTHONPATH and this folder out; an installed package stays, but nobody imports it.
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    logits, after = model.step(tokens(2), state)
    close(torch.load(tmp_path / "got.pt"), [logits.detach(), *(tensor.detach() for tensor in after.tensors())])


def test_prefill_of_any_length(model: LanguageModel, tmp_path: Path) -> None:
    last = reload(export_prefill(model), tmp_path / "last.pt2")
    whole = reload(export_prefill(model, last_only=False), tmp_path / "whole.pt2")
    for batch, length in ((1, 1), (1, 9), (2, 2), (4, 33)):
        state = model.initial_state(batch)
        first, second = tokens(batch, length), tokens(batch, 3)
        expected, expected_state = model(torch.cat([first, second], 1), state)
        logits, middle = whole(first, state)
        close(logits, expected[:, :length])
        logits, after = last(second, middle)
        close(logits, expected[:, -1])
        for left, right in zip(after.tensors(), expected_state.tensors(), strict=True):
            close(left, right)


@pytest.mark.gpu
def test_a_gpu_s_graphs(tmp_path: Path) -> None:
    model = make(n_layer=1).eval().cuda()
    given = tokens(2, 9).cuda()
    expected, _ = model(given)
    prefill = reload(export_prefill(model), tmp_path / "prefill.pt2")
    step = reload(export_step(model), tmp_path / "step.pt2")
    _, state = prefill(given[:, :8], model.initial_state(2))
    torch.testing.assert_close(step(given[:, 8], state)[0], expected[:, 8], rtol=1e-3, atol=1e-4)


def test_options_of_the_model(tmp_path: Path) -> None:
    """Inner norms, an MLP, biases, a head of its own, no convolution to speak of."""
    options = {"selection_norm_eps": 1e-6, "bias": True, "conv_bias": False, "d_conv": 1}
    model = make(mixer_options=options, d_intermediate=8, tie_embeddings=False, n_layer=1).eval()
    check_steps(with_lists(export_step(model, plain=True).module()), model)


def test_a_fixed_batch(tmp_path: Path) -> None:
    model = make(n_layer=1).eval()
    step = export_step(model, batch=2).module()
    check_steps(step, model, (2,))
    with pytest.raises(Exception, match="Guard failed"):
        step(tokens(3), model.initial_state(3))


def test_time_invariant_models_step(tmp_path: Path) -> None:
    model = make(mixer="s4d", mixer_options={"d_state": 4}, n_layer=1).eval()
    check_steps(reload(export_step(model), tmp_path / "s4d.pt2"), model)


def test_bfloat16(tmp_path: Path) -> None:
    model = make(n_layer=1).eval().to(torch.bfloat16)
    logits, state = with_lists(export_step(model, plain=True).module())(tokens(2), model.initial_state(2))
    expected, expected_state = model.step(tokens(2), model.initial_state(2))
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    assert [tensor.dtype for tensor in state.tensors()] == [tensor.dtype for tensor in expected_state.tensors()]


def run_onnx(session: Any, model: LanguageModel, batch: int) -> None:
    names = state_names(model)
    state = model.initial_state(batch)
    held = {f"state.{name}": tensor.numpy() for name, tensor in zip(names, state.tensors(), strict=True)}
    for token in tokens(6, batch):
        values = session.run(None, {"tokens": token.numpy(), **held})
        outputs = dict(zip([given.name for given in session.get_outputs()], values, strict=True))
        expected, state = model.step(token, state)
        close(torch.from_numpy(outputs["logits"]), expected)
        for name, tensor in zip(names, state.tensors(), strict=True):
            close(torch.from_numpy(outputs[f"next.{name}"]), tensor)
        held = {f"state.{name}": outputs[f"next.{name}"] for name in names}


def test_onnx_runs_in_onnxruntime(tmp_path: Path) -> None:
    model = make(n_layer=2).eval()
    path = export_onnx(model, tmp_path / "step.onnx")
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()][:3] == ["tokens", "state.layers.0.conv", "state.layers.0.ssm"]
    for batch in (1, 2, 5):
        run_onnx(session, model, batch)


def test_refusals_say_why(tmp_path: Path) -> None:
    mixed = make("mixed")
    with pytest.raises(ArgumentError, match="attention cannot be exported"):
        export_step(mixed)
    with pytest.raises(ArgumentError, match="Mamba layers only"):
        export_prefill(make(mixer="s4d", mixer_options={"d_state": 4}))
    with pytest.raises(ArgumentError, match="Mamba layers only"):
        export_step(make(mixer="s4d", mixer_options={"d_state": 4}), plain=True)
    with pytest.raises(ArgumentError, match="complex"):
        export_onnx(make("complex"), tmp_path / "x.onnx")
    with pytest.raises(ArgumentError, match="batch must be"):
        export_step(make(), batch=0)
    with pytest.raises(CheckpointError, match="no such file"):
        load_program(tmp_path / "none.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        load_program(tmp_path / "broken.pt2")
