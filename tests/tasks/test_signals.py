"""Delays, trajectories and files of time series: what is asked is what was drawn or stands in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.errors import ArgumentError, DataError
from longscan.tasks.delay import Delay, white_signal
from longscan.tasks.task import NRMSE
from longscan.tasks.time_series import read_time_series
from longscan.tasks.trajectories import CharacterTrajectories, TrajectoriesStandin

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_white_signals_have_no_fast_parts() -> None:
    signal = white_signal(300, 200, 12, generator())
    spectrum = torch.fft.rfft(signal.double()).abs()
    assert spectrum[:, 13:].max() < 1e-4
    assert spectrum[:, 0].max() < 1e-4
    power = spectrum[:, 1:13].square().mean(0)
    assert power.max() < 1.6 * power.min()
    assert torch.allclose(signal.abs().amax(1), torch.ones(300))
    assert torch.equal(signal.abs().argmin(1), torch.zeros(300, dtype=torch.int64))


def test_a_delay_asks_for_what_was_read_so_long_ago() -> None:
    task = Delay(length=40, delays=5, cycles=4)
    inputs, targets = task.sample(3, generator())
    assert inputs.shape == (3, 100, 1)
    assert targets.shape == (3, 100, 5)
    assert targets[:, :40].isnan().all()
    for index in range(5):
        for place in range(40, 100):
            assert torch.equal(targets[:, place, index], inputs[:, place - 10 * index, 0])


def test_one_delay_is_judged_at_a_time() -> None:
    task = Delay(length=40, delays=5, cycles=4)
    ((inputs, targets),) = task.tests(20, 4, 4, CPU, 0)
    asked = ~targets.isnan()
    assert asked[:, 40:, 2].all()
    assert int(asked.sum()) == 4 * 60
    scores = torch.zeros_like(targets, requires_grad=True)
    errors, squares = task.judge(scores, targets)
    assert NRMSE.score(errors.item(), squares.item()) == pytest.approx(1)
    task.loss(scores, targets).backward()
    assert scores.grad is not None
    assert torch.allclose(scores.grad[:, 40:, 2], -2 * inputs[:, 20:80, 0] / (4 * 60), atol=1e-8)
    assert int((scores.grad != 0).sum()) <= 4 * 60
    with pytest.raises(ArgumentError, match="got 21 steps; allowed are 0, 10, 20, 30, 40"):
        next(task.tests(21, 4, 4, CPU, 0))
    with pytest.raises(ArgumentError, match="multiple of delays - 1"):
        Delay(length=42)


def test_a_curve_is_the_same_at_any_rate() -> None:
    """Without noise and stray, samples at twice the rate are those between."""
    task = TrajectoriesStandin(length=20, classes=3)
    curves = {}
    for length in (20, 40):
        inputs, classes = task.sample(4000, generator(), length)
        curves[length] = torch.stack([inputs[classes == k].mean(0) for k in range(3)])
    assert (curves[40][:, ::2] - curves[20]).abs().max() < 0.15
    assert (curves[20][0] - curves[20][1]).abs().max() > 0.5
    assert not torch.equal(task.sample(2, generator(1))[0], task.sample(2, generator(2))[0])


@pytest.fixture
def series() -> list[tuple[np.ndarray, str]]:
    random = np.random.default_rng(0)
    return [(random.normal(size=(3, places)).astype(np.float32), str(k % 2 + 1)) for k, places in enumerate((5, 9, 7))]


def write_ts(path: Path, series: list[tuple[np.ndarray, str]]) -> Path:
    longest = max(values.shape[1] for values, _ in series)
    lines = ["#a comment", "@problemName CharacterTrajectories", "@classLabel true 1 2", "@data"]
    for values, label in series:
        channels = [[*map(repr, map(float, row)), *["?"] * (longest - len(row))] for row in values]
        lines.append(":".join([*map(",".join, channels), label]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_mat(path: Path, series: list[tuple[np.ndarray, str]]) -> Path:
    scipy_io = pytest.importorskip("scipy.io")
    cells = np.empty((1, len(series)), dtype=object)
    for index, (values, _) in enumerate(series):
        cells[0, index] = values.astype(np.float64)
    labels = np.array([[float(label) for _, label in series]])
    scipy_io.savemat(path, {"mixout": cells, "consts": {"charlabels": labels}})
    return path


@pytest.mark.parametrize("write", [write_ts, write_mat])
def test_files_of_either_kind_are_read(write: object, series: list[tuple[np.ndarray, str]], tmp_path: Path) -> None:
    path = write(tmp_path / f"file.{write.__name__[6:]}", series)  # type: ignore[operator,attr-defined]
    found, labels = read_time_series(path)
    assert labels == [label for _, label in series]
    for ours, (theirs, _) in zip(found, series, strict=True):
        assert np.allclose(ours, theirs)


def test_trajectories_are_thinned_and_know_their_lengths(series: list[tuple[np.ndarray, str]], tmp_path: Path) -> None:
    write_ts(tmp_path / "C_TEST.ts", series[:1])
    write_ts(tmp_path / "C_TRAIN.ts", series[1:])
    task = CharacterTrajectories(length=8, data=str(tmp_path))
    split = task.on(CPU)
    assert split.train_inputs.shape == (2, 8, 3)
    assert split.test_inputs.shape == (1, 8, 3)
    stored = torch.cat([split.train_inputs, split.test_inputs])
    assert sorted(task.lengths(stored).tolist()) == [5, 7, 8]
    half = task.present(stored, 50)
    assert torch.equal(half, stored[:, ::2])
    assert sorted(task.lengths(half).tolist()) == [3, 4, 4]
    assert CharacterTrajectories(length=8, rate=50, data=str(tmp_path)).sample(4, generator())[0].shape == (4, 4, 3)
    with pytest.raises(ArgumentError, match="must divide 100, got 30"):
        CharacterTrajectories(rate=30)


def test_what_is_wrong_is_said(tmp_path: Path, series: list[tuple[np.ndarray, str]]) -> None:
    with pytest.raises(DataError, match=r"no \.ts file"):
        read_time_series(tmp_path)
    path = tmp_path / "a.ts"
    with pytest.raises(DataError, match="cannot read"):
        read_time_series(path)
    path.write_text("@problemName x\n")
    with pytest.raises(DataError, match="no series after a line @data"):
        read_time_series(path)
    path.write_text("@data\n1,2:3,x:1\n")
    with pytest.raises(DataError, match=r"a\.ts, line 2"):
        read_time_series(path)
    path.write_text("@data\n1,2:3,4:1\n")
    with pytest.raises(DataError, match="is not of 3 channels"):
        CharacterTrajectories(data=str(path)).on(CPU)
    (tmp_path / "b.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match="is no file of character trajectories"):
        read_time_series(tmp_path / "b.mat")
