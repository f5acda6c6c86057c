"""Every argument, in the order and with the defaults of mamba-ssm 2.3 and causal-conv1d 1.6."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

from longscan.integrations.mamba_ssm.names import MODULES

_SCAN = "u delta A B C D=None z=None delta_bias=None delta_softplus=False return_last_state=False"
_INNER = (
    "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B=None C=None D=None "
    "delta_bias=None B_proj_bias=None C_proj_bias=None delta_softplus=True"
)
_STEP = "state x dt A B C D=None z=None dt_bias=None dt_softplus=False"
_CONV = "initial_states=None return_final_states=False final_states_out=None activation=None"
_CONV_STEP = "x conv_state weight bias=None activation=None cache_seqlens=None"
_NORM = (
    "x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 dropout_p=0.0 rowscale=None prenorm=False "
    "residual_in_fp32=False"
)
_SAMPLING = "top_k=1 top_p=0.0 min_p=0.0 temperature=1.0"
_PLACE = "device=None dtype=None"

SIGNATURES = {
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": _SCAN,
        "selective_scan_ref": _SCAN,
        "mamba_inner_fn": f"{_INNER} checkpoint_lvl=1 b_rms_weight=None c_rms_weight=None dt_rms_weight=None "
        "b_c_dt_rms_eps=1e-06",
        "mamba_inner_ref": _INNER,
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": f"{_STEP} state_batch_indices=None",
        "selective_state_update_ref": _STEP,
    },
    "mamba_ssm.ops.triton.layer_norm": {
        "layer_norm_fn": f"{_NORM} is_rms_norm=False return_dropout_mask=False",
        "rms_norm_fn": f"{_NORM} return_dropout_mask=False",
        "RMSNorm": f"hidden_size eps=1e-05 dropout_p=0.0 {_PLACE}",
        "RMSNorm.forward": "x residual=None prenorm=False residual_in_fp32=False",
    },
    "mamba_ssm.modules.mamba_simple": {
        "Mamba": "d_model d_state=16 d_conv=4 expand=2 dt_rank='auto' dt_min=0.001 dt_max=0.1 dt_init='random' "
        "dt_scale=1.0 dt_init_floor=0.0001 conv_bias=True bias=False use_fast_path=True layer_idx=None " + _PLACE,
        "Mamba.forward": "hidden_states inference_params=None",
        "Mamba.step": "hidden_states conv_state ssm_state",
        "Mamba.allocate_inference_cache": "batch_size max_seqlen dtype=None **kwargs",
        "Mamba._get_states_from_cache": "inference_params batch_size initialize_states=False",
    },
    "mamba_ssm.modules.block": {
        "Block.forward": "hidden_states residual=None inference_params=None **mixer_kwargs",
        "Block.allocate_inference_cache": "batch_size max_seqlen dtype=None **kwargs",
    },
    "mamba_ssm.models.config_mamba": {
        "MambaConfig": "d_model=2560 d_intermediate=0 n_layer=64 vocab_size=50277 ssm_cfg=[] attn_layer_idx=[] "
        "attn_cfg=[] rms_norm=True residual_in_fp32=True fused_add_norm=True pad_vocab_size_multiple=8 "
        "tie_embeddings=True",
    },
    "mamba_ssm.models.mixer_seq_simple": {
        "create_block": "d_model d_intermediate ssm_cfg=None attn_layer_idx=None attn_cfg=None norm_epsilon=1e-05 "
        f"rms_norm=False residual_in_fp32=False fused_add_norm=False layer_idx=None {_PLACE}",
        "_init_weights": "module n_layer initializer_range=0.02 rescale_prenorm_residual=True n_residuals_per_layer=1",
        "MixerModel": "d_model n_layer d_intermediate vocab_size ssm_cfg=None attn_layer_idx=None attn_cfg=None "
        f"norm_epsilon=1e-05 rms_norm=False initializer_cfg=None fused_add_norm=False residual_in_fp32=False {_PLACE}",
        "MixerModel.forward": "input_ids inference_params=None **mixer_kwargs",
        "MambaLMHeadModel": f"config initializer_cfg=None {_PLACE}",
        "MambaLMHeadModel.forward": "input_ids position_ids=None inference_params=None num_last_tokens=0 "
        "**mixer_kwargs",
        "MambaLMHeadModel.allocate_inference_cache": "batch_size max_seqlen dtype=None **kwargs",
        "MambaLMHeadModel.from_pretrained": f"pretrained_model_name {_PLACE} **kwargs",
        "MambaLMHeadModel.save_pretrained": "save_directory",
    },
    "mamba_ssm.utils.generation": {
        "InferenceParams": "max_seqlen max_batch_size seqlen_offset=0 batch_size_offset=0 key_value_memory_dict=[] "
        "lengths_per_sample=None",
        "sample": f"logits {_SAMPLING}",
        "decode": f"input_ids model max_length {_SAMPLING} repetition_penalty=1.0 eos_token_id=None "
        "teacher_outputs=None vocab_size=None cg=False enable_timing=False output_scores=False streamer=None",
        "GenerationMixin.generate": f"input_ids max_length {_SAMPLING} return_dict_in_generate=False "
        "output_scores=False **kwargs",
    },
    "mamba_ssm.utils.hf": {
        "load_config_hf": "model_name",
        "load_state_dict_hf": f"model_name {_PLACE}",
    },
    "causal_conv1d": {
        "causal_conv1d_fn": f"x weight bias=None seq_idx=None {_CONV}",
        "causal_conv1d_update": f"{_CONV_STEP} conv_state_indices=None",
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_ref": f"x weight bias=None {_CONV}",
        "causal_conv1d_update_ref": _CONV_STEP,
    },
    "causal_conv1d.causal_conv1d_varlen": {
        "causal_conv1d_varlen_states": "x cu_seqlens state_len",
        "causal_conv1d_varlen_states_ref": "x cu_seqlens state_len",
    },
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": "x weight bias seq_idx initial_states final_states_out silu_activation",
        "causal_conv1d_bwd_function": "x weight bias dout seq_idx initial_states dfinal_states dx "
        "return_dinitial_states silu_activation",
        "causal_conv1d_update_function": "x conv_state weight bias silu_activation cache_seqlens conv_state_indices",
    },
}


def spelled(function: Any) -> str:
    """Its parameters as they are written above; a default made anew by each call is []."""
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind == parameter.VAR_KEYWORD:
            words.append(f"**{parameter.name}")
        elif parameter.default is parameter.empty:
            words.append(parameter.name)
        else:
            made = type(parameter.default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS"
            words.append(f"{parameter.name}={[] if made else parameter.default!r}")
    return " ".join(word for word in words if word != "self")


@pytest.mark.parametrize("module", SIGNATURES)
def test_signatures(module: str) -> None:
    for name, expected in SIGNATURES[module].items():
        owner, _, method = name.partition(".")
        found = getattr(importlib.import_module(MODULES[module][owner]), owner)
        assert spelled(getattr(found, method) if method else found) == expected, name
