"""Models of about one number of parameters: the width is what gives way."""

from __future__ import annotations

from dataclasses import replace

import torch

from longscan.errors import ArgumentError, ConfigError
from longscan.models.config import LanguageModelConfig
from longscan.models.language_model import LanguageModel
from longscan.models.options import mixer_option_names


def contestant(name: str, shape: LanguageModelConfig) -> LanguageModelConfig:
    """The shape with another mixer: "mamba", or "h3/s4d" for one inside a block shape.

    Inside a block, a mixer that has a form without projections of its own (the option ``bare``) takes it: the block has
    them.

    Raises:
        ArgumentError: there is no such mixer or block.
    """
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
    keeps its proportion.

    Args:
        config: the shape whose width and MLP are to be changed.
        target: number of parameters.
        multiple: widths that are tried are multiples of this.

    Raises:
        ArgumentError: no width gives a model.
    """
    ratio = config.d_intermediate / config.d_model
    best: tuple[int, LanguageModelConfig] | None = None
    width, refused = 0, ""
    while True:
        width += multiple
        wide = replace(config, d_model=width, d_intermediate=round(ratio * width))
        try:
            size = parameters(wide)
        except ArgumentError as error:  # a number of heads that does not divide it, for one
            refused = str(error)
            if width > 64 * config.d_model:
                break
            continue
        if best is None or abs(size - target) < best[0]:
            best = abs(size - target), wide
        if size > target:
            break
    if best is None:
        raise ArgumentError(f"no width of {config.mixer!r} gives a model: {refused}")
    return best[1]
