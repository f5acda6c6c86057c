"""``python -m longscan`` is ``longscan``."""

from __future__ import annotations

import sys

from longscan.cli import main

if __name__ == "__main__":
    sys.exit(main())
