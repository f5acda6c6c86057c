"""Hugging Face Transformers: its Mamba-1 models on our operators, and our models as its own.

    import longscan.integrations.transformers as hf
    hf.enable()     # MambaForCausalLM, Falcon Mamba, Jamba, Zamba: faster, the same outputs; hf.disable() undoes it
    hf.register()   # AutoModelForCausalLM.from_pretrained(a folder of LanguageModel.save_pretrained)

With LONGSCAN_TRANSFORMERS=1 in the environment, `import longscan` does both; a program that knows nothing of longscan
runs with both by ``python -m longscan.integrations.transformers program.py``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from longscan.integrations.transformers.patches import FAMILIES, Enabled, disable, enable, enabled

if TYPE_CHECKING:
    from longscan.integrations.transformers.card import model_card
    from longscan.integrations.transformers.configuration import LongscanConfig
    from longscan.integrations.transformers.modeling import LongscanCache, LongscanForCausalLM
    from longscan.integrations.transformers.tokenizer import tokenizer_of

__all__ = [
    "FAMILIES",
    "Enabled",
    "LongscanCache",
    "LongscanConfig",
    "LongscanForCausalLM",
    "disable",
    "enable",
    "enabled",
    "model_card",
    "register",
    "tokenizer_of",
]


#: Looked at by `import longscan`, see :func:`enable_from_environment`.
VARIABLE = "LONGSCAN_TRANSFORMERS"


def _check_installed() -> None:
    from longscan.errors import IntegrationError

    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise IntegrationError(f"transformers cannot be imported ({error}); install longscan[transformers]") from error


def register() -> None:
    """Make our models known to ``AutoConfig`` and ``AutoModelForCausalLM`` (and so to ``pipeline``) by their folders.

    Raises:
        IntegrationError: Transformers is not installed.
    """
    _check_installed()
    from transformers import AutoConfig, AutoModelForCausalLM

    from longscan.integrations.transformers.configuration import LongscanConfig
    from longscan.integrations.transformers.modeling import LongscanForCausalLM

    AutoConfig.register("longscan", LongscanConfig, exist_ok=True)
    AutoModelForCausalLM.register(LongscanConfig, LongscanForCausalLM, exist_ok=True)


# These are made of Transformers' classes, so they wait until somebody asks for them.
_LATER = {
    "LongscanCache": "modeling",
    "LongscanConfig": "configuration",
    "LongscanForCausalLM": "modeling",
    "model_card": "card",
    "tokenizer_of": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        import importlib

        _check_installed()
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def enable_from_environment() -> None:
    """Do what the environment variable LONGSCAN_TRANSFORMERS asks for: with 1 :func:`enable` and :func:`register`.

    Raises:
        ArgumentError: it is neither "1", "0" nor empty.
        IntegrationError: as of those two.
    """
    from longscan.errors import ArgumentError

    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ArgumentError(f"{VARIABLE}: got {value!r}, allowed are 1 and 0")
    if value == "1":
        enable()
        register()
