"""layer_norm_fn, rms_norm_fn and RMSNorm against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.norm import RMSNorm, layer_norm_fn, rms_norm_fn
from tests.integrations.mamba_ssm import formulas


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    centred = x if rms else x - x.mean(-1, keepdim=True)
    out = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [(), ("residual",), ("x1",), ("rowscale",), ("weight1", "bias1"), ("x1", "weight1")])
def test_the_norm_is_its_definition(rms: bool, bias: bool, given: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    shapes = {"residual": (2, 3, 8), "x1": (2, 3, 8), "rowscale": (2, 3), "weight1": (8,), "bias1": (8,)}
    optional = [torch.randn(shapes[name]) for name in given]

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor) -> Any:
        named = dict(zip(given, rest, strict=True))
        if rms:
            return rms_norm_fn(x, weight, bias, **named, eps=1e-3, prenorm=True)
        return layer_norm_fn(x, weight, bias, **named, eps=1e-3, prenorm=True)

    def exact(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor) -> Any:
        named = dict(zip(given, rest, strict=True))
        total = x * named["rowscale"][..., None] if "rowscale" in named else x
        for name in ("x1", "residual"):
            total = total + named.get(name, 0)
        second = (normed(total, named["weight1"], named.get("bias1"), 1e-3, rms),) if "weight1" in named else ()
        return (normed(total, weight, bias, 1e-3, rms), *second, total)

    tensors = [torch.randn(2, 3, 8), torch.randn(8), torch.randn(8) if bias else None, *optional]
    formulas.agree(ours, exact, tensors)


@pytest.mark.parametrize("rms", [False, True])
def test_dtypes_of_the_stream(rms: bool) -> None:
    x, weight = torch.randn(4, 8).bfloat16(), torch.ones(8)
    bias = None if rms else torch.zeros(8)
    _, stream = layer_norm_fn(x, weight, bias, prenorm=True, is_rms_norm=rms)
    assert stream.dtype == torch.bfloat16
    y, stream = layer_norm_fn(x, weight, bias, prenorm=True, residual_in_fp32=True, is_rms_norm=rms)
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    _, stream = layer_norm_fn(x, weight, bias, torch.zeros(4, 8), prenorm=True, is_rms_norm=rms)
    assert stream.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm_fn(x.float(), weight, bias, is_rms_norm=rms).dtype == torch.float32


def test_dropout_and_its_masks() -> None:
    torch.manual_seed(0)
    x, x1, weight = torch.randn(64, 32), torch.randn(64, 32), torch.ones(32)
    y, total, mask, mask1 = layer_norm_fn(
        x, weight, None, x1=x1, dropout_p=0.25, prenorm=True, is_rms_norm=True, return_dropout_mask=True
    )
    assert mask.dtype == mask1.dtype == torch.bool
    assert abs(mask.float().mean() - 0.75) < 0.05
    assert not torch.equal(mask, mask1)
    torch.testing.assert_close(total, (x * mask + x1 * mask1) / 0.75)
    torch.testing.assert_close(y, normed(total, weight, None, 1e-6, True))
    assert layer_norm_fn(x, weight, None, return_dropout_mask=True)[1:] == (None, None)
    with pytest.raises(ArgumentError, match="together with x1"):
        layer_norm_fn(x, weight, None, x1=x1, rowscale=torch.ones(64))


def test_the_module() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(8, eps=1e-3, dropout_p=0.5)
    assert list(norm.state_dict()) == ["weight"]
    assert norm.bias is None
    x, residual = torch.randn(4, 8), torch.randn(4, 8)
    dropped, stream = norm(x, residual, prenorm=True)
    assert not torch.equal(stream, x + residual)
    y, stream = norm.eval()(x, residual, prenorm=True, residual_in_fp32=True)
    torch.testing.assert_close(stream, x + residual)
    torch.testing.assert_close(y, normed(x + residual, norm.weight, None, 1e-3, True))
    assert dropped.shape == y.shape
