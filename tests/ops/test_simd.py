"""The SIMD toolkit against numpy in float64, lane by lane, and what kernels rely on: caching, threads, forks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
from numba import njit

import longscan
from longscan.ops import jit, simd, simd_math, simd_memory
from longscan.ops.simd import WIDTH
from longscan.ops.simd_memory import load, load_format, load_part, store, store_format, store_part

DTYPES = {simd_memory.FLOAT32: torch.float32, simd_memory.BFLOAT16: torch.bfloat16, simd_memory.FLOAT16: torch.float16}
FORMATS = [f for f in DTYPES if f != simd_memory.FLOAT16 or simd.HAS_FLOAT16]


def mapped(function):
    """Runs `function` over a float32 array, vector by vector."""

    @njit
    def loop(source, target, vectors):
        for i in range(vectors):
            store(function(load(source + 4 * WIDTH * i)), target + 4 * WIDTH * i)

    def run(values: np.ndarray) -> np.ndarray:
        padded = np.zeros(-(-len(values) // WIDTH) * WIDTH, np.float32)
        padded[: len(values)] = values
        out = np.full_like(padded, np.nan)
        loop(padded.ctypes.data, out.ctypes.data, len(padded) // WIDTH)
        return out[: len(values)]

    return run


def relative_error(got: np.ndarray, truth: np.ndarray) -> float:
    return float(np.max(np.abs(got - truth) / np.abs(truth)))


GRID = np.concatenate([np.linspace(-30, 30, 200_001), np.geomspace(1e-30, 1, 1000), -np.geomspace(1e-30, 1, 1000)])
GRID = GRID.astype(np.float32)


@pytest.mark.parametrize(
    ("name", "truth", "tolerance"),
    [
        ("exp2", np.exp2, 2e-7),
        ("exp", np.exp, 2e-6),
        ("softplus", lambda x: np.logaddexp(0.0, x), 2e-6),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 2e-6),
        ("silu", lambda x: x / (1 + np.exp(-x)), 2e-6),
    ],
)
def test_function(name, truth, tolerance) -> None:
    function = getattr(simd_math, name)
    assert relative_error(mapped(function)(GRID), truth(GRID.astype(np.float64))) < tolerance


def test_exp2_at_the_ends() -> None:
    ends = np.array([-np.inf, -1e30, -151, 0, 127.5, 128, 1e30, np.inf, np.nan], np.float32)
    with np.errstate(over="ignore"):
        expected = np.exp2(ends)
    np.testing.assert_allclose(mapped(simd_math.exp2)(ends), expected, rtol=2e-7)


def test_turn() -> None:
    a = np.linspace(-50, 50, 100_001).astype(np.float32)
    cosine = mapped(njit(lambda v: simd_math.turn(v, 0.75)[0]))(a)
    sine = mapped(njit(lambda v: simd_math.turn(v, 0.75)[1]))(a)
    angle = np.pi * 0.75 * a.astype(np.float64)
    assert np.abs(cosine - np.cos(angle)).max() < 3e-7
    assert np.abs(sine - np.sin(angle)).max() < 3e-7


@njit
def _operators(v):
    chosen = simd.where((v > 0.0) & (v <= 2.0) | (v < -3.0), v, -1.0)
    return (2.0 * v - chosen) / (simd.absolute(v) + 1) + simd.maximum(v, 0.5) * simd.minimum(v, 0.25) + simd.total(v)


def test_operators() -> None:
    v = np.random.default_rng(0).normal(size=WIDTH).astype(np.float32) * 3
    chosen = np.where((v > 0) & (v <= 2) | (v < -3), v, -1)
    truth = (2 * v - chosen) / (np.abs(v) + 1) + np.maximum(v, 0.5) * np.minimum(v, 0.25) + v.sum()
    np.testing.assert_allclose(mapped(_operators)(v), truth, rtol=1e-5, atol=1e-6)


@njit
def _copy_part(source, target, number_format, count):
    store_part(load_part(source, number_format, count), target, number_format, count)


@njit
def _convert(source, source_format, target, target_format):
    store_format(load_format(source, source_format), target, target_format)


@pytest.mark.parametrize("number_format", FORMATS)
def test_partial_vectors_touch_only_their_lanes(number_format) -> None:
    for count in range(WIDTH + 1):
        source = torch.randn(WIDTH + 2).to(DTYPES[number_format])
        target = torch.full_like(source, 7.0)
        # One element off: no alignment is assumed.
        size = source.element_size()
        _copy_part(source.data_ptr() + size, target.data_ptr() + size, number_format, count)
        assert torch.equal(target[1 : count + 1], source[1 : count + 1])
        assert (target[count + 1 :] == 7).all()
        assert target[0] == 7


@pytest.mark.parametrize("number_format", FORMATS)
def test_conversion_rounds_as_torch_does(number_format) -> None:
    dtype = DTYPES[number_format]
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 1e-41, 65519.0]
    )
    for values in (special, torch.randn(4000) * 10):
        padded = torch.zeros(-(-len(values) // WIDTH) * WIDTH)
        padded[: len(values)] = values
        narrow, wide = torch.empty(len(padded), dtype=dtype), torch.empty(len(padded))
        for i in range(0, len(padded), WIDTH):
            _convert(padded[i:].data_ptr(), simd_memory.FLOAT32, narrow[i:].data_ptr(), number_format)
            _convert(narrow[i:].data_ptr(), number_format, wide[i:].data_ptr(), simd_memory.FLOAT32)
        torch.testing.assert_close(narrow, padded.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(wide, padded.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@njit
def _reverse(source, target, scratch):
    values = simd.tile(4)
    for i in range(4):
        values[i] = load(source + 4 * WIDTH * i)
    for i in range(4):
        store(values[3 - i], target + 4 * WIDTH * i)
    simd_memory.store_scalar(simd_memory.load_scalar(source), scratch)


def test_tiles() -> None:
    source, target, scratch = torch.randn(4, WIDTH), torch.empty(4, WIDTH), torch.empty(1)
    _reverse(source.data_ptr(), target.data_ptr(), scratch.data_ptr())
    assert torch.equal(target, source.flip(0))
    assert scratch[0] == source[0, 0]


_PROGRAM = """
import numpy as np
from numba import prange
from longscan.ops import jit, simd
from longscan.ops.simd import WIDTH
from longscan.ops.simd_memory import load, store

