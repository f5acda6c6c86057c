"""Nested list operations and their values, as the Long Range Arena draws them (Tay et al. 2021).

A node is an operator with probability 0.25, with 2 .. ``max_args`` arguments that are nodes again, else a digit; at
depth ``max_depth`` always a digit. Trees whose length does not lie strictly between the bounds are thrown away.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
from numba import prange

from longscan.errors import DataError
from longscan.ops.jit import inline, kernel, parallel_kernel, run
from longscan.tasks.generators.randoms import below, stream, uniform
from longscan.tasks.watching import tell

#: What stands for each token: padding, the digits, operators with their bracket, the closing bracket.
SYMBOLS = ("_", *"0123456789", "[MAX", "[MIN", "[MED", "[SM", "]")
PADDING = 0
_ZERO, _MAX, _MIN, _MEDIAN, _SUM, _CLOSE = 1, 11, 12, 13, 14, 15
_OPERATORS = 4
_OPERATOR_SHARE = 0.25
# A set of distinct expressions that is not full after so many times its size was drawn has no more of them.
_PATIENCE = 64
# Trees to draw until one has a length that is asked for; by the Arena's numbers one in fifteen has.
_TRIES = 100_000
# Drawn at once, so that it can be said how far it is.
_AT_ONCE = 1 << 14


@inline
def _apply(operator, arguments, count):
    """The value of an operator; its arguments may be left in another order. The median is rounded down."""
    if operator == _SUM:
        return arguments[:count].sum() % 10
    arguments = np.sort(arguments[:count])
    if operator == _MIN:
        return arguments[0]
    if operator == _MAX:
        return arguments[count - 1]
    return (arguments[(count - 1) // 2] + arguments[count // 2]) // 2


@inline
def _draw(random, tokens, max_depth, max_args, open_operators, wanted, seen, arguments):
    """One tree, written into tokens: its length and value; the length of tokens, if it grows beyond."""
    longest = len(tokens)
    length, depth = 0, 0  # depth: operators that are open
    while True:
        if length == longest:
            return longest, np.int64(0)
        if depth + 1 < max_depth and uniform(random) < _OPERATOR_SHARE:
            operator = _MAX + below(random, _OPERATORS)
            open_operators[depth], wanted[depth], seen[depth] = operator, 2 + below(random, max_args - 1), 0
            depth += 1
            tokens[length] = operator
            length += 1
            continue
        value = below(random, 10)
        tokens[length] = _ZERO + value
        length += 1
        while depth > 0:
            top = depth - 1
            arguments[top, seen[top]] = value
            seen[top] += 1
            if seen[top] < wanted[top]:
                break
            if length == longest:
                return longest, np.int64(0)
            value = _apply(open_operators[top], arguments[top], seen[top])
            tokens[length] = _CLOSE
            length += 1
            depth = top
        if depth == 0:
            return length, value


@kernel
def _expression(task, seed, first, max_depth, max_args, above, tokens, lengths, values, digests):
    random = stream(seed, first + task)
    open_operators, wanted, seen = np.empty((3, max_depth), np.int64)
    arguments = np.empty((max_depth, max_args), np.int64)
    row = tokens[task]
    length, value = np.int64(0), np.int64(0)
    for _ in range(_TRIES):
        length, value = _draw(random, row, max_depth, max_args, open_operators, wanted, seen, arguments)
        if above < length < len(row):
            break
        length = 0
    row[length:] = PADDING
    lengths[task], values[task] = length, value
    digest = np.uint64(14695981039346656037)  # FNV-1a
    for token in row[:length]:
        digest = (digest ^ np.uint64(token)) * np.uint64(1099511628211)
    digests[task] = digest


@parallel_kernel
def _expressions(tasks, seed, first, max_depth, max_args, above, tokens, lengths, values, digests):
    for task in prange(tasks):
        _expression(task, seed, first, max_depth, max_args, above, tokens, lengths, values, digests)


def expressions(
    count: int, *, seed: int, max_depth: int = 10, max_args: int = 10, above: int = 500, under: int = 2000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different random expressions.

    Args:
        count: how many.
        seed: equal seeds give equal expressions, and the first of a larger set.
        max_depth: of the tree; the root is at depth 1, and what is at ``max_depth`` is a digit.
        max_args: most arguments of an operator, at least 2.
        above, under: bounds of the length, which is that of the operators, digits and closing brackets.

    Returns:
        tokens (count, under - 1) uint8, indices of :data:`SYMBOLS`, padded at the end; lengths (count,) int64; values
        (count,) int64, digits.

    Raises:
        DataError: expressions of such lengths are too rare, or fewer than asked for.
    """
    tokens = np.empty((count, under), np.uint8)
    lengths, values = np.empty((2, count), np.int64)
    digests = np.empty(count, np.uint64)
    kept, drawn = 0, 0
    while kept < count:
        if drawn > _PATIENCE * count:
            raise DataError(
                f"{drawn:,} expressions of max_depth {max_depth}, max_args {max_args} and length {above + 1} to "
                f"{under - 1} had only {kept:,} different ones among them, {count:,} are needed; widen the bounds"
            )
        tell("drawing expressions", kept, count)
        batch = min(count - kept, _AT_ONCE) if drawn else 1  # one alone shows whether the bounds can be met
        part = tuple(array[kept : kept + batch] for array in (tokens, lengths, values, digests))
        run(_expressions, _expression, batch, seed, drawn, max_depth, max_args, above, *part)
        drawn += batch
        if not part[1].all():
            raise DataError(
                f"max_depth {max_depth} and max_args {max_args} gave no expression of length {above + 1} to "
                f"{under - 1} in {_TRIES:,} tries; give other bounds of the length, or a greater depth"
            )
        first = np.sort(np.unique(part[3], return_index=True)[1])
        first = first[~np.isin(part[3][first], digests[:kept])]
        for array in part:
            array[: len(first)] = array[first]
        kept += len(first)
    return tokens[:, : under - 1], lengths, values
