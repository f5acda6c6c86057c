"""Generation: rows do not meet, cuts do not show, states go on and fork, memory stays."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import ArgumentError
from longscan.models.generation import Generation, prefill
from longscan.nn import ModelState
from tests.models.small import KINDS, VOCABULARY, make

all_kinds = pytest.mark.parametrize("kind", KINDS)
RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 0]]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 9, "top_p": 0.95, "repetition_penalty": 1.1}


def decode(tokens: Sequence[int]) -> str:
    return "".join("abcdefghijklm"[token] for token in tokens)


@all_kinds
@pytest.mark.parametrize("options", [{"temperature": 0.0}, SAMPLED])
def test_ragged_rows_are_as_each_alone(kind: str, options: dict[str, Any]) -> None:
    model = make(kind)
    together = model.generate(RAGGED, 12, seed=[7, 8, 9], **options)
    for row, prompt in enumerate(RAGGED):
        alone = model.generate(prompt, 12, seed=[7, 8, 9][row], **options)
        assert alone.tokens == [together.tokens[row]]
    assert together.reasons == ["length"] * 3
    assert len(set(map(tuple, together.tokens))) == 3


@settings(max_examples=8, deadline=None, derandomize=True)
@given(chunk=st.integers(1, 20), kind=st.sampled_from(list(KINDS)))
def test_prefill_in_chunks_is_prefill(chunk: int, kind: str) -> None:
    model = make(kind).double()
    prompts = [torch.tensor(prompt) for prompt in RAGGED]
    with torch.no_grad():
        logits, state = prefill(model, prompts)
        cut, after = prefill(model, prompts, chunk=chunk)
    torch.testing.assert_close(cut, logits)
    next_tokens = torch.tensor([1, 2, 3])
    torch.testing.assert_close(model.step(next_tokens, after)[0], model.step(next_tokens, state)[0])


@all_kinds
def test_streamed_is_generated(kind: str) -> None:
    model = make(kind)
    whole = model.generate(RAGGED, 10, seed=1, decode=decode, **SAMPLED)
    tokens: list[list[int]] = [[], [], []]
    texts = ["", "", ""]
    run = model.stream(RAGGED, 10, seed=1, decode=decode, **SAMPLED)
    for item in run:
        tokens[item.row].append(item.token)
        texts[item.row] += item.text
    assert (tokens, texts, run.reasons) == (whole.tokens, whole.texts, whole.reasons)
    assert texts == [decode(row) for row in tokens]
    assert run.tokens == [[], [], []]


@all_kinds
def test_greedy_is_the_argmax_of_the_whole(kind: str) -> None:
    model = make(kind)
    out = model.generate([1, 2, 3], 8, temperature=0)
    logits, _ = model(torch.tensor([[1, 2, 3, *out.tokens[0]]]))
    assert logits[0, 2:-1].argmax(-1).tolist() == out.tokens[0]


@all_kinds
def test_going_on_from_a_state_is_not_stopping(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    whole = model.generate(RAGGED, 12, temperature=0)
    first = model.generate(RAGGED, 5, temperature=0)
    state = ModelState.load(first.state.save(tmp_path / "state"))
    second = model.generate(first.pending, 7, temperature=0, state=state)
    assert [one + two for one, two in zip(first.tokens, second.tokens, strict=True)] == whole.tokens
    again = model.generate(first.pending, 7, temperature=0, state=state)
    assert again.tokens == second.tokens, "generation changed the state it was given"


@all_kinds
def test_forks_go_their_own_ways(kind: str) -> None:
    model = make(kind)
    first = model.generate([1, 2, 3], 4, temperature=0)
    fork = model.generate(
        [[*first.pending[0], 5], [*first.pending[0], 6, 7]], 6, temperature=0, state=first.state.repeat(2)
    )
    for row, more in enumerate(([5], [6, 7])):
        whole = model.generate([1, 2, 3, *first.tokens[0], *more], 6, temperature=0)
        assert whole.tokens[0] == fork.tokens[row]


def test_seeds() -> None:
    model = make()
    first, same, other = (model.generate([[1]] * 2, 20, seed=seed).tokens for seed in (0, 0, 5))
    assert first == same != other
    assert first[0] != first[1]
    before = torch.random.get_rng_state()
    model.generate([1], 3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    fresh = model.generate([1], 20).tokens
    assert fresh != model.generate([1], 20).tokens
    torch.manual_seed(3)
    assert fresh == model.generate([1], 20).tokens


@all_kinds
def test_rows_stop_by_themselves(kind: str) -> None:
    model = make(kind)
    free = model.generate(RAGGED, 12, seed=2, temperature=2.0)
    stop = free.tokens[0][4]
    out = model.generate(RAGGED, 12, seed=2, temperature=2.0, stop_tokens=[stop])
    for row in range(3):
        end = free.tokens[row].index(stop) + 1 if stop in free.tokens[row] else 12
        assert out.tokens[row] == free.tokens[row][:end]
        assert out.reasons[row] == ("stop_token" if stop in free.tokens[row] else "length")
    # The state of each row is of the moment it ended, whenever that was.
    more = model.generate(out.pending, 3, temperature=0, state=out.state)
    for row, prompt in enumerate(RAGGED):
        alone = model.generate([*prompt, *out.tokens[row]], 3, temperature=0)
        assert more.tokens[row] == alone.tokens[0]


def test_stop_strings() -> None:
    model = make()
    free = model.generate(RAGGED, 30, seed=3, temperature=2.0, decode=decode)
    stop = free.texts[0][6:8]
    out = model.generate(RAGGED, 30, seed=3, temperature=2.0, decode=decode, stop=stop)
    for row in range(3):
        place = free.texts[row].find(stop)
        assert out.texts[row] == (free.texts[row][:place] if place >= 0 else free.texts[row])
        assert out.reasons[row] == ("stop" if place >= 0 else "length")
    with pytest.raises(ArgumentError, match="decode"):
        model.generate([1], 3, stop="a")
    with pytest.raises(ArgumentError, match="empty"):
        model.generate([1], 3, stop=["a", ""], decode=decode)


def test_it_shows_what_it_wrote() -> None:
    out = make("mamba").generate([[1, 2]], 2, seed=0)
    assert repr(out) == f"Generation(tokens={out.tokens}, texts=[''], reasons=['length'])"


def test_prompts_of_every_form() -> None:
    model = make()
    expected = model.generate([[1, 2]], 3, temperature=0).tokens
    forms = [1, 2], (1, 2), torch.tensor([1, 2]), torch.tensor([[1, 2]]), [torch.tensor([1, 2])]
    # What tokenizers here give.
    arrays = np.array([1, 2], dtype=np.uint8), [np.array([1, 2], dtype=np.uint32)]
    for prompts in (*forms, *arrays):
        assert model.generate(prompts, 3, temperature=0).tokens == expected


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "at least one prompt"),
        ([[1], []], "prompt 1 must hold at least one token"),
        (torch.ones(0, 3, dtype=torch.int64), "at least one prompt"),
        (torch.ones(2, 0, dtype=torch.int64), "prompt 0 must hold at least one token"),
        ([[1], [2, 13]], r"prompt 1 must lie in 0 \.\. 12.*got 13"),
        ([[-1]], "got -1"),
        ([[1.5]], "integer"),
        ("text", "encode"),
        (["text"], "encode"),
        ([[[1]]], "prompt 0"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "got shape"),
    ],
)
def test_prompts_that_are_none(prompts: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make().generate(prompts, 3)


def test_options_that_make_no_sense() -> None:
    model = make()
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        model.generate([1], 0)
    with pytest.raises(ArgumentError, match="max_new_tokens must be an integer"):
        model.generate([1], 2.5)
    with pytest.raises(ArgumentError, match="stop_tokens must be token ids"):
        model.generate([1], 2, stop_tokens="a")
    with pytest.raises(ArgumentError, match="prefill_chunk"):
        model.generate([1], 1, prefill_chunk=0)
    with pytest.raises(ArgumentError, match="2 sequences, there are 1 prompts"):
        model.generate([1], 1, state=model.initial_state(2))
    with pytest.raises(ArgumentError, match="no state yet"):
        Generation(model, [1], 1).state  # noqa: B018


def test_no_gradients_and_states_that_can_be_trained_from() -> None:
    model = make()
    out = model.generate([1, 2], 3)
    logits, _ = model(torch.tensor([[1]]), out.state)
    logits.sum().backward()
    assert not any(tensor.requires_grad for tensor in out.state.tensors())


def test_memory_is_constant_in_the_length() -> None:
    """State bytes do not change, and neither does what Python holds, over hundreds of tokens."""
    model = make()
    run = model.stream([1, 2, 3], None, seed=0, decode=decode, **SAMPLED)
    items = iter(run)

    def advance(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            next(items)
        gc.collect()
        return tracemalloc.get_traced_memory()[0], run.state.nbytes

    tracemalloc.start()
    try:
        advance(100)
        held, state = advance(100)
        later, later_state = advance(300)
    finally:
        tracemalloc.stop()
    assert state == later_state == model.state_bytes(1)
    # A block of random numbers may just have been drawn.
    assert later - held < 8_000


def test_vocabulary_of_any_size_and_autocast() -> None:
    model = make(vocab_size=VOCABULARY + 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate([1], 5).tokens[0]) == 5
    model = model.to(torch.bfloat16)
    assert len(model.generate(RAGGED, 5).tokens[2]) == 5
