"""The sections of `longscan report`: runs, experiments, comparisons, benchmarks, with the tables of their commands."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from longscan.bench.report import Report
from longscan.cli.bench import bench_table
from longscan.cli.compare import comparison_table
from longscan.cli.config import read_toml
from longscan.cli.reproduce import experiment_table
from longscan.errors import DataError, LongscanError
from longscan.experiments import Published, Result, beside, read_published, read_result
from longscan.experiments.report import COST_HEAD, cost_cells, duration
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.plots.bench import draw_bench
from longscan.plots.compare import draw_comparison
from longscan.plots.experiments import draw_experiment
from longscan.plots.page import Html, Section, facts, figure, folded, paragraph, preformatted, table
from longscan.plots.training import draw_estimates, draw_runs, draw_speed, draw_training
from longscan.training.metrics import METRICS_FILE, read_metrics
from longscan.training.runs import HELD_OUT_FILE, SAMPLE_FILE, read_run

# A run's last loss is the mean over so many percent of its steps.
_LAST = 2
# A benchmark with more settings has its tables folded.
_OPEN = 4


def make_sections(found: Mapping[str, Sequence[Path]], published: Path) -> list[Section]:
    """All of a page: runs (several of them side by side first), experiments scale by scale, comparisons, benchmarks,
    evaluations, what is kept of runs, tests.

    Args:
        found: paths by "run", "experiment", "compare", "bench", "evaluation", "text" and "tests".
        published: the file of published figures; where there is none, ours stand alone.

    Raises:
        ConfigError: a run's configuration or the published figures cannot be read.
        DataError, StorageError: a file is not what it says it is.
    """
    tables = read_published(read_toml(published), str(published)) if published.is_file() else {}
    runs = found["run"]
    sections = [_whole(run_section, folder) for folder in runs]
    if len(runs) > 1:
        sections.insert(0, runs_section(runs))
    groups: dict[tuple[str, str], list[Path]] = {}
    results = {path: read_result(path) for path in found["experiment"]}
    for path, result in results.items():
        groups.setdefault((result.experiment, result.scale), []).append(path)
    for paths in groups.values():
        own = [results[path] for path in paths]
        with _told(*paths):
            sections.append(experiment_section(own, beside(tables, own[0].published, own[0].scale)))
    sections += [_whole(comparison_section, path) for path in found["compare"]]
    sections += [_whole(bench_section, path) for path in found["bench"]]
    sections += [_whole(evaluation_section, path) for path in found["evaluation"]]
    sections += [_whole(text_section, path) for path in found["text"]]
    sections += [_whole(tests_section, path) for path in found["tests"]]
    return sections


def runs_section(folders: Sequence[Path]) -> Section:
    """Runs of `longscan train` beside one another."""
    # Two runs may have the same name in different folders.
    boxes = {str(folder): _figures(folder) for folder in folders}
    keys = dict.fromkeys(key for own in boxes.values() for key in own)
    rows = [[key, *(own.get(key, "") for own in boxes.values())] for key in keys]
    parts = [table(["", *boxes], rows)]
    metrics = {str(folder): read_metrics(folder / METRICS_FILE) for folder in folders}
    begun = {name: own for name, own in metrics.items() if own}
    if begun:
        parts.append(figure(draw_runs(begun), "Bits per byte over the text seen: lines in training, dots held out."))
    return Section("Runs beside one another", parts)


def run_section(folder: Path) -> Section:
    """A run of `longscan train`, finished or not."""
    config, rows = read_run(folder), read_metrics(folder / METRICS_FILE)
    held_out = _json(folder / HELD_OUT_FILE)
    compressors = held_out.get("compressors_bits_per_byte", {})
    label = config["corpus"]["label"]
    parts = [facts(_figures(folder))]
    if any("bits_per_byte" in row for row in rows):
        drawn = draw_training(rows, title=label, compressors=compressors, held_out=held_out.get("bits_per_byte"))
        parts.append(figure(drawn, "Bits per byte and learning rate over the text seen."))
    else:
        parts.append(paragraph("No step has been written down yet."))
    if len(_speeds(rows)) > 1:
        drawn = draw_speed(_speeds(rows))
        parts.append(figure(drawn, "Tokens a second, with what lies between steps: estimates, checkpoints."))
    sample = folder / SAMPLE_FILE
    if sample.is_file():
        parts += [paragraph("A sample of the trained model:"), preformatted(sample.read_text(encoding="utf-8"))]
    settings = [
        (f"{part}.{key}", _plain(value))
        for part in ("text", "model", "training")
        for key, value in config[part].items()
    ]
    parts.append(folded("Settings", [table(("setting", "value"), settings, left=(0, 1))]))
    parts += _machine(config, config.get("device"))
    return Section(folder.resolve().name, parts)


def _figures(folder: Path) -> dict[str, str]:
    """What a run is and what came out, in short."""
    config, rows = read_run(folder), read_metrics(folder / METRICS_FILE)
    held_out = _json(folder / HELD_OUT_FILE)
    shape = LanguageModelConfig.from_dict(config["model"])
    with torch.device("meta"):
        parameters = LanguageModel(shape).num_parameters()
    boxes = {
        "text": config["corpus"]["label"],
        "model": f"{shape.n_layer} x {'+'.join(shape.mixer_names)}, d_model {shape.d_model}",
        "parameters": f"{parameters:,}",
        **_progress(rows, config["training"]["steps"], config["corpus"]["train_tokens"]),
    }
    if held_out:
        boxes["held-out, bits per byte"] = f"{held_out['bits_per_byte']:.4f}"
    boxes |= {
        f"{name}, bits per byte": f"{value:.4f}"
        for name, value in held_out.get("compressors_bits_per_byte", {}).items()
    }
    return boxes


def _progress(rows: Sequence[Mapping[str, Any]], planned: int, corpus: int) -> dict[str, str]:
    if not rows:
        return {"steps": f"0 of {planned:,}"}
    last = rows[-1]
    speeds = [speed for _, speed in _speeds(rows)]
    boxes = {
        "steps": f"{last['step']:,}" + (f" of {planned:,}" if last["step"] < planned else ""),
        "tokens seen": f"{last['tokens']:,}, {last['tokens'] / corpus:.2g} passes",
        "time of training": duration(last["seconds"]),
        "tokens/s": f"{statistics.median(speeds):,.0f}" if speeds else "",
    }
    recent = [row for row in rows if row["step"] > last["step"] * (1 - _LAST / 100)]
    for key, words in (("loss", "nats"), ("bits_per_byte", "bits per byte")):
        values = [row[key] for row in recent if key in row]
        boxes[f"training, {words}, last {_LAST}%"] = f"{statistics.fmean(values):.4f}" if values else ""
    return boxes


def _speeds(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Tokens seen and tokens a second, between each two rows."""
    return [
        (row["tokens"], (row["tokens"] - before["tokens"]) / (row["seconds"] - before["seconds"]))
        for before, row in itertools.pairwise(rows)
        if row["seconds"] > before["seconds"] and row["tokens"] > before["tokens"]
    ]


