"""Configurations and weight names of other packages' Mamba and Mamba-2 models, to ours and back.

- ``mamba-ssm``: the released models' layout (``state-spaces/mamba-130m``, ``state-spaces/mamba2-130m`` and their like),
  ``pytorch_model.bin``.
- ``transformers``: ``MambaForCausalLM``, ``FalconMambaForCausalLM`` and ``Mamba2ForCausalLM``, safetensors. It is the
  layout that vLLM and llama.cpp's converter read, so it is the road to a serving engine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longscan.errors import ConfigError
from longscan.models.config import LanguageModelConfig

FORMATS = ("longscan", "mamba-ssm", "transformers")

# Ours, by the name that Transformers calls architectures by.
_MODEL_TYPE = "longscan"

# A gated MLP's width in mamba-ssm is rounded up to a multiple of this.
_MLP_MULTIPLE = 128

# Options of the mixers by their names in Transformers' configurations.
_TRANSFORMERS_OPTIONS = {
    "mamba": {
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "expand": "expand",
        "dt_rank": "time_step_rank",
        "dt_scale": "time_step_scale",
        "dt_min": "time_step_min",
        "dt_max": "time_step_max",
        "dt_init": "time_step_init_scheme",
        "dt_init_floor": "time_step_floor",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
    },
    "mamba2": {
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "expand": "expand",
        "head_dim": "head_dim",
        "n_groups": "n_groups",
        "dt_min": "time_step_min",
        "dt_max": "time_step_max",
        "dt_init_floor": "time_step_floor",
        "dt_limit": "time_step_limit",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
    },
}
_MIXERS = {"mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2"}

# The same in mamba-ssm's.
_MAMBA_SSM_OPTIONS = {
    "mamba": {
        name: name
        for name in (
            "d_state", "d_conv", "expand", "dt_rank", "dt_scale", "dt_min", "dt_max", "dt_init", "dt_init_floor",
            "bias", "conv_bias",
        )
    },
    "mamba2": {
        **{name: name for name in ("d_state", "d_conv", "expand", "dt_min", "dt_max", "dt_init_floor", "dt_limit")},
        "head_dim": "headdim", "n_groups": "ngroups", "a_range": "A_init_range",
        **{name: name for name in ("bias", "conv_bias")},
    },
}  # fmt: skip
_LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}

# What the layers of mamba-ssm can be beside that, and ours are not; and what is about speed alone.
_MAMBA_SSM_FIXED = {
    "d_ssm": (None,), "rmsnorm": (True,), "norm_before_gate": (False,), "D_has_hdim": (False,), "conv_init": (None,),
    "activation": ("swish", "silu"),
}  # fmt: skip
_MAMBA_SSM_SPEED = ("use_fast_path", "use_mem_eff_path", "chunk_size")


def recognise(values: Mapping[str, Any]) -> str:
    """The format that a ``config.json`` is of."""
    if "model_type" in values:
        return "longscan" if values["model_type"] == _MODEL_TYPE else "transformers"
    if "ssm_cfg" in values or "rms_norm" in values:
        return "mamba-ssm"
    return "longscan"


def read_config(values: Mapping[str, Any]) -> LanguageModelConfig:
    """Our configuration of a model that any of the formats describes.

    Raises:
        ConfigError: it is of another architecture, or has a setting that our model has not; the message names it.
    """
    kind = recognise(values)
    if kind == "transformers":
        return _from_transformers(values)
    if kind == "mamba-ssm":
        return _from_mamba_ssm(values)
    values = {name: value for name, value in values.items() if name not in ("model_type", "architectures")}
    if "transformers_version" in values:
        # Transformers has written it: what is not ours in it is its own.
        ours = {field.name for field in dataclasses.fields(LanguageModelConfig)}
        values = {name: value for name, value in values.items() if name in ours}
    return LanguageModelConfig.from_dict(values)


def write_config(config: LanguageModelConfig, kind: str) -> dict[str, Any]:
    """The ``config.json`` of a format.

    Raises:
        ConfigError: the format cannot say what the model is; the message names what it is about.
    """
    if kind not in FORMATS:
        raise ConfigError(f"format: got {kind!r}; allowed are {', '.join(FORMATS)}")
    if kind == "longscan":
        # By the first two, Transformers knows whose it is (`longscan.integrations.transformers`).
        return {"model_type": _MODEL_TYPE, "architectures": ["LongscanForCausalLM"], **config.to_dict()}
    names = set(config.mixer_names)
    mixer = names.pop()
    if names or mixer not in _TRANSFORMERS_OPTIONS:
        raise ConfigError(
            f"format {kind!r} holds Mamba layers only, or Mamba-2 layers only; this model has "
            + ", ".join(config.mixer_names)
        )
    if config.block != "plain":
        raise ConfigError(f"format {kind!r} has no blocks around mixers, this model has {config.block!r}")
    own = LanguageModelConfig()
    for field in ("norm", "prenorm", "mlp", "positions"):
        if (value := getattr(config, field)) != getattr(own, field):
            raise ConfigError(f"format {kind!r} has {field} {getattr(own, field)!r}, this model {value!r}")
    options = dict(config.options_of(mixer))
    if not isinstance(config.mixer, str):
        config = LanguageModelConfig.from_dict({**config.to_dict(), "mixer": mixer, "mixer_options": options})
    if options.get("a_init") == "s4d-lin":
        raise ConfigError(f"format {kind!r} holds a real A only, this model's is complex")
    if mixer == "mamba2":
        inner = options.pop("norm_eps", 1e-5)
        if inner != config.norm_eps:
            raise ConfigError(
                f"format {kind!r} has one epsilon for all norms, this model has {config.norm_eps} and, inside, {inner}"
            )
        # Ours is less where the inner width is.
        options.setdefault("head_dim", min(64, int(options.get("expand", 2) * config.d_model)))
    return (_to_transformers if kind == "transformers" else _to_mamba_ssm)(config, mixer, options)


def rename(tensors: Mapping[str, Tensor], kind: str, *, out: bool) -> dict[str, Tensor]:
    """Weights under our names, from a format's; with ``out`` the other way round."""
    if kind != "transformers":
        return dict(tensors)
    ours, theirs = "backbone.embedding.weight", "backbone.embeddings.weight"
    old, new = (ours, theirs) if out else (theirs, ours)
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


