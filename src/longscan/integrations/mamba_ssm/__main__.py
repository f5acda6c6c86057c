"""Runs a program that imports mamba_ssm, unchanged, with longscan under its names.

python -m longscan.integrations.mamba_ssm program.py arguments...
python -m longscan.integrations.mamba_ssm -m module arguments...
"""

from __future__ import annotations

import os
import sys

from longscan.integrations.mamba_ssm.install import VARIABLE, enable, enable_from_environment
from longscan.integrations.programs import run_program


def main() -> None:
    """Run the program that the command line names."""
    run_program(sys.argv[1:], enable_from_environment if os.environ.get(VARIABLE) else enable, __doc__)


if __name__ == "__main__":
    main()
