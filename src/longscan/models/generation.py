"""Generation: prefill in chunks, then token by token, at a memory that does not grow with the length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.models.backbone import check_vocabulary
from longscan.models.chunks import take_chunk
from longscan.models.decoding import make_stepper
from longscan.models.sampling import Draws, Sampling, seeds_of_rows
from longscan.models.text import Decode, TextStream
from longscan.nn.state import ModelState

if TYPE_CHECKING:
    from longscan.models.language_model import LanguageModel

#: One prompt of token ids, or several, of any lengths.
Prompts: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        row: the prompt it continues.
        token: its id.
        text: text that became final with it ("" without ``decode``).
        reason: None, or why the row ends here: "length", "stop_token" or "stop".
    """

    row: int
    token: int
    text: str
    reason: str | None


class Generation:
    """A generation under way: iterate for :class:`Token` by token, or :meth:`run` to the end.

    Args:
        model: a language model.
        prompts: one prompt or several of any lengths; each at least one token. Rows do not influence one another.
        max_new_tokens: per row; None: until a row stops by itself.
        state: what the model remembers from earlier, one sequence per prompt (see ``state`` below); left as it was.
        temperature, top_k, top_p, min_p, repetition_penalty: see :class:`longscan.models.sampling.Sampling`.
        seed: a number (row i draws from ``seed + i``), a number per row, or None for fresh ones. A row depends on its
            own seed alone.
        stop_tokens: tokens that end a row.
        stop: strings that end a row; needs ``decode``. The row's text ends before the string.
        decode: from token ids to text, to stream text and look for stop strings.
        prefill_chunk: most prompt tokens taken through the model at once, over all rows; bounds the memory of a long
            prompt.
        short_states: see :class:`longscan.models.decoding.GraphStepper`; on GPUs.
        keep_tokens: collect ``tokens`` and ``texts``; without it only iteration shows them, and memory stays constant.

    Attributes:
        tokens: new tokens of each row, a token that stopped it included.
        texts: text of each row, when there is a ``decode``.
        reasons: why each row ended: "length", "stop_token" or "stop"; None while it goes on.
        pending: the last token of each row, which the model has not seen yet.

    ``state`` has taken in each prompt and all new tokens but the pending one. To go on:
    ``model.generate([[*last, *more] for last in out.pending], n, state=out.state)``.

    Raises:
        ArgumentError: a prompt is empty or holds a token outside the vocabulary, a state of another batch, an option
            outside its range.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        max_new_tokens: int | None,
        *,
        state: ModelState | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        stop_tokens: Sequence[int] = (),
        stop: str | Sequence[str] = (),
        decode: Decode | None = None,
        prefill_chunk: int = 2048,
        short_states: bool = False,
        keep_tokens: bool = True,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
            # Another kind of number would be passed over, and a row never end.
            if value is not None and not (isinstance(value, Integral) and value >= 1):
                raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if stop and decode is None:
            raise ArgumentError("stop strings are looked for in text: pass decode, a function from token ids to text")
        if not all(stop):
            raise ArgumentError("stop strings must not be empty")
        self._model = model
        self._prompts = _rows(prompts, model.config.vocab_size, model.device)
        self._sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        rows = len(self._prompts)
        self._draws = Draws(seeds_of_rows(seed, rows))
        self._max_new_tokens = max_new_tokens
        self._stop_tokens = frozenset(_stop_tokens(stop_tokens))
        self._streams = None if decode is None else [TextStream(decode, stop) for _ in range(rows)]
        self._prefill_chunk = prefill_chunk
        self._short_states = short_states
        self._keep_tokens = keep_tokens

        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.texts: list[str] = ["" for _ in range(rows)]
        self.reasons: list[str | None] = [None] * rows
        self.pending: list[list[int]] = [[] for _ in range(rows)]

        self._initial = state
        self._active: list[int] = list(range(rows))
        self._running: ModelState | None = None
        self._finished: dict[int, ModelState] = {}
        self._items = self._generate()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("tokens", "texts", "reasons"))
        return f"Generation({shown})"

    def __iter__(self) -> Iterator[Token]:
        return self._items

    def run(self) -> Generation:
        """Generate to the end."""
        for _ in self._items:
            pass
        return self

    @property
    def state(self) -> ModelState:
        """A copy of the model's state, one sequence per prompt, without the pending tokens."""
        parts = dict(self._finished)
        if self._running is not None:
            parts.update((row, self._running.select([place])) for place, row in enumerate(self._active))
        if len(parts) < len(self.pending):
            raise ArgumentError("there is no state yet: iterate first")
        return ModelState.cat([parts[row] for row in sorted(parts)]).clone()

    @torch.no_grad()
    def _generate(self) -> Iterator[Token]:
        logits, state = prefill(self._model, self._prompts, self._initial, self._prefill_chunk)
        seen = self._seen(logits)
        stepper = make_stepper(self._model, short_states=self._short_states)
        generated = 0
        while True:
            uniform = self._draws.draw(self._active)
            chosen = self._sampling.choose(logits, uniform, seen)
            generated += 1
            self._running = state
            items = [
                self._take(row, token, generated) for row, token in zip(self._active, chosen.tolist(), strict=True)
            ]
            going = [place for place, item in enumerate(items) if item.reason is None]
            if seen is not None:
                seen[torch.arange(len(items), device=seen.device), chosen] = True
            if len(going) < len(items):
                for place, item in enumerate(items):
                    if item.reason is not None:
                        self._finished[item.row] = state.select([place])
                self._active = [self._active[place] for place in going]
                # Rows that have ended cost nothing any more.
                self._running = state = state.select(going) if going else state
                kept = torch.tensor(going, dtype=torch.int64, device=chosen.device)
                chosen, seen = chosen[kept], None if seen is None else seen[kept]
            if not going:
                self._running = None
            yield from items
            if not going:
                return
            logits, state = stepper.step(chosen, state)

    def _take(self, row: int, token: int, generated: int) -> Token:
        """Book one token of a row and see whether it ends there."""
        text, stopped, reason = "", False, None
        if token in self._stop_tokens:
            reason = "stop_token"
        elif self._streams is not None:
            text, stopped = self._streams[row].push(token)
            reason = "stop" if stopped else None
        if reason is None and generated == self._max_new_tokens:
            reason = "length"
        if reason is not None and self._streams is not None and not stopped:
            text += self._streams[row].finish()
        self.pending[row] = [token]
        self.reasons[row] = reason
        if self._keep_tokens:
            self.tokens[row].append(token)
            self.texts[row] += text
        return Token(row, token, text, reason)

    def _seen(self, logits: Tensor) -> Tensor | None:
        if self._sampling.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        for row, prompt in enumerate(self._prompts):
            seen[row, prompt] = True
        return seen


