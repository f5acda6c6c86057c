"""Linear-time sequence modelling for PyTorch: Mamba, and the line of systems it stands on."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longscan.mixers import (
        H3,
        LMU,
        LSSL,
        LSTM,
        RWKV4,
        S4,
        S4D,
        S5,
        S6,
        Attention,
        DilatedRNN,
        HiPPO,
        Hyena,
        LinearAttention,
        Mamba,
        Mamba2,
        RetNet,
        RWKV4Channels,
    )
    from longscan.models import LanguageModel, LanguageModelConfig
    from longscan.nn import SequenceMixer, State
    from longscan.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

__version__ = "0.1.0"

# Name -> module. Imported when first used, so that `import longscan` costs nothing beyond torch.
_EXPORTS = {
    "H3": "longscan.mixers",
    "LMU": "longscan.mixers",
    "LSSL": "longscan.mixers",
    "LSTM": "longscan.mixers",
    "Attention": "longscan.mixers",
    "DilatedRNN": "longscan.mixers",
    "HiPPO": "longscan.mixers",
    "Hyena": "longscan.mixers",
    "LanguageModel": "longscan.models",
    "LanguageModelConfig": "longscan.models",
    "LinearAttention": "longscan.mixers",
    "Mamba": "longscan.mixers",
    "Mamba2": "longscan.mixers",
    "RWKV4": "longscan.mixers",
    "RWKV4Channels": "longscan.mixers",
    "RetNet": "longscan.mixers",
    "S4": "longscan.mixers",
    "S4D": "longscan.mixers",
    "S5": "longscan.mixers",
    "S6": "longscan.mixers",
    "SequenceMixer": "longscan.nn",
    "State": "longscan.nn",
    "causal_conv1d": "longscan.ops",
    "causal_conv1d_update": "longscan.ops",
    "selective_scan": "longscan.ops",
    "selective_state_update": "longscan.ops",
}

__all__ = [
    "H3",
    "LMU",
    "LSSL",
    "LSTM",
    "RWKV4",
    "S4",
    "S4D",
    "S5",
    "S6",
    "Attention",
    "DilatedRNN",
    "HiPPO",
    "Hyena",
    "LanguageModel",
    "LanguageModelConfig",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "RWKV4Channels",
    "RetNet",
    "SequenceMixer",
    "State",
    "__version__",
    "causal_conv1d",
    "causal_conv1d_update",
    "selective_scan",
    "selective_state_update",
]


# Imported when first used, too.
_SUBMODULES = {
    "bench",
    "diagnostics",
    "errors",
    "evaluation",
    "experiments",
    "integrations",
    "mixers",
    "models",
    "nn",
    "ops",
    "plots",
    "statespace",
    "tasks",
    "training",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"longscan.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'longscan' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})


for _variable, _module in (
    ("LONGSCAN_MAMBA_SSM", "longscan.integrations.mamba_ssm.install"),
    ("LONGSCAN_TRANSFORMERS", "longscan.integrations.transformers"),
):
    if os.environ.get(_variable):
        importlib.import_module(_module).enable_from_environment()