def experiment_section(results: Sequence[Result], published: Published | None) -> Section:
    """The results of an experiment at one scale, the published figures beside them."""
    first = results[0]
    task = ", ".join(f"{key} {_plain(value)}" for key, value in first.task.items() if key != "name")
    command = f"longscan reproduce {first.experiment.replace('_', '-')} --scale {first.scale}"
    parts = [
        preformatted(command),
        paragraph(f"Task: {first.task['name']}, {task}. Test sequences of each figure: {first.sequences:,}."),
    ]
    if published is not None:
        parts.append(paragraph(f"Published: {published.source}. {published.note}"))
    parts += [
        table_of(experiment_table(results, published)),
        figure(draw_experiment(results, published), f"{first.title}, scale: {first.scale}"),
        table(COST_HEAD, map(cost_cells, results), left=(0, len(COST_HEAD) - 1)),
    ]
    # Systems may have been measured in different places.
    places = {json.dumps([result.machine, result.versions, result.commit]): result for result in results}
    for result in places.values():
        parts += _machine(dataclasses.asdict(result), None)
    return Section(f"{first.title}, scale: {first.scale}", parts)


def comparison_section(path: Path) -> Section:
    """A result of `longscan compare`."""
    values = _json(path)
    settings = [(key, _plain(value)) for key, value in values["settings"].items()]
    parts = [
        table_of(comparison_table(values)),
        figure(draw_comparison(values), "The loss in training; quality against speed, time of a step, and state."),
        folded("Settings", [table(("setting", "value"), settings, left=(0, 1))]),
        *_machine(values, values["settings"].get("device")),
    ]
    return Section(f"Mixers compared: {values['compare']} ({path.stem})", parts)


def bench_section(path: Path) -> Section:
    """A result of `longscan bench`."""
    report = Report.load(path)
    groups = report.groups()
    tables = [table_of(bench_table(report, group)) for group in groups]
    parts = [paragraph(report.note)] if report.note else []
    parts.append(figure(draw_bench(dataclasses.asdict(report)), f"longscan bench {report.bench}, in {report.unit}"))
    parts += tables if len(groups) <= _OPEN else [folded(f"All figures, {len(groups)} settings", tables)]
    parts += _machine(dataclasses.asdict(report), report.settings.get("device"))
    return Section(f"Speed: {report.bench} ({path.stem})", parts)


