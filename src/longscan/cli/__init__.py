"""The command line: ``longscan COMMAND ...``."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

#: Each command is a module here with ``Options`` (a frozen dataclass) and ``run(options) -> exit code``.
COMMANDS = {
    "train": "train a model:  longscan train text,  longscan train --resume runs/NAME",
    "prepare": "tokenize text once, to shards:  longscan prepare --data FOLDER --out shards",
    "generate": "continue a prompt:  longscan generate runs/NAME --prompt 'def '",
    "evaluate": "held-out bits per byte, or benchmarks:  longscan evaluate runs/NAME [--tasks hellaswag,piqa]",
    "export": "write its graph, for ONNX or torch.export:  longscan export runs/NAME --format onnx",
    "compare": "train several mixers alike and say what each is good for:  longscan compare --mixers mamba,s4d",
    "reproduce": "a published result, here:  longscan reproduce induction-heads,  longscan reproduce --list",
    "bench": "measure speed here, beside the peers that are installed:  longscan bench scan",
    "report": "one HTML page of runs and results:  longscan report runs/NAME",
    "plot": "draw what memories are made of:  longscan plot statespace",
    "doctor": "say which backend serves what on this machine, and test each",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 (a check failed), 2 (an error in words), 130 or 143 (stopped)."""
    # Read by GNU's OpenMP when PyTorch loads it. Its threads spin between parallel regions by default, which takes four
    # times as long where another process wants a core; after a short spin they sleep. A training step on two cores,
    # alone and beside such a process: 1,000 turns 150 and 185 ms, 5,000 turns 123 and 204, by default 115 and 474.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows what it has
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _say(_usage())
        return 0
    if arguments[0] in ("--version", "-V"):
        from longscan import __version__

        _say(f"longscan {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        _fail(f"no command {command!r}{f' (did you mean {near[0]!r}?)' if near else ''}; one of: {', '.join(COMMANDS)}")
        return 2
    return _guarded(command, rest)


def _guarded(command: str, rest: list[str]) -> int:
    """Run a command; our errors and interruptions become one line and an exit code."""
    from longscan.errors import LongscanError

    try:
        import tyro

        module = importlib.import_module(f"longscan.cli.{command}")
        parse = getattr(module, "parse", None)
        prog = f"longscan {command}"
        options = parse(rest, prog) if parse else tyro.cli(module.Options, args=rest, prog=prog)
        return int(module.run(options))
    except LongscanError as error:
        if os.environ.get("LONGSCAN_DEBUG") == "1":
            raise
        rank = os.environ.get("RANK")
        _fail(str(error) if rank is None else f"process {rank}: {error}")
        return 2
    except KeyboardInterrupt:
        _fail("stopped")
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: longscan COMMAND [options]", "", *lines, "", "longscan COMMAND --help shows its options."]
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _fail(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True).print(f"[bold red]longscan:[/] {escape(message)}", highlight=False)
