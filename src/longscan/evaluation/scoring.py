"""Log-likelihoods of continuations of token contexts, each shared stretch of tokens read once.

The questions of a benchmark share much: a question's answers its context, few-shot prompts their examples. The requests
are sorted into a forest of token prefixes. A node is a stretch of tokens, read from a fork of its parent's state; nodes
of one generation go through the model packed in one row, without padding.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.models import LanguageModel
from longscan.nn.state import ModelState

# A shorter common prefix is read again: a further generation of nodes costs more than these tokens.
_LEAST_SHARED = 8
# Most places whose logits exist at once: 512 times 50,000 of them take 100 MB.
_HEAD_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: natural logarithm of its probability given the context.
        is_greedy: whether each of its tokens is the likeliest one at its place.
    """

    log_likelihood: float
    is_greedy: bool


@dataclasses.dataclass
class _Node:
    """Tokens at places ``start``, ``start + 1``, ... of all sequences in ``requests``, and what follows them."""

    start: int
    tokens: list[int]
    requests: list[int]
    children: list[_Node]


@torch.no_grad()
def score_continuations(
    model: LanguageModel,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    tokens_per_pass: int = 8192,
    sequences_per_pass: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The log-likelihood of each continuation given its context.

    Args:
        model: a language model, in the mode (``eval``) and dtype it is to be measured in.
        requests: pairs of context and continuation, token ids, each at least one.
        tokens_per_pass: most tokens taken through the model at once; a longer stretch goes in pieces.
        sequences_per_pass: most sequences packed together; None: as many as the tokens allow.
        progress: is given the number of requests done since it was last called.

    Returns:
        A score per request, in their order. Logarithms are float32, their sums float64.

    Raises:
        ArgumentError: an empty context or continuation, or a token outside the vocabulary (looked at on the CPU).
    """
    if tokens_per_pass < 1 or (sequences_per_pass is not None and sequences_per_pass < 1):
        raise ArgumentError(
            f"tokens_per_pass and sequences_per_pass must be at least 1, got {tokens_per_pass} and {sequences_per_pass}"
        )
    for index, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise ArgumentError(
                f"request {index}: context and continuation must hold at least one token each, "
                f"got {len(context)} and {len(continuation)}"
            )
    return _Scorer(model, requests, tokens_per_pass, sequences_per_pass, progress).run()


class _Scorer:
    def __init__(
        self,
        model: LanguageModel,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        tokens_per_pass: int,
        sequences_per_pass: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._model = model
        self._full = [[*context, *continuation] for context, continuation in requests]
        self._first = [len(context) for context, _ in requests]  # the place of a continuation's first token
        self._tokens_per_pass = tokens_per_pass
        self._sequences_per_pass = sequences_per_pass or len(requests)
        self._progress = progress
        self._nats = [0.0] * len(requests)
        self._greedy = [True] * len(requests)

    def run(self) -> list[Score]:
        self._read(_forest(self._full, self._first), [], None)
        return [Score(nats, greedy) for nats, greedy in zip(self._nats, self._greedy, strict=True)]

    def _read(self, nodes: list[_Node], parents: list[int], state: ModelState | None) -> None:
        """Read nodes and all below them; ``parents`` are their rows of ``state`` (None: they begin afresh)."""
        for places in self._passes(nodes):
            chosen = [nodes[place] for place in places]
            before = state.select([parents[place] for place in places]) if state is not None else None
            pieces = -(-len(chosen[0].tokens) // self._tokens_per_pass) if len(chosen) == 1 else 1
            if before is None and (pieces > 1 or any(node.children for node in chosen)):
                before = self._model.initial_state(len(chosen))
            after = self._read_long(chosen[0], before) if pieces > 1 else self._read_packed(chosen, before)
            below = [(child, row) for row, node in enumerate(chosen) for child in node.children]
            del before
            if below:
                self._read([child for child, _ in below], [row for _, row in below], after)

    def _passes(self, nodes: list[_Node]) -> Iterator[list[int]]:
        """Places of nodes that are read together."""
        places: list[int] = []
        tokens = 0
        for place, node in enumerate(nodes):
            full = tokens + len(node.tokens) > self._tokens_per_pass or len(places) == self._sequences_per_pass
            if places and full:
                yield places
                places, tokens = [], 0
            places.append(place)
            tokens += len(node.tokens)
        if places:
            yield places

    def _read_packed(self, nodes: list[_Node], state: ModelState | None) -> ModelState | None:
        device = self._model.device
        lengths = [len(node.tokens) for node in nodes]
        packed = torch.tensor([token for node in nodes for token in node.tokens], device=device)
        if len(set(lengths)) == 1:
            hidden, after = self._model.backbone(packed.view(len(nodes), -1), state)
        else:
            offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
            hidden, after = self._model.backbone(packed[None], state, cu_seqlens=offsets)
        self._score(nodes, hidden.flatten(0, 1))
        return after

    def _read_long(self, node: _Node, state: ModelState | None) -> ModelState | None:
        for offset in range(0, len(node.tokens), self._tokens_per_pass):
            tokens = node.tokens[offset : offset + self._tokens_per_pass]
            hidden, state = self._model.backbone(torch.tensor([tokens], device=self._model.device), state)
            self._score([_Node(node.start + offset, tokens, node.requests, [])], hidden[0])
        return state

    def _score(self, nodes: list[_Node], hidden: Tensor) -> None:
        """Book what the hidden vectors (tokens, d_model) of some nodes say of the tokens that come next."""
        rows: list[int] = []
        targets: list[int] = []
        owners: list[tuple[int, int]] = []  # a request and how many of the rows are its
        done = offset = 0
        for node in nodes:
            end = node.start + len(node.tokens)
            for request in node.requests:
                full = self._full[request]
                first, last = max(node.start, self._first[request] - 1), min(end, len(full) - 1)
                if first < last:
                    rows.extend(range(offset + first - node.start, offset + last - node.start))
                    targets.extend(full[first + 1 : last + 1])
                    owners.append((request, last - first))
                done += last == len(full) - 1
            offset += len(node.tokens)
        nats, greedy = self._judge(hidden, rows, targets)
        place = 0
        for request, count in owners:
            self._nats[request] += sum(nats[place : place + count])
            self._greedy[request] &= all(greedy[place : place + count])
            place += count
        if self._progress is not None and done:
            self._progress(done)

    def _judge(self, hidden: Tensor, rows: list[int], targets: list[int]) -> tuple[list[float], list[bool]]:
        """Log-probabilities of targets after the given rows of hidden vectors, and whether each is the likeliest."""
        nats: list[float] = []
        greedy: list[bool] = []
        # Answers of one question ask about the same place: its logits are computed once.
        wanted, index = torch.tensor(rows, dtype=torch.int64).unique(return_inverse=True)
        order = index.argsort(stable=True)
        index, wished = index[order], torch.tensor(targets, dtype=torch.int64)[order]
        for start in range(0, len(wanted), _HEAD_ROWS):
            logits = self._model.head(hidden[wanted[start : start + _HEAD_ROWS].to(hidden.device)]).float()
            here = (index >= start) & (index < start + _HEAD_ROWS)
            row, target = (index[here] - start).to(logits.device), wished[here].to(logits.device)
            nats.extend((logits[row, target] - logits.logsumexp(-1)[row]).tolist())
            greedy.extend((logits.argmax(-1)[row] == target).tolist())
        back = order.argsort().tolist()
        return [nats[place] for place in back], [greedy[place] for place in back]


def _forest(full: list[list[int]], first: list[int]) -> list[_Node]:
    """The prefix trees of all sequences; a sequence's last token is only predicted, never read."""
    order = sorted(range(len(full)), key=lambda request: full[request][:-1])
    shared = [0, *(_common(full[a], full[b]) for a, b in itertools.pairwise(order))]

    def grow(low: int, high: int, start: int) -> list[_Node]:
        """Nodes of the sequences ``order[low:high]``, which agree up to ``start``."""
        nodes = []
        while low < high:
            end = low + 1
            common = len(full[order[low]]) - 1
            while end < high:
                least = min(first[order[end - 1]], first[order[end]], start + _LEAST_SHARED)
                if shared[end] < max(least, start + 1):
                    break
                common = min(common, shared[end])
                end += 1
            node = _Node(start, full[order[low]][start:common], order[low:end], [])
            # What ends here needs no more reading; sorted, it comes first.
            while low < end and len(full[order[low]]) - 1 == common:
                low += 1
            node.children = grow(low, end, common)
            nodes.append(node)
            low = end
        return nodes

    return grow(0, len(order), 0)


def _common(left: list[int], right: list[int]) -> int:
    """How many tokens two sequences share in front, their last ones aside."""
    most = min(len(left), len(right)) - 1
    return next((place for place in range(most) if left[place] != right[place]), most)
