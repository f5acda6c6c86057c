"""Large pages: nothing but the pages changes."""

from __future__ import annotations

import sys

import pytest
import torch

from longscan.ops.mamba_step import pages
from longscan.ops.mamba_step.pages import use_large_pages


def test_contents_and_addresses_stay() -> None:
    matrices = [torch.randn(1100, 1000), torch.randn(3, 5), torch.randn(4000, 1000).to(torch.bfloat16)]
    before = [(matrix.data_ptr(), matrix.clone()) for matrix in matrices]
    done = use_large_pages(matrices)
    for matrix, (address, contents) in zip(matrices, before, strict=True):
        assert matrix.data_ptr() == address
        assert torch.equal(matrix, contents)
    assert done % (1 << 21) == 0
    assert 0 <= done <= sum(matrix.nbytes + (2 << 21) for matrix in matrices)


def test_small_matrices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def madvise(*arguments: int) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(pages, "_madvise", lambda: madvise)
    assert use_large_pages([torch.zeros(500, 1000)]) == 0
    assert not calls
    large = torch.zeros(1050, 1000)
    assert use_large_pages([large]) >= large.nbytes
    covered = {address + k for address, size, _ in calls for k in (0, size - 1)}
    assert min(covered) <= large.data_ptr()
    assert max(covered) >= large.data_ptr() + large.nbytes - 1


def test_a_system_that_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *_: -1)
    assert use_large_pages([torch.zeros(1050, 1000)]) == 0
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert use_large_pages([torch.zeros(1050, 1000)]) == 0


def test_only_linux_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert pages._madvise.__wrapped__() is None
