r"""SaShiMi: a U-net of mixers at several rates of time, for waveforms sample by sample.

Goel, Gu, Donahue and Re 2022 (arXiv 2202.09729), in the form with layers on both sides of the net. A stage with the
pooling factor p has layers at its own rate, p places joined into one for the stage inside, and what comes back spread
over the *next* p places, so that none sees its own future:

.. math::
    x^\downarrow = \mathrm{layers}(x), \qquad
    y_j = \mathrm{inner}(W^\downarrow [x^\downarrow_{pj}, \dots, x^\downarrow_{pj + p - 1}]), \qquad
    o = \mathrm{layers}'\big(x^\downarrow + \mathrm{shift}_p(\mathrm{spread}(W^\uparrow y))\big)

Every stage may be cut anywhere: what waits for a group of p to fill up is part of the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError, ConfigError
from longscan.models.backbone import check_vocabulary
from longscan.models.options import Config, MixerChoice
from longscan.models.stack import NORMS, Stack, make_norm
from longscan.models.storage import StoredModel
from longscan.nn.mixer import check_batch, check_state
from longscan.nn.state import ModelState, State


@dataclasses.dataclass(frozen=True)
class SashimiConfig(MixerChoice, Config):
    """Shape of a :class:`Sashimi`.

    Args:
        d_model: width of the outermost stage.
        n_layer: mixers in each stack: two stacks a stage, one in the centre.
        pool: pooling factors from the outside in, one a stage.
        expand: how much wider each stage is than the one around it.
        vocab_size: levels of a sample (256: 8 bits, usually after mu-law).
        mixer, mixer_options, block, block_options: as in :class:`longscan.LanguageModelConfig`; the widths of the
            stages differ, and options have to fit them all.
        mlp_expand: width of the gated MLP after each mixer over its stage's; 0 means none.
        centre: what is otherwise in the centre, such as ``{"mixer": "mamba", "mlp_expand": 0}``; any of the five
            arguments before, and n_layer.
        norm: "layer" or "rms".
        dropout: probability, of whole channels of each branch.

    Raises:
        ConfigError: a value is not allowed.
    """

    d_model: int = 64
    n_layer: int = 3
    pool: tuple[int, ...] = (4, 4)
    expand: int = 2
    vocab_size: int = 256
    mixer: str | tuple[str, ...] = "s4d"
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    block: str = "plain"
    block_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mlp_expand: int = 2
    centre: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norm: str = "layer"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.check_integers({"d_model": 1, "n_layer": 1, "expand": 1, "vocab_size": 1, "mlp_expand": 0})
        if not isinstance(self.pool, (list, tuple)) or not all(isinstance(p, int) and p >= 2 for p in self.pool):
            raise ConfigError(f"pool must be a list of integers of at least 2, got {self.pool!r}")
        object.__setattr__(self, "pool", tuple(self.pool))
        if self.norm not in NORMS or self.norm == "batch":
            raise ConfigError(f'norm must be "layer" or "rms", got {self.norm!r}')
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        self.check_mixers()
        if not isinstance(self.centre, Mapping):
            raise ConfigError(f"centre must be a mapping, got {type(self.centre).__name__}")
        if unknown := [key for key in self.centre if key not in _CENTRE]:
            raise ConfigError(f"centre: unknown key {unknown[0]!r}; allowed: {', '.join(_CENTRE)}")
        object.__setattr__(self, "centre", dict(self.centre))
        if self.centre:
            self.of_centre()

    def of_centre(self) -> SashimiConfig:
        """The configuration that the stack in the centre is built by."""
        return dataclasses.replace(self, centre={}, **self.centre)


_CENTRE = ("n_layer", "mixer", "mixer_options", "block", "block_options", "mlp_expand")


@dataclasses.dataclass(frozen=True)
class StageState(State):
    """Of a stage: its two stacks' states, what waits to be joined (batch, fewer than p, d_model), what came back of the
    last full group (batch, p, d_model), and the stage inside."""

    down: ModelState
    waiting: Tensor
    spread: Tensor
    inner: State
    up: ModelState


class Stage(nn.Module):
    """A stage around another, or around the centre."""

    def __init__(
        self, down: Stack, inner: Stage | Stack, up: Stack, d_model: int, d_inner: int, pool: int, **factory: Any
    ) -> None:
        super().__init__()
        self.d_model, self.pool = d_model, pool
        self.down, self.inner, self.up = down, inner, up
        self.join = nn.Linear(pool * d_model, d_inner, **factory)
        self.part = nn.Linear(d_inner, pool * d_model, **factory)

    def initial_state(self, batch: int, dtype: torch.dtype | None = None) -> StageState:
        """The state of an empty past."""
        weight = self.join.weight
        return StageState(
            down=self.down.initial_state(batch, dtype),
            waiting=torch.zeros(batch, 0, self.d_model, device=weight.device, dtype=dtype or weight.dtype),
            spread=torch.zeros(batch, self.pool, self.d_model, device=weight.device, dtype=dtype or weight.dtype),
            inner=self.inner.initial_state(batch, dtype),
            up=self.up.initial_state(batch, dtype),
        )

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """x (batch, length, d_model) to the same shape."""
        before = state if isinstance(state, StageState) else None
        x, down = self.down(x, None if before is None else before.down)
        waiting = x if before is None else torch.cat((before.waiting.to(x.dtype), x), dim=1)
        full = waiting.shape[1] // self.pool
        # Of the group that is not full yet, some places have already been given theirs.
        given = 0 if before is None else before.waiting.shape[1]
        last = x.new_zeros(x.shape[0], self.pool, self.d_model) if before is None else before.spread.to(x.dtype)
        groups, inner = [last], None if before is None else before.inner
        if full:
            joined = self.join(waiting[:, : full * self.pool].unflatten(1, (full, self.pool)).flatten(2))
            y, inner = self.inner(joined, inner)
            groups.append(self.part(y).unflatten(-1, (self.pool, self.d_model)).flatten(1, 2))
        spread = torch.cat(groups, dim=1)
        x, up = self.up(x + spread[:, given : given + x.shape[1]], None if before is None else before.up)
        if before is None:
            return x, None
        assert down is not None
        assert inner is not None
        assert up is not None
        rest = waiting[:, full * self.pool :].to(before.waiting.dtype)
        return x, StageState(down, rest, spread[:, -self.pool :].to(before.spread.dtype), inner, up)


class Sashimi(StoredModel):
    """Next-sample model of waveforms: ``Sashimi(SashimiConfig())(samples)``.

    Args:
        config: the shape of the model.
        device, dtype: of the parameters.
    """

    config_type = SashimiConfig
    model_type = "longscan-sashimi"

    def __init__(
        self,
        config: SashimiConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def stack(config: SashimiConfig, width: int) -> Stack:
            return Stack(
                config,
                width,
                config.n_layer,
                d_intermediate=config.mlp_expand * width,
                norm=config.norm,
                dropout=config.dropout,
                **factory,
            )

        self.embedding = nn.Embedding(config.vocab_size, config.d_model, **factory)
        widths = [config.d_model * config.expand**depth for depth in range(len(config.pool) + 1)]
        net: Stage | Stack = stack(config.of_centre(), widths[-1])
        for depth in reversed(range(len(config.pool))):
            width, inner = widths[depth], widths[depth + 1]
            net = Stage(stack(config, width), net, stack(config, width), width, inner, config.pool[depth], **factory)
        self.net = net
        self.norm = make_norm(config.norm, config.d_model, device, dtype)
        self.head = nn.Linear(config.d_model, config.vocab_size, **factory)

    def initial_state(self, batch: int, dtype: torch.dtype | None = None) -> State:
        """The state before the first sample."""
        check_batch(batch)
        return self.net.initial_state(batch, dtype)

    def forward(self, samples: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Scores of the next sample.

        Args:
            samples: (batch, length) integers in ``0 .. vocab_size - 1``, of any length.
            state: of earlier samples; None starts afresh and carries nothing.

        Returns:
            (batch, length, vocab_size) scores, those at t of sample t + 1, and the state (None if none was given).

        Raises:
            ArgumentError: samples are of another shape, dtype or range, or the state of another batch size or model.
        """
        if samples.dim() != 2 or min(samples.shape) < 1 or samples.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"samples must be (batch, length) int64 or int32, both at least 1; got {samples.dtype} of shape "
                f"{tuple(samples.shape)}"
            )
        if samples.device.type == "cpu" and not torch.compiler.is_compiling():
            check_vocabulary(samples, self.config.vocab_size)
        if state is not None:
            check_state("the model", state, StageState if isinstance(self.net, Stage) else ModelState, len(samples))
        x, state = self.net(self.embedding(samples), state)
        return self.head(self.norm(x)), state

    def loss(self, samples: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``targets`` (batch, length), already shifted; -100 does not count."""
        scores, _ = self(samples)
        return F.cross_entropy(scores.float().flatten(0, 1), targets.long().flatten())

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        *,
        temperature: float = 1.0,
        seed: int | None = None,
        begun: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Go on from a prompt, sample by sample.

        Args:
            prompt: (batch, at least 1) samples.
            length: how many to make.
            temperature: 0 takes the likeliest.
            seed: of the drawing.
            begun: called before each new sample with how many there are.

        Returns:
            (batch, length) int64 new samples.
        """
        if temperature < 0:
            raise ArgumentError(f"temperature must not be negative, got {temperature}")
        generator = torch.Generator(prompt.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        scores, state = self(prompt, self.initial_state(len(prompt)))
        made: list[Tensor] = []
        while len(made) < length:
            if begun is not None:
                begun(len(made))
            last = scores[:, -1].float()
            if temperature:
                sample = torch.multinomial(torch.softmax(last / temperature, -1), 1, generator=generator)
            else:
                sample = last.argmax(-1, keepdim=True)
            made.append(sample)
            if len(made) < length:
                scores, state = self(sample, state)
        return torch.cat(made, dim=1) if made else prompt.new_empty(len(prompt), 0, dtype=torch.int64)
