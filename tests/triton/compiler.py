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
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TENSOR_CORES = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCMMA)\b")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", re.MULTILINE)
BACK = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
LEAST_LOOP = 32 * 16  # bytes
SPILLS = re.compile(r"\b(?:STL|LDL)\b")
PROCESSORS = 192  # more than any GPU has
LARGEST_SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB per block; a processor has 1 more


class Launches:
    """Takes the place of every launch, and launches nothing. `new` is told of each kernel when it is first needed."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)
        self.backend = make_backend(self.target)
        self.case, self.needed = "", set()

    def run(self, kernel, *args, grid=None, warmup=False, **kwargs):
        # What Triton's own launch does until it looks the kernel up, which there needs a device.
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = bind(*args, **kwargs)
        needed = kernel.__name__, str(specialization), str(options)
        if needed not in self.needed:
            self.needed.add(needed)
            self.new(kernel, *kernel._pack_args(self.backend, kwargs, bound, specialization, options))


class Compiler(Launches):
    """Compiles them, and prints what came out."""

    def new(self, kernel, options, signature, constants, attributes):
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, self.target, options.__dict__)
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
            "spills_in_loops": sum(len(SPILLS.findall(loop)) for loop in inner_loops(machine_code)),
            "programs": programs_a_processor(usage, compiled.metadata, self.target.arch),
            "shared": compiled.metadata.shared,
            "shared_limit": LARGEST_SHARED[self.target.arch] * 1024,
            "tensor_cores": sorted(set(TENSOR_CORES.findall(machine_code))),
            "wgmma": "wgmma.mma_async" in ptx,
            "flushes_denormals": ".ftz" in ptx,
            "fused_double": "fma.rn.f64" in ptx,
            "machine_fused_double": "DFMA" in machine_code,  # also in divisions and roots
        }


def inner_loops(machine_code: str) -> list[str]:
    """The loops with products of tensor cores that have no other loop inside, but one that waits."""
    instructions = [(int(place, 16), text) for place, text in INSTRUCTION.findall(machine_code)]
    ends = [(int(back.group(1), 16), place) for place, text in instructions if (back := BACK.search(text))]
    loops = [(first, last) for first, last in ends if last - first > LEAST_LOOP]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    texts = ["\n".join(text for place, text in instructions if a <= place <= b) for a, b in inner]
    return [text for text in texts if TENSOR_CORES.search(text)]


def programs_a_processor(usage: str, metadata, architecture: int) -> int:
    """How many fit, by registers and shared memory."""
    registers = (int(re.search(r"REG:(\d+)", usage).group(1)) + 7) // 8 * 8
    shared = (LARGEST_SHARED[architecture] + 1) * 1024 // (metadata.shared + 1024)
    return min(65536 // (registers * 32 * metadata.num_warps), shared)


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def replace_launches(launches: Launches) -> None:
    triton.runtime.jit.JITFunction.run = lambda kernel, *args, **kwargs: launches.run(kernel, *args, **kwargs)
    from vqops.triton_kernels import blocks

    blocks.INTERPRETED = blocks.ON_GPU  # the tensors are on the CPU, the kernels are not
    blocks.PROCESSORS_INTERPRETED = PROCESSORS
    blocks.queue_programs = lambda device: blocks.PROGRAMS_PER_PROCESSOR * PROCESSORS
    blocks.shared_memory = lambda device: LARGEST_SHARED[launches.target.arch] * 1024
    blocks.major = lambda device: launches.target.arch // 10


def main(architecture: int, wanted: str) -> None:
    compiler = Compiler(architecture)
    replace_launches(compiler)
    for name, call in calls().items():
        if name.startswith(tuple(wanted.split(";"))):
            compiler.case = name
            call()


def calls() -> dict:
    from vqops.triton_kernels import (
        code_sums,
        ema,
        gather,
        products,
        quantize,
        quantize_backward,
        residual,
        residual_backward,
        sample,
        search,
    )

    def tensors(D, dtype=torch.float32, H=1, N=64, K=512):
        return torch.zeros(H, N, D, dtype=dtype), torch.zeros(H, K, D)

    widths = (1, 8, 32, 64, 128, 256, 320, 2048)
    cases = {f"nearest, D={D}": partial(search.nearest, *tensors(D, K=128)) for D in widths}
    cases |= {f"nearest in parts, D={D}": partial(search.nearest, *tensors(D)) for D in widths}
    for D in widths:
        x, codebook = (t[0].half() for t in tensors(D))
        cases[f"products, D={D}"] = partial(products.products, x, codebook)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cases[f"nearest, {dtype}"] = partial(search.nearest, *tensors(64, dtype))
    mask = torch.ones(2, 64, dtype=torch.bool)
    cases["nearest, heads, mask, cosine"] = partial(search.nearest, *tensors(64, H=2), mask, "cosine")
    for D in (64, 256, 320):
        cases[f"nearest_topk, D={D}"] = partial(search.nearest_topk, *tensors(D), 8)
    draw = torch.tensor(0.5), torch.zeros(2, dtype=torch.int64)
    for D in (1, 8, 64, 320):
        cases[f"sample, D={D}"] = partial(sample.sample, *tensors(D, H=2), *draw)
    for dtype in (torch.bfloat16, torch.float64):
        cases[f"sample, {dtype}, cosine"] = partial(sample.sample, *tensors(64, dtype), *draw, None, "cosine")
    x, codebook = tensors(64)
    indices, error = torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, 64)
    for metric in ("euclidean", "cosine"):
        cases[f"quantize, {metric}"] = partial(quantize.quantize, x, codebook, None, error, metric, code_sums=True)
        for D in (64, 2048):
            rows, codes = tensors(D)
            arguments = rows, error, rows, codes, indices, None, metric, "rotation", 1.0, True, True, True
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
    of_levels, errors = torch.zeros(2, 64, 3, dtype=torch.int64), torch.zeros(2, 3, 64, dtype=torch.float64)
    for D, dtype in ((8, torch.bfloat16), (64, torch.float32), (64, torch.float64), (300, torch.float16)):
        rows, codes = tensors(D, dtype, H=2)
        rest = rows.double() if dtype == torch.float64 else rows.float()
        for metric, norms in (("euclidean", None), ("cosine", errors[:, 0])):
            arguments = rows, codes, of_levels[..., 0], mask, norms, rest, rest, rows, of_levels, errors, 3, 2
            cases[f"residual_quantize, D={D}, {dtype}, {metric}"] = partial(residual.take_off, *arguments)
    cases["residual_quantize, errors"] = partial(residual.sum_in_runs, errors, torch.float32)
    ways = [(64, torch.float32, *way) for way in (("rotation", True), ("rotation", False), ("straight_through", True))]
    ways += [(D, dtype, "rotation", True) for D, dtype in ((8, torch.bfloat16), (64, torch.float64), (2048, x.dtype))]
    for D, dtype, gradient, per_level in ways:
        rows, codes = tensors(D, dtype, H=2)
        for metric in ("euclidean", "cosine"):
            arguments = rows, errors[..., 0].float(), rows, codes, [200, 200, 112], of_levels, mask, torch.tensor(2)
            arguments += metric, gradient, per_level, 1.0, True, True, gradient == "straight_through"
            name = f"residual_quantize_backward, D={D}, {dtype}, {gradient}{'' if per_level else ' once'}, {metric}"
            cases[name] = partial(residual_backward.residual_quantize_backward, *arguments)
    for D in (8, 64, 300):
        weight = None if D == 8 else error
        rows, codes = tensors(D)
        cases[f"code_sums, atomic, D={D}"] = partial(code_sums.atomic, rows, indices, 512, weight)
        added = weight, *code_sums.no_sums(rows, 512, weight)
        cases[f"quantize, adding rows, D={D}"] = partial(gather.gather, rows, codes, indices, None, D == 64, *added)
    one, row = torch.zeros(1, 1, 1), torch.zeros(1, 1)  # strides and D that are 1 become constants

    def ones():
        index = torch.zeros(1, 1, dtype=torch.int64)
        search.nearest(one.double(), one)
        search.nearest_topk(one, one, 1)
        quantize.quantize(one, one, None, row, "cosine", code_sums=True)
        sample.sample(one, one, *draw, metric="cosine")
        code_sums.atomic(one, index, 1, row)
        arguments = one, row, one, one, index, None, "cosine", "rotation", 1.0, True, True, True
        quantize_backward.quantize_backward(*arguments)
        two = torch.zeros(1, 1, 2)
        residual.residual_quantize(one, [one] * 2, None, torch.tensor(1), "cosine", code_sums=True)
        arguments = one, two[0], one, two.mT, [1, 1], two.long(), None, None, "cosine", "rotation", True, 1.0
        residual_backward.residual_quantize_backward(*arguments, True, True, True)
        ema.ema_update_(row, one, one, row, one, torch.tensor(0.9), metric="cosine")

    cases["one of everything, cosine"] = ones
    return cases


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
