"""Waveforms: files in and out, 8 bits by mu-law, notes at the pitches of their keys."""

from __future__ import annotations

import math
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.errors import ArgumentError, DataError
from longscan.evaluation.tasks import evaluate_task
from longscan.evaluation.waveforms import continue_waveform
from longscan.models import Sashimi
from longscan.tasks.audio import Audio, NotesStandin, from_mu_law, mu_law, read_wav, write_wav
from longscan.tasks.task import Recipe
from longscan.training.tasks import TaskTrainer, task_model

CPU = torch.device("cpu")
RECIPE = Recipe(
    model="sashimi",
    d_model=8,
    n_layer=1,
    batch_size=8,
    learning_rate=1e-2,
    model_options={"pool": [4], "mlp_expand": 0},
)


def write_pcm(path: Path, samples: np.ndarray, rate: int = 16_000) -> None:
    """By the standard library: (places,) or (places, channels) of uint8 or int16."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


@pytest.fixture
def recordings(tmp_path: Path) -> list[np.ndarray]:
    pytest.importorskip("scipy")
    random = np.random.default_rng(0)
    made = [random.integers(-20_000, 20_000, 400).astype(np.int16) for _ in range(2)]
    (tmp_path / "more").mkdir()
    for name, samples in zip(("a.wav", "more/b.wav"), made, strict=True):
        write_pcm(tmp_path / name, samples)
    return made


def levels_of(samples: np.ndarray) -> list[int]:
    """mu-law by its formula, one sample at a time."""
    curved = [math.copysign(math.log(1 + 255 * abs(s) / 32768) / math.log(256), s) for s in samples.tolist()]
    return [round((c + 1) / 2 * 255) for c in curved]


def test_every_level_comes_back() -> None:
    levels = torch.arange(256)
    waveform = from_mu_law(levels)
    assert torch.equal(mu_law(waveform), levels)
    assert waveform[0] == -1
    assert waveform[-1] == 1
    assert (waveform.diff() > 0).all()
    assert mu_law(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_files_are_read_and_written(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    samples = np.array([-32768, -1, 0, 16384, 32767], np.int16)
    write_pcm(tmp_path / "a.wav", samples)
    assert np.array_equal(read_wav(tmp_path / "a.wav", 16_000), samples / np.float32(32768))
    write_pcm(tmp_path / "b.wav", np.array([0, 128, 255], np.uint8))
    assert read_wav(tmp_path / "b.wav", 16_000).tolist() == [-1, 0, 127 / 128]
    write_pcm(tmp_path / "c.wav", np.array([[0, 16384], [-32768, 0]], np.int16))
    assert read_wav(tmp_path / "c.wav", 16_000).tolist() == [0.25, -0.5]
    waveform = torch.tensor([0.0, 0.5, -1.0, 2.0])
    again = read_wav(write_wav(tmp_path / "d.wav", waveform, 8000), 8000)
    assert np.allclose(again, [0, 0.5, -1, 1], atol=1e-4)


def test_windows_are_of_the_recordings(recordings: list[np.ndarray], tmp_path: Path) -> None:
    task = Audio(30, data=str(tmp_path))
    train = bytes(level for samples in recordings for level in levels_of(samples[:380]))
    inputs, targets = task.sample(50, torch.Generator().manual_seed(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert all(bytes(row.tolist()) in train for row in torch.cat([inputs, targets[:, -1:]], 1))
    rest = [level for samples in recordings for level in levels_of(samples[380:])]
    ((inputs, targets),) = task.tests(19, 5, 8, CPU, 0)
    assert inputs.tolist() == [rest[:19], rest[20:39]]
    assert targets.tolist() == [rest[1:20], rest[21:40]]


def test_what_is_wrong_is_said(recordings: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"has 16000 samples a second, the task 8000; .* ffmpeg -i a.wav -ar 8000"):
        Audio(30, 8000, data=str(tmp_path)).to(CPU)
    with pytest.raises(DataError, match="part to train on has 760 places, windows are of 801"):
        Audio(800, data=str(tmp_path)).to(CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.wav file in"):
        Audio(data=str(tmp_path / "empty")).to(CPU)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(DataError, match=r"cannot read .*text\.wav"):
        read_wav(tmp_path / "text.wav", 16_000)
    with pytest.raises(DataError, match="cannot read"):
        read_wav(tmp_path / "missing.wav", 16_000)
    with pytest.raises(ArgumentError, match="rate must be at least 6000, got 5000"):
        NotesStandin(rate=5000)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"scipy.*longscan\[experiments\]"):
        read_wav(tmp_path / "a.wav", 16_000)


def test_notes_are_in_tune() -> None:
    """Where the spectrum of a second is highest there is a white key's frequency, or a partial of one."""
    waveforms = NotesStandin(notes=2).play(8, 16_000, torch.Generator().manual_seed(0))
    white = [130.81 * 2 ** ((12 * octave + step) / 12) for octave in (0, 1) for step in (0, 2, 4, 5, 7, 9, 11)]
    for waveform in waveforms:
        peak = int(torch.fft.rfft(waveform * torch.hann_window(16_000)).abs().argmax())
        assert min(abs(peak - number * key) / number for key in white for number in (1, 2, 3)) < 1.5
    assert waveforms.abs().amax(1).min() > 0.05
    assert waveforms.abs().max() < 1.5


def test_notes_depend_on_the_seed_alone() -> None:
    task = NotesStandin(200)
    first, again, other = (task.sample(3, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.min()) >= 0
    assert int(first.max()) < 256


def test_a_model_learns_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    task = NotesStandin(128)
    model = task_model(task, "lstm", RECIPE, seed=0, device=CPU)
    trainer = TaskTrainer(task, model, RECIPE, seed=1, device=CPU)
    trainer.advance(30)
    bits = evaluate_task(model, task, length=128, sequences=20)
    assert 3 < bits < 0.95 * task.chance
    assert isinstance(model, Sashimi)
    path = continue_waveform(model, task, tmp_path / "a.wav", seed=3)
    inputs, _ = next(task.tests(128, 1, 1, CPU, 3))
    waveform = read_wav(path, 16_000)
    assert waveform.shape == (128,)
    assert np.allclose(waveform[:64], from_mu_law(inputs[0, :64]).numpy(), atol=1e-4)
    assert len(set(waveform[64:].tolist())) > 5
    assert model.training


@pytest.mark.gpu
def test_notes_are_drawn_within_a_captured_step() -> None:
    device, task = torch.device("cuda"), NotesStandin(256)
    losses = []
    for capture in (True, False):
        model = task_model(task, "s4d", RECIPE, seed=0, device=device)
        trainer = TaskTrainer(task, model, RECIPE, seed=1, device=device, capture=capture)
        losses.append(trainer.advance(5).loss)
        assert (trainer._graph is not None) == capture
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
