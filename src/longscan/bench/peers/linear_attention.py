"""The chunked kernels of others: flash-linear-attention's, and Mamba-2's own, where they are installed beside a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """Inputs as a peer takes them (q, k and v first), its call, and its gradient of v over ours where they differ."""

    inputs: Inputs
    call: Callable[..., Tensor]
    scale: Tensor | None = None


def _over_time(inputs: Inputs) -> Inputs:
    """The log-decay, if there is one, written out for every step."""
    if "log_decay" not in inputs:
        return inputs
    return {**inputs, "log_decay": inputs["log_decay"].expand(inputs["v"].shape[:3]).contiguous()}


def fla(inputs: Inputs) -> Peer:
    """`chunk_simple_gla`, or `chunk_linear_attn` where nothing decays; `inputs` are those of `decay_attention`.

    Raises:
        ImportError: flash-linear-attention is not installed, or the tensors are on the CPU.
    """
    _check_device(inputs, "flash-linear-attention")
    if "log_decay" not in inputs:
        from fla.ops.linear_attn import chunk_linear_attn

        return Peer(inputs, lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0])
    from fla.ops.simple_gla import chunk_simple_gla

    return Peer(_over_time(inputs), lambda q, k, v, log_decay: chunk_simple_gla(q, k, v, g=log_decay, scale=1.0)[0])


def ssd(inputs: Inputs) -> Peer:
    """Mamba-2's `mamba_chunk_scan_combined`, which multiplies its x by dt: A = -1, dt = -log_decay and x = v / dt.

    Raises:
        ImportError: mamba-ssm is not installed, the tensors are on the CPU, or nothing decays.
    """
    _check_device(inputs, "mamba-ssm")
    if "log_decay" not in inputs:
        raise ImportError("mamba-ssm has no form without decay")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    dt = -_over_time(inputs)["log_decay"].clamp(max=-1e-4)
    A = -torch.ones(dt.shape[2], device=dt.device)
    v = inputs["v"]
    taken = {"q": inputs["q"], "k": inputs["k"], "v": (v / dt[..., None]).to(v.dtype), "dt": dt}
    return Peer(
        taken, lambda q, k, v, dt: mamba_chunk_scan_combined(v, dt, A, k, q, chunk_size=256), scale=dt[..., None]
    )


def _check_device(inputs: Inputs, package: str) -> None:
    if inputs["q"].device.type != "cuda":
        raise ImportError(f"{package} runs on GPUs only")
