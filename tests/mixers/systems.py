"""Every registered mixer in the options that the protocol's tests run over."""

from __future__ import annotations

from typing import Any

import torch

from longscan.mixers import make_mixer
from longscan.nn import SequenceMixer

D_MODEL = 8

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"d_state": 4}),
    "mamba-complex": ("mamba", {"d_state": 4, "a_init": "s4d-lin", "d_conv": 3}),
    "mamba-normed": ("mamba", {"d_state": 4, "selection_norm_eps": 1e-6}),
    "mamba-plain": ("mamba", {"d_state": 1, "d_conv": 1, "expand": 1, "dt_rank": 2, "conv_bias": False, "bias": True}),
    "mamba2": ("mamba2", {"d_state": 4, "head_dim": 4}),
    "mamba2-grouped": ("mamba2", {"d_state": 3, "head_dim": 4, "n_groups": 2, "dt_limit": (0.01, 0.5), "bias": True}),
    "s4d": ("s4d", {"d_state": 4}),
    "s4d-legs-bilinear": ("s4d", {"d_state": 6, "a_init": "s4d-legs", "discretisation": "bilinear", "glu": False}),
    "s6": ("s6", {"d_state": 4}),
    "s6-steps": ("s6", {"d_state": 4, "selective": ["dt"]}),
    "s6-fixed-in-mamba": ("s6", {"d_state": 4, "selective": [], "block": "mamba"}),
    "s6-in-mamba": ("s6", {"d_state": 4, "block": "mamba", "block_options": {"d_conv": 3, "bias": True}}),
    "s6-in-h3": ("s6", {"d_state": 4, "block": "h3"}),
    "s4d-in-mamba": ("s4d", {"d_state": 4, "bare": True, "block": "mamba", "block_options": {"expand": 1}}),
    "s4d-in-h3": ("s4d", {"d_state": 4, "bare": True, "block": "h3"}),
    "s4d-ungated": ("s4d", {"d_state": 4, "bare": True, "block": "ungated", "block_options": {"d_conv": 1}}),
    "s4-in-mamba": ("s4", {"d_state": 4, "bare": True, "block": "mamba", "block_options": {"expand": 1}}),
    "attention-in-h3": ("attention", {"n_heads": 2, "block": "h3"}),
    "s4": ("s4", {"d_state": 4}),
    "s4-legt-plain": ("s4", {"d_state": 6, "measure": "legt", "glu": False}),
    "s5": ("s5", {"d_state": 8, "blocks": 2}),
    "s5-bilinear": ("s5", {"d_state": 4, "discretisation": "bilinear", "glu": "full"}),
    "attention": ("attention", {"n_heads": 2}),
    "attention-unturned": ("attention", {"n_heads": 1, "head_dim": 5, "rotary": False}),
    "attention-grouped": ("attention", {"n_heads": 4, "n_kv_heads": 2, "bias": True}),
    "linear-attention": ("linear_attention", {"n_heads": 2}),
    "retnet": ("retnet", {"n_heads": 2}),
    "retnet-paper": ("retnet", {"n_heads": 2, "gamma": "paper", "expand": 1}),
    "rwkv4": ("rwkv4", {}),
    "rwkv4-channels": ("rwkv4_channels", {"d_hidden": 12}),
    "h3": ("h3", {"d_state": 4}),
    "h3-heads": ("h3", {"d_state": 2, "d_shift": 3, "head_dim": 4, "discretisation": "bilinear", "bias": False}),
    "hyena": ("hyena", {"filter_width": 6}),
    "hyena-3-bounded": ("hyena", {"order": 3, "max_length": 5, "filter_width": 6, "filter_layers": 1, "bias": False}),
    "hyena-code": ("hyena", {"filter_values": False, "d_conv": 1, "d_features": 3, "filter_width": 6}),
    "hyena-in-mamba": ("hyena", {"filter_width": 6, "bare": True, "block": "mamba", "block_options": {"expand": 1}}),
    "hyena-in-h3": ("hyena", {"filter_width": 6, "max_length": 5, "bare": True, "block": "h3"}),
    "lstm": ("lstm", {}),
    "lstm-projected": ("lstm", {"d_hidden": 5, "bias": False}),
    "dilated-gru": ("dilated_rnn", {"dilations": (1, 2, 4), "cell": "gru"}),
    "dilated-lstm": ("dilated_rnn", {"dilations": (3, 2), "cell": "lstm", "d_hidden": 5}),
    "lmu": ("lmu", {"order": 3, "theta": 9.0, "d_memory": 2, "d_hidden": 5, "bias": True}),
    "lmu-parallel": ("lmu", {"order": 4, "theta": 6.0, "d_memory": 2, "parallel": True, "discretisation": "bilinear"}),
    "hippo": ("hippo", {"order": 4}),
    "hippo-window": ("hippo", {"order": 4, "measure": "legt", "window": 6.0, "d_hidden": 5, "d_memory": 2}),
    "lssl": ("lssl", {"d_state": 4}),
    "lssl-fixed": ("lssl", {"d_state": 3, "fixed": True, "measure": "legt", "discretisation": "gbt", "alpha": 0.7}),
    "dilated-tanh": ("dilated_rnn", {"dilations": (1, 3), "cell": "rnn", "bias": False}),
}


def make(variant: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> SequenceMixer:
    """A mixer with every parameter moved off its initial value, so that none hides behind a zero or a one."""
    name, options = VARIANTS[variant]
    torch.manual_seed(seed)
    mixer = make_mixer(name, D_MODEL, **options).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer
