"""Speech from text by eSpeak NG: the library that the package espeakng-loader ships, or the program `espeak-ng`.

Both are free software under the GPL, version 3 or later. They run as processes of their own; what they say is not
covered by their licence.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from longscan.errors import DataError

_PROGRAM = "espeak-ng"
# Of a WAV file as the program writes it: samples a second stand at 24, samples from 44 on.
_HEADER, _RATE_AT = 44, 24


@dataclass(frozen=True)
class Saying:
    """Words, and who says them how.

    Args:
        text: in the voice's language.
        voice: a name of eSpeak NG's, such as "en-us" or, with a variant, "en-us+f3".
        pitch: 0 to 99.
        speed: words a minute, from 80.
    """

    text: str
    voice: str = "en-us"
    pitch: int = 50
    speed: int = 175


def speak(sayings: Sequence[Saying], rate: int) -> Iterator[np.ndarray]:
    """Samples (float32, from -1 to 1) of each, ``rate`` a second, without the silence around them.

    The same sayings in the same order always give the same samples, from one version of eSpeak NG.

    Raises:
        DataError: neither the package nor the program is there, or it does not know a voice.
    """
    try:
        import espeakng_loader
    except ImportError:
        program = shutil.which(_PROGRAM)
        if program is None:
            raise DataError(
                "data: spoken digits need eSpeak NG; install its library with: pip install 'longscan[experiments]' "
                f"(the package espeakng-loader), or its program `{_PROGRAM}`, which has to be on PATH"
            ) from None
        said = _by_program(program, sayings)
    else:
        said = _by_library(espeakng_loader.get_library_path(), espeakng_loader.get_data_path(), sayings)
    for found, samples in said:
        loud = np.flatnonzero(samples)
        yield _resampled(samples[loud[0] : loud[-1] + 1] / np.float32(32768), found, rate) if len(loud) else samples


def _by_library(library: str, data: str, sayings: Sequence[Saying]) -> Iterator[tuple[int, np.ndarray]]:
    worker = [sys.executable, str(Path(__file__).with_name("espeak_worker.py")), library, data]
    with subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for saying in sayings:
            try:
                process.stdin.write(json.dumps(astuple(saying)).encode() + b"\n")
                process.stdin.flush()
                rate, count = struct.unpack("=ii", process.stdout.read(8))
            except (BrokenPipeError, struct.error):
                raise DataError(f"data: eSpeak NG failed: {process.stderr.read().decode().strip()}") from None
            yield rate, np.frombuffer(process.stdout.read(2 * count), np.int16)


def _by_program(program: str, sayings: Sequence[Saying]) -> Iterator[tuple[int, np.ndarray]]:
    for saying in sayings:
        pace = ["-v", saying.voice, "-p", str(saying.pitch), "-s", str(saying.speed)]
        done = subprocess.run([program, *pace, "--stdout", saying.text], capture_output=True, check=False)
        if done.returncode or len(done.stdout) < _HEADER:
            raise DataError(f"data: {program} failed: {done.stderr.decode().strip()}")
        # The lengths in the header are those of a stream, not known when it was written.
        (rate,) = struct.unpack_from("<i", done.stdout, _RATE_AT)
        yield rate, np.frombuffer(done.stdout, np.dtype("<i2"), offset=_HEADER)


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Of the same duration, at another rate; what it cannot hold is left out."""
    count = max(1, round(len(samples) * wanted / rate))
    return (np.fft.irfft(np.fft.rfft(samples), n=count) * (count / len(samples))).astype(np.float32)
