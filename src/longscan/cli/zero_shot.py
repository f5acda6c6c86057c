"""`longscan evaluate MODEL --tasks ...`: tasks of lm-evaluation-harness, beside the paper's figures."""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longscan.errors import ArgumentError, ConfigError, DataError

if TYPE_CHECKING:
    from longscan.cli.evaluate import Options

# What the harness reports beside metrics, and metrics that are no fractions.
_NO_METRICS = ("alias", "name", "sample_len", "sample_count")
_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def run(options: Options) -> int:
    """Print the table, write the JSON."""
    from longscan.cli.progress import Display

    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(
            f"--tasks: lm-evaluation-harness cannot be imported ({error}); "
            "install it with: pip install 'longscan[lm-eval]'"
        ) from error
    # It warns of settings that are its tasks' own.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    assert options.tasks is not None
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    with Display() as display:
        with display.status("finding tasks"):
            manager = _manager(names, options.include_path)
        with display.status("reading the model"):
            harness = _harness(options)
        with display.status("reading the tasks' data"):
            tasks = _load(manager, names)
        results = lm_eval.simple_evaluate(
            model=harness,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=_limit(options.limit),
            log_samples=False,
            # For the standard error of perplexities; accuracies have a formula.
            bootstrap_iters=1000,
        )
        assert results is not None
        report = _report(results, options, harness)
        display.console.print(_table(report))
        path = options.output or _default_output(options.run)
        from longscan.nn.storage import write_text

        write_text(path, json.dumps(report, indent=2) + "\n")
        display.line(f"figures: {path}")
    return 0


def _manager(names: list[str], include_path: Path | None) -> Any:
    """The harness's index of tasks; its own thousands are looked at only if the given folder does not do."""
    from lm_eval.tasks import TaskManager

    if not names:
        raise ConfigError("tasks: give at least one name, such as lambada_openai,hellaswag")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include_path: {include_path} is no folder; give one with the YAML files of tasks")
    folder = None if include_path is None else str(include_path)
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(name in manager.task_index for name in names):
            return manager
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
            raise ConfigError(f"tasks: the harness knows no task {name!r}{hint}")
    return manager


def _load(manager: Any, names: list[str]) -> list[Any]:
    """The tasks, or groups of them, with their data."""
    try:
        loaded = manager.load(names)
    except Exception as error:  # of the network, the hub, a task's own code: of many kinds
        raise DataError(f"tasks: {', '.join(names)}: cannot be read: {error}") from error
    groups = [loaded["groups"][name] for name in names if name in loaded["groups"]]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in loaded["tasks"].items() if name not in grouped]


def _harness(options: Options) -> Any:
    """The model behind the harness's interface: a training run, or anything that `from_pretrained` reads."""
    from longscan.cli.generate import choose_device, load_run
    from longscan.integrations.lm_eval import LongscanLM
    from longscan.training.runs import read_run

    dtype = options.precision or "auto"
    try:
        read_run(options.run)
    except ConfigError:
        device = choose_device(options.device)
        return LongscanLM(
            options.run.as_posix(),
            tokenizer=options.tokenizer,
            dtype=dtype,
            weights=options.weights,
            device=device,
        )
    if options.tokenizer is not None:
        raise ConfigError(f"tokenizer: {options.run} is a run with a tokenizer of its own; leave it out")
    model, tokenizer = load_run(options.run, options.device, options.weights)
    return LongscanLM(model, tokenizer=tokenizer, dtype=dtype)


def _limit(limit: float | None) -> int | float | None:
    if limit is None or 0 < limit < 1:
        return limit
    if limit != int(limit) or limit < 1:
        raise ArgumentError(f"limit must be a whole number of documents or a fraction below 1, got {limit}")
    return int(limit)


def _default_output(source: Path) -> Path:
    name = "zero_shot.json"
    return source / name if source.is_dir() else Path(f"{source.name}-{name}")


def _report(results: dict[str, Any], options: Options, harness: Any) -> dict[str, Any]:
    """The harness's results as plain values: a line per task and metric."""
    import lm_eval

    from longscan import __version__
    from longscan.evaluation.published import published_zero_shot

    published = published_zero_shot(options.run.as_posix())
    lines = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric in _NO_METRICS or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            lines.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": value,
                    "stderr": error if isinstance(error, float) else None,
                    "documents": results.get("n-samples", {}).get(task, {}).get("effective"),
                    "shots": results.get("n-shot", {}).get(task),
                    "version": results.get("versions", {}).get(task),
                    "paper": published.get((task, metric)),
                }
            )
    return {
        "model": options.run.as_posix(),
        "limit": options.limit,
        "dtype": str(harness._model.backbone.embedding.weight.dtype).removeprefix("torch."),
        "weights": harness._model.quantization or "saved",
        "device": str(harness.device),
        "max_length": harness.max_length,
        "tokenizer": harness.tokenizer_name,
        "versions": {"longscan": __version__, "lm_eval": lm_eval.__version__},
        "results": lines,
        "average": _average(lines),
    }


def _average(lines: list[dict[str, Any]]) -> dict[str, float | None] | None:
    """The mean of the paper's six accuracies in per cent, when all are there; ours and, for its models, the paper's."""
    from longscan.evaluation.published import ZERO_SHOT_METRICS

    found = {line["task"]: line for line in lines if ZERO_SHOT_METRICS.get(line["task"]) == line["metric"]}
    if found.keys() != ZERO_SHOT_METRICS.keys():
        return None
    theirs = [line["paper"] for line in found.values()]
    return {
        "value": 100 * sum(line["value"] for line in found.values()) / len(found),
        "paper": None if None in theirs else sum(theirs) / len(theirs),
    }


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    limited = "" if report["limit"] is None else f", the first {report['limit']:g} documents of each task only"
    table = Table(title=f"{report['model']}{limited}")
    paper = any(line["paper"] is not None for line in report["results"])
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("value", "standard error", *(("paper",) if paper else ())):
        table.add_column(heading, justify="right")
    for line in report["results"]:
        scale = 1 if line["metric"] in _PERPLEXITIES else 100
        unit = "" if scale == 1 else " %"
        error = "" if line["stderr"] is None else f"{scale * line['stderr']:.2f}"
        beside = [] if not paper else ["" if line["paper"] is None else f"{line['paper']:.2f}{unit}"]
        table.add_row(line["task"], line["metric"], f"{scale * line['value']:.2f}{unit}", error, *beside)
    average = report["average"]
    if average is not None:
        beside = [] if not paper else ["" if average["paper"] is None else f"{average['paper']:.2f} %"]
        table.add_section()
        table.add_row("average", "accuracy", f"{average['value']:.2f} %", "", *beside, style="bold")
    return table
