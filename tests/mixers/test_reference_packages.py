"""The same weights in, the same numbers out as what others put on PyPI.

rwkv and s5-pytorch are of the development environment; ``pip install --no-deps torchscale`` is for the third. Passed
with rwkv 0.8.32, s5-pytorch 0.2.1 and torchscale 0.3.0. Transformers' models are in tests/models/test_agreement.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.backends import cudnn
from torch.backends.cuda import matmul

from longscan.mixers import RWKV4, S5, RetNet, RWKV4Channels


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_s5_is_s5_pytorch(discretisation: str, bidirectional: bool) -> None:
    """Theirs has both of a conjugate pair where ours doubles the real part of one."""
    package = pytest.importorskip("s5.s5_model")
    torch.manual_seed(0)
    ours = S5(6, d_state=8, discretisation=discretisation, bidirectional=bidirectional)
    one = torch.eye(8, dtype=torch.complex64)
    theirs = package.S5SSM(
        one[0], one, one, 6, 8, 0.001, 0.1, discretization=discretisation, bcInit="dense", bidir=bidirectional
    )
    B, C = torch.view_as_complex(ours.B), torch.view_as_complex(ours.C)
    with torch.no_grad():
        A = torch.complex(-torch.exp(ours.A_log), ours.A_imag)
        theirs.Lambda = nn.Parameter(torch.cat((A, A.conj())))
        theirs.log_step = nn.Parameter(ours.log_dt.repeat(2))
        theirs.B = nn.Parameter(torch.view_as_real(torch.cat((B, B.conj())).resolve_conj()))
        theirs.C = nn.Parameter(torch.cat([torch.cat((part, part.conj()), dim=1) for part in C], dim=1))
        theirs.D.copy_(ours.D)
        x = torch.randn(2, 33, 6)
        y = F.gelu(torch.stack([theirs(row) for row in x]))
        torch.testing.assert_close(ours(x)[0], y * torch.sigmoid(ours.gate(y)), rtol=1e-4, atol=1e-5)


class Ours(nn.Module):
    """A projection of ours where torchscale has a wrapper around one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


@torch.no_grad()
def test_retnet_is_torchscale() -> None:
    """With one pair of features a head, since later ones turn at other rates, and the paper's group norm, of which
    later code has made an RMS norm. Their parallel and recurrent forms."""
    retention = pytest.importorskip("torchscale.component.multiscale_retention")
    torch.manual_seed(0)
    ours = RetNet(8, n_heads=4, norm_eps=1e-12)
    args: Any = SimpleNamespace(multiway=False, layernorm_eps=1e-12)
    theirs = retention.MultiScaleRetention(args, 8, 16, 4)
    parts = ours.in_proj.weight.detach().split([8, 8, 16, 16])
    for name, weight in zip(("q_proj", "k_proj", "v_proj", "g_proj"), parts, strict=True):
        setattr(theirs, name, Ours(weight))
    theirs.out_proj = Ours(ours.out_proj.weight.detach())
    theirs.group_norm = nn.LayerNorm(4, eps=1e-12, elementwise_affine=False)
    x = torch.randn(2, 12, 8)
    expected, _ = ours(x)
    places = torch.arange(12.0)
    log_decay = ours.log_decay(x.device)
    turn = places[:, None].sin().expand(-1, 2), places[:, None].cos().expand(-1, 2)
    mask = torch.exp((places[:, None] - places) * log_decay[:, None, None]).tril()
    torch.testing.assert_close(theirs(x, (turn, mask)), expected, rtol=1e-4, atol=1e-5)
    memory: dict[str, torch.Tensor] = {}
    for t in range(12):
        at = (turn[0][t], turn[1][t])
        y = theirs(x[:, t : t + 1], (at, log_decay.exp()), incremental_state=memory)
        torch.testing.assert_close(y[:, 0], expected[:, t], rtol=1e-4, atol=1e-5)


@pytest.fixture
def _precision_kept() -> Iterator[None]:
    """What importing rwkv changes, which allows TF32 everywhere."""
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.usefixtures("_precision_kept")
@torch.no_grad()
def test_rwkv_is_the_authors_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole RWKV-4 of two layers, read by its authors' package from a file as they write it."""
    for flag in ("RWKV_JIT_ON", "RWKV_CUDA_ON", "RWKV_V7_ON"):
        monkeypatch.setenv(flag, "0")
    package = pytest.importorskip("rwkv.model")
    torch.manual_seed(0)
    width, tokens = 8, torch.randint(11, (9,)).tolist()
    weights = {"emb.weight": torch.randn(11, width), "head.weight": torch.randn(11, width)}
    norms = {name: nn.LayerNorm(width) for name in ("blocks.0.ln0", "ln_out")}
    mixers: dict[str, Any] = {}
    for layer in range(2):
        norms |= {f"blocks.{layer}.ln{n}": nn.LayerNorm(width) for n in (1, 2)}
        mixers |= {f"blocks.{layer}.att": RWKV4(width), f"blocks.{layer}.ffn": RWKV4Channels(width)}
    for prefix, module in (norms | mixers).items():
        for name, parameter in module.named_parameters():
            parameter += 0.5 * torch.randn_like(parameter)
            weights[f"{prefix}.{name}"] = parameter.view(1, 1, width) if "time_mix" in name else parameter
    # Copies: the reader changes what it has read in place.
    torch.save({name: tensor.detach().clone() for name, tensor in weights.items()}, tmp_path / "model.pth")
    theirs = package.RWKV(model=str(tmp_path / "model"), strategy="cpu fp32", verbose=False)

    x = norms["blocks.0.ln0"](weights["emb.weight"][tokens])[None]
    for layer in range(2):
        x = x + mixers[f"blocks.{layer}.att"](norms[f"blocks.{layer}.ln1"](x))[0]
        x = x + mixers[f"blocks.{layer}.ffn"](norms[f"blocks.{layer}.ln2"](x))[0]
    expected = F.linear(norms["ln_out"](x), weights["head.weight"])[0]
    state = None
    for place, token in enumerate(tokens):
        logits, state = theirs.forward([token], state)
        torch.testing.assert_close(logits, expected[place], rtol=1e-4, atol=1e-4)
    logits, _ = theirs.forward(tokens, None)
    torch.testing.assert_close(logits, expected[-1], rtol=1e-4, atol=1e-4)
