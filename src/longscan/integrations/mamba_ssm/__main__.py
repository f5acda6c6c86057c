"""Runs a program that imports mamba_ssm, unchanged, with longscan under its names.

python -m longscan.integrations.mamba_ssm program.py arguments...
python -m longscan.integrations.mamba_ssm -m module arguments...
"""

from __future__ import annotations

import os
import runpy
import sys

from longscan.integrations.mamba_ssm.install import VARIABLE, enable, enable_from_environment


def main() -> None:
    """Run the program that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"] or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    if os.environ.get(VARIABLE):
        enable_from_environment()
    else:
        enable()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        # As Python does for a module: programs beside the caller are found.
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
