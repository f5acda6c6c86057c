"""The systems, one file each; a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from longscan.mixers.attention import Attention
from longscan.mixers.dilated_rnn import DilatedRNN
from longscan.mixers.h3 import H3
from longscan.mixers.hippo import HiPPO
from longscan.mixers.hyena import Hyena
from longscan.mixers.linear_attention import LinearAttention
from longscan.mixers.lmu import LMU
from longscan.mixers.lssl import LSSL
from longscan.mixers.lstm import LSTM
from longscan.mixers.mamba import Mamba
from longscan.mixers.mamba2 import Mamba2
from longscan.mixers.retnet import RetNet
from longscan.mixers.rwkv4 import RWKV4
from longscan.mixers.rwkv4_channels import RWKV4Channels
from longscan.mixers.s4 import S4
from longscan.mixers.s4d import S4D
from longscan.mixers.s5 import S5
from longscan.mixers.s6 import S6
from longscan.nn.blocks import BLOCKS
from longscan.nn.mixer import SequenceMixer

#: Name in configurations -> class.
MIXERS: dict[str, type[SequenceMixer]] = {
    "mamba": Mamba,
    "s4": S4,
    "mamba2": Mamba2,
    "s6": S6,
    "s4d": S4D,
    "s5": S5,
    "attention": Attention,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "rwkv4": RWKV4,
    "rwkv4_channels": RWKV4Channels,
    "h3": H3,
    "hyena": Hyena,
    "lssl": LSSL,
    "lstm": LSTM,
    "dilated_rnn": DilatedRNN,
    "lmu": LMU,
    "hippo": HiPPO,
}


def make_mixer(
    name: str,
    d_model: int,
    *,
    block: str = "plain",
    block_options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> SequenceMixer:
    """A registered mixer, by itself or inside a block shape.

    Args:
        name: key of :data:`MIXERS`.
        d_model: width of input and output.
        block: "plain", the mixer by itself, or a key of :data:`longscan.nn.blocks.BLOCKS`.
        block_options: keyword arguments of the block shape, and ``expand``, its inner width over d_model.
        device, dtype: of the parameters.
        options: keyword arguments of the mixer.
    """
    if block == "plain":
        return MIXERS[name](d_model, device=device, dtype=dtype, **options)
    shape, expand = BLOCKS[block]
    around = dict(block_options or {})
    d_inner = int(around.pop("expand", expand) * d_model)
    inner = MIXERS[name](d_inner, device=device, dtype=dtype, **options)
    return shape(d_model, inner, device=device, dtype=dtype, **around)


__all__ = [
    "H3",
    "LMU",
    "LSSL",
    "LSTM",
    "MIXERS",
    "RWKV4",
    "S4",
    "S4D",
    "S5",
    "S6",
    "Attention",
    "DilatedRNN",
    "HiPPO",
    "Hyena",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "RWKV4Channels",
    "RetNet",
    "make_mixer",
]
