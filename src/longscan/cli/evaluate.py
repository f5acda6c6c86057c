"""`longscan evaluate runs/NAME`: held-out bits per byte of a trained model, beside compressors, and by position.

With `--tasks`: benchmarks of lm-evaluation-harness instead, of any saved model (:mod:`longscan.cli.zero_shot`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longscan.errors import ConfigError

_STREAMED = (
    "every byte predicted from what comes before it: parts side by side, state carried across documents, each part but "
    "the first primed with the text in front of it; document borders are predicted too, but are no bytes"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure a run on its held-out part, or on all of another text, or on benchmarks; figures are written as JSON."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run; with --tasks also of a saved model, or a name on the Hugging Face Hub."""
    data: str | None = None
    """Other text to measure on, all of it: as for `longscan train text`."""
    field: str = "text"
    """Field of a JSON line or data-set row that holds the text."""
    max_bytes: int | None = None
    """Stop reading other text after this many bytes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["float32", "bfloat16"] | None = None
    """"bfloat16": matrix products under autocast; default: the precision the run was trained in."""
    weights: Literal["saved", "int8"] = "saved"
    """"int8": matrices in a byte a weight, and what they cost beside the weights as saved."""
    length: int | None = None
    """Longest context of the loss by position; default: four times the length the run was trained on."""
    output: Path | None = None
    """The JSON file; default: evaluation.json (zero_shot.json with --tasks) in the run's folder."""
    tasks: str | None = None
    """Names of lm-evaluation-harness's tasks, with commas between them. The paper's table is
    lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande."""
    limit: float | None = None
    """Of each task only so many documents, or, below 1, this fraction of them."""
    num_fewshot: int | None = None
    """Examples in front of each question; default: the task's."""
    include_path: Path | None = None
    """A folder with YAML files of tasks of your own."""
    tokenizer: str | None = None
    """With --tasks, for a model that is no run: "bytes", a tokenizer.json or a name on the Hub; default: its own."""


def measure(
    model: Any, corpus: Any, *, precision: str, progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """The figures of a model on a corpus' held-out part, as plain values."""
    from longscan.evaluation import bits_per_byte, compressors_bits_per_byte, stream_nats

    nats = stream_nats(model, corpus.held_out, precision=precision, progress=progress)
    return {
        "text": corpus.label,
        "bytes": corpus.held_out_bytes,
        "tokens": len(corpus.held_out),
        "documents": corpus.held_out_documents,
        "bits_per_byte": bits_per_byte(nats, corpus.held_out_bytes),
        "nats_per_token": nats / (len(corpus.held_out) - 1),
        "compressors_bits_per_byte": compressors_bits_per_byte(corpus.held_out_text()),
        "how": _STREAMED,
    }


def beside_saved(report: dict[str, Any], model: Any, corpus: Any) -> dict[str, Any]:
    """What other weights than the saved ones cost: a model's own figures, and a report's perplexity over its."""
    from longscan.evaluation import bits_per_byte, stream_nats

    nats = stream_nats(model, corpus.held_out, precision=report["precision"])
    saved = {
        "bits_per_byte": bits_per_byte(nats, corpus.held_out_bytes),
        "nats_per_token": nats / (len(corpus.held_out) - 1),
    }
    return {"saved": saved, "perplexity_ratio": math.exp(report["nats_per_token"] - saved["nats_per_token"])}


def run(options: Options) -> int:
    """Print the table and the loss by position, write both.

    Raises:
        ConfigError: the folder is not a run, or the length is not positive.
    """
    if options.length is not None and options.length < 1:
        raise ConfigError(f"length must be at least 1, got {options.length}")
    if options.tasks is not None:
        from longscan.cli import zero_shot

        return zero_shot.run(options)
    from rich.table import Table

    from longscan import diagnostics
    from longscan.cli.generate import load_run
    from longscan.cli.progress import Display
    from longscan.cli.train_options import saved_options
    from longscan.evaluation import nats_by_position
    from longscan.nn.storage import write_text
    from longscan.tasks.text import TextConfig, prepare

    saved = saved_options(options.run)
    precision = options.precision or saved.training.precision
    model, tokenizer = load_run(options.run, options.device, options.weights)
    text = saved.text
    if options.data is not None:
        text = TextConfig(options.data, saved.text.tokenizer, options.field, options.max_bytes, held_out=1.0)
    with Display() as display:
        with display.amounts() as amounts:
            corpus, _ = prepare(text, tokenizer, progress=amounts)
        with display.fraction("held-out part") as progress:
            report = measure(model, corpus, precision=precision, progress=progress)
        report.update(precision=precision, weights=options.weights)
        display.held_out(report)
        if options.weights != "saved":
            report.update(beside_saved(report, load_run(options.run, options.device)[0], corpus))
            ratio = f"{options.weights} weights: perplexity {report['perplexity_ratio']:.6f} times that of those saved"
            display.line(f"{ratio} ({report['saved']['bits_per_byte']:.4f} bits per byte)")
        length = options.length or 4 * saved.training.sequence_length
        windows = max(16, 262144 // length)
        nats = nats_by_position(model, corpus.held_out, windows=windows, length=length, precision=precision)
        report["by_position"] = _buckets(nats.tolist(), report)
        table = Table(title="by position in the context, starting afresh")
        for heading in ("tokens before", "bits per byte"):
            table.add_column(heading, justify="right")
        for bucket in report["by_position"]:
            table.add_row(f"{bucket['first']} to {bucket['last']}", f"{bucket['bits_per_byte']:.3f}")
        display.console.print(table)
        report.update(
            model=model.config.to_dict(),
            training=dataclasses.asdict(saved.training),
            machine=diagnostics.describe_machine(),
            versions=diagnostics.versions(),
            commit=diagnostics.commit(),
            command=diagnostics.command_line(),
        )
        path = options.output or options.run / "evaluation.json"
        write_text(path, json.dumps(report, indent=2) + "\n")
        display.line(f"figures: {path}")
    return 0


def _buckets(nats: list[float], report: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over positions 0, 1, 2-3, 4-7, ...: powers of two."""
    from longscan.evaluation import bits_per_byte

    buckets, first = [], 0
    while first < len(nats):
        last = min(max(1, 2 * first), len(nats))
        mean = sum(nats[first:last]) / (last - first)
        bits = bits_per_byte(mean * report["tokens"], report["bytes"])
        # The window's own first token is before all of them.
        buckets.append({"first": first + 1, "last": last, "bits_per_byte": bits})
        first = last
    return buckets
