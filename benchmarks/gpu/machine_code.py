"""python -m benchmarks.gpu.machine_code           counts the machine code of the search's kernels: a minute, no GPU

Compiles each kernel of CUDA C++ that the search of float32 takes on ARCHITECTURES, one by one, and the fast pass in
Triton at DEPTHS, writes a row for each to benchmarks/results/machine_code, and draws the pages anew. Needs nvcc and
Triton.

The loop over tiles is the shortest one that both multiplies on tensor cores and compares. A turn is the way through it
with the fewest instructions that does both: no row finds a candidate, no stage is copied, and of codes in pieces one is
multiplied. Each further piece is a way that only multiplies.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu import stand_in
from benchmarks.gpu.prepare import ROOT, said
from benchmarks.rows import RESULTS

FOLDER = RESULTS / "machine_code"
ARCHITECTURES = ("90a", "80")
DEPTHS = (16, 32, 64, 128, 256, 320)  # as Triton stores them; beyond 256 the pass takes them in steps
SHARED = {"80": 164, "90a": 228, "100": 228, "120": 100}  # KB of an SM, of which a block may have all but one
WGMMA = ("1", "2")  # how it may be used
REGISTERS = 65536  # of an SM, given to warps by 256
CLASSES = {  # of instructions, by how they begin
    "products": ("HGMMA", "HMMA"),
    "FFMA": ("FFMA",),
    "FMUL": ("FMUL",),
    "FMNMX": ("FMNMX",),
    "LDS": ("LDS",),  # and LDSM
    "spills": ("LDL", "STL"),
    "copies": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "barriers": ("BAR", "SYNCS"),
}
OF_A_TURN = ("products", "FFMA", "FMUL", "FMNMX", "LDS")
TILE = ("products", "FMNMX")  # what the loop over tiles has
SETUP = "import setup; print(setup.hash_of_cuda(), setup.find_toolkit()[0])"


class Instruction(NamedTuple):
    place: int
    text: str

    @property
    def name(self) -> str:
        """Without what it depends on."""
        return re.sub(r"^@!?U?P\w+ +", "", self.text).partition(" ")[0]

    def is_a(self, *beginnings: str) -> bool:
        return self.name.startswith(beginnings)

    @property
    def target(self) -> int | None:
        """Of a branch."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.text) if self.is_a("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def may_go_on(self) -> bool:
        """To what stands behind it."""
        conditional = self.text.startswith("@") or "," in self.text  # `BRA P1, 0x40` has its condition inside
        return conditional or not self.is_a("BRA", "EXIT", "RET")


Way = tuple[Instruction, ...]


