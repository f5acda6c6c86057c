"""Captures that fail leave the process as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from longscan.nn.capture import captured


class _Driver:
    """Stands in for PyTorch's captures, which fail at their end as those on a GPU do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, underway: bool) -> None:
        self.calls: list[tuple[object, ...]] = []
        self._underway = underway
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(device_index=3))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.calls.append(("stream", stream.device_index)))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: self.calls.append(("release", *of)))

    @contextmanager
    def graph(self, graph: object, **options: object) -> Iterator[None]:
        self.calls.append(("capture", options["pool"], options["capture_error_mode"]))
        yield

    def end(self, device: int, pool: object) -> None:
        self.calls.append(("end", device, pool))
        if not self._underway:
            raise RuntimeError("not currently recording to mempool_id")


BEGUN = ("capture", (0, 7), "thread_local")


def test_nothing_is_undone_where_all_went_well(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _Driver(monkeypatch, underway=False)
    with captured(SimpleNamespace()):  # type: ignore[arg-type]
        pass
    assert driver.calls == [BEGUN]


@pytest.mark.parametrize("underway", [True, False])
def test_a_failure_gives_back_stream_and_pool(monkeypatch: pytest.MonkeyPatch, underway: bool) -> None:
    driver = _Driver(monkeypatch, underway=underway)
    with pytest.raises(KeyError), captured(SimpleNamespace()):  # type: ignore[arg-type]
        raise KeyError
    undone = [("stream", 3), ("end", 3, (0, 7))]
    assert driver.calls == [BEGUN, *undone, *([("release", 3, (0, 7))] if underway else [])]


@pytest.mark.gpu
def test_graphs_after_a_failure() -> None:
    before = torch.cuda.current_stream()
    x = torch.ones(1000, device="cuda")
    for _ in range(3):
        with pytest.raises(RuntimeError), captured(torch.cuda.CUDAGraph()):
            (x + 1).sum().item()  # waits, which a graph cannot hold
        assert torch.cuda.current_stream() == before
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            y = (x * 2).cumsum(0)
        torch.cuda.empty_cache()
        x.fill_(3)
        graph.replay()
        assert y[-1].item() == 6000
        x.fill_(1)
        del graph, y
