"""Compiles every Triton kernel that a set of calls would launch, without a GPU, and prints what came out as JSON
lines.

    python tests/triton/compiler.py 90
    python tests/triton/compiler.py 90 "nearest, D=64;one of everything"

Calls the ops on CPU tensors with the launch replaced by a compilation, so that arguments, block sizes and options are
those of a real launch on that architecture.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
TENSOR_CORES = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCMMA)\b")
PROCESSORS = 192  # more than any GPU has
LARGEST_SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB per block


def specialized(kernel, args, kwargs):
    """Signature, constants and divisibility, as Triton's own launch derives them."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in kwargs.items() if k in kernel.arg_names
    }
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


class Compiler:
    """Takes the place of every launch."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)
        self.case, self.done = "", set()

    def run(self, kernel, *args, grid=None, warmup=False, **kwargs):
        signature, constants, attributes = specialized(kernel, args, kwargs)
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        key = (kernel.__name__, *map(str, (signature, constants, attributes, options)))
        if key in self.done:
            return
        self.done.add(key)
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), self.target, options)
        print(json.dumps({"case": self.case, "kernel": kernel.__name__, **self.facts(compiled)}), flush=True)

    def facts(self, compiled) -> dict:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "--dump-resource-usage", file.name)
            machine_code = tool("cuobjdump", "--dump-sass", file.name)
        ptx = compiled.asm["ptx"]
        return {
            "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
            "spills": len(re.findall(r"\bSTL\b", machine_code)),
            "shared": compiled.metadata.shared,
            "shared_limit": LARGEST_SHARED[self.target.arch] * 1024,
            "tensor_cores": sorted(set(TENSOR_CORES.findall(machine_code))),
            "wgmma": "wgmma.mma_async" in ptx,
            "flushes_denormals": ".ftz" in ptx,
            "fused_double": "fma.rn.f64" in ptx,
            "machine_fused_double": "DFMA" in machine_code,  # also in divisions and roots
        }


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def main(architecture: int, wanted: str) -> None:
    compiler = Compiler(architecture)
    triton.runtime.jit.JITFunction.run = lambda kernel, *args, **kwargs: compiler.run(kernel, *args, **kwargs)
    from vqops.triton_kernels import blocks

    blocks.INTERPRETED = blocks.ON_GPU  # the tensors are on the CPU, the kernels are not
    blocks.PROCESSORS_INTERPRETED = PROCESSORS
    blocks.queue_programs = lambda device: blocks.PROGRAMS_PER_PROCESSOR * PROCESSORS
    blocks.shared_memory = lambda device: LARGEST_SHARED[architecture] * 1024
    blocks.major = lambda device: architecture // 10
    for name, call in calls().items():
        if name.startswith(tuple(wanted.split(";"))):
            compiler.case = name
            call()


def calls() -> dict:
    from vqops.triton_kernels import code_sums, ema, quantize, quantize_backward, search

    def tensors(D, dtype=torch.float32, H=1, N=64, K=512):
        return torch.zeros(H, N, D, dtype=dtype), torch.zeros(H, K, D)

    widths = (1, 8, 32, 64, 128, 256, 320, 2048)
    cases = {f"nearest, D={D}": partial(search.nearest, *tensors(D, K=128)) for D in widths}
    cases |= {f"nearest in parts, D={D}": partial(search.nearest, *tensors(D)) for D in widths}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cases[f"nearest, {dtype}"] = partial(search.nearest, *tensors(64, dtype))
    mask = torch.ones(2, 64, dtype=torch.bool)
    cases["nearest, heads, mask, cosine"] = partial(search.nearest, *tensors(64, H=2), mask, "cosine")
    for D in (64, 256, 320):
        cases[f"nearest_topk, D={D}"] = partial(search.nearest_topk, *tensors(D), 8)
    x, codebook = tensors(64)
    indices, error = torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, 64)
    for metric in ("euclidean", "cosine"):
        cases[f"quantize, {metric}"] = partial(quantize.quantize, x, codebook, None, error, metric, code_sums=True)
        for D in (64, 2048):
            rows, codes = tensors(D)
            arguments = rows, error, rows, codes, indices, None, metric, "rotation", 1.0, True, True
            cases[f"quantize_backward, D={D}, {metric}"] = partial(quantize_backward.quantize_backward, *arguments)
        state = (
            torch.zeros(1, 512),
            codebook.clone(),
            codebook.clone(),
            torch.zeros(1, 512),
            codebook,
            torch.tensor(0.9),
        )
        cases[f"ema_update_, {metric}"] = partial(ema.ema_update_, *state, metric=metric)
    for D in (8, 64, 300):
        weight = None if D == 8 else error
        cases[f"code_sums, atomic, D={D}"] = partial(code_sums.atomic, tensors(D)[0], indices, 512, weight)
    one, row = torch.zeros(1, 1, 1), torch.zeros(1, 1)  # arguments that are 1 become constants

    def ones():
        index = torch.zeros(1, 1, dtype=torch.int64)
        search.nearest(one.double(), one)
        search.nearest_topk(one, one, 1)
        quantize.quantize(one, one, None, row, "cosine", code_sums=True)
        code_sums.atomic(one, index, 1, row)
        quantize_backward.quantize_backward(one, row, one, one, index, None, "cosine", "rotation", 1.0, True, True)
        ema.ema_update_(row, one, one, row, one, torch.tensor(0.9), metric="cosine")

    cases["one of everything, cosine"] = ones
    return cases


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
