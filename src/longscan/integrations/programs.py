"""Programs of somebody else, run unchanged after something was made ready for them."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable


def run_program(arguments: list[str], prepare: Callable[[], object], usage: str | None) -> None:
    """Run ``program.py arguments...`` or ``-m module arguments...`` as Python itself would.

    Args:
        arguments: of a command line.
        prepare: called before the program begins.
        usage: what is said, and the process ended with, where no program is named.
    """
    if not arguments or arguments == ["-m"] or arguments[0] in ("-h", "--help"):
        sys.exit(usage)
    prepare()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        # As Python does for a module: programs beside the caller are found.
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
