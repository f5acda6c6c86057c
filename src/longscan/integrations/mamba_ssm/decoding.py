"""One compiled call per token where a model is all plain Mamba (:mod:`longscan.ops.mamba_step`); on a GPU a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longscan.errors import BackendError
from longscan.integrations.mamba_ssm.block import Block
from longscan.integrations.mamba_ssm.layouts import channels_last
from longscan.integrations.mamba_ssm.module import Mamba
from longscan.integrations.mamba_ssm.norm import RMSNorm
from longscan.mixers.mamba import MambaState
from longscan.models.decoding import DecoderStepper, Graphs, Stepper
from longscan.nn.state import ModelState

if TYPE_CHECKING:
    from longscan.ops.mamba_step import MambaStepWeights

# What the compiled step does as these modules do; anything else (LoRA, quantised layers) is to be called itself.
_KNOWN = (Block, Mamba, RMSNorm, nn.Linear, nn.Conv1d, nn.Embedding, nn.SiLU, nn.ModuleList)


def compiled_step(model: Any, cache: Any) -> Callable[[Tensor], Tensor] | None:
    """A function from one token per row (batch,) to logits (batch, padded vocabulary), or None if modules must do it.

    Args:
        model: a `MambaLMHeadModel`; its weights are read now.
        cache: an `InferenceParams` after the prompt. Its states are copied, and not kept up to date.
    """
    from longscan.ops.mamba_step import CudaMambaDecoder, MambaDecoder

    backbone, head = model.backbone, model.lm_head
    device = head.weight.device
    make: Any = {"cpu": MambaDecoder, "cuda": CudaMambaDecoder}.get(device.type)
    if make is None or torch.is_autocast_enabled(device.type) or not _plain(model):
        return None
    try:
        decoder = make(
            [_weights(block) for block in backbone.layers],
            embedding=backbone.embedding.weight,
            final_norm=backbone.norm_f.weight,
            head=head.weight,
            eps=backbone.norm_f.eps,
        )
    except BackendError:
        return None
    kept = [cache.key_value_memory_dict[block.mixer.layer_idx] for block in backbone.layers]
    states = [MambaState(channels_last(conv[..., 1:]).contiguous(), ssm.contiguous()) for conv, ssm in kept]
    if any(state.ssm.dtype != torch.float32 for state in states):
        return None
    stepper: Stepper = DecoderStepper(decoder)
    if device.type == "cuda":
        stepper = Graphs(stepper, device)
    state = ModelState(tuple(states))

    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        logits, state = stepper.step(tokens, state)
        return logits.to(head.weight.dtype)

    return step


def _plain(model: nn.Module) -> bool:
    """Whether calling the modules would do nothing but what they are made for."""
    own = (model, model.backbone)
    for module in model.modules():
        # The classes themselves: subclasses, and what replaced a layer, may do otherwise. So may hooks.
        if module not in own and type(module) not in _KNOWN:
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    return type(model).__module__ == type(model.backbone).__module__ == "longscan.integrations.mamba_ssm.language_model"


def _weights(block: Block) -> MambaStepWeights:
    from longscan.ops.mamba_step import MambaStepWeights

    mixer: Any = block.mixer
    norm: Any = block.norm
    if not isinstance(mixer, Mamba) or not isinstance(norm, RMSNorm) or block.mlp is not None:
        raise BackendError("the compiled step serves blocks of an RMSNorm and a Mamba without an MLP")
    return MambaStepWeights(
        norm=norm.weight,
        eps=norm.eps,
        in_proj=mixer.in_proj.weight,
        in_proj_bias=mixer.in_proj.bias,
        conv=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        x_proj=mixer.x_proj.weight,
        dt_proj=mixer.dt_proj.weight,
        dt_bias=mixer.dt_proj.bias,
        A=mixer.A,
        D=mixer.D,
        out_proj=mixer.out_proj.weight,
        out_proj_bias=mixer.out_proj.bias,
    )
