"""What general compressors make of a text, in the unit of a language model's loss."""

from __future__ import annotations

import gzip
import lzma


def compressors_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of ``gzip -9`` and ``xz -9`` on a text, file headers included."""
    if not text:
        return {}
    sizes = {"gzip -9": len(gzip.compress(text, 9, mtime=0)), "xz -9": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}
