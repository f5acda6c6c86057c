"""mamba.py (`mambapy`): a parallel scan in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.mixers import Mamba
from longscan.models import LanguageModel


def scan(inputs: dict[str, Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The scan by itself, softplus on: a call that gives y in our layout, and the inputs it differentiates."""
    from mambapy.mamba import MambaBlock

    x, dt, A, B, C, D, z, dt_bias = leaves = list(inputs.values())

    def call() -> Tensor:
        # Its scan is a method that reads nothing of its block.
        y: Tensor = MambaBlock.selective_scan(None, x, F.softplus(dt + dt_bias), A, B, C, D)
        return y * F.silu(z)

    return call, leaves


def block(mixer: Mamba) -> nn.Module:
    """One block with the weights of ours; takes and returns (batch, length, d_model)."""
    from mambapy.mamba import MambaBlock

    weight = mixer.in_proj.weight
    peer = MambaBlock(_config(mixer, num_layers=1))
    peer.load_state_dict(mixer.state_dict())
    return peer.to(device=weight.device, dtype=weight.dtype)


def language_model(model: LanguageModel) -> nn.Module:
    """The whole model with the weights of ours: its layers and norm, with an embedding and a head tied to it.

    (The package has a language model of its own, but one that imports mamba-ssm.)
    """
    from mambapy.mamba import Mamba as Layers
    from mambapy.mamba import RMSNorm

    weight = model.backbone.embedding.weight
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer, Mamba)
    d_model, vocabulary = model.config.d_model, model.config.padded_vocab_size
    config = _config(mixer, model.config.n_layer)
    peer = nn.Module()
    peer.embedding, peer.mamba = nn.Embedding(vocabulary, d_model), Layers(config)
    peer.norm_f, peer.lm_head = RMSNorm(d_model, 1e-5), nn.Linear(d_model, vocabulary, bias=False)
    names = {"backbone.layers.": "mamba.layers.", "backbone.": ""}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        state[name] = tensor
    peer.load_state_dict(state)
    peer.lm_head.weight = peer.embedding.weight
    return peer.to(device=weight.device, dtype=weight.dtype)


def loss(peer: Any, tokens: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Mean cross-entropy of `targets` (already shifted), as our model computes it: without the padded vocabulary."""
    logits = peer.lm_head(peer.norm_f(peer.mamba(peer.embedding(tokens))))
    return F.cross_entropy(logits[..., :vocabulary].float().flatten(0, 1), targets.flatten())


def prefill(peer: Any, tokens: Tensor) -> Tensor:
    """Scores after the last token (batch, vocabulary); the head runs for that token only. It keeps no state."""
    hidden = peer.mamba(peer.embedding(tokens))
    logits: Tensor = peer.lm_head(peer.norm_f(hidden[:, -1]))
    return logits


def decode(peer: Any, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One token per row (batch,). With a state of None it starts afresh."""
    if state is None:
        config, weight = peer.mamba.config, peer.lm_head.weight
        inputs = torch.zeros(
            tokens.shape[0], config.d_inner, config.d_conv - 1, device=weight.device, dtype=weight.dtype
        )
        state = [(None, inputs) for _ in range(config.n_layers)]
    hidden, state = peer.mamba.step(peer.embedding(tokens), state)
    return peer.lm_head(peer.norm_f(hidden)), state


def _config(mixer: Mamba, num_layers: int) -> Any:
    from mambapy.mamba import MambaConfig

    return MambaConfig(
        d_model=mixer.d_model,
        n_layers=num_layers,
        dt_rank=mixer.dt_rank,
        d_state=mixer.d_state,
        expand_factor=mixer.d_inner // mixer.d_model,
        d_conv=mixer.d_conv,
        rms_norm_eps=1e-5,
    )
