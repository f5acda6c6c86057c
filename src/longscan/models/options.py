"""What configurations of models share: JSON to and fro, and the choice of mixers and of the blocks around them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from longscan.errors import ConfigError, LongscanError
from longscan.mixers import MIXERS, make_mixer
from longscan.nn.blocks import BLOCKS, BlockShape
from longscan.nn.mixer import SequenceMixer

C = TypeVar("C", bound="Config")


class Config:
    """Base of a frozen dataclass of plain values that round-trips through JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown key (named, with the closest allowed one), or a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a model configuration is a mapping of names to values, got {type(values).__name__}")
        allowed = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [f"{key!r}{closest(key, allowed)}" for key in values if key not in allowed]
        if unknown:
            raise ConfigError(f"unknown configuration keys: {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return cls(**values)

    @classmethod
    def from_json(cls: type[C], text: str) -> C:
        """Inverse of :meth:`to_json`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"configuration is not valid JSON: {error}") from error
        return cls.from_dict(values)

    def check_integers(self, least: Mapping[str, int]) -> None:
        """Raise ConfigError unless each of these fields is an integer of at least so much."""
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise ConfigError(f"{name} must be an integer of at least {bound}, got {value!r}")

    def check_names(self, allowed: Mapping[str, Iterable[str]]) -> None:
        """Raise ConfigError unless each of these fields is one of its names."""
        for field, names in allowed.items():
            if (value := getattr(self, field)) not in tuple(names):
                raise ConfigError(f"{field} must be one of {', '.join(names)}; got {value!r}")


class MixerChoice:
    """Mixers that layers cycle over, and the block shape around them: the fields below, of a frozen dataclass."""

    n_layer: int
    mixer: str | tuple[str, ...]
    mixer_options: Mapping[str, Any]
    block: str
    block_options: Mapping[str, Any]

    def check_mixers(self) -> None:
        """Raise ConfigError unless all names and options are known; make lists tuples and mappings plain."""
        if not isinstance(self.mixer, str):
            if not isinstance(self.mixer, (list, tuple)) or not self.mixer:
                raise ConfigError(f"mixer must be a name or a non-empty list of names, got {self.mixer!r}")
            object.__setattr__(self, "mixer", tuple(self.mixer))
        for name in self.mixer_names:
            if not isinstance(name, str) or name not in MIXERS:
                raise ConfigError(
                    f"mixer {name!r} is not registered{closest(name, MIXERS)}; known: {', '.join(MIXERS)}"
                )
        for field in ("mixer_options", "block_options"):
            value = getattr(self, field)
            if not isinstance(value, Mapping):
                raise ConfigError(f"{field} must be a mapping, got {type(value).__name__}")
            object.__setattr__(self, field, dict(value))
        self._check_options()
        if self.block != "plain" and (not isinstance(self.block, str) or self.block not in BLOCKS):
            known = ("plain", *BLOCKS)
            raise ConfigError(f"block must be one of {', '.join(known)}; got {self.block!r}")
        allowed = block_option_names() if self.block != "plain" else []
        for key in self.block_options:
            if key not in allowed:
                raise ConfigError(
                    f"block_options: block {self.block!r} has no option {key!r}{closest(key, allowed)}; "
                    f"allowed: {', '.join(allowed) or 'none'}"
                )

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
                        f"mixer_options: {name!r} has no option {key!r}{closest(key, allowed)}; "
                        f"allowed: {', '.join(allowed)}"
                    )

    @property
    def mixer_names(self) -> tuple[str, ...]:
        """The cycle of mixer names."""
        return (self.mixer,) if isinstance(self.mixer, str) else self.mixer

    def mixer_of(self, layer: int) -> str:
        """Name of the mixer of a layer."""
        return self.mixer_names[layer % len(self.mixer_names)]

    def options_of(self, mixer: str) -> dict[str, Any]:
        """Keyword arguments for a mixer of this name."""
        options = self.mixer_options if isinstance(self.mixer, str) else self.mixer_options.get(mixer, {})
        return dict(options)

    def build_mixer(
        self,
        layer: int,
        d_model: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SequenceMixer:
        """The mixer of a layer, in its block. One that starts according to its place (RWKV-4) is told, as the share of
        the layers below it.

        Raises:
            ConfigError: an option has a value of the wrong kind.
        """
        name = self.mixer_of(layer)
        options = self.options_of(name)
        if "depth" in mixer_option_names(name):
            cycle = len(self.mixer_names)
            options.setdefault("depth", layer // cycle / -(-self.n_layer // cycle))
        try:
            return make_mixer(
                name,
                d_model,
                block=self.block,
                block_options=self.block_options,
                device=device,
                dtype=dtype,
                **options,
            )
        except (LongscanError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
            # Options come from files: any value of JSON can be among them.
            raise ConfigError(f"options of mixer {name!r} in block {self.block!r} cannot be used: {error}") from error


def check_positions(positions: str, max_positions: int) -> None:
    """Raise ConfigError unless learned positions, and only those, have a longest sequence."""
    if (positions == "learned") != (max_positions > 0):
        raise ConfigError(
            "max_positions must be the longest sequence's tokens with learned positions, and 0 with others; got "
            f"{max_positions} with positions {positions!r}"
        )


def mixer_option_names(mixer: str) -> list[str]:
    """Keyword arguments that configure a registered mixer."""
    names = list(inspect.signature(MIXERS[mixer].__init__).parameters)
    return [name for name in names if name not in ("self", "d_model", "device", "dtype")]


def block_option_names() -> list[str]:
    """Keyword arguments that configure a block shape."""
    names = list(inspect.signature(BlockShape.__init__).parameters)
    return ["expand", *(name for name in names if name not in ("self", "d_model", "inner", "device", "dtype"))]


def closest(key: object, allowed: Iterable[str]) -> str:
    """The allowed name that was meant, in words; nothing if none is near."""
    matches = difflib.get_close_matches(str(key), list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
