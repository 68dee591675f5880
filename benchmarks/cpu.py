"""`python -m benchmarks.cpu`: search, statistics and training step on one CPU thread, beside every peer installed here.

Writes benchmarks/results/<device>/cpu.jsonl. Each row has the ceilings of its own run: the rate of torch's float32
GEMM, of multiply-adds without loads (in the arithmetic that the kernels screen in) and of a copy. A method whose
indices are wrong is still timed; its row counts them.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import vqops
from benchmarks.rows import Writer, processor, summary
from benchmarks.timing import interleaved, ratio
from vqops import _C

SEARCH = [(65536, 64, 1024), (32768, 128, 1024), (4096, 256, 8192), (8192, 8, 16384)]
SMALL = [(1, 128, 1024), (16, 8, 16384), (32, 256, 65536)]
GROWTH = [(8192, 64, 1024), (16384, 64, 1024), (8192, 128, 1024), (8192, 64, 2048)]
SUMS = [(65536, 64, 1024)]
STEP = [(32768, 64, 512), (32768, 128, 1024)]
GEMM = 2048
COPY = 2**26  # bytes: more than the last cache holds

Methods = dict[str, Callable[[], object]]


def addmm(x: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    return torch.addmm(half_squares, x, codebook.mT, alpha=-1).argmin(1)


def faiss_search(codebook: Tensor) -> Callable[[Tensor], Tensor] | None:
    try:
        import faiss
    except ImportError:
        print("faiss-cpu is not installed: left out")
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda x: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def search_methods(N: int, D: int, K: int) -> Methods:
    x, codebook = torch.randn(N, D), torch.randn(K, D)
    half_squares = codebook.square().sum(1) / 2
    methods = {
        "vqops": partial(vqops.nearest, x, codebook),
        "addmm + argmin": partial(addmm, x, codebook, half_squares),
        "cdist + argmin": lambda: torch.cdist(x, codebook).argmin(1),
    }
    if faiss := faiss_search(codebook):
        methods["faiss IndexFlatL2"] = partial(faiss, x)
    return methods


def wrong_rows(methods: Methods, x: Tensor, codebook: Tensor) -> dict[str, int]:
    exact = vqops.nearest(x[:256], codebook, implementation="reference")
    return {name: int((method()[:256] != exact).sum()) for name, method in methods.items()}


def index_add_sums(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    return torch.bincount(indices, minlength=K), torch.zeros(K, x.shape[1]).index_add_(0, indices, x)


def sums_methods(N: int, D: int, K: int) -> Methods:
    x, indices = torch.randn(N, D), torch.randint(K, (N,))
    methods = {
        "vqops": partial(vqops.code_sums, x, indices, K),
        "bincount + index_add_": partial(index_add_sums, x, indices, K),
    }
    torch.testing.assert_close(*(method() for method in methods.values()))
    return methods


def expanded(x: Tensor, codebook: Tensor) -> Tensor:
    """|x|^2 - 2 x.c + |c|^2 as most code has it, after the first VQ-VAE's."""
    return (x.square().sum(1, keepdim=True) - 2 * x @ codebook.mT + codebook.square().sum(1)).argmin(1)


def naive_step(search: Callable, x: Tensor, g: Tensor, codebook: Tensor, size: Tensor, average: Tensor) -> None:
    """A training step of plain PyTorch: distances, straight-through, index_add_, EMA, backward."""
    x.grad = None
    indices = search(x.detach(), codebook)
    chosen = codebook[indices]
    loss = (x - chosen).square().mean()
    quantized = x + (chosen - x).detach()
    with torch.no_grad():
        counts, sums = index_add_sums(x, indices, codebook.shape[0])
        size.lerp_(counts.float(), 0.2)
        average.lerp_(sums, 0.2)
        total = size.sum()
        codebook.copy_(average / ((size + 1e-5) / (total + size.numel() * 1e-5) * total)[:, None])
    torch.autograd.backward([quantized, loss], [g, None])


def module_step(module: torch.nn.Module, x: Tensor, g: Tensor) -> None:
    x.grad = None
    quantized, _, loss = module(x)
    torch.autograd.backward([quantized, loss], [g, None])


