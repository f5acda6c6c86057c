"""Where the long runs of ``-m soak`` leave their figures: ``LONGSCAN_RECORD=results/soak`` names the folder."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from longscan import diagnostics
from longscan.nn.storage import write_text


def folder() -> Path | None:
    """The folder; None if none is named."""
    name = os.environ.get("LONGSCAN_RECORD")
    return Path(name).resolve() if name else None


def recorded(name: str) -> dict[str, Any]:
    """What NAME.json of the folder says; nothing if there is none."""
    place = folder()
    path = None if place is None else place / f"{name}.json"
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def record(name: str, found: dict[str, Any]) -> None:
    """Write figures with the machine, versions and commit to NAME.json of the folder; nothing if none is named."""
    place = folder()
    if place is None:
        return
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": diagnostics.commit(),
        "machine": diagnostics.describe_machine(),
        "versions": diagnostics.versions(),
    }
    write_text(place / f"{name}.json", json.dumps(found | about, indent=2) + "\n")
