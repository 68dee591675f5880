"""Triton's own launcher without a GPU: CPU tensors, kernels compiled for an H100, a driver that does nothing.

Nothing is computed, but everything else happens on the host that a call on a GPU makes happen there.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

SOURCE = Path(__file__).with_name("driver.c")
ARCHITECTURE, PROCESSORS, SHARED = 90, 132, 227 << 10  # as driver.c has them


class Driver:
    """The library, which has to be loaded before Triton asks for one of its name."""

    def __init__(self, folder: Path):
        path = folder / "libcuda.so.1"
        options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *options, SOURCE, "-o", path], check=True)
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.library.launched.restype = ctypes.c_size_t

    def launched(self) -> list[str]:
        """The kernels that were launched since the last call of this, in order."""
        names = ctypes.POINTER(ctypes.c_char_p)()
        number = self.library.launched(ctypes.byref(names))
        found = [names[i].decode() for i in range(number)]
        self.library.forget()
        return found


@contextmanager
def gpu() -> Iterator[Driver]:
    """Within it, calls on CPU tensors with implementation "triton" launch there. Once a process, before any launch."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as patches:
        folder = Path(name)
        # What Triton builds against the stand-in stays in a folder of its own.
        variables = {"TRITON_LIBCUDA_PATH": name, "TRITON_CACHE_DIR": str(folder / "cache")}
        patches.enter_context(mock.patch.dict(os.environ, variables))
        driver = Driver(folder)
        activate()
        for target, attribute, value in differences():
            patches.enter_context(mock.patch.object(target, attribute, value))
        yield driver


def activate() -> None:
    import triton
    from triton.backends.nvidia import driver as nvidia

    class CudaDriver(nvidia.CudaDriver):
        def __init__(self):
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: divmod(ARCHITECTURE, 10)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None

    triton.runtime.driver.set_active(CudaDriver())


def differences() -> Iterator[tuple]:
    """Where the kernels and the quantizers ask whether tensors are on a GPU, and of which kind it is."""
    from vqops import triton_kernels
    from vqops.quantizers.codebook import steps
    from vqops.triton_kernels import blocks, code_sums, finish, quantize

    yield triton_kernels, "why_not", lambda device: None
    yield blocks, "INTERPRETED", blocks.ON_GPU
    yield finish, "queue_programs", lambda device: blocks.PROGRAMS_PER_PROCESSOR * PROCESSORS
    yield blocks, "processors", lambda device: PROCESSORS
    yield blocks, "shared_memory", lambda device: SHARED
    yield blocks, "major", lambda device: ARCHITECTURE // 10
    for module in (code_sums, quantize):
        yield module, "in_order", lambda x: False
    yield steps, "all_have_rows", lambda indices: False
