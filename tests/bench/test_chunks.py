"""The benchmarks of long sequences in miniature."""

from __future__ import annotations

import pytest

from longscan.bench import Settings, chunks, parts
from longscan.errors import ArgumentError


def test_chunks_keep_less() -> None:
    report = chunks.run(Settings(shapes=((2, 16, 32, 256, 32),)))
    values = {row.contender: row.value for row in report.rows}
    assert values.keys() == {"chunks, full", "chunks, truncated", "at once"}
    assert all(value is not None for value in values.values()), [row.note for row in report.rows]
    assert values["chunks, full"] < 0.3 * values["at once"]  # type: ignore[operator]


def test_what_every_mixer_sends() -> None:
    rows = {row.contender: row for row in parts.measure((2, 64, 16), ("mamba", "retnet", "hyena"), Settings())}
    assert "takes whole sequences" in rows["hyena"].note
    assert rows["retnet"].value is not None
    # In two exchanges a state and a decay (32 channels of 16), and the convolution's 3 tokens; 4 bytes each.
    assert rows["mamba"].value == 4 * 32 * (2 * 2 * 16 + 3) / 1e3
    with pytest.raises(ArgumentError, match="between processes on CPUs"):
        parts.run(Settings(device="cuda"))
