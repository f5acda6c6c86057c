"""`longscan report PATH...`: one HTML page of training runs and results, with everything inside."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from longscan.errors import ConfigError, DataError
from longscan.models.pretrained import CONFIG_FILE
from longscan.nn.storage import write_text

_RUN = "run"
# The key that a result's file is known by; `longscan reproduce`, `compare`, `bench`, `evaluate` write the first four.
# The others: the kept figures of a run of `longscan train`, and what tests/gpu_report.py writes.
_RESULTS = {
    "experiment": "experiment",
    "compare": "compare",
    "bench": "bench",
    "evaluation": "by_position",
    "text": "tokens_per_second",
    "tests": "counts",
}
_COMMANDS = "`longscan reproduce`, `compare`, `bench` or `evaluate`"
_PUBLISHED = "published.toml"


@dataclass(frozen=True)
class Options:
    """Put runs of `longscan train` and results of `longscan reproduce`, `compare`, `bench` and `evaluate` on one page.

    The page is one file: figures lie inside it, and it asks nothing of the network.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, JSON files of results, or folders with such anywhere below them."""
    output: Path | None = None
    """The page. By default report.html in the run's folder where there is one run, else runs/report.html."""
    title: str | None = None
    """Of the page; by default what it shows."""
    experiments: Path = Path("experiments")
    """Folder of the experiments' files, for the published figures beside ours."""


def run(options: Options, console: Console | None = None) -> int:
    """Reads, draws and writes; says what it left out."""
    console = console or Console(highlight=False, soft_wrap=True)
    found = find(options.paths)
    others = found.pop("")
    # Drawing takes its time to import; a wrong path is told before.
    from longscan import __version__
    from longscan.cli.sections import make_sections
    from longscan.plots.page import page

    with console.status("drawing"):
        sections = make_sections(found, options.experiments / _PUBLISHED)
    title = options.title or (sections[0].heading if len(sections) == 1 else "longscan report")
    now = datetime.datetime.now(datetime.timezone.utc)
    text = page(title, sections, f"longscan {__version__}, {now:%Y-%m-%d %H:%M} UTC")
    alone = found["run"] if sum(map(len, found.values())) == 1 else []
    path = options.output or (alone[0] if alone else Path("runs")) / "report.html"
    write_text(path, text)
    console.print(f"written: {path} ({len(text.encode()) / 1e6:.2g} MB)", markup=False)
    if others:
        console.print(f"left out, being no results: {', '.join(map(str, others))}", markup=False)
    return 0


def find(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """What lies at and below paths, each once, by kind: runs, the kinds of results, and "" for other JSON files.

    Raises:
        ConfigError: no path, one that is not there, or a folder with nothing of these kinds.
        DataError: a file is no result.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in (_RUN, *_RESULTS, "")}
    seen = set()
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
        kinds = {place: _kind(place) for place in (_walk(path) if path.is_dir() else (path,))}
        if path.is_dir() and not any(kinds.values()):
            raise ConfigError(
                f"{path} is no run of `longscan train` (it would have a config.json), and there are none and no "
                f"results of {_COMMANDS} below it"
            )
        if not any(kinds.values()):
            raise DataError(f"{path} is no result of {_COMMANDS}; of a run, give the folder")
        for place, kind in kinds.items():
            if place.resolve() not in seen:
                seen.add(place.resolve())
                found[kind].append(place)
    if not seen:
        raise ConfigError("name runs or results, as in `longscan report runs/NAME` or `longscan report results`")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Runs (their insides are theirs) and JSON files at and below a folder; nothing hidden."""
    for name, folders, files in os.walk(folder):
        place = Path(name)
        if _kind(place) == _RUN:
            folders.clear()
            yield place
            continue
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        yield from (place / file for file in sorted(files) if file.endswith(".json") and not file.startswith("."))


def _kind(place: Path) -> str:
    """Of a folder or a JSON file, by its keys; "" if it is none that we know."""
    try:
        values = json.loads((place / CONFIG_FILE if place.is_dir() else place).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(values, dict):
        return ""
    if place.is_dir():
        return _RUN if {"text", "model", "training"} <= values.keys() else ""
    return next((kind for kind, key in _RESULTS.items() if key in values), "")
