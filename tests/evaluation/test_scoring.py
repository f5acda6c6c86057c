"""Continuations scored with shared prefixes against each read on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import ArgumentError
from longscan.evaluation import score_continuations
from longscan.evaluation.scoring import _forest
from longscan.models import LanguageModel
from tests.models.small import VOCABULARY, make

Requests = list[tuple[list[int], list[int]]]


def alone(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: the whole sequence read, log-softmax everywhere."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(tokens[:, :-1])[0][0, len(context) - 1 :].double().log_softmax(-1)
    target = tokens[0, len(context) :]
    nats = logits.gather(-1, target[:, None]).sum().item()
    return nats, bool((logits.argmax(-1) == target).all())


def greedy(model: LanguageModel, context: list[int], count: int) -> list[int]:
    return model.generate([context], count, temperature=0).tokens[0]


def check(model: LanguageModel, requests: Requests, **options: int) -> None:
    scores = score_continuations(model, requests, **options)
    assert len(scores) == len(requests)
    for score, (context, continuation) in zip(scores, requests, strict=True):
        nats, is_greedy = alone(model, context, continuation)
        assert score.log_likelihood == pytest.approx(nats, rel=1e-5, abs=1e-4)
        assert score.is_greedy is is_greedy


def questions(model: LanguageModel) -> Requests:
    """Shared examples in front, then questions of a few answers each; some answers are the greedy ones."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=draw).tolist()

    front, requests = tokens(30), []
    for question in range(5):
        context = [*front, *tokens(2 + 3 * question)]
        requests += [(context, tokens(1 + answer)) for answer in range(3)]
        requests += [(context, greedy(model, context, 3)), (context[5:], tokens(2)), (tokens(1), tokens(4))]
    return requests


@pytest.mark.parametrize("kind", ["mamba", "mixed"])
@pytest.mark.parametrize("options", [{}, {"tokens_per_pass": 7}, {"sequences_per_pass": 1}], ids=str)
def test_equals_each_request_alone(kind: str, options: dict[str, int]) -> None:
    model = make(kind).eval()
    requests = questions(model)
    check(model, requests, **options)
    assert any(score.is_greedy for score in score_continuations(model, requests))


one = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(st.tuples(one, one), min_size=1, max_size=9), tokens=st.integers(1, 40))
def test_any_requests(requests: Requests, tokens: int) -> None:
    """Three tokens only, so that prefixes, whole contexts and whole requests recur."""
    check(make().eval(), requests, tokens_per_pass=tokens)


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(st.tuples(one, one), min_size=1, max_size=9))
def test_the_forest_spells_every_sequence(requests: Requests) -> None:
    full = [[*context, *continuation] for context, continuation in requests]
    spelled: dict[int, list[int]] = {index: [] for index in range(len(full))}
    nodes = _forest(full, [len(context) for context, _ in requests])
    while nodes:
        for node in nodes:
            assert node.tokens
            for request in node.requests:
                assert len(spelled[request]) == node.start
                spelled[request] += node.tokens
        nodes = [child for node in nodes for child in node.children]
    assert [spelled[index] for index in range(len(full))] == [tokens[:-1] for tokens in full]


def test_a_context_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    context = list(range(13)) * 5
    requests: Requests = [(context, [answer, answer, 1]) for answer in range(4)]
    read = []
    embed = model.backbone.embedding.forward

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        read.append(tokens.numel())
        return embed(tokens)

    monkeypatch.setattr(model.backbone.embedding, "forward", forward)
    score_continuations(model, requests)
    assert sum(read) == len(context) + 4 * 2


@pytest.mark.gpu
def test_a_gpu_scores_the_same() -> None:
    model = make().eval()
    requests = questions(model)
    expected = score_continuations(model, requests)
    for score, wanted in zip(score_continuations(model.cuda(), requests), expected, strict=True):
        assert score.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-4, abs=1e-3)


def test_progress_counts_every_request() -> None:
    model = make().eval()
    requests = questions(model)
    done: list[int] = []
    score_continuations(model, requests, tokens_per_pass=11, progress=done.append)
    assert sum(done) == len(requests)


def test_none_at_all_and_errors() -> None:
    model = make().eval()
    assert score_continuations(model, []) == []
    with pytest.raises(ArgumentError, match="request 1: context and continuation"):
        score_continuations(model, [([1], [2]), ([], [1])])
    with pytest.raises(ArgumentError, match="tokens_per_pass"):
        score_continuations(model, [([1], [2])], tokens_per_pass=0)
    with pytest.raises(ArgumentError, match="vocabulary"):
        score_continuations(model, [([1], [2]), ([VOCABULARY], [1])])
