"""What Transformers gets wrong and we mend: a warm cache takes any number of tokens, and padding leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import ArgumentError
from longscan.integrations.transformers import enable
from longscan.integrations.transformers.padding import packing_of
from tests.integrations.transformers.theirs import FAMILIES, VOCABULARY, call, make, tokens

pytest.importorskip("transformers")

EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_warm_cache_takes_several_tokens(family: str) -> None:
    model, ids = make(family), tokens(2, 9)
    whole, _ = call(model, ids)
    _, cache = call(model, ids[:, :4])
    plain, _ = call(model, ids[:, 4:], cache)
    # The fault: their scan begins anew. Were it mended there, this would say so.
    assert (plain - whole[:, 4:]).abs().max() > 1e-3
    with enable():
        _, cache = call(model, ids[:, :4])
        middle, cache = call(model, ids[:, 4:7], cache)
        last, _ = call(model, ids[:, 7:], cache)
    torch.testing.assert_close(torch.cat([middle, last], 1), whole[:, 4:], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_right_padding(family: str) -> None:
    model, long, short = make(family), tokens(1, 6), tokens(1, 3, seed=1)
    padded = torch.cat([short, torch.zeros(1, 3, dtype=torch.int64)], 1)
    batch, mask = torch.cat([long, padded]), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    alone = model.generate(short, max_new_tokens=4, do_sample=False)[:, 3:]
    plain = model.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False)[1:, 6:]
    assert not torch.equal(plain, alone)
    with enable():
        ours = model.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False)[1:, 6:]
        # What goes on from there is the row's own text; Zamba and Jamba count places of padding in their attention.
        assert torch.equal(ours, alone)
        # Without a cache too nothing changes for the tokens that count.
        free = model(batch, attention_mask=mask, use_cache=False).logits[1, :3]
        torch.testing.assert_close(free, model(short, use_cache=False).logits[0], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_of_one_row_is_no_matter_of_another(family: str) -> None:
    """What padding gives, too, depends on its own row alone, and not on the kind of output."""
    model, ids = make(family), tokens(2, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]])
    with enable():
        both = model.base_model(ids, attention_mask=mask, use_cache=True)[0]
        for row in (0, 1):
            alone = model.base_model(ids[row, None], attention_mask=mask[row, None], use_cache=True)[0]
            torch.testing.assert_close(both[row, None], alone, **EXACT)
        plain = model.base_model(ids, attention_mask=mask, use_cache=True, return_dict=False)[0]
        torch.testing.assert_close(both, plain)


@pytest.mark.parametrize("family", ["jamba", "zamba"])
@torch.no_grad()
def test_a_static_cache_gives_the_same(family: str) -> None:
    """`generate` then hands on masks that are made ready."""
    model, ids = make(family), tokens(2, 6)
    options = {"attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]), "max_new_tokens": 4, "do_sample": False}
    with enable():
        expected = model.generate(ids, **options)
        assert torch.equal(expected, model.generate(ids, cache_implementation="static", **options))


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
@torch.no_grad()
def test_a_chunk_that_is_all_padding_changes_nothing(family: str) -> None:
    model, ids = make(family), tokens(2, 6)
    nothing = torch.zeros(2, 3, dtype=torch.int64)
    with enable():
        whole, _ = call(model, ids)
        # Before anything, and in the middle.
        _, cache = call(model, ids[:, :3], attention_mask=nothing)
        _, cache = call(model, ids[:, :4], cache)
        logits, cache = call(model, ids[:, :3], cache, attention_mask=nothing)
        assert torch.isfinite(logits).all()
        last, _ = call(model, ids[:, 4:], cache)
    torch.testing.assert_close(last, whole[:, 4:], **EXACT)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_batch_that_is_all_padding_has_gradients(family: str) -> None:
    """Of every parameter, as processes that average them expect."""
    model, ids = make(family), tokens(2, 6)
    with enable():
        model(ids, attention_mask=torch.zeros_like(ids), labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


MASKS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3).filter(
    lambda rows: any(any(row) for row in rows)
)


@settings(max_examples=15, deadline=None)
@given(rows=MASKS, cut=st.integers(0, 5), family=st.sampled_from(["mamba", "falcon_mamba"]))
@torch.no_grad()
def test_padding_anywhere_leaves_no_trace(rows: list[list[bool]], cut: int, family: str) -> None:
    """In one piece or in two, with gaps at the edges or inside: the rows go on as their tokens alone would."""
    model, mask = make(family), torch.tensor(rows)
    ids = tokens(len(rows), 6)
    if not (mask[:, :cut].any() and mask[:, cut:].any()):
        cut = 0
    with enable():
        cache = None
        if cut:
            _, cache = call(model, ids[:, :cut], attention_mask=mask[:, :cut])
        # The mask of what a cache has taken in may be there or not.
        logits, cache = call(model, ids[:, cut:], cache, attention_mask=mask if cut % 2 else mask[:, cut:])
        after, _ = call(model, ids[:, :1], cache)
        for row, counts in enumerate(mask):
            own = ids[row][counts]
            if len(own) == 0:
                continue
            expected, memory = call(model, own[None])
            here = counts[cut:]
            torch.testing.assert_close(logits[row][here], expected[0, len(own) - int(here.sum()) :], **EXACT)
            if here.any():
                torch.testing.assert_close(logits[row, -1], expected[0, -1], **EXACT)
            torch.testing.assert_close(after[row], call(model, ids[row : row + 1, :1], memory)[0][0], **EXACT)


@torch.no_grad()
def test_left_padding_before_a_projection_with_a_bias() -> None:
    """Their mask is applied before it, so that the bias gets into the convolution's window."""
    model, short = make("mamba", use_bias=True), tokens(1, 4)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    alone, _ = call(model, short)
    plain, _ = call(model, ids, attention_mask=mask)
    assert (plain[:, 3:] - alone).abs().max() > 1e-3
    with enable():
        ours, _ = call(model, ids, attention_mask=mask)
    torch.testing.assert_close(ours[:, 3:], alone, **EXACT)


