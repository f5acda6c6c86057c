"""One token through a model of Transformers on the CPU: its layers as compiled calls, with attention between them.

A model is read as a list of stages. A stage begins, in a hybrid, with an attention layer, and goes on with the layers
up to the next one in one compiled call (:mod:`longscan.ops.mamba_step`): Mamba mixers, MLPs and mixtures of experts,
and in the last stage the head.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import BackendError
from longscan.integrations.transformers.attention import Attend, JambaAttention, Token, ZambaAttention
from longscan.nn.linear import is_plain
from longscan.ops.mamba_step import MambaDecoder, MambaStepWeights, MlpStepWeights
from longscan.ops.mamba_step.decoder import State

_SILU = ("silu", "swish")


@dataclasses.dataclass(frozen=True)
class Stage:
    attend: Attend | None
    decoder: MambaDecoder
    mambas: int

    @property
    def addresses(self) -> frozenset[int]:
        """Where the matrices lie that are read in place."""
        attention = () if self.attend is None else self.attend.matrices
        return self.decoder.weights.addresses.union(matrix.data_ptr() for matrix in attention)


class TokenStep:
    """The compiled step of a model.

    Args:
        embedding: the module.
        stages: in their order; the last one has the head.
        layers: which of the cache's layers are Mamba's.
    """

    def __init__(self, embedding: nn.Module, stages: Sequence[Stage], layers: Sequence[int]) -> None:
        self._embedding, self._stages, self.layers = embedding, stages, layers
        #: Whether all of it is one call.
        self.whole = all(stage.attend is None for stage in stages)

    def reads_in_place(self) -> frozenset[int]:
        """Addresses of the matrices whose changes it sees by itself."""
        return frozenset().union(*(stage.addresses for stage in self._stages))

    def __call__(self, tokens: Tensor, states: Sequence[State], cache: Any, mask: Tensor | None) -> Tensor:
        """Scores (batch, vocabulary) in float32; the states and the cache's attention are moved on.

        Args:
            tokens: (batch,).
            states: of the Mamba layers.
            cache: the model's.
            mask: what is added to the scores of attention, (batch, 1, 1, past + 1), or None.

        Raises:
            ArgumentError: a token out of range, states of another model or batch; nothing has changed then.
        """
        if self.whole:
            return self._stages[0].decoder.step(tokens, states)
        parts = []
        for stage in self._stages:
            parts.append(states[: stage.mambas])
            states = states[stage.mambas :]
            stage.decoder.check_states(parts[-1], tokens.shape[0])
        embedded = self._embedding(tokens)
        token = Token(embedded, mask, cache)
        hidden, residual, aside = embedded.float(), None, None
        for stage, own in zip(self._stages, parts, strict=True):
            if stage.attend is not None:
                hidden, residual, aside = stage.attend(hidden, residual, token)
            if stage is self._stages[-1]:
                return stage.decoder.step_to_logits(hidden, residual, own, aside)
            hidden, residual = stage.decoder.step_hidden(hidden, residual, own, aside)
        raise AssertionError("a model has a stage")


def make_step(model: Any) -> TokenStep:
    """The compiled step of a causal language model of one of the families.

    Raises:
        BackendError: it has parts that are more than their weights say, or that the compiled step cannot read.
    """
    family = type(model).__module__.rpartition(".")[2].removeprefix("modeling_")
    try:
        return _READERS[family](_Reader(model, family))
    except (KeyError, AttributeError) as error:
        raise BackendError(f"{type(model).__name__}: not built as the compiled step takes it ({error!r})") from error


class _Reader:
    """Reads the weights of a model's modules, which must be just what they seem."""

    def __init__(self, model: Any, family: str) -> None:
        self.model = model
        self._classes = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        prefix = {"falcon_mamba": "FalconMamba"}.get(family, family.capitalize())
        self._prefix = prefix

    def check(self, module: Any, *names: str) -> Any:
        """The module, if it is exactly of one of these classes of the family (or a plain one of PyTorch)."""
        known = (nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleList)
        if not is_plain(module, *known, *(getattr(self._classes, self._prefix + name) for name in names)):
            raise BackendError(f"the compiled step reads plain weights, this is more than that: {module}")
        return module

    def matrix(self, layer: Any) -> Tensor:
        if self.check(layer).bias is not None:
            raise BackendError(f"the compiled step takes no bias here: {layer}")
        weight: Tensor = layer.weight
        return weight

    def norm(self, module: Any) -> dict[str, Any]:
        self.check(module, "RMSNorm")
        return {"norm": module.weight, "eps": module.variance_epsilon}

    def mamba(self, norm: Any, mixer: Any, **own: Any) -> MambaStepWeights:
        """A mixer and the norm before it; `own`: where the family differs."""
        if mixer.activation not in _SILU or mixer.conv_kernel_size < 2:
            raise BackendError("the compiled step serves SiLU and convolutions of at least two taps")
        for layer in (mixer.in_proj, mixer.conv1d, mixer.out_proj):
            self.check(layer)
        return MambaStepWeights(
            **self.norm(norm),
            in_proj=mixer.in_proj.weight,
            in_proj_bias=mixer.in_proj.bias,
            conv=mixer.conv1d.weight.squeeze(1),
            conv_bias=mixer.conv1d.bias,
            A=-torch.exp(mixer.A_log.detach().float()).flatten(0, -2),
            D=mixer.D.flatten(),
            out_proj=mixer.out_proj.weight,
            out_proj_bias=mixer.out_proj.bias,
            **own,
        )

    def selection(self, mixer: Any) -> dict[str, Any]:
        """The projections of dt, B and C of a mixer with one head."""
        x_proj, dt_proj = self.matrix(mixer.x_proj), self.check(mixer.dt_proj)
        return {"x_proj": x_proj, "dt_proj": dt_proj.weight, "dt_bias": dt_proj.bias}

    def mlp(self, norm: Any, mlp: Any) -> MlpStepWeights:
        """A gated MLP or a mixture of them, and the norm before it."""
        if self.model.config.hidden_act not in _SILU:
            raise BackendError("the compiled step serves SiLU")
        if hasattr(mlp, "experts"):
            return self._experts(norm, mlp)
        self.check(mlp, "MLP")
        gate, up, down = (self.matrix(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return MlpStepWeights(**self.norm(norm), gate=gate, up=up, down=down)

    def _experts(self, norm: Any, mixture: Any) -> MlpStepWeights:
        self.check(mixture, "SparseMoeBlock")
        experts, router = self.check(mixture.experts, "Experts"), self.check(mixture.router, "TopKRouter")
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        return MlpStepWeights(
            **self.norm(norm), gate=gate, up=up, down=experts.down_proj, router=router.weight, chosen=router.top_k
        )

    def decoder(self, layers: Sequence[MambaStepWeights | MlpStepWeights], embedding: Any, norm: Any) -> MambaDecoder:
        """The last of a model: layers, final norm, head; with an embedding all of it."""
        head, final = self.check(self.model.lm_head), self.norm(norm)
        own = {"head": head.weight, "head_bias": head.bias, "final_norm": final["norm"], "eps": final["eps"]}
        return MambaDecoder(layers, embedding=None if embedding is None else self.check(embedding).weight, **own)


def _read_mamba(read: _Reader) -> TokenStep:
    backbone = read.model.backbone
    layers = []
    for block in backbone.layers:
        mixer = read.check(read.check(block, "Block").mixer, "Mixer")
        layers.append(read.mamba(block.norm, mixer, **read.selection(mixer)))
    decoder = read.decoder(layers, backbone.embeddings, backbone.norm_f)
    return TokenStep(backbone.embeddings, [Stage(None, decoder, len(layers))], range(len(layers)))


def _read_falcon_mamba(read: _Reader) -> TokenStep:
    backbone = read.model.backbone
    layers = []
    for block in backbone.layers:
        mixer = read.check(read.check(block, "Block").mixer, "Mixer")
        norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
        own: dict[str, Any] = read.selection(mixer)
        own["selection_eps"] = _one_eps(read.check(norm, "WeightlessRMSNorm").eps for norm in norms)
        # They scale by nothing.
        own["selection_norm"] = torch.ones(mixer.x_proj.weight.shape[0])
        layers.append(read.mamba(block.norm, mixer, **own))
    decoder = read.decoder(layers, backbone.embeddings, backbone.norm_f)
    return TokenStep(backbone.embeddings, [Stage(None, decoder, len(layers))], range(len(layers)))


def _read_jamba(read: _Reader) -> TokenStep:
    model = read.model.model
    runs: list[tuple[Attend | None, list[MambaStepWeights | MlpStepWeights]]] = [(None, [])]
    layers = []
    for i, layer in enumerate(model.layers):
        read.check(layer, "MambaDecoderLayer", "AttentionDecoderLayer")
        if hasattr(layer, "mamba"):
            mixer = read.check(layer.mamba, "MambaMixer")
            norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
            own: dict[str, Any] = read.selection(mixer)
            own["selection_eps"] = _one_eps(read.norm(norm)["eps"] for norm in norms)
            own["selection_norm"] = torch.cat([norm.weight for norm in norms])
            runs[-1][1].append(read.mamba(layer.input_layernorm, mixer, **own))
            layers.append(i)
        else:
            read.check(layer.self_attn, "Attention")
            read.norm(layer.input_layernorm)
            runs.append((JambaAttention(layer, read.matrix), []))
        runs[-1][1].append(read.mlp(layer.pre_ff_layernorm, layer.feed_forward))
    return _staged(read, model, runs, layers)


def _read_zamba(read: _Reader) -> TokenStep:
    model = read.model.model
    runs: list[tuple[Attend | None, list[MambaStepWeights | MlpStepWeights]]] = [(None, [])]
    for i, layer in enumerate(model.layers):
        if hasattr(layer, "mamba_decoder"):
            shared = read.check(read.check(layer, "HybridLayer").shared_transf, "AttentionDecoderLayer")
            read.check(shared.self_attn, "Attention")
            read.check(shared.feed_forward, "MLP")
            for norm in (shared.input_layernorm, shared.pre_ff_layernorm):
                read.norm(norm)
            runs.append((ZambaAttention(layer, read.matrix, i), []))
            layer = layer.mamba_decoder
        mixer = read.check(read.check(layer, "MambaDecoderLayer").mamba, "MambaMixer")
        own = {
            "x_proj": mixer.x_proj_weight.flatten(0, 1),
            "dt_proj": mixer.dt_proj_weight.flatten(0, 1),
            "dt_bias": mixer.dt_proj_bias.flatten(),
            "heads": mixer.n_mamba_heads,
            "paired": True,
        }
        runs[-1][1].append(read.mamba(layer.input_layernorm, mixer, **own))
    return _staged(read, model, runs, range(len(model.layers)))


def _staged(
    read: _Reader,
    model: Any,
    runs: list[tuple[Attend | None, list[MambaStepWeights | MlpStepWeights]]],
    layers: Sequence[int],
) -> TokenStep:
    """The step of a hybrid whose layers come in such runs, the first of which may be empty."""
    if not runs[0][1]:
        runs = runs[1:]
    stages = []
    for i, (attend, own) in enumerate(runs):
        last = i == len(runs) - 1
        decoder = read.decoder(own, None, model.final_layernorm) if last else MambaDecoder(own)
        stages.append(Stage(attend, decoder, sum(isinstance(layer, MambaStepWeights) for layer in own)))
    return TokenStep(read.check(model.embed_tokens), stages, layers)


def _one_eps(values: Any) -> float:
    found: set[float] = set(values)
    if len(found) > 1:
        raise BackendError(f"the norms of dt, B and C have several epsilons: {sorted(found)}")
    return found.pop()


_READERS: dict[str, Callable[[_Reader], TokenStep]] = {
    "mamba": _read_mamba,
    "falcon_mamba": _read_falcon_mamba,
    "jamba": _read_jamba,
    "zamba": _read_zamba,
}
