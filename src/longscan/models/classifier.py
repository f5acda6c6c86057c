"""A model of whole sequences: tokens or vectors in; a class, numbers, or something at every place out.

The shape is that of S4's experiments (Gu, Goel and Re 2022, arXiv 2111.00396): an encoder, residual layers of mixers,
pooling over time, a linear decoder; with its bidirectional form, two stacks that read from either end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError, ConfigError
from longscan.models.options import Config, MixerChoice, check_positions
from longscan.models.stack import NORMS, Stack, make_norm
from longscan.models.storage import StoredModel
from longscan.nn.mlp import MLPS
from longscan.nn.positions import POSITIONS, make_positions, places

POOLINGS = ("mean", "last", "max", "none")
DIRECTIONS = ("forward", "sum", "concat")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(MixerChoice, Config):
    """Shape of a :class:`Classifier`.

    Args:
        d_model: width of the residual stream.
        n_layer: number of mixers in a stack.
        n_outputs: classes, or numbers for a regression.
        vocab_size: for inputs that are tokens, how many there are; 0: inputs are vectors.
        d_input: for inputs that are vectors, their width; 0: inputs are tokens.
        mixer, mixer_options, block, block_options: as in :class:`longscan.LanguageModelConfig`.
        d_intermediate: width of the MLP after each mixer; 0 means none.
        pooling: over time before the decoder: "mean", "max", "last" (of both ends, if bidirectional), or "none": an
            output at every place.
        direction: "forward" is causal; "sum" and "concat" run a second stack from the end and put both together.
        norm: "layer", "rms" or "batch" (then the last norm, before pooling, is a layer norm).
        pair: an input is two sequences of equal length, one after the other. Each is read by itself; of what is pooled
            from them, a and b, an MLP sees (a, b, a * b, a - b) (the Long Range Arena's retrieval, Tay et al. 2021).
        prenorm: norms stand before mixers (and one before pooling), or after the sums.
        dropout: probability, of whole channels of each branch.
        mlp, positions, max_positions: as in :class:`longscan.LanguageModelConfig`; sines are added to inputs as they
            are, and places are counted from the first, in both directions.

    Raises:
        ConfigError: a value is not allowed.
    """

    d_model: int = 128
    n_layer: int = 4
    n_outputs: int = 10
    vocab_size: int = 0
    d_input: int = 0
    mixer: str | tuple[str, ...] = "mamba"
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    block: str = "plain"
    block_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    d_intermediate: int = 0
    pooling: str = "mean"
    direction: str = "forward"
    norm: str = "layer"
    prenorm: bool = True
    dropout: float = 0.0
    pair: bool = False
    mlp: str = "gated"
    positions: str = "none"
    max_positions: int = 0

    def __post_init__(self) -> None:
        self.check_integers(_LEAST)
        if (self.vocab_size == 0) == (self.d_input == 0):
            raise ConfigError(
                f"inputs are tokens (vocab_size) or vectors (d_input), one of the two; got vocab_size "
                f"{self.vocab_size} and d_input {self.d_input}"
            )
        self.check_names(
            {"pooling": POOLINGS, "direction": DIRECTIONS, "norm": NORMS, "mlp": MLPS, "positions": POSITIONS}
        )
        check_positions(self.positions, self.max_positions)
        for name in ("prenorm", "pair"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.pair and self.pooling == "none":
            raise ConfigError("pair: two sequences are compared by what is pooled from them; got pooling 'none'")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        self.check_mixers()


_LEAST = {
    **dict.fromkeys(("d_model", "n_layer", "n_outputs"), 1),
    **dict.fromkeys(("vocab_size", "d_input", "d_intermediate", "max_positions"), 0),
}


class Classifier(StoredModel):
    """Scores of classes for sequences of any lengths: ``Classifier(ClassifierConfig(vocab_size=256))(tokens)``.

    With one output it is a regression, with ``pooling="none"`` it labels every place.

    Args:
        config: the shape of the model.
        device, dtype: of the parameters.
    """

    config_type = ClassifierConfig
    model_type = "longscan-classifier"

    def __init__(
        self,
        config: ClassifierConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.encoder: nn.Module
        if config.vocab_size:
            self.encoder = nn.Embedding(config.vocab_size, d_model, device=device, dtype=dtype)
        else:
            self.encoder = nn.Linear(config.d_input, d_model, device=device, dtype=dtype)
        self.positions = make_positions(config.positions, d_model, config.max_positions, device=device, dtype=dtype)
        self.stacks = nn.ModuleList(
            Stack(
                config,
                d_model,
                config.n_layer,
                d_intermediate=config.d_intermediate,
                mlp=config.mlp,
                norm=config.norm,
                prenorm=config.prenorm,
                dropout=config.dropout,
                device=device,
                dtype=dtype,
            )
            for _ in range(1 if config.direction == "forward" else 2)
        )
        width = 2 * d_model if config.direction == "concat" else d_model
        self.norm = make_norm("rms" if config.norm == "rms" else "layer", width, device, dtype)
        self.decoder: nn.Module = nn.Linear(width, config.n_outputs, device=device, dtype=dtype)
        if config.pair:
            widen = nn.Linear(4 * width, width, device=device, dtype=dtype)
            self.decoder = nn.Sequential(widen, nn.GELU(), self.decoder)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Score sequences.

        Args:
            inputs: (batch, length) integer tokens, or (batch, length, d_input) vectors; for pairs twice as long.
            lengths: (batch,), for pairs (batch, 2), places of each that count, from the first, at least 1; None: all.
                What stands behind them changes nothing.

        Returns:
            (batch, n_outputs), or (batch, length, n_outputs) without pooling, where places that do not count are 0.

        Raises:
            ArgumentError: shapes or dtypes do not fit.
        """
        if self.config.pair:
            inputs, lengths = _one_by_one(inputs, lengths)
        self._check(inputs, lengths)
        mask = None
        if lengths is not None:
            lengths = lengths.to(inputs.device)
            mask = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
        x = self.encoder(inputs)
        if self.positions is not None:
            x = self.positions(x, places(x.shape[1], x.device, None, None))
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        x = self.norm(self._mix(x, lengths, mask))
        if self.config.pooling == "none":
            scores = self.decoder(x)
            return scores if mask is None else scores.masked_fill(~mask[..., None], 0)
        pooled = self._pool(x, lengths, mask)
        if self.config.pair:
            a, b = pooled.unflatten(0, (-1, 2)).unbind(1)
            pooled = torch.cat((a, b, a * b, a - b), dim=-1)
        return self.decoder(pooled)

    def _mix(self, x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
        ahead, _ = self.stacks[0](x, mask=mask)
        if self.config.direction == "forward":
            return ahead
        back, _ = self.stacks[1](_reverse(x, lengths), mask=mask)
        back = _reverse(back, lengths)
        return ahead + back if self.config.direction == "sum" else torch.cat((ahead, back), dim=-1)

    def _pool(self, x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.config.pooling == "mean":
            if mask is None or lengths is None:
                return x.mean(dim=1)
            return x.masked_fill(~mask[..., None], 0).sum(dim=1) / lengths[:, None].to(x.dtype)
        if self.config.pooling == "max":
            return (x if mask is None else x.masked_fill(~mask[..., None], -torch.inf)).amax(dim=1)
        return x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1]

    def _check(self, inputs: Tensor, lengths: Tensor | None) -> None:
        config = self.config
        if config.vocab_size:
            if inputs.dim() != 2 or inputs.dtype not in (torch.int32, torch.int64):
                raise ArgumentError(
                    f"inputs must be (batch, length) int64 or int32 tokens, got {inputs.dtype} of shape "
                    f"{tuple(inputs.shape)}"
                )
        elif inputs.dim() != 3 or inputs.shape[-1] != config.d_input:
            raise ArgumentError(f"inputs must be (batch, length, {config.d_input}), got shape {tuple(inputs.shape)}")
        if min(inputs.shape[:2]) < 1:
            raise ArgumentError(f"inputs are empty: got shape {tuple(inputs.shape)}")
        if lengths is None:
            return
        if lengths.shape != inputs.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"lengths must be ({inputs.shape[0]},) int64 or int32, got {lengths.dtype} of shape "
                f"{tuple(lengths.shape)}"
            )
        # On other devices looking at values would wait for them.
        if lengths.device.type == "cpu" and not (int(lengths.min()) >= 1 and int(lengths.max()) <= inputs.shape[1]):
            raise ArgumentError(f"lengths must lie in 1 .. {inputs.shape[1]}, got {lengths.tolist()}")


def _one_by_one(inputs: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Pairs (batch, 2 * length, ...) as sequences (2 * batch, length, ...)."""
    if inputs.dim() < 2 or inputs.shape[1] % 2 or not inputs.shape[1]:
        raise ArgumentError(f"inputs must be pairs of sequences, (batch, twice the length), got {tuple(inputs.shape)}")
    if lengths is not None:
        if lengths.shape != (inputs.shape[0], 2):
            raise ArgumentError(f"lengths must be ({inputs.shape[0]}, 2), got shape {tuple(lengths.shape)}")
        lengths = lengths.flatten()
    return inputs.unflatten(1, (2, -1)).flatten(0, 1), lengths


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (batch, length, channels) backwards in time, each sequence within its own length."""
    if lengths is None:
        return x.flip(1)
    place = torch.arange(x.shape[1], device=x.device)
    source = lengths[:, None] - 1 - place
    source = torch.where(source < 0, place, source)
    return x.gather(1, source[..., None].expand_as(x))
