"""Where the long runs of ``-m soak`` leave their figures: ``LONGSCAN_RECORD=results/soak`` names the folder."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from longscan import diagnostics
from longscan.nn.storage import write_text


def record(name: str, found: dict[str, Any]) -> None:
    """Write figures with the machine, versions and commit to NAME.json of the folder; nothing if none is named."""
    folder = os.environ.get("LONGSCAN_RECORD")
    if not folder:
        return
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": diagnostics.commit(),
        "machine": diagnostics.describe_machine(),
        "versions": diagnostics.versions(),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / f"{name}.json", json.dumps(found | about, indent=2) + "\n")
