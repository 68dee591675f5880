"""The cases by which an implementation is judged on a device, smallest first: each op against the kernels of the CPU.

Between them they reach every kernel of the search: its depths by the tensor cores that multiply them, few rows and many
codes, the tiers behind the fast pass.
"""

import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor

import vqops
from vqops.check.inputs import SEARCHES, normal
from vqops.check.products import PROBES, Probe

METRICS = ("euclidean", "cosine")
SMALL = 50  # rows and codes at most, in a rehearsal
SEVERAL = 9  # codes a row, of nearest_topk


class Ops:
    """The ops as one implementation runs them on a device: the public ones, and past their checks the ops themselves
    where these wait for the device or do not show a backward."""

    def __init__(self, implementation: str, device: torch.device):
        self.implementation, self.device = implementation, device

    def __getattr__(self, op: str) -> Callable:
        return partial(getattr(vqops, op), implementation=self.implementation)

    def op(self, name: str) -> Callable:
        return getattr(torch.ops.vqops, f"{name}_{self.implementation}")


@dataclass(frozen=True)
class Case:
    name: str
    op: str  # the family that a wrong result speaks against
    build: Callable[[bool], dict]  # the arguments, on the CPU; True: small ones
    call: Callable[..., dict[str, Tensor]]  # call(ops, **arguments): results by name
    loose: dict[str, float] = field(default_factory=dict)  # of results that may differ, by how much of the largest
    plain: bool = True  # few rows are left open: "pytorch" has room for them where it may not wait
    in_order: bool = True  # under torch.use_deterministic_algorithms, which also poisons fresh memory

    def concerns(self, implementation: str, kind: str) -> bool:
        return True

    def judge(self, implementation: str, device: torch.device, small: bool) -> dict:
        """Runs it twice, and once more from a CUDA graph; `wrong` has what differs, by result."""
        given = self.build(small)
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(self.in_order, warn_only=True)
        try:
            expected = self.call(oracle(implementation, device), **given)
            moved = {name: moved_to(device, value) for name, value in given.items()}
            run = partial(self.call, Ops(implementation, device), **moved)
            runs = {"first": run(), "again": run()}
            if device.type == "cuda" and (self.plain or implementation != "pytorch") and can_be_captured():
                runs["from a graph"] = captured(run)
            found = {time: {name: value.cpu() for name, value in values.items()} for time, values in runs.items()}
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        wrong = {}
        for time, values in found.items():
            for name, value in values.items():
                if differing := difference(value, expected[name], self.loose.get(name, 0.0)):
                    wrong[f"{name}, {time}"] = differing
        return {"wrong": wrong}


def oracle(implementation: str, device: torch.device) -> Ops:
    """The compiled kernels of the CPU, or for themselves what runs without a kernel."""
    itself = (implementation, device.type) == ("compiled", "cpu")
    return Ops("pytorch" if itself else "compiled", torch.device("cpu"))


def judge(name: str, implementation: str, device: torch.device, small: bool) -> dict:
    """What came out of a case; `wrong` is empty where it is right."""
    torch.manual_seed(zlib.crc32(name.encode()))
    return CASES[name].judge(implementation, device, small)


def moved_to(device: torch.device, value):
    """With its strides, which `to` may change."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def can_be_captured() -> bool:
    """Not without torch's allocator, as a memory check wants it."""
    return os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1"


