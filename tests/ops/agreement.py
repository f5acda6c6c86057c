"""Comparing a backend with the float64 definition: outputs, and the gradients of every input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]

#: The largest error allowed, relative to the largest entry: a few roundings of the dtype that carries the values.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

#: How each backend is run here: (backend, device, marks).
RUNS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
]

#: The same for operators that have CUDA kernels.
CUDA_RUNS = [*RUNS, pytest.param("cuda", "cuda", id="cuda-gpu", marks=pytest.mark.gpu)]


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in double precision on the CPU."""
    out: Inputs = {}
    for name, tensor in inputs.items():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)
        out[name] = tensor if tensor is None else tensor.cpu()
    return out


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: Inputs, names: tuple[str, ...], seed: int = 1
) -> dict[str, Tensor]:
    """Outputs of `function`, and gradients of the sum of outputs weighted with fixed random weights."""
    leaves = dict(inputs)
    for name in names:
        tensor = inputs[name]
        leaves[name] = None if tensor is None else tensor.detach().clone().requires_grad_()
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(seed)
    loss = outputs[0].new_zeros((), dtype=torch.float64, device="cpu")
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.is_complex():
            weights = torch.complex(weights, torch.randn(output.shape, generator=generator, dtype=torch.float64))
        # The weights are rounded to what a bfloat16 output can carry back, so that every dtype gets the same gradient.
        rounded = weights if weights.is_complex() else weights.to(torch.bfloat16).double()
        product = output.cpu().to(rounded.dtype) * rounded
        loss = loss + (product.real if product.is_complex() else product).sum()
    loss.backward()
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name in names:
        leaf = leaves[name]
        if leaf is not None:
            assert leaf.grad is not None, f"no gradient for {name}"
            results[f"gradient of {name}"] = leaf.grad
    return results


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Every result within `tolerance` of the truth, relative to the truth's largest entry."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        expected = expected.cpu()
        got = ours[name].cpu().to(expected.dtype)
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        if expected.numel() == 0:
            continue
        scale = max(1.0, float(expected.abs().max()))
        error = float((got - expected).abs().max()) / scale
        assert error <= tolerance, f"{name}: error {error:.3g} of the largest entry, allowed {tolerance:.3g}"
