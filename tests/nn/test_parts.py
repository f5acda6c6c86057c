"""Norms and the gated MLP against their formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from longscan.nn import AddRMSNorm, GatedMLP, RMSNorm, rotate


def test_rms_norm() -> None:
    norm, x = RMSNorm(6, eps=0.1).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 0.1))


def test_add_rms_norm_adds_in_float32() -> None:
    norm = AddRMSNorm(6).to(torch.bfloat16)
    x, residual = torch.randn(2, 3, 6).bfloat16(), torch.randn(2, 3, 6)
    normed, total = norm(x, residual)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(total, x.float() + residual)
    torch.testing.assert_close(normed.float(), F.rms_norm(total, (6,), eps=1e-5), rtol=0.01, atol=0.01)
    assert torch.equal(norm(x)[1], x.float())


def test_gated_mlp() -> None:
    mlp, x = GatedMLP(4, 6), torch.randn(2, 3, 4)
    value, gate = x @ mlp.fc1.weight[:6].T, x @ mlp.fc1.weight[6:].T
    torch.testing.assert_close(mlp(x), (value * gate * torch.sigmoid(gate)) @ mlp.fc2.weight.T)


def test_rotation_turns_pairs() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    turned = rotate(x, torch.tensor([[0, 1, 7]]))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    for pair in ((0, 2), (1, 3)):
        torch.testing.assert_close(turned[..., pair].norm(dim=-1), x[..., pair].norm(dim=-1), rtol=1e-6, atol=0)
    expected = torch.view_as_complex(x[0, 0, 2, [0, 2]]) * torch.polar(
        torch.tensor(1.0).double(), torch.tensor(7.0).double()
    )
    torch.testing.assert_close(torch.view_as_complex(turned[0, 0, 2, [0, 2]]), expected, rtol=1e-6, atol=1e-6)