def evaluation_section(path: Path) -> Section:
    """What `longscan evaluate` found on held-out text."""
    values = _json(path)
    figures = {"model": values["bits_per_byte"], **values["compressors_bits_per_byte"]}
    boxes = {"weights": values["weights"], "precision": values["precision"], "held-out bytes": f"{values['bytes']:,}"}
    if saved := values.get("saved"):
        figures = {"model with the weights saved": saved["bits_per_byte"], **figures}
        boxes["perplexity, times that of the weights saved"] = f"{values['perplexity_ratio']:.6f}"
    rows = [(name, f"{figure:.4f}") for name, figure in sorted(figures.items(), key=lambda item: item[1])]
    places = [(f"{at['first']} to {at['last']}", f"{at['bits_per_byte']:.3f}") for at in values["by_position"]]
    parts = [facts(boxes), table(("held out", "bits per byte"), rows), paragraph(values["how"])]
    parts.append(folded("By position, starting afresh", [table(("tokens before", "bits per byte"), places)]))
    return Section(f"longscan evaluate: {values['text']} ({path.stem})", [*parts, *_machine(values, None)])


def text_section(path: Path) -> Section:
    """What is kept of a run of `longscan train text`."""
    values = _json(path)
    figures = values.get("held_out_bits_per_byte", {})
    if held_out := values.get("held_out"):
        figures = {"model": held_out["bits_per_byte"], **held_out["compressors_bits_per_byte"]}
    boxes = {
        "tokens/s": f"{values['tokens_per_second']:,}",
        "steps": f"{values['training_steps']:,}" if "training_steps" in values else "",
        "time of training": duration(values["training_seconds"]) if "training_seconds" in values else "",
        "held-out bytes": f"{held_out['bytes']:,}" if held_out else "",
    }
    rows = [(name, f"{figure:.4f}") for name, figure in sorted(figures.items(), key=lambda item: item[1])]
    parts = [facts(boxes), table(("held out", "bits per byte"), rows)]
    if estimates := values.get("held_out_estimates_by_step"):
        words = "Bits per byte of a part of the held-out text, while training."
        parts.append(figure(draw_estimates(estimates), words))
    if "note" in values:
        parts.append(paragraph(values["note"]))
    settings = [(key, _plain(value)) for key, value in values["config"].items()]
    parts.append(folded("Settings", [table(("setting", "value"), settings, left=(0, 1))]))
    return Section(f"{values['what']} ({path.stem})", [*parts, *_machine(values, None)])


def tests_section(path: Path) -> Section:
    """Tests that ran on a GPU, as tests/gpu_report.py keeps them."""
    values = _json(path)
    boxes = {
        **{name: f"{count:,}" for name, count in values["counts"].items()},
        "seconds": f"{values['seconds']:,}",
        "when": values["when"],
    }
    tests = sorted(values["tests"], key=lambda test: test["seconds"], reverse=True)
    rows = [(test["name"], test["outcome"], f"{test['seconds']:.2f}") for test in tests]
    other = [row for row in rows if row[1] != "passed"]
    head = ("test", "outcome", "seconds")
    parts = [facts(boxes)]
    if other:
        parts.append(table(head, other, title="Not passed", left=(0, 1)))
    parts.append(folded("All tests, the longest first", [table(head, rows, left=(0, 1))]))
    return Section(f"Tests on a GPU ({path.stem})", [*parts, *_machine(values, None)])


def table_of(shown: Table) -> Html:
    """A table of the terminal as one of the page."""
    columns = [[Text.from_markup(str(cell)).plain for cell in column.cells] for column in shown.columns]
    head = [Text.from_markup(str(column.header)).plain for column in shown.columns]
    title, caption = (Text.from_markup(str(words or "")).plain for words in (shown.title, shown.caption))
    return table(head, zip(*columns, strict=True), title=title, caption=caption)


def _machine(values: Mapping[str, Any], device: str | None) -> list[Html]:
    """Where something was measured, as far as it is written down."""
    machine, versions = values.get("machine") or {}, values.get("versions") or {}
    boxes = {
        "device": device or machine.get("device", ""),
        "GPU": ", ".join(machine.get("gpus", [])),
        "processor": machine.get("cpu", ""),
        "cores, threads": f"{machine['cores']}, {machine['threads']}" if "cores" in machine else "",
        "memory": f"{machine['memory'] / 2**30:.0f} GiB" if machine.get("memory") else "",
        "system": machine.get("system", ""),
        "commit": values.get("commit") or machine.get("commit", ""),
        "date": values.get("date") or "",
        "command": values.get("command") or "",
    }
    if not versions and "longscan" in values:
        versions = {"longscan": values["longscan"]}
    versions = versions or {name: machine[name] for name in ("python", "torch", "triton", "cuda") if name in machine}
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [folded("Machine and versions", [facts(boxes), paragraph(words)])]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _whole(section: Callable[[Path], Section], path: Path) -> Section:
    with _told(path):
        return section(path)


@contextlib.contextmanager
def _told(*paths: Path) -> Iterator[None]:
    """What is missing from files, or of another type than it must be, is told of them."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        if isinstance(error, LongscanError):
            raise
        names = ", ".join(map(str, paths))
        raise DataError(f"{names}: damaged, or of another version: {type(error).__name__}: {error}") from error