def _expect(values: Mapping[str, Any], name: str, *allowed: Any) -> None:
    if name in values and values[name] not in allowed:
        shown = " or ".join(map(repr, allowed))
        raise ConfigError(f"{name}: got {values[name]!r}, expected {shown}: nothing else is supported")


def _required(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ConfigError(f"{name} is missing")
    return values[name]


def _from_transformers(values: Mapping[str, Any]) -> LanguageModelConfig:
    kind = values["model_type"]
    if kind not in _MIXERS:
        raise ConfigError(f"model_type: got {kind!r}, expected {', '.join(map(repr, _MIXERS))}")
    _expect(values, "hidden_act", "silu", "swish")
    mixer, eps = _MIXERS[kind], values.get("layer_norm_epsilon", 1e-5)
    options = {
        ours: _infinite(values[theirs]) for ours, theirs in _TRANSFORMERS_OPTIONS[mixer].items() if theirs in values
    }
    if mixer == "mamba" and "intermediate_size" in values:
        # It holds whatever `expand` says, which in the released Falcon Mamba is something else.
        options["expand"] = _whole(values["intermediate_size"] / _required(values, "hidden_size"))
    if kind == "falcon_mamba":
        options["selection_norm_eps"] = values.get("mixer_rms_eps", 1e-6)
    if mixer == "mamba2":
        options.setdefault("n_groups", 8)
        if eps != 1e-5:
            options["norm_eps"] = eps
    rows = _required(values, "vocab_size")
    vocabulary, multiple = values.get("unpadded_vocab_size", rows), values.get("pad_vocab_size_multiple", 1)
    if -(-vocabulary // multiple) * multiple != rows:
        # Somebody has resized the embedding since.
        vocabulary, multiple = rows, 1
    return LanguageModelConfig(
        d_model=_required(values, "hidden_size"),
        n_layer=_required(values, "num_hidden_layers"),
        vocab_size=vocabulary,
        mixer=mixer,
        mixer_options=options,
        norm_eps=eps,
        residual_in_fp32=values.get("residual_in_fp32", True),
        tie_embeddings=values.get("tie_word_embeddings", mixer != "mamba2"),
        pad_vocab_size_multiple=multiple,
    )


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _infinite(value: Any) -> Any:
    """JSON knows no infinity: Transformers writes ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_infinite(item) for item in value]
    return float(value["__float__"]) if isinstance(value, Mapping) and "__float__" in value else value


def _finite(value: Any) -> Any:
    """The inverse of :func:`_infinite`."""
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return {"__float__": "Infinity"} if value == math.inf else value


def _to_transformers(config: LanguageModelConfig, mixer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if config.d_intermediate:
        raise ConfigError("format 'transformers' has no MLPs, this model has (d_intermediate)")
    eps = options.get("selection_norm_eps")
    if mixer == "mamba2":
        kind, name = "mamba2", "Mamba2ForCausalLM"
    else:
        kind, name = ("mamba", "MambaForCausalLM") if eps is None else ("falcon_mamba", "FalconMambaForCausalLM")
    expand = options.get("expand", 2)
    if expand != int(expand):
        raise ConfigError(f"format 'transformers' takes a whole expand, this model has {expand}")
    values = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.padded_vocab_size,
        "unpadded_vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        # Said outright, for those who read the file without Transformers.
        "conv_kernel": 4,
        "expand": int(expand),
        "use_bias": False,
        "use_conv_bias": True,
    }
    if mixer == "mamba2":
        values |= {"state_size": 128, "n_groups": 1, "num_heads": int(expand) * config.d_model // options["head_dim"]}
    else:
        values |= {
            "state_size": 16,
            "intermediate_size": int(expand * config.d_model),
            "time_step_rank": -(-config.d_model // 16),
        }
    for ours, theirs in _TRANSFORMERS_OPTIONS[mixer].items():
        if ours in options and options[ours] != "auto":
            values[theirs] = _finite(options[ours])
    if eps is not None:
        values["mixer_rms_eps"] = eps
    return values


def _from_mamba_ssm(values: Mapping[str, Any]) -> LanguageModelConfig:
    _expect(values, "rms_norm", True)
    _expect(values, "attn_layer_idx", [], None)
    given = dict(values.get("ssm_cfg") or {})
    _expect(given, "layer", *_LAYERS)
    mixer = _LAYERS[given.pop("layer", "Mamba1")]
    for name, allowed in _MAMBA_SSM_FIXED.items():
        _expect(given, name, *allowed)
    names = _MAMBA_SSM_OPTIONS[mixer]
    if unknown := [name for name in given if name not in (*names.values(), *_MAMBA_SSM_FIXED, *_MAMBA_SSM_SPEED)]:
        raise ConfigError(f"ssm_cfg: unknown keys {', '.join(unknown)}; allowed: {', '.join(names.values())}")
    return LanguageModelConfig(
        d_model=_required(values, "d_model"),
        n_layer=_required(values, "n_layer"),
        vocab_size=_required(values, "vocab_size"),
        mixer=mixer,
        mixer_options={ours: given[theirs] for ours, theirs in names.items() if theirs in given},
        d_intermediate=-(-values.get("d_intermediate", 0) // _MLP_MULTIPLE) * _MLP_MULTIPLE,
        residual_in_fp32=values.get("residual_in_fp32", True),
        tie_embeddings=values.get("tie_embeddings", True),
        pad_vocab_size_multiple=values.get("pad_vocab_size_multiple", 8),
    )


def _to_mamba_ssm(config: LanguageModelConfig, mixer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if options.get("selection_norm_eps") is not None:
        raise ConfigError("format 'mamba-ssm' has no inner norms, this model has (selection_norm_eps)")
    if config.norm_eps != 1e-5:
        raise ConfigError(f"format 'mamba-ssm' has a norm_eps of 1e-5, this model's is {config.norm_eps}")
    if config.d_intermediate % _MLP_MULTIPLE:
        raise ConfigError(
            f"format 'mamba-ssm' has MLP widths that are multiples of {_MLP_MULTIPLE}, this model's is "
            f"{config.d_intermediate}"
        )
    layer = {theirs: options[ours] for ours, theirs in _MAMBA_SSM_OPTIONS[mixer].items() if ours in options}
    return {
        "d_model": config.d_model,
        "d_intermediate": config.d_intermediate,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        # Mamba-1 goes without its name, as in the files of packages that knew no other.
        "ssm_cfg": layer if mixer == "mamba" else {"layer": "Mamba2", **layer},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    }
