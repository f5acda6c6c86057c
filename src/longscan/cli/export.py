"""`longscan export MODEL`: its graph, to run where longscan, or PyTorch, is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from longscan.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a model as a graph that takes and gives the state: one step, or a whole prompt of any length."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model, or a name on the Hugging Face Hub."""
    format: Literal["onnx", "pt2"] = "onnx"
    """"onnx": the step in ONNX's own operators; "pt2": a program of torch.export."""
    what: Literal["step", "prefill"] = "step"
    """One token per sequence, or a prompt (pt2 only)."""
    batch: int | None = None
    """A fixed number of sequences; default: any."""
    plain: bool = False
    """With pt2: PyTorch's own operators alone, so that it runs without longscan (the step only)."""
    output: Path | None = None
    """The file; default: WHAT.FORMAT in the model's folder, or here."""


def run(options: Options) -> int:
    """Write the file and say what goes in and comes out."""
    from longscan.cli.generate import load_run
    from longscan.cli.progress import Display
    from longscan.models import LanguageModel, export
    from longscan.training.runs import read_run

    if options.what == "prefill" and (options.format == "onnx" or options.plain):
        raise ConfigError(
            "what: 'prefill' runs over time, which needs longscan's operators; take --format pt2 without --plain, "
            "or export the step and take a prompt token by token"
        )
    try:
        read_run(options.model)
    except ConfigError:
        model = LanguageModel.from_pretrained(options.model.as_posix()).eval()
    else:
        model, _ = load_run(options.model, "cpu")
    name = f"{options.what}.{options.format}"
    path = options.output or (options.model / name if options.model.is_dir() else Path(name))
    with Display() as display:
        with display.status("exporting"):
            if options.format == "onnx":
                export.export_onnx(model, path, batch=options.batch)
            elif options.what == "step":
                export.save_program(export.export_step(model, batch=options.batch, plain=options.plain), path)
            else:
                export.save_program(export.export_prefill(model, batch=options.batch), path)
        batch = options.batch or "any batch"
        length = ", any length" if options.what == "prefill" else ""
        display.line(f"{path}: {path.stat().st_size:,} bytes")
        display.line(f"in: tokens ({batch}{length}) int64, and the state, {model.state_bytes(1):,} bytes a sequence")
        display.line(f"out: logits ({batch}, {model.config.vocab_size}), and the next state")
    return 0
