"""What a language model is made of, as one frozen dataclass that round-trips through JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from longscan.errors import ConfigError
from longscan.models.options import Config, MixerChoice, check_positions, closest
from longscan.nn.mlp import MLPS
from longscan.nn.norms import ADD_NORMS
from longscan.nn.positions import POSITIONS


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(MixerChoice, Config):
    """Shape of a :class:`longscan.LanguageModel`.

    Args:
        d_model: width of the residual stream.
        n_layer: number of residual blocks.
        vocab_size: number of tokens; tokens are ``0 .. vocab_size - 1``.
        mixer: name of a registered mixer, or a tuple of names that the layers cycle over
            (``("mamba", "mamba", "attention")``: every third layer attends).
        mixer_options: keyword arguments of the mixer. With a tuple of mixers, one mapping per mixer name
            (``{"attention": {"n_heads": 8}}``).
        d_intermediate: width of the MLP after each mixer; 0 means none.
        norm_eps: epsilon of every norm.
        residual_in_fp32: keep the residual stream in float32 whatever the activations' dtype.
        tie_embeddings: the output matrix is the embedding.
        pad_vocab_size_multiple: rows of the embedding are rounded up to a multiple of this. Padding rows are never
            output.
        block: "plain", or the shape around each mixer: "h3", "mamba" or "ungated" (:mod:`longscan.nn.blocks`).
        block_options: keyword arguments of that shape, such as ``{"expand": 2, "d_conv": 4}``.
        norm: "rms" or "layer".
        prenorm: norms stand before mixers and MLPs, and one before the head (GPT-2's order); else after each sum (the
            first Transformer's).
        mlp: "gated" (SwiGLU), or plain with biases and this between its matrices: "relu", "gelu", or "gelu_tanh",
            GPT-2's approximation of it.
        positions: "none" (mixers tell positions apart by themselves), or what is added to embeddings: "learned", or
            "sinusoidal", which multiplies embeddings by the root of d_model first (Vaswani et al. 2017, section 3.4).
        max_positions: tokens of the longest sequence, of learned positions.

    Raises:
        ConfigError: a value is not allowed, a mixer is not registered or does not know an option.
    """

    d_model: int = 256
    n_layer: int = 4
    vocab_size: int = 256
    mixer: str | tuple[str, ...] = "mamba"
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    d_intermediate: int = 0
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    block: str = "plain"
    block_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norm: str = "rms"
    prenorm: bool = True
    mlp: str = "gated"
    positions: str = "none"
    max_positions: int = 0

    def __post_init__(self) -> None:
        self.check_integers(_LEAST)
        self.check_names({"norm": tuple(ADD_NORMS), "mlp": MLPS, "positions": POSITIONS})
        check_positions(self.positions, self.max_positions)
        for name in ("residual_in_fp32", "tie_embeddings", "prenorm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.norm_eps, (int, float)) or isinstance(self.norm_eps, bool) or not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be a positive number, got {self.norm_eps!r}")
        self.check_mixers()

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LanguageModelConfig:
        """A published size, such as ``"mamba-130m"`` or ``"transformer-125m"``, with fields changed by keyword.

        Sizes of Mamba: the released models (Gu and Dao 2023, Table 12, layers doubled), GPT-NeoX vocabulary.
        Transformer++ (rotary positions, SwiGLU, RMS norm, no biases) takes the same table's layers, widths and heads,
        and so does Transformer (:data:`TRANSFORMER`, as GPT-3: 2,048 learned positions, MLPs of four times the width).
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}{closest(name, PRESETS)}; known: {', '.join(PRESETS)}")
        values = {**PRESETS[name], **changes}
        return cls.from_dict(values)


_LEAST = {
    "d_model": 1,
    "n_layer": 1,
    "vocab_size": 1,
    "d_intermediate": 0,
    "pad_vocab_size_multiple": 1,
    "max_positions": 0,
}


_NEOX_VOCABULARY = 50277

#: The first Transformer's decoder (Vaswani et al. 2017) in the order of GPT-2: absolute positions, layer norms before
#: mixers and plain MLPs, biases. ``prenorm=False`` and ``mlp="relu"`` are the order and the MLP of 2017.
TRANSFORMER: dict[str, Any] = {
    "mixer": "attention",
    "mixer_options": {"rotary": False, "bias": True},
    "norm": "layer",
    "mlp": "gelu_tanh",
    "positions": "sinusoidal",
}


def _mamba(n_layer: int, d_model: int) -> dict[str, Any]:
    return {"d_model": d_model, "n_layer": n_layer, "vocab_size": _NEOX_VOCABULARY, "mixer": "mamba"}


def _transformer(n_layer: int, d_model: int, n_heads: int) -> dict[str, Any]:
    return {
        **TRANSFORMER,
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": _NEOX_VOCABULARY,
        "mixer_options": {**TRANSFORMER["mixer_options"], "n_heads": n_heads},
        "d_intermediate": 4 * d_model,
        "positions": "learned",
        "max_positions": 2048,
    }


def _transformer_plus(n_layer: int, d_model: int, n_heads: int) -> dict[str, Any]:
    # A SwiGLU of width 8/3 d_model holds as many parameters as the usual MLP of width 4 d_model; rounded up to 128.
    d_intermediate = -(-8 * d_model // (3 * 128)) * 128
    return {
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": _NEOX_VOCABULARY,
        "mixer": "attention",
        "mixer_options": {"n_heads": n_heads},
        "d_intermediate": d_intermediate,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "mamba-130m": _mamba(24, 768),
    "mamba-370m": _mamba(48, 1024),
    "mamba-790m": _mamba(48, 1536),
    "mamba-1.4b": _mamba(48, 2048),
    "mamba-2.8b": _mamba(64, 2560),
    "transformer++-125m": _transformer_plus(12, 768, 12),
    "transformer++-350m": _transformer_plus(24, 1024, 16),
    "transformer++-760m": _transformer_plus(24, 1536, 16),
    "transformer++-1.3b": _transformer_plus(24, 2048, 32),
    "transformer++-2.7b": _transformer_plus(32, 2560, 32),
    "transformer-125m": _transformer(12, 768, 12),
    "transformer-350m": _transformer(24, 1024, 16),
    "transformer-760m": _transformer(24, 1536, 16),
    "transformer-1.3b": _transformer(24, 2048, 32),
    "transformer-2.7b": _transformer(32, 2560, 32),
}
