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


class Decoder:
    """Token by token as its `generate(..., cg=True)` does it: a step is one replay of a captured CUDA graph.

    Args:
        peer: what :func:`language_model` made.
        batch: number of sequences.
        max_length: room for that many tokens each.
    """

    @torch.inference_mode()
    def __init__(self, peer: nn.Module, batch: int, max_length: int) -> None:
        from mamba_ssm.utils.generation import update_graph_cache

        # Captured with a past of one token: what it holds does not depend on how long the past is.
        self._cache = update_graph_cache(peer, None, batch, 1, max_length)
        self._peer, self._batch, self._max_length = peer, batch, max_length
        device = next(peer.parameters()).device
        # Its models take positions, and do not look at them.
        self._positions = torch.zeros(batch, 1, dtype=torch.long, device=device)

    @torch.inference_mode()
    def reset(self) -> None:
        """An empty past."""
        self._cache.inference_params.reset(self._max_length, self._batch)
        for states in self._cache.inference_params.key_value_memory_dict.values():
            for state in states:
                state.zero_()

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, rows: int) -> Tensor:
        """A prompt (batch, length) into an empty past, `rows` sequences at once; scores (batch, vocabulary)."""
        from mamba_ssm.utils.generation import InferenceParams

        self.reset()
        past = self._cache.inference_params
        logits = []
        for start in range(0, self._batch, rows):
            part = slice(start, start + rows)
            own = InferenceParams(
                max_seqlen=self._max_length,
                max_batch_size=tokens[part].shape[0],
                # Views: the prompt writes its states where the graph reads them.
                key_value_memory_dict={
                    layer: tuple(state[part] for state in states)
                    for layer, states in past.key_value_memory_dict.items()
                },
            )
            logits.append(self._peer(tokens[part], inference_params=own, num_last_tokens=1).logits[:, -1])
        past.seqlen_offset = tokens.shape[1]
        return torch.cat(logits)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """One token per sequence (batch,) to scores (batch, vocabulary)."""
        past = self._cache.inference_params
        logits: Tensor = self._cache.run(tokens[:, None], self._positions, past.seqlen_offset)
        past.seqlen_offset += 1
        return logits.squeeze(1)


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ImportError("mamba-ssm runs on NVIDIA GPUs only")
