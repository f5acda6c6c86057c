"""Transformers' Mamba and its kin (`transformers`), in plain PyTorch as it runs where no kernels are installed.

With :func:`accelerated` it runs on our operators instead, as after `longscan.integrations.transformers.enable()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from longscan.integrations.transformers.caches import NAMES
from longscan.mixers import Mamba
from longscan.models import LanguageModel

P = ParamSpec("P")
T = TypeVar("T")


def accelerated(call: Callable[P, T], families: Sequence[str] = ("mamba",)) -> Callable[P, T]:
    """The call with Transformers' models of some families on our operators.

    They are put in before it and taken out after it, so that the contender without them stays as it is.
    """

    def accelerated_call(*args: P.args, **kwargs: P.kwargs) -> T:
        from longscan.integrations.transformers import enable

        with enable(families):
            return call(*args, **kwargs)

    return accelerated_call


def scan(inputs: dict[str, Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The scan by itself, softplus on: a call that gives y in our layout, and the inputs it differentiates."""
    _import()
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, dt, A, B, C, D, z, dt_bias = leaves = list(inputs.values())

    def call() -> Tensor:
        first, second, b, c, gate = (tensor.transpose(1, 2) for tensor in (x, dt, B, C, z))
        y = mamba_selective_scan(first, second, A, b, c, D=D, z=gate, delta_bias=dt_bias, delta_softplus=True)
        return y.transpose(1, 2)

    return call, leaves


def block(mixer: Mamba) -> nn.Module:
    """One block with the weights of ours; takes and returns (batch, length, d_model)."""
    _import()
    from transformers.models.mamba.modeling_mamba import MambaMixer

    weight = mixer.in_proj.weight
    peer = MambaMixer(_config(mixer, num_layers=1, vocab_size=8), layer_idx=0)
    peer.load_state_dict(mixer.state_dict())
    return peer.to(device=weight.device, dtype=weight.dtype)


def language_model(model: LanguageModel) -> nn.Module:
    """The whole model with the weights of ours."""
    _import()
    from transformers import MambaForCausalLM

    weight = model.backbone.embedding.weight
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer, Mamba)
    # Its methods are wrapped so that their types get lost.
    peer: Any = MambaForCausalLM(_config(mixer, model.config.n_layer, model.config.padded_vocab_size))
    peer = peer.to(dtype=weight.dtype)
    state = {name.replace("embedding.", "embeddings."): tensor for name, tensor in model.state_dict().items()}
    peer.load_state_dict(state)
    peer.tie_weights()
    return peer.to(weight.device)


def of_family(family: str, layers: int, d_model: int, vocabulary: int) -> nn.Module:
    """A causal language model with random weights and the proportions of the published ones, for inference.

    Those are Falcon Mamba 7B, Jamba v0.1 and Zamba 7B v1; heads of attention are of 64 channels at most.
    """
    _import()
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = max(1, d_model // 64)
    hybrid = {"num_attention_heads": heads, "mamba_dt_rank": max(1, d_model // 16)}
    own: dict[str, dict[str, Any]] = {
        "falcon_mamba": {},
        "jamba": {
            **hybrid, "num_key_value_heads": max(1, heads // 4), "intermediate_size": 7 * d_model // 2,
            "num_experts": 16, "num_experts_per_tok": 2, "attn_layer_period": 8, "attn_layer_offset": 4,
            "expert_layer_period": 2, "expert_layer_offset": 1,
        },
        "zamba": {
            **hybrid, "num_key_value_heads": heads, "intermediate_size": 4 * d_model, "n_mamba_heads": 2,
            "attn_layer_period": 6, "attn_layer_offset": 4,
        },
    }  # fmt: skip
    config = AutoConfig.for_model(
        family, hidden_size=d_model, num_hidden_layers=layers, vocab_size=vocabulary, pad_token_id=0, **own[family]
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


def stepper(model: nn.Module) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """Of a causal language model: from tokens (batch, length) and a cache, or None, to scores and the cache."""
    name = next(name for name in NAMES if name in inspect.signature(model.forward).parameters)

    def step(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=tokens, use_cache=True, **{} if cache is None else {name: cache})
        return output.logits, getattr(output, name)

    return step


def loss(peer: nn.Module, tokens: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Mean cross-entropy of `targets` (already shifted), as our model computes it: without the padded vocabulary."""
    logits = peer(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[..., :vocabulary].float().flatten(0, 1), targets.flatten())


def prefill(peer: nn.Module, tokens: Tensor) -> tuple[Tensor, Any]:
    """Scores after the last token (batch, vocabulary), and the state."""
    output = peer(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1], output.cache_params


def decode(peer: nn.Module, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One token per row (batch,)."""
    output = peer(input_ids=tokens[:, None], cache_params=state, use_cache=True)
    return output.logits[:, -1], output.cache_params


def _config(mixer: Mamba, num_layers: int, vocab_size: int) -> Any:
    from transformers import MambaConfig

    return MambaConfig(
        vocab_size=vocab_size,
        hidden_size=mixer.d_model,
        num_hidden_layers=num_layers,
        state_size=mixer.d_state,
        conv_kernel=mixer.d_conv,
        expand=mixer.d_inner // mixer.d_model,
        time_step_rank=mixer.dt_rank,
        layer_norm_epsilon=1e-5,
        residual_in_fp32=True,
        tie_word_embeddings=True,
    )


def _import() -> None:
    """Transformers without its advice: that plain PyTorch is the slow way is what is being measured."""
    import transformers

    transformers.logging.set_verbosity_error()
