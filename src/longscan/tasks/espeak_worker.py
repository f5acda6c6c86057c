"""A process of its own for eSpeak NG's library: what it says depends on all that it said before, and nothing resets it.

Run as a file, so that it starts in no time: a line of JSON (text, voice, pitch, speed) in; samples a second, how many
samples, and the samples, 16-bit, out.
"""

from __future__ import annotations

import array
import ctypes
import json
import struct
import sys

# Of espeak-ng's speak_lib.h.
_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _PITCH = 1, 3
# Where a voice has an echo, its end is lost with the first buffer that is full: one has to hold all of a saying.
_MILLISECONDS = 10_000
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _main(library: str, data: str) -> None:
    espeak = ctypes.CDLL(library)
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        *[ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint],
        *[ctypes.c_void_p] * 2,
    ]
    rate = espeak.espeak_Initialize(_SYNCHRONOUS, _MILLISECONDS, data.encode(), _DONT_EXIT)
    if rate < 0:
        sys.exit(f"eSpeak NG finds no data in {data}")
    said = array.array("h")

    @_CALLBACK
    def heard(samples, count, _events):  # type: ignore[no-untyped-def]
        if samples and count:
            said.frombytes(ctypes.string_at(samples, 2 * count))
        return 0

    espeak.espeak_SetSynthCallback(heard)
    for line in sys.stdin:
        text, voice, pitch, speed = json.loads(line)
        if espeak.espeak_SetVoiceByName(voice.encode()):
            sys.exit(f"eSpeak NG has no voice {voice!r}")
        # Else of the time.
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
        espeak.espeak_SetParameter(_PITCH, pitch, 0)
        espeak.espeak_SetParameter(_RATE, speed, 0)
        words = text.encode()
        espeak.espeak_Synth(words, len(words) + 1, 0, 0, 0, _UTF8, None, None)
        sys.stdout.buffer.write(struct.pack("=ii", rate, len(said)) + said.tobytes())
        sys.stdout.buffer.flush()
        del said[:]


if __name__ == "__main__":
    _main(*sys.argv[1:])
