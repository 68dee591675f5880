"""`python -m benchmarks.cpu`: search, statistics and training step on one CPU thread, beside every peer installed here.

Writes benchmarks/results/<device>/cpu.jsonl. A method whose indices are wrong is still timed; its row counts them.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import vqops
from benchmarks.rows import Writer, processor, summary
from benchmarks.timing import interleaved, ratio

SEARCH = [(65536, 64, 1024), (32768, 128, 1024), (4096, 256, 8192), (8192, 8, 16384)]
SMALL = [(1, 128, 1024), (16, 8, 16384), (32, 256, 65536)]
STEP = [(32768, 64, 512), (32768, 128, 1024)]
GEMM = 2048


def addmm(x: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    return torch.addmm(half_squares, x, codebook.mT, alpha=-1).argmin(1)


def search_methods(x: Tensor, codebook: Tensor) -> dict[str, Callable[[], Tensor]]:
    half_squares = codebook.square().sum(1) / 2
    methods = {
        "vqops": partial(vqops.nearest, x, codebook),
        "addmm + argmin": partial(addmm, x, codebook, half_squares),
        "cdist + argmin": lambda: torch.cdist(x, codebook).argmin(1),
    }
    try:
        import faiss
    except ImportError:
        print("faiss-cpu is not installed: left out")
        return methods
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    methods["faiss IndexFlatL2"] = lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    return methods


def search(writer: Writer, rounds: int) -> None:
    a, b, product = (torch.randn(GEMM, GEMM) for _ in range(3))
    for N, D, K in SEARCH + SMALL:
        x, codebook = torch.randn(N, D), torch.randn(K, D)
        methods = search_methods(x, codebook)
        exact = vqops.nearest(x[:256], codebook, implementation="reference")
        wrong = {name: int((method()[:256] != exact).sum()) for name, method in methods.items()}
        methods["sgemm"] = lambda: torch.mm(a, b, out=product)
        seconds = interleaved(methods, rounds)
        share = ratio([N * D * K / s for s in seconds["vqops"]], [GEMM**3 / s for s in seconds["sgemm"]])
        for name in methods:
            operations = 2 * GEMM**3 if name == "sgemm" else 2 * N * D * K
            row = {"op": "nearest", "method": name, "N": N, "D": D, "K": K, "dtype": "float32", **summary(seconds[name])}
            row["gflops"] = round(operations / row["p50_ms"] / 1e6, 2)
            row["times_vqops"] = round(ratio(seconds[name], seconds["vqops"]), 3)
            if name != "sgemm":
                row["wrong_of_256"] = wrong[name]
            if name == "vqops":
                row["share_of_sgemm"] = round(share, 3)
            writer.write(row)
            print(row)


def index_add_sums(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    return torch.bincount(indices, minlength=K), torch.zeros(K, x.shape[1]).index_add_(0, indices, x)


def statistics(writer: Writer, rounds: int) -> None:
    N, D, K = 65536, 64, 1024
    x, indices = torch.randn(N, D), torch.randint(K, (N,))
    methods = {
        "vqops": partial(vqops.code_sums, x, indices, K),
        "bincount + index_add_": partial(index_add_sums, x, indices, K),
    }
    torch.testing.assert_close(methods["vqops"](), methods["bincount + index_add_"]())
    seconds = interleaved(methods, 5 * rounds)
    for name in methods:
        row = {"op": "code_sums", "method": name, "N": N, "D": D, "K": K, "dtype": "float32", **summary(seconds[name])}
        row["times_vqops"] = round(ratio(seconds[name], seconds["vqops"]), 3)
        writer.write(row)
        print(row)


def naive_step(x: Tensor, g: Tensor, codebook: Tensor, size: Tensor, average: Tensor) -> None:
    """A training step as papers' code has it: cdist, straight-through, index_add_."""
    x.grad = None
    indices = torch.cdist(x.detach(), codebook).argmin(1)
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


def step(writer: Writer, rounds: int) -> None:
    for N, D, K in STEP:
        x, g = torch.randn(1, N, D, requires_grad=True), torch.randn(1, N, D)
        ours = vqops.VectorQuantize(D, K, rotation_trick=False)
        state = [t[0].clone() for t in (ours._codebook.embed, ours._codebook.cluster_size, ours._codebook.embed_avg)]
        flat = x.detach()[0].requires_grad_()
        methods = {"vqops": partial(module_step, ours, x, g), "naive": partial(naive_step, flat, g[0], *state)}
        try:
            from vector_quantize_pytorch import VectorQuantize

            incumbent = VectorQuantize(D, K, rotation_trick=False)
            incumbent.load_state_dict(ours.state_dict())
            for expected, found in zip(incumbent(x), ours(x), strict=True):
                torch.testing.assert_close(found, expected)
            methods["vector-quantize-pytorch"] = partial(module_step, incumbent, x, g)
        except ImportError:
            print("vector-quantize-pytorch is not installed: left out")
        seconds = interleaved(methods, rounds)
        for name in methods:
            row = {"op": "training step", "method": name, "N": N, "D": D, "K": K, "dtype": "float32"}
            row |= {**summary(seconds[name]), "times_vqops": round(ratio(seconds[name], seconds["vqops"]), 3)}
            writer.write(row)
            print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = re.sub(r"\W+", "-", processor().lower()).strip("-")
    writer = Writer(options.out or Path(__file__).parent / "results" / folder / "cpu.jsonl")
    for stage in (search, statistics, step):
        stage(writer, options.rounds)


if __name__ == "__main__":
    main()
