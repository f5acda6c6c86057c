"""The colours of lines, in their order."""

from __future__ import annotations

COLOURS = (
    "#1f6fb4",
    "#d9822b",
    "#7d5ba6",
    "#3a9a5b",
    "#c2405a",
    "#6b7683",
    "#b59a2b",
    "#2fa3a8",
    "#8c564b",
    "#e08ac0",
    "#1b2a41",
    "#9bc53d",
)