def listing(sass: str) -> list[Instruction]:
    """Of one kernel, as cuobjdump prints it."""
    return [Instruction(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S[^;]*?) *;", sass)]


def loop_that(code: list[Instruction], *does: str) -> tuple[int, int]:
    """Its first and last instruction: the fewest between a branch back and its target with all these classes."""
    index = {instruction.place: i for i, instruction in enumerate(code)}
    back = [(index[to], i) for i, each in enumerate(code) if (to := each.target) in index and index[to] <= i]
    for _, first, last in sorted((last - first, first, last) for first, last in back):
        if all(amount(code[first : last + 1], of) for of in does):
            return first, last
    raise ValueError(f"no loop has {' and '.join(does)}")


def turn(code: list[Instruction], *does: str) -> Way:
    """The shortest way through that loop, from its first instruction to it again, with all these classes."""
    first, last = loop_that(code, *does)
    index = {code[i].place: i for i in range(first, last + 1)}
    Left = frozenset[str]  # classes that are still to come
    waiting: list[tuple[int, int, int, Left]] = [(0, 0, first, frozenset(does))]
    ways: dict[int, tuple[int, int]] = {}  # what was taken, by its turn: instruction, and the one before
    seen: set[tuple[int, Left]] = set()
    while waiting:
        length, before, i, left = heappop(waiting)
        left -= {of for of in left if code[i].is_a(*CLASSES[of])}
        if (i, left) in seen:
            continue
        seen.add((i, left))
        ways[number := len(ways) + 1] = i, before
        following = [i + 1] * code[i].may_go_on + [index[to] for to in [code[i].target] if to in index]
        if first in following and not left:
            return tuple(ways_back(number, ways, code))[::-1]
        for j in following:
            if first < j <= last:
                heappush(waiting, (length + 1, number, j, left))
    raise ValueError(f"no way through the loop has {' and '.join(does)}")


def ways_back(number: int, ways: dict[int, tuple[int, int]], code: list[Instruction]) -> Iterator[Instruction]:
    while number:
        i, number = ways[number]
        yield code[i]


def counts(sass: str) -> dict:
    """What can be told of a kernel from its machine code."""
    code = listing(sass)
    first, last = loop_that(code, *TILE)
    loop, way, piece = code[first : last + 1], turn(code, *TILE), turn(code, "products")
    return {
        "instructions": len(code),
        "loop": len(loop),
        "spills": amount(loop, "spills"),
        "copies": amount(loop, "copies"),
        "barriers": amount(loop, "barriers"),
        "waits": [int(each.text.rpartition(" ")[2], 16) for each in loop if each.is_a("WARPGROUP.DEPBAR")],
        "turn": len(way),
        "piece": None if amount(piece, "FMNMX") else len(piece),
        "classes": classes(way),
    }


def amount(code: Sequence[Instruction], of: str) -> int:
    return sum(each.is_a(*CLASSES[of]) for each in code)


def classes(way: Way) -> dict[str, int]:
    """The rest is addresses, tests and branches."""
    of = {name: amount(way, name) for name in OF_A_TURN}
    return {**of, "other": len(way) - sum(of.values())}


def blocks_of_sm(architecture: str, shared: int, registers: int, threads: int) -> int:
    """As shared memory and registers allow."""
    of_a_warp = -(-32 * registers // 256) * 256
    warps = REGISTERS // 4 // of_a_warp * 4  # a quarter of them lies at each scheduler
    return min(1024 * SHARED[architecture] // (shared + 1024), warps * 32 // threads)


def kernels(architecture: str, folder: Path) -> dict[str, dict]:
    """What the kernels' own source tells of each that the search takes, by a part of its symbol."""
    program = folder / f"kernels_{architecture}"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++20", ROOT / "benchmarks/gpu/machine_code.cpp", "-o", program], check=True)
    largest = 1024 * (SHARED[architecture] - 1)
    ways = WGMMA if architecture == "90a" else ("0",)
    lines = [line for way in ways for line in dumped(program, str(largest), way).splitlines()]
    found: dict[str, dict] = {}
    for symbol, name, *sizes in map(methodcaller("split", "\t"), lines):
        depths, threads, scores, shared = map(int, sizes)
        part = symbol.removeprefix("N5vqops4cuda").removesuffix("E")
        row = found.setdefault(part, {"type": name, "threads": threads, "scores": scores, "shared": {}})
        row["shared"][depths] = shared
    return found


def compiled(kernel: str, architecture: str, target: Path, nvcc: str) -> Path:
    """A kernel alone."""
    from torch.utils.cpp_extension import include_paths

    source = target.with_suffix(".cu")
    headers = "".join(f'#include "{ROOT}/csrc/cuda/{name}.h"\n' for name in ("launch", "passes"))
    launch = f"template __global__ void vqops::cuda::run<{kernel}>(const __grid_constant__ {kernel});\n"
    source.write_text(headers + launch)
    flags = ["-O3", "-std=c++20", "-fmad=false", "-DVQOPS_WGMMA=1", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{path}" for path in include_paths()]
    flags += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-cubin"]
    subprocess.run([nvcc, *flags, source, "-o", target], check=True)
    return target


def cuobjdump() -> str | None:
    """In the toolkit, or in Triton, which brings one."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    try:
        import triton
    except ImportError:
        return found
    return found or shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends/nvidia/bin"))


def dumped(tool: str | Path, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def version_of(nvcc: str) -> str:
    return "nvcc " + re.search(r"V([\d.]+)", dumped(nvcc, "--version"))[1]


def rows_of(architecture: str, folder: Path, nvcc: str, tool: str, say: Callable[[str], None]) -> Iterator[dict]:
    found = kernels(architecture, folder)

    def row(numbered: tuple[int, tuple[str, dict]]) -> dict:
        number, (symbol, of) = numbered
        cubin = compiled(of["type"], architecture, folder / f"{architecture}_{number}.cubin", nvcc)
        registers = int(re.search(r"REG:(\d+)", dumped(tool, "--dump-resource-usage", cubin))[1])
        sizes = of["shared"].values()
        blocks = [blocks_of_sm(architecture, shared, registers, of["threads"]) for shared in sizes]
        name = of["type"].replace("vqops::cuda::", "")
        say(f"sm_{architecture} {name}")
        return {
            "architecture": f"sm_{architecture}",
            "kernel": name,
            "symbol": symbol,
            "D": [min(of["shared"]), max(of["shared"])],
            "registers": registers,
            "shared_bytes": [min(sizes), max(sizes)],
            "blocks": [min(blocks), max(blocks)],
            "scores": of["scores"],
            **counts(dumped(tool, "--dump-sass", cubin)),
        }

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(row, enumerate(found.items()))


def rows_of_triton(folder: Path, tool: str, say: Callable[[str], None]) -> Iterator[dict]:
    """For the GPU of stand_in.py."""
    from vqops.dispatch.records import kernels_here
    from vqops.triton_kernels import blocks, search
    from vqops.triton_kernels.launch import Kept

    here = kernels_here()["triton"]
    with stand_in.gpu():
        for D in DEPTHS:
            x, codebook = torch.zeros(1, 128, D), torch.zeros(1, 128, D)
            Kept.found.clear()
            search.nearest(x, codebook)
            kernel = next(kernel for kernel, _launch in Kept.found.values() if kernel.name == "screen_kernel")
            (cubin := folder / f"triton_{D}.cubin").write_bytes(kernel.asm["cubin"])
            registers = int(re.search(r"REG:(\d+)", dumped(tool, "--dump-resource-usage", cubin))[1])
            block, threads = blocks.screen_blocks(D, x.device), 32 * kernel.metadata.num_warps
            say(f"sm_{stand_in.ARCHITECTURE} screen_kernel, {D} dimensions")
            yield {
                "implementation": "triton",
                "compiler": f"Triton {here['version']}",
                "sources": here["sources"],
                "architecture": f"sm_{stand_in.ARCHITECTURE}",
                "kernel": "screen_kernel",
                "D": [D, D],
                "registers": registers,
                "shared_bytes": [kernel.metadata.shared] * 2,
                "blocks": [blocks_of_sm("90a", kernel.metadata.shared, registers, threads)] * 2,
                "scores": block.rows * block.codes // threads,
                **counts(dumped(tool, "--dump-sass", cubin)),
            }


def write(name: str, rows: list[dict]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    sources, toolkit = said(sys.executable, SETUP).split()
    nvcc, tool = f"{toolkit}/bin/nvcc", cuobjdump()
    if toolkit == "None" or tool is None:
        raise SystemExit("machine_code: there is no nvcc, or no cuobjdump")
    common = {"implementation": "compiled", "compiler": version_of(nvcc), "sources": sources}
    with tempfile.TemporaryDirectory() as folder:
        made = (rows_of(each, Path(folder), nvcc, tool, lambda said: print(said, flush=True)) for each in ARCHITECTURES)
        write("compiled", [common | row for rows in made for row in rows])
        write("triton", list(rows_of_triton(Path(folder), tool, lambda said: print(said, flush=True))))
    from benchmarks import report

    report.main()


if __name__ == "__main__":
    main()
