"""What Transformers calls the memory of a model: it has changed with its versions, and with its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Names of a cache among arguments and outputs, the newest first: up to 5.23 Mamba has `cache_params` and the hybrids
#: have `past_key_values`; from 5.24 on everyone has `cache`.
NAMES = ("cache", "cache_params", "past_key_values")


def cache_of(output: Any) -> Any:
    """The cache of an output, under whatever name; None if there is none."""
    return next((value for name in NAMES if (value := getattr(output, name, None)) is not None), None)


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, likewise."""
    return next((value for name in NAMES if (value := arguments.get(name)) is not None), None)


def output_with_cache(kind: Any, cache: Any, **fields: Any) -> Any:
    """An output of this class, with a cache under the name that the class has for it."""
    name = next(name for name in NAMES if name in kind.__dataclass_fields__)
    return kind(**{name: cache}, **fields)
