"""The compiled CPU kernels: every instruction set on what breaks error bounds, threads, memory and how work grows.

`VQOPS_CPU` is read once a process, so each set has a process of its own that runs `CASES` against the reference.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from processor import environment
from promises import INDICES, ORDER

import vqops
from vqops import _C

SETS = _C.instruction_sets.split()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def huge_code(size):
    codes = normal(200, 16, seed=1)
    codes[7] *= size
    return normal(150, 16), codes


def near_ties():
    """Rows on the plane between two codes, moved by less than float32 can tell."""
    codes = normal(300, 24, seed=1)
    first, second = codes[:150], codes[150:]
    return (first + second) / 2 + 1e-7 * (second - first) * torch.rand(150, 1), codes


def clusters():
    """Codes that bfloat16 can't tell apart, wherever the centre is: every list of candidates overflows."""
    codes = normal(4, 16).repeat_interleave(50, 0) + 1e-4 * normal(200, 16, seed=1)
    return codes.repeat(2, 1) + 1e-5 * normal(400, 16, seed=2), codes


def half_square():
    """|c|^2 / 2 far above x.c, so that its rounding alone would decide: codes on a sphere of radius 1000."""
    codes = torch.nn.functional.normalize(normal(256, 12, seed=1), dim=1) * 1000
    return 0.01 * normal(128, 12), codes


def halfway():
    """Values midway between two bfloat16, all of one sign: the most that rounding can take, without cancellation."""
    x, codes = normal(120, 31).abs(), normal(130, 31, seed=1).abs()
    return x.bfloat16().float() * (1 + 2**-8 - 2**-23), codes.bfloat16().float() * (1 + 2**-8 - 2**-23)


def largest():
    """The first code is the nearest of all rows, and its difference from the others overflows float32."""
    x, codes = torch.zeros(150, 8), torch.full((40, 8), 3.2e38)
    x[:, 0], codes[0], codes[0, 0] = 3.3e38, 0, -3.2e38
    codes[1:, 1] -= 1e33 * torch.arange(39)
    return x, codes


def special():
    x, codes = normal(150, 17), normal(140, 17, seed=1)
    for row, value in enumerate((float("nan"), float("inf"), 3e38, 0.0, 1e-42, -1e30)):
        x[row], codes[row] = value, value
    x[20, 3], codes[20, 3] = float("nan"), float("nan")
    return x, codes


CASES = {
    "random": lambda: (normal(300, 64), normal(1000, 64, seed=1)),
    "few rows": lambda: (normal(5, 19), normal(100, 19, seed=1)),
    "odd sizes": lambda: (normal(129, 7), normal(33, 7, seed=1)),
    "one dimension": lambda: (normal(200, 1), normal(50, 1, seed=1)),
    "one code": lambda: (normal(150, 3), normal(1, 3)),
    "off centre": lambda: (normal(200, 16) + 1e3, normal(300, 16, seed=1) + 1e3),
    "huge code": lambda: huge_code(100),
    "code beyond float32": lambda: huge_code(1e20),
    "identical codes": lambda: (normal(150, 16), normal(1, 16).repeat(200, 1)),
    "zero codebook": lambda: (normal(150, 16), torch.zeros(200, 16)),
    "duplicates": lambda: (normal(150, 16), normal(100, 16, seed=1).repeat(3, 1)),
    "denormals": lambda: (normal(150, 16) * 1e-41, normal(200, 16, seed=1) * 1e-41),
    "collapsed": lambda: (1 + 1e-7 * normal(150, 16), 1 + 1e-7 * normal(200, 16, seed=1)),
    "clusters": clusters,
    "near ties": near_ties,
    "rounding of half the square": half_square,
    "halfway": halfway,
    "special values": special,
    "largest values": largest,
    "float64": lambda: (normal(150, 16).double(), normal(200, 16, seed=1).double()),
    "float16": lambda: (normal(150, 16).half(), normal(200, 16, seed=1).half()),
    "bfloat16 rows": lambda: (normal(150, 16).bfloat16(), normal(200, 16, seed=1)),
    "strided": lambda: (normal(9, 150).mT, normal(60, 18)[:, ::2]),
}


