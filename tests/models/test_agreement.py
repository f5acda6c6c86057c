"""The same weights in, the same numbers out as Transformers' own models: Llama whole, and RWKV around our two mixers.

Mamba, Falcon Mamba and Mamba-2 are in test_formats: their files are read and written.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longscan.mixers import RWKV4, RWKV4Channels
from longscan.mixers.rwkv4 import RWKV4State
from longscan.mixers.rwkv4_channels import RWKV4ChannelsState
from longscan.models import LanguageModel, LanguageModelConfig
from tests.models.small import randomise

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(29, (2, 19), generator=torch.Generator().manual_seed(0))


def from_llama(theirs: Any, n_kv_heads: int) -> LanguageModel:
    config = theirs.config
    options = {"n_heads": config.num_attention_heads, "n_kv_heads": n_kv_heads}
    ours = LanguageModel(
        LanguageModelConfig(
            config.hidden_size, config.num_hidden_layers, config.vocab_size, "attention", options,
            d_intermediate=config.intermediate_size, norm_eps=config.rms_norm_eps, tie_embeddings=False,
            pad_vocab_size_multiple=1,
        )
    )  # fmt: skip
    given = theirs.state_dict()
    weights = {
        "backbone.embedding.weight": given["model.embed_tokens.weight"],
        "backbone.norm_f.weight": given["model.norm.weight"],
        "lm_head.weight": given["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        own, old = f"backbone.layers.{layer}.", f"model.layers.{layer}."
        weights |= {
            own + "norm.weight": given[old + "input_layernorm.weight"],
            own + "norm2.weight": given[old + "post_attention_layernorm.weight"],
            own + "mixer.in_proj.weight": torch.cat([given[f"{old}self_attn.{part}_proj.weight"] for part in "qkv"]),
            own + "mixer.out_proj.weight": given[old + "self_attn.o_proj.weight"],
            own + "mlp.fc1.weight": torch.cat([given[f"{old}mlp.{part}_proj.weight"] for part in ("up", "gate")]),
            own + "mlp.fc2.weight": given[old + "mlp.down_proj.weight"],
        }
    ours.load_state_dict(weights)
    return ours


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_transformer_is_llama(n_kv_heads: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=n_kv_heads, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = randomise(transformers.LlamaForCausalLM(config))
    ours = from_llama(theirs, n_kv_heads)
    expected = theirs(TOKENS).logits
    logits, _ = ours(TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(
        ours.backbone.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-4
    )
    with torch.no_grad():
        generated = theirs.generate(
            TOKENS[:1],
            attention_mask=torch.ones_like(TOKENS[:1]),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert ours.generate(TOKENS[0].tolist(), 8, temperature=0).tokens[0] == generated[0, TOKENS.shape[1] :].tolist()


def with_weights_of(theirs: nn.Module, ours: Any) -> Any:
    names = {"time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r"}
    weights = {names.get(name, name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: tensor.view_as(ours.get_parameter(name)) for name, tensor in weights.items()})
    return ours


class TimeMixing(nn.Module):
    """Ours under the calling convention of Transformers' RwkvSelfAttention, whose states are (..., layer)."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.layer, width = theirs.layer_id, theirs.config.hidden_size
        self.ours = with_weights_of(theirs, RWKV4(width))

    def forward(self, hidden: Tensor, state: Any = None, use_cache: bool = False) -> tuple[Tensor, Any]:
        before = None
        if state is not None:
            last, *sums = (part[:, :, self.layer] for part in state[1:])
            before = RWKV4State(last, torch.stack(sums, dim=1))
        y, after = self.ours(hidden, before)
        if after is not None:
            for part, value in zip(state[1:], (after.last, *after.wkv.unbind(1)), strict=True):
                part[:, :, self.layer] = value
        return y, state


class ChannelMixing(nn.Module):
    """The same of RwkvFeedForward."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.layer = theirs.layer_id
        self.ours = with_weights_of(theirs, RWKV4Channels(theirs.config.hidden_size))

    def forward(self, hidden: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        before = None if state is None else RWKV4ChannelsState(state[0][:, None, :, self.layer])
        y, after = self.ours(hidden, before)
        if after is not None:
            state[0][:, :, self.layer] = after.last[:, 0]
        return y, state


def test_rwkv_is_the_same_around_our_time_and_channel_mixing() -> None:
    config = transformers.RwkvConfig(vocab_size=29, hidden_size=16, num_hidden_layers=3, rescale_every=0)
    theirs = randomise(transformers.RwkvForCausalLM(config))
    with torch.no_grad():
        first = theirs(TOKENS[:, :11], use_cache=True)
        expected = torch.cat((first.logits, theirs(TOKENS[:, 11:], state=first.state, use_cache=True).logits), dim=1)
    for block in theirs.rwkv.blocks:
        block.attention, block.feed_forward = TimeMixing(block.attention), ChannelMixing(block.feed_forward)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        first = theirs(TOKENS[:, :11], use_cache=True)
        second = theirs(TOKENS[:, 11:], state=first.state, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), expected, rtol=1e-4, atol=1e-4)
