"""The operators as PyTorch sees them: registration, compilation, export, autocast, and the bytes kept for backward."""

from __future__ import annotations

import pytest
import torch

from longscan.ops import causal_conv1d, selective_scan
from longscan.ops.causal_conv1d import cases as conv_cases
from longscan.ops.selective_scan import cases as scan_cases

pytestmark = pytest.mark.compile

SCAN = {case.name: case for case in scan_cases.CASES}
CONV = {case.name: case for case in conv_cases.CASES}


def scan_arguments(name: str, backend: str, grad: bool = True) -> tuple:
    inputs = scan_cases.make_inputs(SCAN[name])
    for key in ("B", "C"):
        if inputs[key].dim() == 3:
            inputs[key] = inputs[key].unsqueeze(2)
    tensors = [inputs[key] for key in scan_cases.NAMES]
    if grad:
        tensors = [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors]
    return (*tensors, inputs.get("cu_seqlens"), SCAN[name].softplus, grad, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["mamba", "packed-states", "complex-initial", "constant-b-c"])
def test_opcheck_of_the_scan(name: str, backend: str) -> None:
    torch.library.opcheck(torch.ops.longscan.selective_scan.default, scan_arguments(name, backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck_of_the_step(backend: str) -> None:
    x, dt, A, B, C, D, z, dt_bias, state, *_ = scan_arguments("initial-state", backend, grad=False)
    step = (state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], dt_bias, True, backend)
    torch.library.opcheck(torch.ops.longscan.selective_state_update_.default, step)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["mamba", "packed-states", "width-1"])
def test_opcheck_of_the_convolution(name: str, backend: str) -> None:
    inputs = conv_cases.make_inputs(CONV[name])
    tensors = [inputs[key] if inputs[key] is None else inputs[key].requires_grad_() for key in conv_cases.NAMES]
    arguments = (*tensors, inputs.get("cu_seqlens"), True, backend)
    torch.library.opcheck(torch.ops.longscan.causal_conv1d.default, arguments)
    if inputs["initial_state"] is not None and inputs.get("cu_seqlens") is None:
        x, weight, bias, state = (tensor.detach() for tensor in tensors)
        step = (state, x[:, 0], weight, bias, True, backend)
        torch.library.opcheck(torch.ops.longscan.causal_conv1d_update_.default, step)


def block(x, weight, dt, A, B, C):
    x = causal_conv1d(x, weight, activation="silu")
    y, state = selective_scan(x, dt, A, B, C, dt_softplus=True, return_final_state=True)
    return (y * 2).sin(), state


def block_inputs(length: int = 33) -> list[torch.Tensor]:
    inputs = scan_cases.make_inputs(scan_cases.ScanCase("block", length=length, bias=False, skip=False, gate=False))
    weight = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    return [inputs["x"], weight, inputs["dt"], inputs["A"], inputs["B"], inputs["C"]]


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (33, 50):
        inputs = [tensor.requires_grad_() for tensor in block_inputs(length)]
        y, state = compiled(*inputs)
        (y.sum() + state.sum()).backward()
        grads = [tensor.grad.clone() for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        y_eager, state_eager = block(*inputs)
        (y_eager.sum() + state_eager.sum()).backward()
        assert torch.allclose(y, y_eager, atol=1e-6)
        assert torch.allclose(state, state_eager, atol=1e-6)
        for grad, tensor in zip(grads, inputs, strict=True):
            assert torch.allclose(grad, tensor.grad, atol=1e-5)


def test_exports_with_a_dynamic_length() -> None:
    class Block(torch.nn.Module):
        def forward(self, x, weight, dt, A, B, C):
            return block(x, weight, dt, A, B, C)

    inputs = block_inputs(33)
    length = torch.export.Dim("length", min=2, max=4096)
    over_time = {1: length}
    dynamic = (over_time, None, over_time, None, over_time, over_time)
    program = torch.export.export(Block(), tuple(inputs), dynamic_shapes=dynamic)
    longer = block_inputs(70)
    got = program.module()(*longer)
    for ours, expected in zip(got, block(*longer), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_autocast_narrows_activations_only() -> None:
    inputs = scan_cases.make_inputs(SCAN["initial-state"])
    with torch.autocast("cpu", torch.bfloat16):
        y, state = selective_scan(**inputs, dt_softplus=True, return_final_state=True)
    narrow = {k: v.bfloat16() if k in ("x", "dt", "z", "B", "C") else v for k, v in inputs.items()}
    expected, expected_state = selective_scan(**narrow, dt_softplus=True, return_final_state=True)
    assert y.dtype == torch.float32
    assert torch.equal(y.bfloat16(), expected)
    assert torch.equal(state, expected_state)


def saved_bytes(function) -> int:
    """Bytes of distinct storage that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bytes_kept_for_backward_do_not_grow_with_the_state(backend: str) -> None:
    def kept(state: int) -> int:
        case = scan_cases.ScanCase("memory", batch=1, length=2048, channels=64, state=state)
        inputs = scan_cases.make_inputs(case)
        shared = sum(inputs[name].nbytes for name in ("A", "B", "C"))
        inputs["x"].requires_grad_()
        return saved_bytes(lambda: selective_scan(**inputs, dt_softplus=True, backend=backend)) - shared

    length_times_channels = 2048 * 64 * 4
    for state in (16, 64, 256):
        # x, dt and z, and the states at chunk borders: 4 states' worth of bytes at most, whatever the state size.
        assert kept(state) <= (3 + 0.6) * length_times_channels + 64 * 4 * 2
