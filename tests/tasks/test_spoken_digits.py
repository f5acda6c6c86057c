"""Spoken digits: by the library or the program, the same every time; no held-out speaker is heard in training."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.errors import ArgumentError, DataError
from longscan.evaluation.tasks import evaluate_task
from longscan.tasks.audio import from_mu_law
from longscan.tasks.speech import Saying, speak
from longscan.tasks.spoken_digits import DIGITS, VOICES, SpokenDigitsClassesStandin, SpokenDigitsStandin
from longscan.tasks.task import Recipe
from longscan.training.tasks import TaskTrainer, task_model

CPU = torch.device("cpu")
SAYINGS = [
    Saying(digit, voice, pitch, speed)
    for digit, voice, pitch, speed in (("one", "en-us+f2", 60, 150), ("two", "en", 40, 190))
]


@pytest.fixture
def library() -> None:
    pytest.importorskip("espeakng_loader")


@pytest.fixture
def task(library: None, monkeypatch: pytest.MonkeyPatch) -> SpokenDigitsStandin:
    """Of five speakers, one of them held out."""
    monkeypatch.setattr("longscan.tasks.spoken_digits.VOICES", VOICES[:5])
    return SpokenDigitsStandin(2000, 4000, takes=2)


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program `espeak-ng`, the only one on PATH, and no package."""
    path = folder / "espeak-ng"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)


def test_words_sound_for_about_half_a_second(library: None) -> None:
    one, two = speak(SAYINGS, 16_000)
    for samples in (one, two):
        assert samples.dtype == np.float32
        assert 0.2 < len(samples) / 16_000 < 0.9
        assert 0.1 < np.abs(samples).max() <= 1.05
    assert all(np.array_equal(*pair) for pair in zip((one, two), speak(SAYINGS, 16_000), strict=True))
    slower, higher = speak([Saying("one", "en-us+f2", 60, 100), Saying("one", "en-us+f2", 99, 150)], 16_000)
    assert len(slower) > 1.2 * len(one)
    assert not np.array_equal(higher, one)


def test_another_rate_is_the_same_sound(library: None) -> None:
    """What a lower rate can hold is the spectrum's lower end."""
    high, low = (next(speak(SAYINGS, rate)) for rate in (16_000, 4000))
    assert len(low) == pytest.approx(len(high) / 4, abs=1)
    spectra = [np.abs(np.fft.rfft(samples))[: len(low) // 2 - 5] / len(samples) for samples in (high, low)]
    assert np.corrcoef(*spectra)[0, 1] > 0.99


def test_a_voice_with_an_echo_is_heard_to_its_end(library: None) -> None:
    """Of a saying longer than one buffer of the library's own, as much is heard as of its two halves."""
    (whole,) = speak([Saying("seven seven seven seven", "en+f4")], 16_000)
    (part,) = speak([Saying("seven seven", "en+f4")], 16_000)
    assert len(whole) > 1.6 * len(part) > 16_000


def test_the_program_serves_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called with each saying's voice, pitch and speed; its WAV file, of a stream's unknown length, is read."""
    wave = b"RIFF" + struct.pack("<i", 0x7FFFF024) + b"WAVEfmt " + struct.pack("<ihhiihh", 16, 1, 1, 4000, 8000, 2, 16)
    wave += b"data" + struct.pack("<i", 0x7FFFF000)
    assert len(wave) == 44
    script = f"import sys, struct\nsys.stdout.buffer.write({wave!r})\nn = sum(map(ord, ' '.join(sys.argv[1:])))\n"
    script += "sys.stdout.buffer.write(struct.pack('<4h', 0, n, -n, 0))\n"
    program(tmp_path, script, monkeypatch)
    one, two = speak(SAYINGS, 4000)
    for samples, arguments in (
        (one, "-v en-us+f2 -p 60 -s 150 --stdout one"),
        (two, "-v en -p 40 -s 190 --stdout two"),
    ):
        n = sum(map(ord, arguments))
        assert np.allclose(samples, [n / 32768, -n / 32768], atol=1e-6)


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: None) -> None:
    with pytest.raises(DataError, match="eSpeak NG has no voice 'nobody'"):
        list(speak([Saying("one", "nobody")], 8000))
    program(tmp_path, "import sys\nsys.exit('no such voice')", monkeypatch)
    with pytest.raises(DataError, match="espeak-ng failed: no such voice"):
        list(speak(SAYINGS, 8000))
    (tmp_path / "espeak-ng").unlink()
    with pytest.raises(
        DataError, match=r"pip install 'longscan\[experiments\]' \(the package espeakng-loader\), or its program"
    ):
        SpokenDigitsStandin().to(CPU)


def test_speakers_are_held_out(task: SpokenDigitsStandin) -> None:
    parts = task.on(CPU)
    assert parts.train_inputs.shape == (4 * 10 * 2, 2001)
    assert parts.test_inputs.shape == (10 * 2, 2001)
    assert parts.test_targets.bincount().tolist() == [2] * 10
    assert not {bytes(row.tolist()) for row in parts.test_inputs} & {bytes(row.tolist()) for row in parts.train_inputs}
    waveforms = from_mu_law(parts.train_inputs)
    assert (waveforms.abs().amax(1) > 0.02).all()
    # Words begin anywhere, in silence that is not quite one.
    assert (waveforms[:, :5].abs().amax(1) < 0.01).float().mean() > 0.5
    begins = (waveforms.abs() > 0.02).int().argmax(1)
    assert begins.unique().numel() > 20


def test_the_next_sample_is_asked_for(task: SpokenDigitsStandin) -> None:
    inputs, targets = task.sample(6, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (6, 2000)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    shorter, _ = task.sample(6, torch.Generator().manual_seed(0), 300)
    assert torch.equal(shorter, inputs[:, :300])
    tested = torch.cat([inputs for inputs, _ in task.tests(2000, 1, 7, CPU, 0)])
    assert torch.equal(tested, task.on(CPU).test_inputs[:, :-1].long())
    with pytest.raises(ArgumentError, match="recordings are of 2000 samples, got length 2001"):
        task.sample(1, torch.Generator(), 2001)
    recipe = Recipe(
        model="sashimi", d_model=8, n_layer=1, batch_size=2, learning_rate=1e-2, model_options={"pool": [4]}
    )
    model = task_model(task, "lstm", recipe, seed=0, device=CPU)
    TaskTrainer(task, model, recipe, seed=1, device=CPU).advance(3)
    assert evaluate_task(model, task, length=200) < task.chance


def test_the_digit_is_asked_for(task: SpokenDigitsStandin) -> None:
    classes = SpokenDigitsClassesStandin(2000, 4000, takes=2)
    inputs, targets = classes.sample(6, torch.Generator().manual_seed(0))
    assert inputs.shape == (6, 2000, 1)
    assert inputs.abs().max() <= 1
    assert targets.shape == (6,)
    assert (classes.outputs, classes.held_out) == (len(DIGITS), 20)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng")
def test_library_and_program_say_the_same(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = list(speak(SAYINGS[1:], 16_000))
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    theirs = list(speak(SAYINGS[1:], 16_000))
    assert len(ours[0]) == pytest.approx(len(theirs[0]), rel=0.1)
