"""The facts of a machine that a check needs. Asked in a child process: whoever starts others leaves the GPU alone."""

import os

import torch

import vqops
import vqops._C as _C
from vqops import info, triton_kernels
from vqops.dispatch.library import available

GPU_IMPLEMENTATIONS = ("pytorch", "compiled", "triton")


def facts() -> dict:
    versions = {"vqops": vqops.__version__, "torch": torch.__version__, "triton": info.installed("triton")}
    if torch.version.cuda:
        versions |= {"cuda": torch.version.cuda, "CUDA of the driver": torch._C._cuda_getDriverVersion()}
    gpus = [of_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"versions": versions, "built": _C.cuda, "processors": os.cpu_count() or 1, "gpus": gpus}


def of_gpu(index: int) -> dict:
    device, gpu = torch.device("cuda", index), torch.cuda.get_device_properties(index)
    left_out = {"compiled": why_not_compiled((gpu.name, (gpu.major, gpu.minor))), "triton": why_not_triton(device)}
    return {
        **{"device": f"cuda:{index}", "name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"},
        "free": torch.cuda.mem_get_info(index)[0],
        "left_out": {name: why for name, why in left_out.items() if why},
    }


def of_cpu() -> dict:
    """For a rehearsal: the compiled kernels of the CPU, and Triton's interpreter."""
    left_out = {} if triton_kernels.installed() else {"triton": "it is not installed"}
    return {"device": "cpu", "name": "rehearsal on a CPU", "capability": "0.0", "free": 0, "left_out": left_out}


def why_not_compiled(device: info.Device) -> str | None:
    if "compiled" not in available("nearest", "cuda"):
        return f"the CUDA kernels are not built: {_C.cuda}"
    said = info.cuda_kernels(_C.cuda, [device])
    return None if said == _C.cuda else f"the CUDA kernels are {said}"


def why_not_triton(device: torch.device) -> str | None:
    return triton_kernels.why_not(device) if triton_kernels.installed() else "it is not installed"
