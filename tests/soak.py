"""Where the long runs of ``-m soak`` leave their figures: ``LONGSCAN_RECORD=results/soak`` names the folder."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from longscan import diagnostics
from longscan.nn.storage import write_text


def recorded() -> Path | None:
    """The folder; None if none is named."""
    folder = os.environ.get("LONGSCAN_RECORD")
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def record(name: str, found: dict[str, Any]) -> None:
    """Write figures with the machine, versions and commit to NAME.json of the folder; nothing if none is named."""
    folder = recorded()
    if folder is None:
        return
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": diagnostics.commit(),
        "machine": diagnostics.describe_machine(),
        "versions": diagnostics.versions(),
    }
    write_text(folder / f"{name}.json", json.dumps(found | about, indent=2) + "\n")
