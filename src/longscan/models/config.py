"""What a language model is made of, as one frozen dataclass that round-trips through JSON."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from longscan.errors import ConfigError
from longscan.mixers import MIXERS


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Shape of a :class:`longscan.LanguageModel`.

    Args:
        d_model: width of the residual stream.
        n_layer: number of residual blocks.
        vocab_size: number of tokens; tokens are ``0 .. vocab_size - 1``.
        mixer: name of a registered mixer, or a tuple of names that the layers cycle over
            (``("mamba", "mamba", "attention")``: every third layer attends).
        mixer_options: keyword arguments of the mixer. With a tuple of mixers, one mapping per mixer name
            (``{"attention": {"n_heads": 8}}``).
        d_intermediate: width of the gated MLP after each mixer; 0 means none.
        norm_eps: epsilon of every RMS norm.
        residual_in_fp32: keep the residual stream in float32 whatever the activations' dtype.
        tie_embeddings: the output matrix is the embedding.
        pad_vocab_size_multiple: rows of the embedding are rounded up to a multiple of this. Padding rows are never
            output.

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

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("residual_in_fp32", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.norm_eps, (int, float)) or isinstance(self.norm_eps, bool) or not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be a positive number, got {self.norm_eps!r}")
        if not isinstance(self.mixer, str):
            if not isinstance(self.mixer, (list, tuple)) or not self.mixer:
                raise ConfigError(f"mixer must be a name or a non-empty list of names, got {self.mixer!r}")
            object.__setattr__(self, "mixer", tuple(self.mixer))
        for name in self.mixer_names:
            if name not in MIXERS:
                raise ConfigError(
                    f"mixer {name!r} is not registered{_closest(name, MIXERS)}; known: {', '.join(MIXERS)}"
                )
        if not isinstance(self.mixer_options, Mapping):
            raise ConfigError(f"mixer_options must be a mapping, got {type(self.mixer_options).__name__}")
        object.__setattr__(self, "mixer_options", dict(self.mixer_options))
        self._check_options()

    def _check_options(self) -> None:
        if not isinstance(self.mixer, str):
            for key, value in self.mixer_options.items():
                if key not in self.mixer or not isinstance(value, Mapping):
                    raise ConfigError(
                        f"mixer_options[{key!r}]: with several mixers, options are one mapping per mixer name, "
                        f"like {{{self.mixer[0]!r}: {{...}}}}; mixers here: {', '.join(dict.fromkeys(self.mixer))}"
                    )
        for name in self.mixer_names:
            allowed = mixer_option_names(name)
            for key in self.options_of(name):
                if key not in allowed:
                    raise ConfigError(
                        f"mixer_options: {name!r} has no option {key!r}{_closest(key, allowed)}; "
                        f"allowed: {', '.join(allowed)}"
                    )

    @property
    def mixer_names(self) -> tuple[str, ...]:
        """The cycle of mixer names."""
        return (self.mixer,) if isinstance(self.mixer, str) else self.mixer

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def mixer_of(self, layer: int) -> str:
        """Name of the mixer of a layer."""
        return self.mixer_names[layer % len(self.mixer_names)]

    def options_of(self, mixer: str) -> dict[str, Any]:
        """Keyword arguments for a mixer of this name."""
        options = self.mixer_options if isinstance(self.mixer, str) else self.mixer_options.get(mixer, {})
        return dict(options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LanguageModelConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown key (named, with the closest allowed one), or a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a model configuration is a mapping of names to values, got {type(values).__name__}")
        allowed = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"{key!r}{_closest(key, allowed)}" for key in values if key not in allowed]
        if unknown:
            raise ConfigError(f"unknown configuration keys: {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> LanguageModelConfig:
        """Inverse of :meth:`to_json`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"configuration is not valid JSON: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LanguageModelConfig:
        """A published size, such as ``"mamba-130m"`` or ``"transformer++-125m"``, with fields changed by keyword.

        Sizes of Mamba: the released models (Gu and Dao 2023, Table 12, layers doubled), GPT-NeoX vocabulary.
        Transformer++ (rotary positions, SwiGLU, RMS norm, no biases) takes the same table's layers, widths and heads.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}{_closest(name, PRESETS)}; known: {', '.join(PRESETS)}")
        values = {**PRESETS[name], **changes}
        return cls.from_dict(values)


_LEAST = {"d_model": 1, "n_layer": 1, "vocab_size": 1, "d_intermediate": 0, "pad_vocab_size_multiple": 1}


def mixer_option_names(mixer: str) -> list[str]:
    """Keyword arguments that configure a registered mixer."""
    names = list(inspect.signature(MIXERS[mixer].__init__).parameters)
    return [name for name in names if name not in ("self", "d_model", "device", "dtype")]


def _closest(key: object, allowed: Any) -> str:
    matches = difflib.get_close_matches(str(key), list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


_NEOX_VOCABULARY = 50277


def _mamba(n_layer: int, d_model: int) -> dict[str, Any]:
    return {"d_model": d_model, "n_layer": n_layer, "vocab_size": _NEOX_VOCABULARY, "mixer": "mamba"}


def _transformer(n_layer: int, d_model: int, n_heads: int) -> dict[str, Any]:
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
    "transformer++-125m": _transformer(12, 768, 12),
    "transformer++-350m": _transformer(24, 1024, 16),
    "transformer++-760m": _transformer(24, 1536, 16),
    "transformer++-1.3b": _transformer(24, 2048, 32),
    "transformer++-2.7b": _transformer(32, 2560, 32),
}