def differences(x, codes, metric):
    """The results in which the kernels of this process and the reference disagree."""
    wrong = []
    found, expected = (vqops.nearest(x, codes, metric=metric, implementation=i) for i in ("compiled", "reference"))
    if (found != expected).any():
        wrong.append(f"nearest: {int((found != expected).sum())} rows")
    k = min(6, len(codes))
    found, expected = (
        vqops.nearest_topk(x, codes, k, metric=metric, implementation=i) for i in ("compiled", "reference")
    )
    if (found[0] != expected[0]).any():
        wrong.append(f"nearest_topk: {int((found[0] != expected[0]).any(1).sum())} rows")
    if not torch.allclose(found[1], expected[1], rtol=1e-6, equal_nan=True):
        wrong.append("distances")
    for temperature in (1e-5, 0.1, 3.0):
        found, expected = (
            vqops.sample(x, codes, temperature, torch.tensor([5, 6]), metric=metric, implementation=i)
            for i in ("compiled", "reference")
        )
        if (found != expected).any():
            wrong.append(f"sample: {int((found != expected).sum())} rows at {temperature}")
    found, expected = (
        vqops.quantize(x, codes, metric=metric, code_sums=True, implementation=i) for i in ("compiled", "reference")
    )
    for name, a, b in zip(found._fields, found, expected, strict=True):
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True):
            wrong.append(f"quantize: {name}")
    if vqops.search_statistics(x, codes, metric=metric).sum() != len(x):
        wrong.append("search_statistics: the tiers don't add up")
    return wrong


def run_cases():
    torch.set_num_threads(1)
    print("set:", _C.instruction_set())
    for name, make in CASES.items():
        for metric in ("euclidean", "cosine"):
            for difference in differences(*make(), metric):
                print(f"wrong: {name}, {metric}: {difference}")


@cache
def output_of(instructions):
    command = [sys.executable, __file__]
    return subprocess.run(command, env=environment(VQOPS_CPU=instructions), capture_output=True, text=True)


@pytest.mark.parametrize("instructions", SETS)
def test_every_instruction_set(instructions):
    result = output_of(instructions)
    if "this processor has no such instructions" in result.stderr:
        pytest.skip(f"this processor has no {instructions}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"set: {instructions}"], result.stdout


def test_unknown_instruction_set():
    result = output_of("avx1024")
    assert result.returncode != 0
    assert f"VQOPS_CPU=avx1024, but it must be one of: {_C.instruction_sets}" in result.stderr


FORK = """
import os, torch, vqops
torch.set_num_threads(2)
x, codes = torch.randn(1000, 24), torch.randn(300, 24)
before = vqops.nearest(x, codes)
child = os.fork()
torch.set_num_threads(1)  # as data loaders do: threads do not survive a fork
right = (vqops.nearest(x, codes) == before).all()
if child == 0:
    os._exit(0 if right else 3)
assert right and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_searches_as_its_parent():
    result = subprocess.run([sys.executable, "-c", FORK], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


REFUSES = """
#include <errno.h>
long syscall(long number, ...) { return errno = number == 158 ? ENOSPC : ENOSYS, -1; }
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_a_system_that_does_not_permit_tiles(tmp_path):
    """arch_prctl is refused, as it is by old kernels, by sandboxes and beside small signal stacks."""
    (tmp_path / "refuses.c").write_text(REFUSES)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "refuses.c", "-o", "refuses.so"], cwd=tmp_path, check=True)
    ask = "from vqops import _C; import vqops, torch; vqops.nearest(torch.ones(200, 4), torch.ones(9, 4)); "
    refused = {"LD_PRELOAD": str(tmp_path / "refuses.so")}
    for chosen in ("", "amx_bf16"):
        command = [sys.executable, "-c", ask + "print(_C.instruction_set())"]
        result = subprocess.run(
            command, env=environment(VQOPS_CPU=chosen, **refused), capture_output=True, text=True
        )
        if chosen:
            assert "VQOPS_CPU=amx_bf16, but this processor has no such instructions, or the system" in result.stderr
        else:
            assert result.returncode == 0, result.stderr
            assert result.stdout.split() in [[name] for name in SETS if name != "amx_bf16"]


