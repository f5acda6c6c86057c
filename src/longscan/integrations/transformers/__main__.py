"""Runs a program that uses Transformers, unchanged, with longscan under its Mamba-1 models and ours known to it.

python -m longscan.integrations.transformers program.py arguments...
python -m longscan.integrations.transformers -m module arguments...
"""

from __future__ import annotations

import sys

from longscan.integrations.programs import run_program
from longscan.integrations.transformers import enable, register


def main() -> None:
    """Run the program that the command line names."""
    run_program(sys.argv[1:], _prepare, __doc__)


def _prepare() -> None:
    enable()
    register()


if __name__ == "__main__":
    main()
