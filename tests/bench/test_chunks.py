"""The benchmarks of long sequences in miniature."""

from __future__ import annotations

import pytest

from longscan.bench import Settings, chunks, layouts, parts
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
    (alone,) = parts.measure((1, 64, 16), ("s5",), Settings())
    assert alone.value == 0
    assert float(alone.note.split("; ")[-1].removesuffix(" of the time")) > 0
    with pytest.raises(ArgumentError, match="between processes on CPUs"):
        parts.run(Settings(device="cuda"))


def test_what_layouts_send_and_hold() -> None:
    """As docs/scaling.md says it: bytes a parameter, whatever the tokens, but with channels over processes."""
    found = {
        length: {row.contender: row for row in layouts.measure((2, 2, 32, 64, 2, length), Settings())}
        for length in (16, 32)
    }
    sent = {name: [found[length][name].value for length in (16, 32)] for name in found[16]}
    assert all(short is not None for short, _ in sent.values())
    assert sent["ddp"][0] == sent["ddp"][1]
    assert sent["fsdp"][0] == sent["fsdp"][1]
    # Around a ring of two a half goes once for a gathering, twice for a sum.
    assert found[16]["ddp"].note.startswith("4.00 bytes a parameter; holds 16.")
    assert found[16]["fsdp"].note.startswith("6.")
    # Twice in half of the bytes, and the gradients.
    assert found[16]["fsdp, gathered in bfloat16"].note.startswith("4.")
    assert sent["tensor parallel"][1] == pytest.approx(2 * sent["tensor parallel"][0], rel=0.01)
    assert sent["sequence parallel, ddp"][0] == sent["sequence parallel, ddp"][1] > sent["ddp"][0]
