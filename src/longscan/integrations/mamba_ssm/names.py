"""Which modules longscan stands in for, and where what they hold is found here."""

from __future__ import annotations

_HERE = "longscan.integrations.mamba_ssm"

#: What `__version__` says. Others ask whether mamba_ssm is at least 2.0.4 to learn whether it has Mamba-2. This one has
#: not, so it names the last version without. The local part says whose it is.
VERSIONS = {"mamba_ssm": "1.2.2+longscan", "causal_conv1d": "1.6.1+longscan"}


def _of(module: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"{_HERE}.{module}")


_CONV = _of("conv", "causal_conv1d_fn", "causal_conv1d_update")
_NORM = _of("norm", "RMSNorm", "layer_norm_fn", "rms_norm_fn")

#: Module -> public name -> the module of longscan that defines it under the same name. A module comes after its parent.
MODULES: dict[str, dict[str, str]] = {
    "mamba_ssm": {
        **_of("scan", "selective_scan_fn", "mamba_inner_fn"),
        **_of("module", "Mamba"),
        **_of("language_model", "MambaLMHeadModel"),
    },
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        **_of("scan", "selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref"),
        **_of("scan", "SelectiveScanFn", "MambaInnerFn"),
        **_of("conv", "causal_conv1d_fn"),
    },
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORM,
    # Its name in mamba-ssm 1.
    "mamba_ssm.ops.triton.layernorm": _NORM,
    "mamba_ssm.ops.triton.selective_state_update": _of("step", "selective_state_update", "selective_state_update_ref"),
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": _of("block", "Block"),
    # The block was here in mamba-ssm 1.
    "mamba_ssm.modules.mamba_simple": {**_of("module", "Mamba"), **_of("block", "Block")},
    "mamba_ssm.modules.mlp": _of("block", "GatedMLP"),
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _of("language_model", "MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": _of(
        "language_model", "MambaConfig", "MambaLMHeadModel", "MixerModel", "_init_weights", "create_block"
    ),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _of("generation", "GenerationMixin", "InferenceParams", "decode", "sample"),
    "mamba_ssm.utils.hf": _of("checkpoints", "load_config_hf", "load_state_dict_hf"),
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": {
        **_CONV,
        **_of("conv", "causal_conv1d_ref", "causal_conv1d_update_ref"),
    },
    "causal_conv1d.causal_conv1d_varlen": _of("conv", "causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"),
    "causal_conv1d.cpp_functions": _of(
        "conv_functions", "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function"
    ),
}
