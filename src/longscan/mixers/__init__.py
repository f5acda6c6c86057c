"""The systems, one file each; a new one is a file and a line here."""

from __future__ import annotations

from longscan.mixers.attention import Attention
from longscan.mixers.dilated_rnn import DilatedRNN
from longscan.mixers.linear_attention import LinearAttention
from longscan.mixers.lstm import LSTM
from longscan.mixers.mamba import Mamba
from longscan.mixers.mamba2 import Mamba2
from longscan.mixers.retnet import RetNet
from longscan.mixers.rwkv4 import RWKV4
from longscan.mixers.s4d import S4D
from longscan.nn.mixer import SequenceMixer

#: Name in configurations -> class.
MIXERS: dict[str, type[SequenceMixer]] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4d": S4D,
    "attention": Attention,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "rwkv4": RWKV4,
    "lstm": LSTM,
    "dilated_rnn": DilatedRNN,
}

__all__ = ["LSTM", "MIXERS", "RWKV4", "S4D", "Attention", "DilatedRNN", "LinearAttention", "Mamba", "Mamba2", "RetNet"]
