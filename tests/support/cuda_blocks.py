"""The bodies of the CUDA kernels, compiled by the C++ compiler, run thread by thread on the CPU, called by ctypes."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from vqops import reference

NATIVE, CSRC = Path(__file__).parents[1] / "cuda_emulated/native", Path(__file__).parents[2] / "csrc"
SOURCES = [NATIVE / f"cuda_{name}.cpp" for name in ("search", "blocks")]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # in the order of csrc/tensors.h
PASSING = ("none", "straight_through", "rotation")
P, L, I, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
# Shared memory of a block, and whether there is wgmma; "float64" leaves no fast pass.
SEARCHES_ON = {
    "sm_80": (L(166912), 0), "sm_90a": (L(232448), 1), "sm_90a, loader": (L(232448), 2), "sm_120": (L(101376), 0),
    "float64": (L(0), 0),
}  # fmt: skip


class Rows(ctypes.Structure):
    _fields_ = [("data", P), ("dtype", I), ("head_stride", L), ("row_stride", L), ("stride", L)]


class Indices(ctypes.Structure):
    _fields_ = [("data", P), ("head_stride", L), ("row_stride", L), ("K", L)]


class RowMask(ctypes.Structure):
    _fields_ = [("data", P), ("head_stride", L), ("row_stride", L)]


class EmaState(ctypes.Structure):
    _fields_ = [
        *[(name, L) for name in "HKD"],
        *[(name, P) for name in ("size", "average", "codes", "counts", "weighted", "sums", "weight", "decay", "total")],
        ("eps", ctypes.c_float),
        ("cosine", ctypes.c_bool),
    ]


class Levels(ctypes.Structure):
    _fields_ = [
        *[(name, L) for name in "HNDQ"],
        *[(name, P) for name in ("sizes", "indices", "levels")],
        *[(name, I) for name in ("passing", "per_level", "units")],
    ]


def rows(t):
    if t is None:
        return ctypes.byref(Rows())
    strides = t.stride() if t.dim() == 3 else (*t.stride(), 1)
    return ctypes.byref(Rows(t.data_ptr(), DTYPES.index(t.dtype), *strides))


def indices_of(t, K):
    return ctypes.byref(Indices(t.data_ptr(), *t.stride(), K))


def mask_of(t):
    return ctypes.byref(RowMask() if t is None else RowMask(t.data_ptr(), *t.stride()))


def pointer(t):
    return P(None if t is None else t.data_ptr())


def error_type(x):
    return torch.promote_types(x.dtype, torch.float32)


class Kernels:
    """The ops as the kernels run them; `descending` runs blocks and threads last to first.

    Sums by code are those of deterministic algorithms if `sorted`, else of atomic additions; `additions` is the number
    of these in the last code_sums, `calls` that of kernels and fills in the last search.
    """

    def __init__(self, library, descending, sorted=True):
        self.library, self.descending, self.sorted = library, int(descending), int(sorted)
        self.additions = self.calls = None

    def code_sums(self, x, indices, K, weight=None):
        H, N, D = x.shape
        sums = x.new_full((H, K, D), torch.nan, dtype=torch.float32)
        counts = x.new_full((H, K), -7, dtype=torch.int64 if weight is None else torch.float32)
        separate = (counts, None) if weight is None else (None, counts)
        self.additions = self.library.code_sums(
            self.descending, self.sorted, *map(L, (H, N, K, D)), rows(x), rows(weight), indices_of(indices, K),
            pointer(sums), *map(pointer, separate),
        )  # fmt: skip
        return counts, sums

    def gather(self, x, codebook, indices, mask=None, weight=None, metric="euclidean", code_sums=False, normalize=True):
        (H, N, D), K = x.shape, codebook.shape[1]
        quantized, error = torch.full(x.shape, 7, dtype=x.dtype), torch.full((H, N), 7, dtype=error_type(x))
        sums = x.new_full((H, K, D), torch.nan, dtype=torch.float32)
        counts = x.new_full((H, K), -7, dtype=torch.int64 if weight is None else torch.float32)
        separate = (counts, None) if weight is None else (None, counts)
        self.library.gather(
            self.descending, self.sorted, *map(L, (H, N, K, D)), rows(x), rows(codebook), rows(weight),
            indices_of(indices, K), mask_of(mask), metric == "cosine" and normalize, code_sums, pointer(quantized),
            pointer(error), pointer(sums), *map(pointer, separate),
        )  # fmt: skip
        return quantized, error, counts, sums

    def search(
        self, x, codebook, k=1, mask=None, metric="euclidean", on="sm_90a", multiprocessors=1, adder=16,
        distances=False, prepared=False,
    ):  # fmt: skip
        """Indices, distances or None, and rows by tier."""
        (H, N, D), K = x.shape, codebook.shape[1]
        indices = torch.full((H, N, k), -7)
        found = torch.full((H, N, k), 7, dtype=error_type(x)) if distances else None
        tiers = torch.zeros(4, dtype=torch.int64)
        self.calls = self.library.search(
            self.descending, *SEARCHES_ON[on], L(multiprocessors), adder, *map(L, (H, N, K, D)), rows(x),
            rows(codebook), mask_of(mask), metric == "cosine", prepared, pointer(indices), L(k), pointer(found),
            DTYPES.index(error_type(x)), pointer(tiers),
        )  # fmt: skip
        return indices, found, tiers

    def survey(self, codebook, metric="euclidean"):
        """Centre and scale."""
        H, K, D = codebook.shape
        centre, scale = torch.full((H, D), torch.nan), torch.full((H,), torch.nan)
        self.library.survey(
            self.descending, *map(L, (H, K, D)), rows(codebook), metric == "cosine", pointer(centre), pointer(scale)
        )
        return centre, scale

    def bounds(self, x, codebook, metric, adder, wgmma):
        """Lower bound, upper bound and exact value of every pair, [N, K] each, of one head."""
        (_, N, D), K = x.shape, codebook.shape[1]
        found = [torch.full((N, K), torch.nan, dtype=torch.float64) for _ in range(3)]
        self.library.bounds(
            int(wgmma), adder, *map(L, (N, K, D)), rows(x), rows(codebook), metric == "cosine", *map(pointer, found)
        )  # fmt: skip
        return found

    def ema_update_(self, size, average, embed, counts, sums, decay, eps=1e-5, weight=None, metric="euclidean"):
        H, K, D = average.shape
        whole = counts.dtype == torch.int64
        total = torch.full((H,), torch.nan)
        both = (counts, None) if whole else (None, counts)
        arrays = map(pointer, (size, average, embed, *both, sums, weight, decay, total))
        state = EmaState(H, K, D, *arrays, eps, metric == "cosine")
        self.library.ema_update(self.descending, ctypes.byref(state))

    def quantize_backward(
        self, grad_quantized, grad_error, x, codebook, indices, mask, metric, passing, scale, normalize, _,
        codebook_needed,
    ):  # fmt: skip
        (H, N, D), K = x.shape, codebook.shape[1]
        grad_x = torch.full(x.shape, 7, dtype=x.dtype)
        real = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
        dtype = codebook.dtype if self.sorted else real  # the op converts
        grad_codebook = torch.full(codebook.shape, 7, dtype=dtype) if codebook_needed else None
        self.library.quantize_backward(
            self.descending, self.sorted, *map(L, (H, N, K, D)), rows(grad_quantized), rows(grad_error), rows(x),
            rows(codebook), indices_of(indices, K), mask_of(mask), metric == "cosine" and normalize,
            PASSING.index(passing), F(scale), pointer(grad_x), pointer(grad_codebook),
        )  # fmt: skip
        return grad_x, None if grad_codebook is None else grad_codebook.to(codebook.dtype)


    def residual_quantize(
        self, x, codebooks, mask=None, levels=None, metric="euclidean", with_sums=False, normalize=True
    ):
        """As residual.cu launches them, with the searches of the reference; and what the last level but one leaves."""
        (H, N, D), Q, real, units = x.shape, len(codebooks), error_type(x), metric == "cosine" and normalize
        quantized, rest = torch.full(x.shape, 7, dtype=x.dtype), torch.full(x.shape, torch.nan, dtype=real)
        total = quantized if real == x.dtype else rest.clone()
        indices, errors = torch.full((H, N, Q), -7), torch.full((H, Q, N), 7, dtype=torch.float64)
        square = torch.full((H, N), torch.nan, dtype=torch.float64) if units else None
        kept = None if levels is None else torch.ones(H, N, dtype=torch.bool)
        on, next_level = (mask_of(mask), pointer(levels)), (pointer(square), pointer(kept))
        if units or kept is not None:
            self.library.first_level(self.descending, *map(L, (H, N, D)), rows(x), *on, *next_level)
        counted = []
        for level, codebook in enumerate(codebooks):
            left, K = x if level == 0 else rest, codebook.shape[1]
            chosen = reference.nearest(left, codebook, mask if kept is None else kept, metric)
            if with_sums:
                counts, sums = torch.full((H, K), -7), torch.full((H, K, D), torch.nan)
                self.library.sum_level(
                    self.descending, self.sorted, *map(L, (H, N, K, D)), rows(left), pointer(square),
                    indices_of(chosen, K), pointer(sums), pointer(counts),
                )  # fmt: skip
                counted.append((counts, sums))
            self.library.take_off(
                self.descending, *map(L, (H, N, D, Q, level)), rows(x), rows(codebook), indices_of(chosen, K), *on,
                *map(pointer, (rest, total, quantized, indices, errors)), *next_level,
            )  # fmt: skip
        error = torch.full((H, Q), 7, dtype=real)
        self.library.add_errors(
            self.descending, *map(L, (H * Q, N)), pointer(errors), pointer(error), DTYPES.index(real)
        )  # fmt: skip
        counts, sums = (torch.cat(parts, 1) for parts in zip(*counted, strict=True)) if with_sums else (None, None)
        return quantized, indices, error, counts, sums, rest

    def residual_quantize_backward(
        self, grad_quantized, grad_error, x, codebooks, sizes, indices, mask, levels, metric, passing, per_level, scale,
        normalize, _, codebooks_needed,
    ):  # fmt: skip
        (H, N, D), Q, real = x.shape, len(sizes), error_type(x)
        grad_x, of_levels = torch.full(x.shape, 7, dtype=x.dtype), torch.tensor(sizes)
        arrays = map(pointer, (of_levels, indices, levels))
        units = metric == "cosine" and normalize
        given = ctypes.byref(Levels(H, N, D, Q, *arrays, PASSING.index(passing), per_level, units))
        self.library.gradient_of_levels(
            self.descending, given, rows(grad_quantized), rows(grad_error), rows(x), rows(codebooks), mask_of(mask),
            pointer(grad_x),
        )  # fmt: skip
        if not codebooks_needed:
            return grad_x, None
        rest, parts, x = torch.full(x.shape, torch.nan, dtype=real), [], x.to(real)
        dtype = codebooks.dtype if self.sorted else torch.promote_types(real, codebooks.dtype)
        for level, K in enumerate(sizes):
            parts.append(torch.full((H, K, D), 7, dtype=dtype))
            self.library.gradient_of_level(
                self.descending, self.sorted, given, L(level), F(scale), rows(grad_error), rows(x), rows(codebooks),
                mask_of(mask), pointer(rest), pointer(parts[-1]),
            )  # fmt: skip
        return grad_x, torch.cat(parts, 1).to(codebooks.dtype)


class GatherCases:
    """In both orders of the sums; `check` says what must come out."""

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, kernels, dtype, metric):
        x, c = torch.randn(2, 300, 13).to(dtype), torch.randn(2, 7, 13)
        self.check(kernels, x, c, torch.rand(2, 300) > 0.2, torch.rand(2, 300), metric)
        self.check(kernels, x, c.to(dtype), metric=metric)
        self.check(kernels, x, c.double(), metric=metric)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_as_given(self, kernels, dtype):
        x, c = torch.randn(2, 300, 70).to(dtype), torch.randn(2, 7, 70)
        self.check(kernels, x, c, torch.rand(2, 300) > 0.2, torch.rand(2, 300), "cosine", normalize=False)

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 0, 3, 4), (1, 65, 2, 64), (1, 40, 3, 200), (3, 90, 5, 65)])
    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    def test_shapes(self, kernels, shape, metric):
        H, N, K, D = shape
        self.check(kernels, torch.randn(H, N, D), torch.randn(H, K, D), metric=metric)


def build(folder: Path) -> ctypes.CDLL:
    """The library in `folder`, compiled if what is there is of other sources, flags or another compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror", "-fPIC"]
    flags += os.environ.get("CXXFLAGS", "").split()
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    content = hashlib.sha256(repr((compiler, version, flags)).encode())
    for path in [*sorted(NATIVE.rglob("*.*")), *sorted(CSRC.rglob("*.*"))]:
        content.update(path.name.encode() + path.read_bytes())
    target = folder / f"{content.hexdigest()}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be at it
        if not target.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                compile_to(Path(temporary, "cuda_blocks.so"), compiler, flags).replace(target)
    library = ctypes.CDLL(str(target))
    for function in (library.packed_bytes, library.code_sums, library.search):
        function.restype = ctypes.c_int64
    return library


def compile_to(target: Path, compiler: str, flags: list[str]) -> Path:
    objects = [target.with_name(f"{source.stem}.o") for source in SOURCES]
    pairs = zip(SOURCES, objects, strict=True)
    running = [subprocess.Popen([compiler, *flags, "-c", source, "-o", made]) for source, made in pairs]
    failed = [process.args for process in running if process.wait()]
    assert not failed
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", target], check=True)
    return target
