"""What every test shares. Without a GPU, Triton's kernels run in its interpreter, set before Triton is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import pytest
import torch
from rich.progress import Progress

T = TypeVar("T")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist runs a worker per core; more threads a worker only get in each other's way.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def countdown(capfd: pytest.CaptureFixture[str]) -> Callable[[Iterable[T], int], Iterator[T]]:
    """Goes through items with a bar that has the time left, past pytest's capture, for tests that take minutes."""

    def shown(items: Iterable[T], total: int) -> Iterator[T]:
        with capfd.disabled(), Progress(*Progress.get_default_columns()) as bar:
            task = bar.add_task("", total=total)
            for item in items:
                yield item
                bar.advance(task)

    return shown


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A kernel that reads where it may not breaks every later call of its process: end it, so that pytest-xdist names
    the test that did it and goes on in a new worker."""
    if "gpu" not in item.keywords or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if os.environ.get("PYTEST_XDIST_WORKER"):
            os._exit(1)
        raise