def step_methods(N: int, D: int, K: int) -> Methods:
    x, g = torch.randn(1, N, D, requires_grad=True), torch.randn(1, N, D)
    ours = vqops.VectorQuantize(D, K, rotation_trick=False)
    state = [t[0].clone() for t in (ours._codebook.embed, ours._codebook.cluster_size, ours._codebook.embed_avg)]
    flat = x.detach()[0].clone().requires_grad_()
    methods = {
        "vqops": partial(module_step, ours, x, g),
        "naive": partial(naive_step, expanded, flat, g[0], *map(torch.clone, state)),
        "naive, cdist": partial(
            naive_step, lambda x, c: torch.cdist(x, c).argmin(1), flat, g[0], *map(torch.clone, state)
        ),
    }
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        print("vector-quantize-pytorch is not installed: left out")
        return methods
    incumbent = VectorQuantize(D, K, rotation_trick=False)
    incumbent.load_state_dict(ours.state_dict())
    check_step(ours, incumbent, x)
    methods["vector-quantize-pytorch"] = partial(module_step, incumbent, x, g)
    return methods


def check_step(ours: torch.nn.Module, incumbent: torch.nn.Module, x: Tensor) -> None:
    """One step of both: where the incumbent's float32 search takes another code, ours is at least as near."""
    codebook = ours.codebook.clone()
    (quantized, indices, loss), (theirs, other, other_loss) = ours(x), incumbent(x)
    same = indices == other
    assert same.float().mean() > 0.999
    torch.testing.assert_close(quantized[same], theirs[same])
    torch.testing.assert_close(loss, other_loss)
    ours_cost, their_cost = ((x.double() - codebook[i].double()).square().sum(-1) for i in (indices, other))
    assert (ours_cost <= their_cost).all()


TABLES = {
    "nearest": (search_methods, SEARCH + SMALL + GROWTH),
    "code_sums": (sums_methods, SUMS),
    "training step": (step_methods, STEP),
}


class Ceilings:
    """What the machine allows, to be timed among the methods."""

    def __init__(self):
        self.a, self.b, self.product = (torch.randn(GEMM, GEMM) for _ in range(3))
        self.source = torch.empty(COPY // 4)
        self.target = torch.empty_like(self.source)

    def sgemm(self) -> None:
        torch.mm(self.a, self.b, out=self.product)

    def copy(self) -> None:
        self.target.copy_(self.source)

    @staticmethod
    def of(seconds: dict[str, list[float]]) -> dict:
        return {
            "sgemm_gflops": round(2 * GEMM**3 / median(seconds["sgemm"]) / 1e9, 1),
            "multiply_add_gflops": round(2 * _C.multiply_add_rate() / 1e9, 1),
            "copy_gb_per_s": round(2 * COPY / median(seconds["copy"]) / 1e9, 1),
        }


def measure(writer: Writer, op: str, shape: tuple[int, int, int], rounds: int, ceilings: Ceilings) -> None:
    (N, D, K), (make, _) = shape, TABLES[op]
    methods = make(N, D, K)
    wrong = {}
    if op == "nearest":
        wrong = wrong_rows(methods, *methods["vqops"].args)
    # A GEMM between short methods would leave them a cold cache; a long one it can't disturb.
    together = op == "nearest" and N * D * K > 1e8
    seconds = interleaved({**methods, "sgemm": ceilings.sgemm} if together else methods, rounds)
    seconds = {**interleaved({"sgemm": ceilings.sgemm, "copy": ceilings.copy}, 5), **seconds}
    limits = Ceilings.of(seconds)
    for name in methods:
        row = {"op": op, "method": name, "N": N, "D": D, "K": K, "dtype": "float32", **summary(seconds[name])}
        row["times_vqops"] = round(ratio(seconds[name], seconds["vqops"]), 3)
        if op == "nearest":
            row["gflops"] = round(2 * N * D * K / median(seconds[name]) / 1e9, 2)
            if together:
                row["of_sgemm"] = round(N * D * K / GEMM**3 * ratio(seconds["sgemm"], seconds[name]), 3)
            row["wrong_of_256"] = wrong[name]
        row |= limits
        writer.write(row)
        print({key: row[key] for key in row if key not in ("dtype",)}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ops", nargs="*", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = re.sub(r"\W+", "-", processor().lower()).strip("-")
    writer = Writer(options.out or Path(__file__).parent / "results" / folder / "cpu.jsonl")
    ceilings = Ceilings()
    for op in options.ops:
        for N, D, K in TABLES[op][1]:
            rounds = options.rounds * (5 if N * D * K < 1e7 or op == "code_sums" else 1)  # what is short varies more
            measure(writer, op, (N, D, K), rounds, ceilings)


if __name__ == "__main__":
    main()
