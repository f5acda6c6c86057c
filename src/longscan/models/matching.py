"""Models of about one number of parameters: the width is what gives way."""

from __future__ import annotations

import bisect
import functools
from dataclasses import replace
from typing import Any

import torch

from longscan.errors import ArgumentError, ConfigError
from longscan.models.config import TRANSFORMER, LanguageModelConfig
from longscan.models.language_model import LanguageModel
from longscan.models.options import mixer_option_names

# Multiples of the width that are tried one after the other until the mixer takes one.
_SEARCHED = 256


#: Whole architectures that can be named in a mixer's place -> their fields, and the width of their MLPs over d_model.
ARCHITECTURES: dict[str, tuple[dict[str, Any], float]] = {
    "transformer": (TRANSFORMER, 4),
    "transformer++": ({"mixer": "attention"}, 8 / 3),
}


def contestant(name: str, shape: LanguageModelConfig) -> LanguageModelConfig:
    """The shape with another mixer: "mamba", or "h3/s4d" for one inside a block shape.

    "transformer" and "transformer++" are attention in the architectures of these names, whose MLPs are as wide as is
    usual where the shape has none.

    Inside a block, a mixer that has a form without projections of its own (the option ``bare``) takes it: the block has
    them.

    Raises:
        ArgumentError: there is no such mixer or block.
    """
    if name in ARCHITECTURES:
        fields, ratio = ARCHITECTURES[name]
        usual = {"mixer_options": {}, "d_intermediate": shape.d_intermediate or round(ratio * shape.d_model)}
        return replace(shape, block="plain", block_options={}, **{**usual, **fields})
    block, _, mixer = name.rpartition("/")
    try:
        config = replace(shape, mixer=mixer, mixer_options={}, block=block or "plain", block_options={})
        if block and "bare" in mixer_option_names(mixer):
            config = replace(config, mixer_options={"bare": True})
    except ConfigError as error:
        raise ArgumentError(f"mixers: {name!r}: {error}") from None
    return config


def parameters(config: LanguageModelConfig) -> int:
    """How many a model of this shape has; no memory is taken for them."""
    with torch.device("meta"):
        return LanguageModel(config).num_parameters()


def match(config: LanguageModelConfig, target: int, multiple: int = 4) -> LanguageModelConfig:
    """The shape with the width (one that the mixer takes) that comes nearest to ``target`` parameters; the MLP's width
    keeps its proportion, as nearly as multiples allow.

    Args:
        config: the shape whose width and MLP are to be changed.
        target: number of parameters.
        multiple: both widths are multiples of this.

    Raises:
        ArgumentError: no width gives a model.
    """
    ratio = config.d_intermediate / config.d_model
    refused = ""

    @functools.cache
    def size(units: int) -> int | None:
        """Parameters at this width, if the mixer takes it."""
        nonlocal refused
        try:
            return parameters(_of_width(config, units, ratio, multiple))
        except ArgumentError as error:  # a number of heads that does not divide it, for one
            refused = str(error)
            return None

    def from_here(units: int) -> int:
        """The next width that is taken."""
        for wider in range(units, units + _SEARCHED):
            if size(wider) is not None:
                return wider
        raise ArgumentError(f"no width of {config.mixer!r} gives a model: {refused}")

    def size_from_here(units: int) -> int:
        return size(from_here(units)) or 0

    most = 1
    while size_from_here(most) < target:
        most *= 2
    above = from_here(bisect.bisect_left(range(most), target, lo=1, key=size_from_here))
    below = next((units for units in range(above - 1, 0, -1) if size(units) is not None), above)
    nearest = min((below, above), key=lambda units: abs((size(units) or 0) - target))
    return _of_width(config, nearest, ratio, multiple)


def _of_width(config: LanguageModelConfig, units: int, ratio: float, multiple: int) -> LanguageModelConfig:
    return replace(config, d_model=units * multiple, d_intermediate=round(ratio * units) * multiple)
