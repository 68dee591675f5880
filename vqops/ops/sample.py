"""Codes drawn at random, nearer ones more often: a sample of the softmax over the codebook, without its matrix."""

import torch
from torch import Tensor

from vqops.dispatch.calls import as_given, call
from vqops.dispatch.library import Implementation, define, select, without_gradient
from vqops.ops.checks import FLOATING, Metric, check_device, check_number, check_search, check_shape
from vqops.ops.heads import with_heads
from vqops.ops.search import LARGEST_K


def sample(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor,  # [K, D] or [H, K, D]
    temperature: Tensor | float,  # T; a 0-d tensor where it changes from step to step
    seed: Tensor,  # [2] int64, on the device of x: the key of the noise, and the number of the first row
    mask: Tensor | None = None,  # bool, shape of x without D; False leaves the row out
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> Tensor:  # int64, shape of x without D
    """A code for each vector, drawn with probability softmax_k(l_k / T), where l_k = -|x - c_k|.

    euclidean: argmax_k (-|x - c_k| + T g_k).  cosine: argmax_k (x.c_k / (|x| |c_k|) + T g_k), where a zero code and all
    codes of x = 0 score 0. g_k is Gumbel noise of its own for each row, head and code, from a generator that counts: it
    depends on the seed and on these numbers alone, so two calls with equal seeds draw equally. Rows count from seed[1],
    in the order of x without D, or in each head: sample(x[n:], ..., seed + [0, n]) is sample(x, ..., seed)[n:].

    T is taken as float32. T = 0 is `nearest`; as a tensor, which is not looked at, negative or NaN is 0, too.

    Exact: keys are compared in float64, by a distance, a root and a logarithm of defined bits
    (`vqops.reference.noise`), so every implementation draws the same code; equal keys go to the least distance, then to
    the lowest index. -1 for rows that are masked or hold a NaN or an Inf; a code that is not finite is never drawn. No
    temporary is of size N x K. No gradient. Source: Gumbel 1954; Maddison et al. 2014, "A* sampling".

    Raises ValueError or TypeError where shapes, dtypes or devices disagree, ValueError for a number T below 0.

    Equivalent to, but for the noise:
        logits = -(x[..., None, :] - codebook).norm(dim=-1)
        gumbel = -torch.empty_like(logits).exponential_().log()
        return (logits + temperature * gumbel).argmax(-1)
    """
    temperature = check_draw("sample", x, codebook, temperature, seed, mask, metric)
    heads = with_heads(x, codebook)
    op = select("sample", implementation)
    return heads.rows_back(call(as_given, op, heads.x, heads.codebook, temperature, seed, heads.row(mask), metric))


def sample_topk(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor,  # [K, D] or [H, K, D]
    temperature: Tensor | float,  # T; a 0-d tensor where it changes from step to step
    seed: Tensor,  # [2] int64, on the device of x: the key of the noise, and the number of the first row
    k: int,
    mask: Tensor | None = None,  # bool, shape of x without D
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> Tensor:  # [..., k] int64
    """k different codes for each vector, drawn as `sample` does, one after another without replacement.

    They are those of the k largest keys of `sample`, descending: the first is its code. 1 <= k <= min(K, 32). Places
    that no finite code fills are -1. Source: Kool et al. 2019, "Stochastic beams and where to find them".

    Raises as `sample` does, and ValueError for k out of range.
    """
    temperature = check_draw("sample_topk", x, codebook, temperature, seed, mask, metric)
    if not 1 <= k <= min(codebook.shape[-2], LARGEST_K):
        raise ValueError(f"sample_topk: k must be from 1 to min(K={codebook.shape[-2]}, {LARGEST_K}), got {k}")
    heads = with_heads(x, codebook)
    op = select("sample_topk", implementation)
    return heads.rows_back(call(as_given, op, heads.x, heads.codebook, temperature, seed, k, heads.row(mask), metric))


def check_draw(
    op: str,
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor | float,
    seed: Tensor,
    mask: Tensor | None,
    metric: str,
) -> Tensor:  # the temperature, () float32
    check_search(op, x, codebook, mask, metric)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        given = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"{op}: seed must be an int64 tensor [2], key and offset, got {given}")
    check_shape(op, "seed", seed, (2,), "[key, offset]")
    check_device(op, x, seed=seed)
    if isinstance(temperature, Tensor):
        if temperature.dtype not in FLOATING:
            raise TypeError(f"{op}: temperature must be a number or a floating 0-d tensor, got {temperature.dtype}")
        check_shape(op, "temperature", temperature, (), "of a 0-d tensor")
        check_device(op, x, temperature=temperature)
        return temperature.detach().float()
    check_number(op, "temperature", temperature)
    if not temperature >= 0:
        raise ValueError(f"{op}: temperature must be at least 0, got {temperature}")
    most = torch.finfo(torch.float32).max
    return torch.full((), min(temperature, most), dtype=torch.float32, device=x.device)


def fake_sample(x, codebook, temperature, seed, mask=None, metric="euclidean"):
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def fake_topk(x, codebook, temperature, seed, k, mask=None, metric="euclidean"):
    return x.new_empty((*x.shape[:2], k), dtype=torch.int64)


define(
    "sample",
    "(Tensor x, Tensor codebook, Tensor temperature, Tensor seed, Tensor? mask=None, str metric='euclidean') -> Tensor",
    fake_sample,
    autograd=without_gradient(),
)
define(
    "sample_topk",
    "(Tensor x, Tensor codebook, Tensor temperature, Tensor seed, int k, Tensor? mask=None, str metric='euclidean') "
    "-> Tensor",
    fake_topk,
    autograd=without_gradient(),
)