def captured(run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for value in found.values():
        value.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return found


def difference(found: Tensor, expected: Tensor, loose: float) -> dict:
    """How many elements differ, of how many, and the first; empty where none does. NaN is equal to NaN."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return {"is": f"{found.dtype} {list(found.shape)}", "should be": f"{expected.dtype} {list(expected.shape)}"}
    differs = (found != expected) & ~(found.isnan() & expected.isnan())
    if loose and expected.numel():
        largest = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else 0.0
        differs &= ~((found.double() - expected.double()).abs() <= loose * float(largest))
    if not differs.any():
        return {}
    place = differs.nonzero()[0].tolist()
    return {
        "differ": int(differs.sum()),
        "of": differs.numel(),
        "first at": place,
        "is": found[tuple(place)].item(),
        "should be": expected[tuple(place)].item(),
    }


# Searches


def searches(ops: Ops, x: Tensor, codebook: Tensor, metrics=METRICS[:1], mask: Tensor | None = None) -> dict:
    return {f"indices, {metric}": ops.nearest(x, codebook, mask, metric) for metric in metrics}


def topk(ops: Ops, x: Tensor, codebook: Tensor, k: int) -> dict:
    """Distances too, in the order of the reference on the CPU."""
    indices, distances = ops.nearest_topk(x, codebook, min(k, codebook.shape[-2]))
    return {"indices": indices, "distances": distances}


def prepared(ops: Ops, x: Tensor, codebook: Tensor) -> dict:
    return {"indices": ops.nearest(x, ops.prepare(codebook))}


def statistics(ops: Ops, x: Tensor, codebook: Tensor) -> dict:
    return {"rows": ops.search_statistics(x, codebook).sum()}


def draws(ops: Ops, x: Tensor, codebook: Tensor, temperature: Tensor, seed: Tensor, mask: Tensor | None = None) -> dict:
    return {
        f"indices, {metric}": ops.sample(x, codebook, temperature, seed, mask, metric) for metric in METRICS
    }


def to_draw(build: Callable[[bool], dict], temperature: float, small: bool) -> dict:
    """Rows count across 2^32."""
    return build(small) | {"temperature": torch.tensor(temperature), "seed": torch.tensor([-(2**40), 2**32 - 9])}


def near_codes(N: int, D: int, K: int, small: bool, dtype=torch.float32, codes=torch.float32) -> dict:
    """A third of the rows lies on a code or nearly so."""
    if small:
        N, K = min(N, SMALL), min(K, SMALL)
    x, codebook = torch.randn(N, D), torch.randn(K, D)
    x[: N // 3] = codebook[torch.randint(K, (N // 3,))] + 1e-3 * torch.randn(N // 3, D)
    return {"x": x.to(dtype), "codebook": codebook.to(codes)}


def adversarial(name: str, small: bool) -> dict:
    """Small as they are."""
    return dict(zip(("x", "codebook"), SEARCHES[name](), strict=True))


def of_one_sign(small: bool) -> dict:
    """Every truncation in a tensor core goes the same way; codes in pairs, a few bits apart."""
    N, K = (SMALL, SMALL) if small else (512, 256)
    x, c = 1 + torch.rand(1, N, 64), 1 + torch.rand(1, K, 64)
    return {"x": x - 3, "codebook": torch.cat([c, c * (1 + 2.0**-22 * torch.randint(-4, 5, (1, K, 1)))], 1)}


def one_large_term(small: bool) -> dict:
    """Small products are cut below the last bit of the large one."""
    N, K = (SMALL, SMALL) if small else (512, 256)
    x, c = torch.rand(1, N, 64) * 2.0**-9, torch.rand(1, K, 64) * 2.0**-9
    x[..., 0] = c[..., 0] = 1
    return {"x": x, "codebook": c}


def odd_strides(small: bool) -> dict:
    N = SMALL if small else 300
    x, codebook = torch.randn(40, 2 * N, 3)[:, ::2].permute(2, 1, 0), torch.randn(80, 3, 100).permute(1, 2, 0)[..., ::2]
    return {"x": x, "codebook": codebook, "mask": (torch.rand(3, 2 * N) > 0.4)[:, ::2]}


# The depths of every kernel of the search, the rows with which a block works at each; then few rows, many codes.
DEPTHS = [(4096, D, 3000) for D in (8, 24, 64, 128, 700, 1100, 2000)]
DEPTHS += [(20000, D, 3000) for D in (200, 256, 400, 512)]
FEW = [(1, 64, 3000), (300, 256, 3000), (1, 8, 100_000)]
MANY = [(20000, 64, 100_000)]
DRAWN = [(300, 8, 3000), (4096, 64, 3000), (300, 700, 3000), (1, 64, 3000)]
TOPK = [(300, 8, 3000), (300, 24, 3000), (3000, 64, 3000), (300, 700, 3000)]
RANKED = ("duplicates", "near_ties", "one_code_x_1e15", "not_finite_rows", "not_finite_codes", "integers")
DTYPES = (torch.float16, torch.bfloat16, torch.float64)


def of_searches() -> list[Case]:
    both = partial(searches, metrics=METRICS)
    ranks = {"op": "nearest_topk", "call": partial(topk, k=SEVERAL), "loose": {"distances": 1e-6}}

    def case(name, build, op="nearest", call=searches, **facts):
        return Case(f"{op} {name}", op, build, call, **facts)

    def sized(N, D, K, **facts):
        return case(f"{N} x {D} x {K}", partial(near_codes, N, D, K), **facts)

    found = [case(name, partial(adversarial, name), call=both, plain=False) for name in SEARCHES]
    found.append(case("of one sign", of_one_sign, plain=False))
    found.append(case("one large term", one_large_term, call=both, plain=False))
    found.append(case("odd strides", odd_strides))
    found += [sized(*size) for size in sorted([*FEW, *DEPTHS], key=math.prod)]
    found.append(case("bfloat16 codes", partial(near_codes, 2000, 64, 3000, codes=torch.bfloat16), plain=False))
    found.append(case("prepared", partial(near_codes, 4096, 64, 3000), call=prepared))
    found.append(case("tiers", partial(near_codes, 4096, 64, 3000), call=statistics))
    for dtype in DTYPES:
        name, build = str(dtype).removeprefix("torch."), partial(near_codes, 2000, 64, 3000, dtype=dtype)
        found += [case(name, build, plain=False), case(name, build, plain=False, **ranks)]
    found += [case(name, partial(adversarial, name), plain=False, **ranks) for name in RANKED]
    for name in RANKED:
        build = partial(to_draw, partial(adversarial, name), 0.01)
        found.append(case(name, build, "sample", draws, plain=False))
    found.append(case("odd strides", partial(to_draw, odd_strides, 1.0), "sample", draws))
    for N, D, K in DRAWN:
        build = partial(to_draw, partial(near_codes, N, D, K), 0.5)
        found.append(case(f"{N} x {D} x {K}", build, "sample", draws))
    for dtype in DTYPES:
        build = partial(to_draw, partial(near_codes, 2000, 64, 3000, dtype=dtype), 0.5)
        found.append(case(str(dtype).removeprefix("torch."), build, "sample", draws))
    return found + [sized(*size, **ranks) for size in TOPK] + [sized(*size) for size in MANY]


# The other ops


def quantizes(ops: Ops, metric: str, normalize: bool, **given) -> dict:
    found = ops.quantize(**given, metric=metric, code_sums=True, normalize=normalize)
    return dict(found._asdict())


def sums(ops: Ops, x: Tensor, indices: Tensor, K: int, weight: Tensor | None = None) -> dict:
    return dict(zip(("counts", "sums"), ops.op("code_sums")(x, indices, K, weight), strict=True))


def updates(ops: Ops, size: Tensor, average: Tensor, metric: str, **statistics: Tensor) -> dict:
    """In place, so on copies: of a codebook that is the average."""
    size, average, codes = size.clone(), average.clone(), average.clone()
    ops.ema_update_(size, average, codes, **statistics, metric=metric)
    return {"cluster sizes": size, "averages": average, "codes": codes}


def gradients(ops: Ops, passing: str, metric: str, normalize: bool, g, g_error, x, codebook, indices, mask) -> dict:
    way = metric, passing, 1.0, normalize
    found = ops.op("quantize_backward")(g, g_error, x, codebook, indices, mask, *way, True, True)
    return dict(zip(("gradient of x", "gradient of codes"), found, strict=True))


def levels(ops: Ops, metric: str, **given) -> dict:
    found = ops.residual_quantize(**given, metric=metric, code_sums=True)
    return {**found._asdict(), "counts": torch.cat(found.counts, 1), "sums": torch.cat(found.sums, 1)}


def gradients_of_levels(ops: Ops, passing: str, metric: str, **given) -> dict:
    found = ops.op("residual_quantize_backward")(*given.values(), None, metric, passing, True, 1.0, True, True, True)
    return dict(zip(("gradient of x", "gradient of codes"), found, strict=True))


def to_quantize(dtype: torch.dtype, small: bool) -> dict:
    """Two heads, rows left out, weights. In half precision the codes as well."""
    H, N, D, K = 2, SMALL if small else 5000, 48, 100
    x, codebook = (values.to(dtype) for values in normal(H, N, K, D))
    return {"x": x, "codebook": codebook, "mask": torch.rand(H, N) > 0.1, "weight": torch.rand(H, N)}


def to_sum(dtype: torch.dtype, weighted: bool, small: bool) -> dict:
    N, D, K = SMALL if small else 5000, 67, 300
    indices = torch.randint(-1, K, (1, N))
    indices[:, ::3] = 7  # as a codebook at its start has them
    x = torch.randn(1, N, D).to(dtype)
    return {"x": x, "indices": indices, "K": K, "weight": torch.rand(1, N) if weighted else None}


def to_update(small: bool) -> dict:
    K, D = 300, 48
    before = {"size": 1 + torch.rand(1, K), "average": torch.randn(1, K, D)}
    return before | {"counts": torch.randint(9, (1, K)), "sums": torch.randn(1, K, D), "decay": torch.tensor(0.9)}


def to_turn_back(dtype: torch.dtype, small: bool) -> dict:
    H, N, D, K = 2, SMALL if small else 5000, 64, 300
    x, codebook = (values.to(dtype) for values in normal(H, N, K, D))
    indices, given = torch.randint(-1, K, (H, N)), {"g": torch.randn(H, N, D).to(dtype), "g_error": torch.randn(H, N)}
    return given | {"x": x, "codebook": codebook, "indices": indices, "mask": indices >= 0}


def to_quantize_again(small: bool) -> dict:
    """Four levels of two heads, rows left out."""
    H, N, D, K = 2, SMALL if small else 5000, 48, 100
    x, codebook = normal(H, N, K, D)
    codebooks = torch.stack([codebook.roll(level, 1) / 2**level for level in range(4)])
    return {"x": x, "codebooks": codebooks, "mask": torch.rand(H, N) > 0.1}


def to_turn_back_again(small: bool) -> dict:
    H, N, D, sizes = 2, SMALL if small else 5000, 64, [100, 30, 100]
    x, codebooks = normal(H, N, sum(sizes), D)
    indices = torch.stack([torch.randint(K, (H, N)) for K in sizes], -1)
    given = {"g": torch.randn(H, N, D), "g_error": torch.randn(H, len(sizes)), "x": x, "codebooks": codebooks}
    return given | {"sizes": sizes, "indices": indices, "mask": torch.rand(H, N) > 0.1}


HALVES = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}  # an element in the last bits, relative to the largest
WAYS = {metric: {"metric": metric, "normalize": True} for metric in METRICS}
WAYS["cosine of rows as given"] = {"metric": "cosine", "normalize": False}
# Dtype of rows and codes, and whether sums by code are in one order, or as they come: then they are timed, too.
MODES = [(torch.float32, True), *((dtype, False) for dtype in (torch.float32, *HALVES))]


def of_the_other_ops() -> list[Case]:
    found = []
    for metric in METRICS:
        loose = {"cluster sizes": 1e-6, "averages": 1e-6, "codes": 1e-5}
        found.append(Case(f"ema_update_ {metric}", "ema_update_", to_update, partial(updates, metric=metric), loose))
    for metric, in_order in product(METRICS, (True, False)):
        how = metric if in_order else f"{metric} atomic"
        op, call, loose = "residual_quantize", partial(levels, metric=metric), {"error": 1e-5, "sums": 1e-5}
        found.append(Case(f"{op} {how}", op, to_quantize_again, call, loose, in_order=in_order))
        for passing in ("straight_through", "rotation"):
            op, call = "residual_quantize_backward", partial(gradients_of_levels, passing=passing, metric=metric)
            loose = dict.fromkeys(("gradient of x", "gradient of codes"), 1e-4)
            found.append(Case(f"{op} {passing} {how}", op, to_turn_back_again, call, loose, in_order=in_order))
    for dtype, in_order in MODES:
        mode = str(dtype).removeprefix("torch.") + (" in order" if in_order else " atomic")
        for weighted in (False, True):
            build = partial(to_sum, dtype, weighted)
            loose = {} if in_order else {"sums": 1e-5, "counts": 1e-5 if weighted else 0.0}
            name = f"code_sums {mode}{' weighted' * weighted}"
            found.append(Case(name, "code_sums", build, sums, loose, in_order=in_order))
        for way, on in WAYS.items():
            loose = {"quantized": HALVES.get(dtype, 1e-6), "error": 1e-5, "sums": 1e-5}  # cosine divides by a length
            loose |= {} if in_order else {"counts": 1e-5}
            build, call = partial(to_quantize, dtype), partial(quantizes, **on)
            found.append(Case(f"quantize {way} {mode}", "quantize", build, call, loose, in_order=in_order))
            loose = dict.fromkeys(("gradient of x", "gradient of codes"), HALVES.get(dtype, 1e-4))
            for passing in ("straight_through", "rotation"):
                build, call = partial(to_turn_back, dtype), partial(gradients, passing=passing, **on)
                name = f"quantize_backward {passing} {way} {mode}"
                found.append(Case(name, "quantize_backward", build, call, loose, in_order=in_order))
    return found


CASES: dict[str, Case | Probe] = {case.name: case for case in [*of_the_other_ops(), *PROBES, *of_searches()]}
