"""The names `mamba_ssm` and `causal_conv1d`, served by longscan.

Code written for those packages runs unchanged, on a CPU too::

    from longscan.integrations import mamba_ssm

    mamba_ssm.enable()
    from mamba_ssm import Mamba

:func:`enable` and :func:`disable` are here, the modules they serve in :mod:`names`; the functions and classes behind
the names are in the other files of this package, which nothing imports before it is used.
"""

from __future__ import annotations

from longscan.integrations.mamba_ssm.install import Enabled, disable, enable

__all__ = ["Enabled", "disable", "enable"]