@jit.kernel
def body(task, address):
    store(load(address + 4 * WIDTH * task) * {factor} + simd_version(), address + 4 * WIDTH * task)

@jit.parallel_kernel
def driver(tasks, address):
    for task in prange(tasks):
        body(task, address)

if __name__ == "__main__":
    values = np.ones(4 * WIDTH, np.float32)
    body(0, values.ctypes.data)
    print(values[0], sum(body.stats.cache_hits.values()), body.stats.cache_path)
"""


def _run(folder: Path, environment: dict[str, str]) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def program(tmp_path):
    """A copy of the package's toolkit and a program with a kernel, both in a folder that may be changed."""
    source = Path(longscan.__file__).parent
    package = tmp_path / "longscan"
    (package / "ops").mkdir(parents=True)
    for name in ("jit.py", "simd.py", "simd_memory.py", "simd_math.py"):
        shutil.copy(source / "ops" / name, package / "ops")
    (package / "__init__.py").touch()
    (package / "ops" / "__init__.py").touch()
    with (package / "ops" / "simd.py").open("a") as file:
        file.write("\nfrom longscan.ops.jit import inline\n\n\n@inline\ndef simd_version():\n    return 1.0\n")
    text = _PROGRAM.format(factor=2.0).replace("import WIDTH", "import WIDTH, simd_version")
    (tmp_path / "program.py").write_text(text)
    return tmp_path


def test_kernels_are_cached_until_the_toolkit_changes(program) -> None:
    environment = {"PYTHONPATH": str(program)}
    assert _run(program, environment)[:2] == ["3.0", "0"]
    assert _run(program, environment)[:2] == ["3.0", "1"]
    toolkit = program / "longscan" / "ops" / "simd.py"
    toolkit.write_text(toolkit.read_text().replace("return 1.0", "return 5.0"))
    assert _run(program, environment)[:2] == ["7.0", "0"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_kernels_are_cached_elsewhere_when_the_package_cannot_be_written(program, tmp_path_factory) -> None:
    # Root may write anywhere: a file in the place of the cache folder stops it too.
    (program / "__pycache__").write_text("")
    home = tmp_path_factory.mktemp("home")
    environment = {"PYTHONPATH": str(program), "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    assert _run(program, environment)[1] == "0"
    result, hits, folder = _run(program, environment)
    assert (result, hits) == ("3.0", "1")
    assert folder.startswith(str(home))


@jit.kernel
def _square(task, address):
    value = load(address + 4 * WIDTH * task)
    store(value * value, address + 4 * WIDTH * task)


@jit.parallel_kernel
def _square_all(tasks, address):
    for task in jit.prange(tasks):
        _square(task, address)


@pytest.mark.parametrize("threads", [1, 2])
def test_run_uses_as_many_threads_as_torch(threads) -> None:
    import numba

    before, numba_before, layer = torch.get_num_threads(), numba.get_num_threads(), numba.config.THREADING_LAYER
    try:
        torch.set_num_threads(threads)
        assert jit.threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
        values = torch.randn(8, WIDTH)
        expected = values * values
        jit.run(_square_all, _square, 8, values.data_ptr())
        assert torch.equal(values, expected)
        assert numba.get_num_threads() == numba_before
        assert layer == numba.config.THREADING_LAYER
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_runs_kernels() -> None:
    """GNU's OpenMP ends a forked process that uses the pool of its parent."""
    values = torch.full((8, WIDTH), 3.0)
    jit.run(_square_all, _square, 8, values.data_ptr())
    child = os.fork()
    if child == 0:
        jit.run(_square_all, _square, 8, values.data_ptr())
        os._exit(0 if (values == 81).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
