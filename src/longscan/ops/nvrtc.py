"""CUDA C++ compiled when it is first needed, by NVRTC through `cuda-core`: no compiler on the user's machine.

A kernel is compiled for one set of macros and one architecture, kept on disk under the hash of everything it was made
from, and loaded once a process and device. Nothing here is imported before a CUDA kernel is launched.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.errors import BackendError

#: Macros of a kernel, name by name.
Macros = tuple[tuple[str, int], ...]


#: Activations' dtypes by the kernels' macro FORMAT.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous in memory, else a copy that has it so."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def pieces(rows: int, length: int, packed: int | None, size: int) -> int:
    """How many pieces of `size` steps the kernels cut sequences into (first_piece in cuda_common.cuh), at most.

    Args:
        rows, length: of the tensors.
        packed: sequences in the one row, whose lengths are not known here; None: every row is a sequence.
    """
    if packed is None:
        return rows * max(1, -(-length // size))
    return length // size + packed


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Where tensors lie, as kernels take them; 0 for None."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


@cache
def refuse_device(index: int) -> str | None:
    """Why no kernel of this package runs on a GPU, in words; None when they do."""
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


@cache
def shared_memory(index: int) -> int:
    """Bytes of shared memory that a block can have."""
    from cuda.core import Device

    return int(Device(index).properties.max_shared_memory_per_block_optin)


@cache
def refuse_imports() -> str | None:
    """Why kernels cannot be compiled and launched here, in words; None when they can."""
    try:
        import cuda.bindings
        import cuda.core  # noqa: F401
    except ImportError as error:
        return f"it needs cuda-core, which cannot be imported ({error}); install longscan[cuda]"
    return None


def macros(values: Mapping[str, int | bool]) -> Macros:
    """Macros in a fixed order, so that equal ones are one kernel."""
    return tuple(sorted((name, int(value)) for name, value in values.items()))


def cache_folder() -> Path:
    """Where compiled kernels are kept: LONGSCAN_CUDA_CACHE_DIR, else the user's cache folder."""
    own = os.environ.get("LONGSCAN_CUDA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "longscan" / "cuda"


@cache
def _sources(folder: Path) -> bytes:
    """Digest of every source a kernel of this folder may include."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.cu"), *folder.glob("*.cuh"), *folder.parent.glob("*.cuh"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


def compile_source(source: Path, options: Macros, arch: str) -> tuple[bytes, str]:
    """Machine code of `source` for `arch` (such as "sm_90"), and what the assembler says of registers and spills.

    No GPU is needed.

    Raises:
        BackendError: the compiler refuses, with what it says.
    """
    from cuda.core import Program, ProgramOptions

    settings = ProgramOptions(
        std="c++17",
        arch=arch,
        include_path=str(source.parent),
        define_macro=[(name, str(value)) for name, value in options],
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    try:
        code = Program(source.read_text(encoding="utf-8"), "c++", settings).compile("cubin", logs=log).code
    except Exception as error:  # whatever the compiler raises: its log is the message
        said = f"{error} {log.getvalue()}".strip()
        raise BackendError(f"{source.name} does not compile for {arch} with {dict(options)}: {said}") from error
    return bytes(code), log.getvalue()


def compile_cubin(source: Path, options: Macros, arch: str) -> bytes:
    """Machine code of `source`, from the cache on disk where it is there; see :func:`compile_source`."""
    from cuda.bindings import __version__ as version

    key = hashlib.sha256(_sources(source.parent))
    key.update(repr((source.name, options, arch, version)).encode())
    kept = cache_folder() / f"{source.stem}-{arch}-{key.hexdigest()[:32]}.cubin"
    with suppress(OSError):
        return kept.read_bytes()
    code, _ = compile_source(source, options, arch)
    # Where nothing can be written, every process compiles anew.
    with suppress(OSError):
        _write(kept, code)
    return code


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)


class Kernel:
    """A kernel on one device. Its dynamic shared memory is as large as the source's `NAME_bytes` says."""

    def __init__(self, source: Path, name: str, options: Macros, device: int) -> None:
        from cuda.bindings import driver
        from cuda.core import Device, ObjectCode

        Device(device).set_current()
        major, minor = torch.cuda.get_device_capability(device)
        self._module = ObjectCode.from_cubin(compile_cubin(source, options, f"sm_{major}{minor}"))
        self._kernel = self._module.get_kernel(name)
        self.shared = self._shared_bytes(driver, name)
        if self.shared > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuKernelSetAttribute(attribute, self.shared, self._kernel.handle, device))
        # A kernel is always launched with the same number of threads.
        self._configs: dict[int | tuple[int, int], Any] = {}

    def _shared_bytes(self, driver: Any, name: str) -> int:
        """Reads the constant `NAME_bytes` of the loaded code; 0 where there is none."""
        error, address, _ = driver.cuLibraryGetGlobal(self._module.handle, f"{name}_bytes".encode())
        if int(error) != 0:
            return 0
        value = bytearray(4)
        _checked(driver.cuMemcpyDtoH(value, address, 4))
        return int.from_bytes(value, "little")

    def launch(
        self, grid: int | tuple[int, int], threads: int, arguments: Sequence[int], *, together: bool = False
    ) -> None:
        """Launches on PyTorch's current stream. Arguments are 64-bit: addresses and integers.

        Args:
            grid: blocks.
            threads: of a block.
            arguments: of the kernel.
            together: all blocks run at the same time, so that they can wait for one another (a cooperative launch).
        """
        launch, configure, stream = _launcher()
        config = self._configs.get(grid)
        if config is None:
            if len(self._configs) > 1000:  # as many lengths
                self._configs.clear()
            config = configure(grid=grid, block=threads, shmem_size=self.shared, is_cooperative=together)
            self._configs[grid] = config
        launch(stream(torch.cuda.current_stream().cuda_stream), config, self._kernel, *arguments)


@cache
def _launcher() -> tuple[Any, Any, Any]:
    from cuda.core import LaunchConfig, Stream, launch

    return launch, LaunchConfig, cache(Stream.from_handle)


@cache
def kernel(source: Path, name: str, options: Macros, device: int) -> Kernel:
    """The kernel `name` of `source`, compiled and loaded once."""
    return Kernel(source, name, options, device)


def _checked(result: Any) -> None:
    if int(result[0]) != 0:
        raise BackendError(f"the CUDA driver reports error {result[0]}")
