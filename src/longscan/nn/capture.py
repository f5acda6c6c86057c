"""Work captured in a CUDA graph, without harm where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """What is launched inside becomes ``graph``; other threads may use the GPU meanwhile.

    Where it cannot be captured, the error comes out and the process goes on as before. By itself ``torch.cuda.graph``
    (PyTorch 2.11) would stay on the stream of the capture, and its allocator would go on asking the graph, which is
    gone, whether memory is for it: a later graph at the same address can then be given memory out of the pool of the
    first one, which the driver gets back at any time.

    Args:
        graph: an empty one.
        stream: on which to capture, not the default one; None: one that PyTorch keeps for that.
    """
    before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        _abandon(before.device_index, pool)
        raise


def _abandon(device: int, pool: tuple[int, int]) -> None:
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # the capture ended well and it was the work that failed: the graph gives its pool back
    torch._C._cuda_releasePool(device, pool)
