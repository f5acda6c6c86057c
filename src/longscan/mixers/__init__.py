"""The systems, one file each; a new one is a file and a line here."""

from __future__ import annotations

from longscan.mixers.attention import Attention
from longscan.mixers.dilated_rnn import DilatedRNN
from longscan.mixers.hippo import HiPPO
from longscan.mixers.linear_attention import LinearAttention
from longscan.mixers.lmu import LMU
from longscan.mixers.lssl import LSSL
from longscan.mixers.lstm import LSTM
from longscan.mixers.mamba import Mamba
from longscan.mixers.retnet import RetNet
from longscan.mixers.rwkv4 import RWKV4
from longscan.mixers.s4d import S4D
from longscan.mixers.s5 import S5
from longscan.nn.mixer import SequenceMixer

#: Name in configurations -> class.
MIXERS: dict[str, type[SequenceMixer]] = {
    "mamba": Mamba,
    "s4d": S4D,
    "s5": S5,
    "attention": Attention,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "rwkv4": RWKV4,
    "lstm": LSTM,
    "dilated_rnn": DilatedRNN,
    "lmu": LMU,
    "hippo": HiPPO,
    "lssl": LSSL,
}

__all__ = [
    "LMU",
    "LSSL",
    "LSTM",
    "MIXERS",
    "RWKV4",
    "S4D",
    "S5",
    "Attention",
    "DilatedRNN",
    "HiPPO",
    "LinearAttention",
    "Mamba",
    "RetNet",
]
