"""Puts modules of our own under the names of mamba-ssm and causal-conv1d, and takes them away again."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.names import MODULES, VERSIONS

#: Looked at by `import longscan`: "1" calls :func:`enable`, "replace" with ``replace=True``; "0" or nothing does not.
VARIABLE = "LONGSCAN_MAMBA_SSM"


class Enabled:
    """What one call of :func:`enable` did; leaving it as a context manager undoes just that.

    Attributes:
        names: the packages that longscan stands in for because of this call.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        # What was imported under these names before.
        self._hidden = {name: module for name, module in sys.modules.items() if _package(name) in names}
        for name in self._hidden:
            del sys.modules[name]

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        if self in _enabled:
            _undo(self)

    def __repr__(self) -> str:
        return f"Enabled(names={self.names})"


_enabled: list[Enabled] = []


def enable(replace: bool = False) -> Enabled:
    """Let ``import mamba_ssm`` and ``import causal_conv1d`` give longscan.

    A package that is really installed is left alone; so `enable` is safe to call anywhere. To take effect it must come
    before the import it is for: names that others have imported already stay what they are.

    Args:
        replace: stand in also for packages that are installed. What was imported of them is kept aside and comes back
            with :func:`disable`.

    Returns:
        An object with the `names` now served because of this call (those served already are not repeated), and a
        context manager::

            with enable():
                from mamba_ssm import Mamba
    """
    served = {name for earlier in _enabled for name in earlier.names}
    names = tuple(name for name in VERSIONS if name not in served and (replace or not _installed(name)))
    here = Enabled(names)
    _enabled.append(here)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    return here


def disable() -> None:
    """Undo every :func:`enable`: the import system is as it was. Objects already imported go on working."""
    while _enabled:
        _undo(_enabled[-1])


def enable_from_environment() -> None:
    """Do what the environment variable LONGSCAN_MAMBA_SSM asks for.

    Raises:
        ArgumentError: it is neither "1", "replace", "0" nor empty.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1", "replace"):
        raise ArgumentError(f"{VARIABLE}: got {value!r}, allowed are 1, replace and 0")
    if value in ("1", "replace"):
        enable(replace=value == "replace")


def _undo(enabled: Enabled) -> None:
    _enabled.remove(enabled)
    for name in [name for name in sys.modules if _package(name) in enabled.names]:
        del sys.modules[name]
    sys.modules.update(enabled._hidden)
    if not _enabled:
        sys.meta_path.remove(_FINDER)


def _package(name: str) -> str:
    return name.partition(".")[0]


def _installed(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


class _StandIn(MetaPathFinder, Loader):
    """Finds and fills the modules of `MODULES`, and says in words what it has not."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(_package(fullname) in enabled.names for enabled in _enabled):
            return None
        if fullname in MODULES:
            # Every module is a package, though an empty one: `from module import name` then asks here for a name that
            # the module lacks, and gets the words below instead of Python's "cannot import name".
            return ModuleSpec(fullname, self, origin="longscan", is_package=True)
        parent, _, name = fullname.rpartition(".")
        if name.startswith("__"):
            return None
        raise ModuleNotFoundError(
            f"longscan stands in for {_package(fullname)} here and has no {name!r} in {parent}; it has "
            f"{', '.join(_public(parent)) or 'nothing by that path'}. For the package itself: "
            "longscan.integrations.mamba_ssm.disable(), and install it"
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__doc__ = f"{name}, served by longscan."
        if name in VERSIONS:
            module.__version__ = VERSIONS[name]  # type: ignore[attr-defined]
        for public, source in MODULES[name].items():
            setattr(module, public, getattr(importlib.import_module(source), public))
        module.__all__ = [public for public in MODULES[name] if not public.startswith("_")]  # type: ignore[attr-defined]
        # As in the packages, whose __init__ imports them: `import mamba_ssm` makes mamba_ssm.ops and so on reachable.
        for inner in _inner(name):
            importlib.import_module(inner)


def _inner(name: str) -> list[str]:
    return [module for module in MODULES if module.rpartition(".")[0] == name]


def _public(parent: str) -> list[str]:
    return [*MODULES.get(parent, ()), *(inner.rpartition(".")[2] for inner in _inner(parent))]


_FINDER = _StandIn()
