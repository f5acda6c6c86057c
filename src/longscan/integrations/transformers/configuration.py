"""Our configuration as one of Transformers'."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from longscan.models.config import LanguageModelConfig

_FIELDS = tuple(field.name for field in dataclasses.fields(LanguageModelConfig))


class LongscanConfig(PreTrainedConfig):
    """The fields of :class:`longscan.LanguageModelConfig`, same defaults, same checks, and those of Transformers.

    Args:
        use_cache: whether a model that is not in training keeps a state, so that it can go on.

    Raises:
        ConfigError: a field of ours is not allowed.
    """

    model_type = "longscan"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    d_model: int = 256
    n_layer: int = 4
    vocab_size: int = 256
    mixer: Any = "mamba"
    mixer_options: Any = None
    d_intermediate: int = 0
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    block: str = "plain"
    block_options: Any = None
    norm: str = "rms"
    prenorm: bool = True
    mlp: str = "gated"
    positions: str = "none"
    max_positions: int = 0
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in self.to_longscan().to_dict().items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    def to_longscan(self) -> LanguageModelConfig:
        """The configuration without what Transformers adds."""
        values = {name: getattr(self, name) for name in _FIELDS}
        options = {name: values[name] or {} for name in ("mixer_options", "block_options")}
        return LanguageModelConfig.from_dict({**values, **options})

    @classmethod
    def from_longscan(cls, config: LanguageModelConfig, **more: Any) -> LongscanConfig:
        """From a configuration of ours; ``more`` are fields of Transformers (``eos_token_id`` and so on)."""
        return cls(**config.to_dict(), **more)
