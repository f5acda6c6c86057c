"""The authors' CUDA kernels (`mamba-ssm`), where they are installed beside an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.mixers import Mamba
from longscan.models import LanguageModel


def scan(inputs: dict[str, Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The scan by itself, softplus on: a call that gives y in our layout, and the inputs it differentiates.

    Its inputs lie as it likes them best, (batch, channels, length) contiguous, so no copies are counted.
    """
    _need_gpu()
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    own = {
        name: tensor.detach().transpose(1, 2).contiguous().requires_grad_(tensor.requires_grad)
        if tensor.dim() == 3
        else tensor
        for name, tensor in inputs.items()
    }
    x, dt, A, B, C, D, z, dt_bias = leaves = list(own.values())

    def call() -> Tensor:
        y: Tensor = selective_scan_fn(x, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True)
        return y.transpose(1, 2)

    return call, leaves


def block(mixer: Mamba) -> nn.Module:
    """One block with the weights of ours; takes and returns (batch, length, d_model)."""
    _need_gpu()
    from mamba_ssm.modules.mamba_simple import Mamba as Peer

    weight = mixer.in_proj.weight
    peer = Peer(mixer.d_model, d_state=mixer.d_state, d_conv=mixer.d_conv, expand=mixer.d_inner // mixer.d_model)
    peer.load_state_dict(mixer.state_dict())
    return peer.to(device=weight.device, dtype=weight.dtype)


def language_model(model: LanguageModel) -> nn.Module:
    """The whole model with the weights of ours."""
    _need_gpu()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = model.config
    weight = model.backbone.embedding.weight
    multiple = config.pad_vocab_size_multiple
    peer = MambaLMHeadModel(
        MambaConfig(
            d_model=config.d_model,
            n_layer=config.n_layer,
            vocab_size=config.vocab_size,
            pad_vocab_size_multiple=multiple,
        ),
        device=weight.device,
        dtype=weight.dtype,
    )
    peer.load_state_dict(model.state_dict())
    peer.tie_weights()
    return peer


def loss(peer: nn.Module, tokens: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Mean cross-entropy of `targets` (already shifted), as our model computes it: without the padded vocabulary."""
    return F.cross_entropy(peer(tokens).logits[..., :vocabulary].float().flatten(0, 1), targets.flatten())


def prefill(peer: nn.Module, tokens: Tensor, max_length: int) -> tuple[Tensor, Any]:
    """Scores after the last token (batch, vocabulary), and the state, with room for `max_length` tokens."""
    from mamba_ssm.utils.generation import InferenceParams

    state = InferenceParams(max_seqlen=max_length, max_batch_size=tokens.shape[0])
    logits = peer(tokens, inference_params=state, num_last_tokens=1).logits[:, -1]
    state.seqlen_offset += tokens.shape[1]
    return logits, state


def decode(peer: nn.Module, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One token per row (batch,)."""
    logits = peer(tokens[:, None], inference_params=state, num_last_tokens=1).logits[:, -1]
    state.seqlen_offset += 1
    return logits, state


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ImportError("mamba-ssm runs on NVIDIA GPUs only")