def test_clusters_go_to_the_more_precise_tier():
    x, codes = clusters()
    certified, decided, again, none = vqops.search_statistics(x, codes).tolist()
    assert again + decided + certified == len(x)
    assert none == 0
    assert again == len(x) or not _C.screens_in_bfloat16()
    assert vqops.search_statistics(normal(400, 16), normal(200, 16, seed=1))[2] == 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("N", "K"), [(3, 700), (60, 700), (1500, 70), (1200, 400)])
def test_threads_do_not_matter(N, K, metric):
    x, codes = normal(2, N, 24), normal(2, K, 24, seed=1)
    x[0, : N // 2] = codes[0, 0]  # a code of more than one run of 256 rows
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            rows = x.clone().requires_grad_()
            found = vqops.quantize(rows, codes, metric=metric, gradient="rotation", code_sums=True)
            (found.quantized.sum() + found.error.sum()).backward()
            drawn = vqops.sample(x, codes, 0.5, torch.tensor([3, 4]), metric=metric)
            results.append((*found, drawn, rows.grad, vqops.prepare(codes, metric=metric).packed))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        ORDER.same(other, results[0])


# Rows that are compared directly with a prepared codebook (csrc/cpu/unprepared.h).
DIRECT = {"amx_bf16": 0, "avx512_bf16": 2, "avx512": 5, "avx2": 2, "portable": 1, "bf16_model": 1, "amx_model": 0}
DIRECT = DIRECT[_C.instruction_set()]


@pytest.mark.parametrize(
    ("N", "K", "D", "metric", "direct"),
    [
        (1, 100, 64, "euclidean", DIRECT >= 1),
        (1, 100, 64, "cosine", DIRECT >= 2),
        (1, 100, 31, "euclidean", False),
        (2, 100, 64, "euclidean", DIRECT >= 2),
        (5, 100, 160, "euclidean", DIRECT >= 5),
        (6, 100, 200, "euclidean", False),
        (1, 20000, 64, "euclidean", False),  # 5 MB
    ],
)
def test_few_rows_do_without_the_preparation(N, K, D, metric, direct):
    """One that knows no code finds no code."""
    x, codes = normal(1, N, D), normal(1, K, D, seed=1)
    prepared = vqops.prepare(codes, metric=metric)
    prepared.packed[64:].zero_()
    prepared.packed[24:32].zero_()  # the number of those that are screened
    right = vqops.nearest(x, prepared, metric=metric) == vqops.nearest(x, codes, metric=metric)
    assert right.all() == direct
    with pytest.raises(RuntimeError, match="prepared was made by another implementation or for another codebook"):
        torch.ops.vqops.nearest(x, codes, None, metric, prepared.packed[1:])


def test_batches_do_not_matter():
    x, codes = normal(1000, 12), normal(300, 12, seed=1)
    whole = vqops.nearest(x, codes)
    for size in (1, 13, 96, 97, 500):
        INDICES.same(torch.cat([vqops.nearest(part, codes) for part in x[:200].split(size)]), whole[:200])


MEMORY = """
import sys, torch, vqops
torch.set_num_threads(1)
N, D, K = map(int, sys.argv[1:])
x, codes = torch.randn(N, D), torch.randn(K, D)

def peak():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]), int(fields["VmRSS"].split()[0])

vqops.nearest(x[:2000], codes[:64])  # what is loaded once
open("/proc/self/clear_refs", "w").write("5")
before = peak()[1]
indices = vqops.nearest(x, codes)
print(1024 * (peak()[0] - before), vqops.prepare(codes).packed.numel())
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to read the peak from")
@pytest.mark.parametrize(("N", "D", "K"), [(65536, 16, 1024), (20000, 128, 4096), (2000, 8, 32768)])
def test_extra_memory_of_a_search(N, D, K):
    """The packed codebook, 64 bytes a row and 256 KB (AMX: 2 MB) a thread; again for what the allocator rounds up."""
    command = [sys.executable, "-c", MEMORY, *map(str, (N, D, K))]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    extra, packed = map(int, result.stdout.split())
    assert extra <= packed + 64 * N + 2 * (2048 if _C.instruction_set() == "amx_bf16" else 256) * 1024
    assert packed <= 4 * (K + 32) * (D + 20)


if __name__ == "__main__":
    run_cases()