def test_gradients_of_a_padded_batch() -> None:
    model, ids = make("mamba"), tokens(2, 6)
    mask = torch.tensor([[1] * 6, [0, 1, 1, 1, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(*losses: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(sum(losses[1:], losses[0]), list(model.parameters())))

    with enable():
        both = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        # Five targets in the first row and two in the second: a row's first token is nobody's target.
        alone = [model(ids[:1], labels=ids[:1]).loss * 5, model(ids[1:, 1:4], labels=ids[1:, 1:4]).loss * 2]
        # In the padded batch the first token of the second row is a target of the padding before it.
        logits = torch.nn.functional.cross_entropy(both.logits[1, 0].float()[None], ids[1, 1][None])
        torch.testing.assert_close(both.loss * 8, alone[0] + alone[1] + logits, **EXACT)
        for mine, theirs in zip(gradients(both.loss * 8 - logits), gradients(*alone), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_masks() -> None:
    assert packing_of(None, 4) is None
    assert packing_of(torch.ones(2, 4), 4) is None
    assert packing_of(torch.ones(2, 1, 4, 4), 4) is None
    # Only the last columns are this batch's.
    assert packing_of(torch.tensor([[0, 1, 1]]), 2) is None
    with pytest.raises(ArgumentError, match="the input has length 4"):
        packing_of(torch.ones(2, 3), 4)
    nothing = packing_of(torch.zeros(2, 3), 3)
    assert nothing is not None
    assert nothing.empty
    # A mask that is changed in place is looked at again.
    mask = torch.tensor([[1, 0]])
    first = packing_of(mask, 2)
    assert first is packing_of(mask, 2)
    mask[0, 1] = 1
    assert packing_of(mask, 2) is None


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_packing_and_back(data: st.DataObject) -> None:
    rows = data.draw(MASKS)
    mask = torch.tensor(rows)
    packing = packing_of(mask, 6)
    if packing is None:
        return
    x = torch.randint(1, VOCABULARY, (*mask.shape, 2))
    packed = packing.pack(x)
    assert torch.equal(packing.unpack(packed), x * mask[..., None])
    held = packing.hold(x)
    before = torch.randint(1, 9, (len(rows), 4, 2)) if data.draw(st.booleans()) else None
    last = packing.last(packed, before, 4)
    for row, counts in enumerate(mask):
        own = x[row][counts]
        history = torch.zeros(4, 2, dtype=own.dtype) if before is None else before[row]
        assert torch.equal(last[row], torch.cat([history, own])[-4:])
        for place in range(6):
            until = x[row, : place + 1][counts[: place + 1]]
            assert torch.equal(held[row, place], until[-1] if len(until) else torch.zeros_like(held[row, place]))
