"""`longscan bench throughput`: tokens generated per second by batch, against a Transformer (figure 8, right)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan import ops
from longscan.bench import floors
from longscan.bench.contest import (
    DTYPES,
    OUT_OF_TIME,
    TOLERANCE,
    Settings,
    describe,
    failure,
    floor,
    relative_error,
    release,
)
from longscan.bench.models import exact, make_model, make_transformer, random_tokens, shapes_of, weight_bytes
from longscan.bench.peers import mamba_ssm
from longscan.bench.report import Report, Row
from longscan.bench.timing import Timing, synchronise
from longscan.mixers.attention import AttentionState
from longscan.models import LanguageModel, prefill
from longscan.models.decoding import make_stepper
from longscan.nn.state import ModelState, State

AXES = "layers,d_model,vocabulary,batch,prompt,tokens"

#: Tokens of a prompt, over all sequences, that go through a model at once: enough to fill a GPU, and bounded in memory.
_PREFILL = 32_768

#: Tokens of the sequence over which scores are compared with the definition's: as a prompt, and one by one.
_CHECKED = (16, 8)

#: Seconds after which no further pass is started.
_BUDGET = 5.0

_PHASES = ("generation", "prompt and generation")


class Generator(Protocol):
    """Takes prompts, then one token after the other."""

    def prefill(self, tokens: Tensor) -> Tensor:
        """A prompt (batch, length) to the scores (batch, vocabulary) after it."""

    def step(self, tokens: Tensor) -> Tensor:
        """One token per sequence (batch,) to the scores after it."""


_Make = Callable[..., LanguageModel]

#: Of a model, a batch, and the most tokens a sequence will have.
_Build = Callable[[LanguageModel, int, int], Generator]


def run(settings: Settings) -> Report:
    """A prompt of 2,048 tokens for every sequence, then 128 tokens each, always the likeliest, in tokens per second.

    Two figures: over the generated tokens alone, and with the prompt's time counted as well, as the paper does. On a
    GPU 1.4B, batches 1 to 256. The Transformer++ is ours, of about as many parameters, with a cache of keys and values
    that has room from the start. Before that, the scores of ours and of mamba-ssm are compared with the definition's
    over 24 tokens. Peak memory counts the weights as well.
    """
    if settings.device == "cpu":
        defaults = [(4, 256, 256, batch, 128, 32) for batch in (1, 4)]
    else:
        defaults = [(48, 2048, 50277, 2**power, 2048, 128) for power in range(9)]
    shapes = shapes_of(settings, AXES, *defaults)
    bandwidth = floors.read_bandwidth(settings.device)
    rows: list[Row] = []
    for dtype in settings.dtypes_of("float32" if settings.device == "cpu" else "bfloat16"):
        for size, same in groupby(shapes, key=lambda shape: shape[:3]):
            rows += _sweep(size, [shape[3:] for shape in same], dtype, settings, bandwidth)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes, "bandwidth": bandwidth}
    return Report("throughput", "tokens/s", higher_is_better=True, rows=rows, settings=about)


def _sweep(
    size: tuple[int, ...], loads: Sequence[tuple[int, ...]], dtype: str, settings: Settings, bandwidth: float
) -> list[Row]:
    """All batches of one size: contender after contender, so that a GPU holds one at a time."""
    found: dict[tuple[str, tuple[int, ...]], list[Row]] = {}
    bounds: dict[tuple[int, ...], float] = {}
    contenders: list[tuple[str, str, _Make, _Build]] = [("longscan", "ours", make_model, OurGenerator)]
    peers: dict[str, tuple[str, _Make, _Build]] = {
        "mamba-ssm": ("peer", make_model, _MambaSSM),
        "transformer++": ("other", make_transformer, OurGenerator),
    }
    contenders += [(name, *peers[name]) for name in settings.peers_of(*peers)]
    for name, kind, make, build in contenders:
        settings.progress(f"{size}: {name}")
        model = make(*size, DTYPES[dtype], settings.device, settings.seed)
        note, error = "", None
        try:
            if kind != "other":
                error = _error(model, build, settings)
                if not error <= TOLERANCE[DTYPES[dtype]]:
                    note = f"not timed: its output differs from the definition's by {error:.1e}"
            else:
                note = f"something else: attention, {model.num_parameters() / 1e6:.4g} million parameters"
        except ImportError:
            del model
            continue
        except Exception as broken:
            note = failure(broken)
        for load in loads:
            release(settings.device)
            settings.progress(f"{(*size, *load)}: {name}")
            groups = [describe((*size, *load), dtype, phase=phase).replace("phase ", "") for phase in _PHASES]
            moved = _moved(model, load)
            if kind == "ours":
                bounds[load] = moved / bandwidth
            rows = [Row(group, name, kind, error=error, note=note) for group in groups]
            if settings.late():
                rows = [dataclasses.replace(row, note=OUT_OF_TIME) for row in rows]
            elif not note or kind == "other":
                try:
                    rows = _timed(model, build, rows, load, settings)
                except Exception as broken:
                    rows = [dataclasses.replace(row, note=failure(broken)) for row in rows]
            for phase, row in zip(_PHASES, rows, strict=True):
                if phase == "generation" and row.timing is not None:
                    seconds = row.timing.median
                    row = dataclasses.replace(row, bandwidth=moved / seconds, of_floor=moved / bandwidth / seconds)
                row = dataclasses.replace(row, series=f"{phase}, {_title(size, dtype)}", place=load[0])
                found.setdefault((phase, load), []).append(row)
        del model
        release(settings.device)
    result = []
    for phase in _PHASES:
        for load in loads:
            result += found[phase, load]
            if phase == "generation":
                note = "every weight of ours read, every state read and written, once a token"
                result.append(floor(result[-1].group, "memory", bounds[load], _rate(load), note))
    return result


def _moved(model: LanguageModel, load: tuple[int, ...]) -> float:
    """Bytes of a generation: every weight, and the state, which keys and values are only read of, but grow."""
    batch, length, count = load
    grows = model.state_bytes(batch, 1) > model.state_bytes(batch, 0)
    state = model.state_bytes(batch, length + count // 2) * (1 if grows else 2)
    return float(count * (weight_bytes(model) + state))


def _title(size: tuple[int, ...], dtype: str) -> str:
    return f"{size[0]} layers of {size[1]}, {dtype}"


def _rate(load: tuple[int, ...]) -> Callable[[float], float]:
    batch, _, count = load
    return lambda seconds: batch * count / seconds


@torch.no_grad()
def _timed(
    model: LanguageModel, build: _Build, rows: list[Row], load: tuple[int, ...], settings: Settings
) -> list[Row]:
    """Fills in both rows: a short pass to warm up, then whole ones while there is time."""
    batch, length, count = load
    prompt = random_tokens(batch * length, model.config.vocab_size, settings.seed).view(batch, length)
    prompt = prompt.to(settings.device)
    before = torch.cuda.memory_allocated() if settings.device == "cuda" else 0
    if build is OurGenerator:
        before -= weight_bytes(model)  # which a peer's generator makes its own copy of
    generator = build(model, batch, length + count)
    _generate(generator, prompt, min(count, 4), settings.device)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    budget = _BUDGET if settings.budget is None else settings.budget
    seconds: list[tuple[float, float]] = []
    while len(seconds) < min(3, settings.repeats) and sum(map(sum, seconds)) < budget:
        seconds.append(_generate(generator, prompt, count, settings.device))
    memory = torch.cuda.max_memory_allocated() - before if settings.device == "cuda" else None
    timings = (
        Timing.of([generation for _, generation in seconds]),
        Timing.of([first + generation for first, generation in seconds]),
    )
    rate = _rate(load)
    return [
        dataclasses.replace(row, timing=timing, value=rate(timing.median), memory=memory)
        for row, timing in zip(rows, timings, strict=True)
    ]


def _generate(generator: Generator, prompt: Tensor, count: int, device: str) -> tuple[float, float]:
    """Seconds that the prompt took, and the `count` tokens after it."""
    synchronise(device)
    begin = time.perf_counter()
    logits = generator.prefill(prompt)
    synchronise(device)
    middle = time.perf_counter()
    for _ in range(count):
        logits = generator.step(logits.argmax(-1))
    synchronise(device)
    return middle - begin, time.perf_counter() - middle


@torch.no_grad()
def _error(model: LanguageModel, build: _Build, settings: Settings) -> float:
    length, count = _CHECKED
    vocabulary = model.config.vocab_size
    tokens = random_tokens(2 * (length + count), vocabulary, settings.seed).view(2, -1).to(settings.device)
    with ops.backend("reference"):
        truth = exact(model)(tokens, last_only=True)[0]
    generator = build(model, 2, length + count)
    generator.prefill(tokens[:, :length])
    for column in tokens[:, length:].unbind(1):
        logits = generator.step(column)
    return relative_error(logits[:, :vocabulary], truth)


class OurGenerator:
    """One of our models: prompts a few sequences at a time, tokens by :func:`longscan.models.decoding.make_stepper`."""

    def __init__(self, model: LanguageModel, batch: int, max_length: int) -> None:
        self._model, self._max_length = model, max_length
        self._stepper = make_stepper(model)
        self._state: ModelState | None = None

    def prefill(self, tokens: Tensor) -> Tensor:
        # The last prompt's state makes room before the next one's is built.
        self._state = None
        rows = max(1, _PREFILL // tokens.shape[1])
        logits, parts = [], []
        for some in tokens.split(rows):
            scores, layers = self._one(some)
            logits.append(scores)
            parts.append(layers)
        self._state = ModelState(tuple(self._joined(parts)))
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        assert self._state is not None
        logits, self._state = self._stepper.step(tokens, self._state)
        return logits

    def _one(self, tokens: Tensor) -> tuple[Tensor, list[State | None]]:
        logits, state = prefill(self._model, list(tokens), chunk=tokens.numel())
        return logits, list(state.layers)

    def _joined(self, parts: list[list[State | None]]) -> Iterator[State]:
        """Layer by layer, giving up each part as soon as it is joined: keys and values may fill the memory."""
        for layer in range(len(parts[0])):
            own = [part[layer] for part in parts]
            for part in parts:
                part[layer] = None
            state = State.cat([one for one in own if one is not None])
            del own
            yield with_room(state, self._max_length) if isinstance(state, AttentionState) else state


def with_room(state: AttentionState, length: int) -> AttentionState:
    """The same past with memory for `length` tokens, so that nothing is moved while it grows."""
    spare = max(0, length - state.keys.shape[2])
    return dataclasses.replace(
        state, keys=F.pad(state.keys, (0, 0, 0, spare)), values=F.pad(state.values, (0, 0, 0, spare))
    )


class _MambaSSM:
    """mamba-ssm as its own `generate(..., cg=True)` runs it."""

    def __init__(self, model: LanguageModel, batch: int, max_length: int) -> None:
        self._decoder = mamba_ssm.Decoder(mamba_ssm.language_model(model).eval(), batch, max_length)
        self._vocabulary = model.config.vocab_size

    def prefill(self, tokens: Tensor) -> Tensor:
        return self._decoder.prefill(tokens, max(1, _PREFILL // tokens.shape[1]))[:, : self._vocabulary]

    def step(self, tokens: Tensor) -> Tensor:
        return self._decoder.step(tokens)[:, : self._vocabulary]