def _stop_tokens(tokens: Sequence[int]) -> list[int]:
    if isinstance(tokens, (str, bytes)) or not all(isinstance(token, Integral) for token in tokens):
        raise ArgumentError(f"stop_tokens must be token ids, got {tokens!r}; strings are given as stop")
    return [int(token) for token in tokens]


def prefill(
    model: LanguageModel, prompts: Sequence[Tensor], state: ModelState | None = None, chunk: int = 2048
) -> tuple[Tensor, ModelState]:
    """Take prompts into a model's state.

    Args:
        model: a language model.
        prompts: (length,) tokens each, of any lengths; those of different lengths go packed, without padding.
        state: where to start, one sequence per prompt; None: afresh.
        chunk: most tokens taken at once over all rows (but at least one per row).

    Returns:
        Logits after each prompt's last token (rows, vocab_size), and the state.
    """
    rows = len(prompts)
    state = model.initial_state(rows) if state is None else state
    if state.batch != rows:
        raise ArgumentError(f"state is for {state.batch} sequences, there are {rows} prompts")
    size = max(1, chunk // rows)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    last: Tensor | None = None
    for start in range(0, int(lengths.max()), size):
        pieces = [prompt[start : start + size] for prompt in prompts]
        here = (lengths - start).clamp(0, size)
        after: ModelState | None
        if bool((here == here[0]).all()):
            hidden, after = take_chunk(model, torch.stack(pieces), state)
        else:
            ends = here.cumsum(0).to(model.device)
            offsets = torch.nn.functional.pad(ends, (1, 0))
            hidden, after = model.backbone(torch.cat(pieces)[None], state, cu_seqlens=offsets)
            # A row that has ended before is empty here; what this picks for it is not used.
            hidden = hidden[0, (ends - 1).clamp(min=0)]
        assert after is not None
        state = after
        last = hidden if last is None else torch.where((here > 0).to(model.device)[:, None], hidden, last)
    assert last is not None
    return model.head(last), state


def _rows(prompts: Prompts, vocab_size: int, device: torch.device) -> list[Tensor]:
    """Prompts as a list of (length,) int64 tensors on the device, checked."""
    if isinstance(prompts, (str, bytes)):
        raise ArgumentError("prompts must be token ids; encode the text first")
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2):
            raise ArgumentError(f"prompts must be (length,) or (batch, length), got shape {tuple(prompts.shape)}")
        rows = list(prompts[None] if prompts.dim() == 1 else prompts)
    else:
        flat = len(prompts) > 0 and all(isinstance(item, Integral) for item in prompts)
        rows = [_row(item, index) for index, item in enumerate([prompts] if flat else prompts)]
    if not rows:
        raise ArgumentError("prompts is empty: there must be at least one prompt")
    for index, row in enumerate(rows):
        if row.dim() != 1 or row.numel() == 0:
            raise ArgumentError(f"prompt {index} must hold at least one token, got shape {tuple(row.shape)}")
        if row.dtype.is_floating_point or row.dtype.is_complex or row.dtype == torch.bool:
            raise ArgumentError(f"prompt {index} must hold integer token ids, got {row.dtype}")
        rows[index] = row.to(torch.int64)
        check_vocabulary(rows[index], vocab_size, f"the tokens of prompt {index}")
    return [row.to(device) for row in rows]


def _row(item: object, index: int) -> Tensor:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, (str, bytes)):
        raise ArgumentError(f"prompt {index} must be token ids, got text; encode it first")
    try:
        values = list(item)  # type: ignore[call-overload]
        return torch.tensor(values) if values else torch.empty(0, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"prompt {index} must be a sequence of token ids: {error}") from None
