"""The peers that vqops is compared with, as functions of the same arguments. Importing this imports no peer.

Every search takes x [N, D], codebook [K, D] and returns indices [N] int64. `peers` of a name come as functions that
prepare what their library lets a user keep between calls (an index, a compiled graph) and return the call to be timed;
they raise Unavailable with the reason where a peer cannot run here.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]
SCORES = 2**28  # of plain PyTorch at a time: 1 GB, beyond all that is measured on a CPU


class Unavailable(Exception):
    """A peer that cannot run here; the text says why."""


def imported(module: str, package: str):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise Unavailable(f"{package} is not installed") from None


def compiled(function: Callable) -> Callable:
    """One graph for exactly these sizes, as a user gets it who calls torch.compile on a step of fixed shape."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no pool of workers that outlives the measurement
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def with_threads(call: Call) -> Call:
    """For libraries with a thread pool of their own: as many threads as torch uses here."""
    limits = imported("threadpoolctl", "threadpoolctl").ThreadpoolController()

    def limited():
        with limits.limit(limits=torch.get_num_threads()):
            return call()

    return limited


def tensor_float_32(call: Call) -> Call:
    """The call with float32 matrix products whose inputs may be rounded to TF32."""

    def rounding():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return rounding


# Search


def in_parts(search: Callable[[Tensor], Tensor], x: Tensor, K: int) -> Tensor:
    """A search of so many rows at a time that SCORES hold their distances."""
    parts = x.split(max(1, SCORES // K))
    return search(x) if len(parts) == 1 else torch.cat([search(rows) for rows in parts])


def cdist_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return in_parts(lambda rows: torch.cdist(rows, codebook).argmin(1), x, len(codebook))


def gumbel_argmax(x: Tensor, codebook: Tensor, temperature: Tensor) -> Tensor:
    def draw(rows: Tensor) -> Tensor:
        logits = -torch.cdist(rows, codebook)
        return (logits / temperature - torch.empty_like(logits).exponential_().log()).argmax(1)

    return in_parts(draw, x, len(codebook))


def scores(x: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    """|c|^2 / 2 - x.c: the fastest plain form."""
    return torch.addmm(half_squares, x, codebook.mT, alpha=-1)


def addmm_argmin(x: Tensor, codebook: Tensor, half_squares: Tensor) -> Tensor:
    return in_parts(lambda rows: scores(rows, codebook, half_squares).argmin(1), x, len(codebook))


def addmm_topk(x: Tensor, codebook: Tensor, half_squares: Tensor, k: int) -> Tensor:
    return in_parts(lambda rows: scores(rows, codebook, half_squares).topk(k, largest=False)[1], x, len(codebook))


def half_squares(codebook: Tensor) -> Tensor:  # [K]
    return codebook.square().sum(1) / 2


def prepare_addmm(x: Tensor, codebook: Tensor) -> Call:
    return partial(addmm_argmin, x, codebook, half_squares(codebook))


def prepare_tf32(x: Tensor, codebook: Tensor) -> Call:
    if x.device.type != "cuda" or x.dtype != torch.float32:
        raise Unavailable("TF32 takes float32 on a GPU")
    return tensor_float_32(prepare_addmm(x, codebook))


def prepare_cdist(x: Tensor, codebook: Tensor) -> Call:
    if x.dtype not in (torch.float32, torch.float64) and x.device.type == "cpu":
        raise Unavailable(f"torch.cdist takes no {x.dtype} on the CPU")
    return partial(cdist_argmin, x, codebook)


def prepare_compiled_search(x: Tensor, codebook: Tensor) -> Call:
    return partial(compiled(addmm_argmin), x, codebook, half_squares(codebook))


def prepare_faiss(x: Tensor, codebook: Tensor) -> Call:
    faiss = imported("faiss", "faiss-cpu")
    float32_on_cpu("faiss-cpu", x)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def prepare_sklearn(x: Tensor, codebook: Tensor) -> Call:
    metrics = imported("sklearn.metrics", "scikit-learn")
    float32_on_cpu("scikit-learn", x)
    a, b = x.numpy(), codebook.numpy()
    return with_threads(lambda: torch.from_numpy(metrics.pairwise_distances_argmin(a, b)))


def prepare_incumbent_search(x: Tensor, codebook: Tensor) -> Call:
    module = incumbent(codebook)
    module._codebook.embed.copy_(codebook[None])
    module.eval()

    @torch.no_grad()
    def call():
        return module(x[None])[1][0]

    return call


def prepare_flash_kmeans(x: Tensor, codebook: Tensor) -> Call:
    if x.device.type != "cuda":
        raise Unavailable("flash-kmeans needs a GPU")
    assign = imported("flash_kmeans.assign_euclid_triton", "flash-kmeans").euclid_assign_triton
    squares = {"x_sq": x.float().square().sum(-1)[None]} if "x_sq" in inspect.signature(assign).parameters else {}
    return lambda: assign(x[None], codebook[None], **squares)[0].long()


def float32_on_cpu(package: str, x: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise Unavailable(f"{package} takes float32 on the CPU")


SEARCH = {
    "addmm + argmin": prepare_addmm,
    "addmm + argmin, TF32": prepare_tf32,
    "cdist + argmin": prepare_cdist,
    "torch.compile of addmm + argmin": prepare_compiled_search,
    "faiss IndexFlatL2": prepare_faiss,
    "scikit-learn": prepare_sklearn,
    "vector-quantize-pytorch": prepare_incumbent_search,
    "flash-kmeans": prepare_flash_kmeans,
}


# Counts and sums of the codes: x [N, D], indices [N] to counts [K], sums [K, D]


def index_add_sums(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(K, x.shape[1], device=x.device).index_add_(0, indices, x.float())
    if not x.is_cuda:
        return torch.bincount(indices, minlength=K), sums
    counts = torch.zeros(K, device=x.device, dtype=torch.int64)  # bincount waits for the device
    return counts.index_add_(0, indices, torch.ones_like(indices)), sums


def one_hot_sums(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    one_hot = F.one_hot(indices, K).float()
    return one_hot.sum(0), one_hot.mT @ x.float()


SUMS = {
    "bincount + index_add_": lambda x, indices, K: partial(index_add_sums, x, indices, K),
    "one-hot product": lambda x, indices, K: partial(one_hot_sums, x, indices, K),
    "torch.compile of one-hot product": lambda x, indices, K: partial(compiled(one_hot_sums), x, indices, K),
}


# The averages, the codebook they give, and a whole training step


def ema_update(size: Tensor, average: Tensor, embed: Tensor, counts: Tensor, sums: Tensor, decay: float) -> None:
    size.lerp_(counts.to(size.dtype), 1 - decay)
    average.lerp_(sums, 1 - decay)
    total = size.sum()
    embed.copy_(average / ((size + 1e-5) / (total + size.numel() * 1e-5) * total)[:, None])


def straight_through(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized values whose gradient passes to x as it is, and the commitment loss."""
    return x + (chosen - x).detach(), (x - chosen).square().mean()


def naive_forward(x: Tensor, size: Tensor, average: Tensor, embed: Tensor, decay: float, sums_of: Callable):
    """A training step as papers' code has it, up to the gradients."""
    with torch.no_grad():
        indices = cdist_argmin(x, embed)
        chosen = embed[indices]
    quantized, loss = straight_through(x, chosen)
    with torch.no_grad():
        ema_update(size, average, embed, *sums_of(x, indices, embed.shape[0]), decay)
    return quantized, indices, loss


def naive_step(
    x: Tensor, grad: Tensor, state: tuple[Tensor, ...], decay: float, sums_of: Callable, forward=naive_forward
):
    x.grad = None
    quantized, indices, loss = forward(x, *state, decay, sums_of)
    torch.autograd.backward([quantized, loss], [grad, None])
    return quantized, indices, loss


def module_step(module: torch.nn.Module, x: Tensor, grad: Tensor):
    x.grad = None
    quantized, indices, loss = module(x[None])
    torch.autograd.backward([quantized, loss], [grad[None], None])
    return quantized[0], indices[0], loss


def incumbent(codebook: Tensor, **options) -> torch.nn.Module:
    package = imported("vector_quantize_pytorch", "vector-quantize-pytorch")
    K, D = codebook.shape
    return package.VectorQuantize(D, K, **options).to(codebook.device)


STEPS = ("PyTorch, index_add_", "PyTorch, one-hot", "torch.compile of PyTorch, one-hot", "vector-quantize-pytorch")


def training_steps(x: Tensor, codebook: Tensor, grad: Tensor, decay: float) -> dict[str, Callable[[], Call]]:
    """Per peer, what makes a training step of its own copy of the same state: counts 1, averages = the codes."""

    def state():
        return torch.ones(len(codebook), device=x.device), codebook.clone(), codebook.clone()

    def naive(sums_of, forward=naive_forward):
        return partial(naive_step, leaf(x), grad, state(), decay, sums_of, forward)

    def module():
        quantizer = incumbent(codebook, decay=decay, rotation_trick=False)
        load_codes(quantizer, codebook)
        return partial(module_step, quantizer, leaf(x), grad)

    makers = (
        lambda: naive(index_add_sums),
        lambda: naive(one_hot_sums),
        lambda: naive(one_hot_sums, compiled(naive_forward)),
        module,
    )
    return dict(zip(STEPS, makers, strict=True))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@torch.no_grad()
def load_codes(quantizer: torch.nn.Module, codebook: Tensor) -> None:
    """The same for vqops and vector-quantize-pytorch, whose buffers have the same names."""
    state = quantizer.state_dict()
    state["_codebook.embed"].copy_(codebook[None])
    state["_codebook.embed_avg"].copy_(codebook[None])
    state["_codebook.cluster_size"].fill_(1)


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
