"""Calls that are refused: each error names the op and the argument, what was given and what is allowed."""

import re

import pytest
import torch
from promises import UNCHANGED

import vqops

x, c = torch.zeros(5, 4), torch.zeros(3, 4)
heads_x, heads_c = torch.zeros(2, 5, 4), torch.zeros(2, 3, 4)

SEARCHES = {
    "D": ((x, torch.zeros(3, 5)), ValueError, "codebook has D=5, x has D=4"),
    "H": ((heads_x, torch.zeros(3, 3, 4)), ValueError, "codebook has H=3, x has H=2"),
    "x for heads": ((x, heads_c), ValueError, r"x must be \[H, N, D\] for a codebook \[H, K, D\], got \[5, 4\]"),
    "axes of the codebook": ((x, torch.zeros(4)), ValueError, r"codebook must be \[K, D\] or \[H, K, D\], got \[4\]"),
    "K = 0": ((x, torch.zeros(0, 4)), ValueError, r"at least one code of one dimension, got \[0, 4\]"),
    "D = 0": ((torch.zeros(5, 0), torch.zeros(3, 0)), ValueError, r"at least one code of one dimension, got \[3, 0\]"),
    "x without axes": ((torch.zeros(()), c), ValueError, "codebook has D=4, x has no"),
    "x of integers": ((x.long(), c), TypeError, "x must be float32, float64, float16 or bfloat16, got torch.int64"),
    "codebook of integers": ((x, c.int()), TypeError, "codebook must be float32, .*got torch.int32"),
    "x a list": (([[0.0] * 4], c), TypeError, "x must be a tensor, got list"),
    "another device": ((x, c.to("meta")), ValueError, "codebook is on meta, x is on cpu"),
    "mask of floats": ((x, c, torch.ones(5)), TypeError, "mask must be bool, .*got torch.float32"),
    "shape of the mask": (
        (x, c, torch.ones(4, dtype=torch.bool)),
        ValueError,
        r"mask must have shape .*\[5\], got \[4\]",
    ),
    "metric": ((x, c, None, "manhattan"), ValueError, "metric must be one of 'euclidean', 'cosine', got 'manhattan'"),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_soft_codes(case):
    arguments, error, message = SEARCHES[case]
    mask, metric = (*arguments[2:], *(None, "euclidean")[len(arguments) - 2 :])
    with pytest.raises(error, match=f"soft_codes: .*{message}"):
        vqops.soft_codes(*arguments[:2], 1.0, mask, metric)


@pytest.mark.parametrize("case", SEARCHES)
def test_searches(case):
    arguments, error, message = SEARCHES[case]
    arguments = (*arguments, *(None, "euclidean")[len(arguments) - 2 :])
    with pytest.raises(error, match=f"nearest: .*{message}"):
        vqops.nearest(*arguments)
    with pytest.raises(error, match=f"nearest_topk: .*{message}"):
        vqops.nearest_topk(arguments[0], arguments[1], 1, *arguments[2:])
    with pytest.raises(error, match=f"quantize: .*{message}"):
        vqops.quantize(*arguments[:3], None, *arguments[3:])
    with pytest.raises(error, match=f"residual_quantize: .*{message}"):
        vqops.residual_quantize(arguments[0], [arguments[1]], arguments[2], None, arguments[3])
    if arguments[2] is None:
        with pytest.raises(error, match=f"search_statistics: .*{message}"):
            vqops.search_statistics(arguments[0], arguments[1], arguments[3])


OTHERS = {
    "axes of the groups": (
        lambda: vqops.assignment_entropy(x, c, 1.0),
        ValueError,
        r"assignment_entropy: x must be \[G, M, D\] for a codebook \[K, D\], got \[5, 4\]",
    ),
    "axes of the groups of heads": (
        lambda: vqops.assignment_entropy(heads_x, heads_c, 1.0),
        ValueError,
        r"assignment_entropy: x must be \[H, G, M, D\] for a codebook \[H, K, D\], got \[2, 5, 4\]",
    ),
    "D of the groups": (
        lambda: vqops.assignment_entropy(heads_x, torch.zeros(3, 5), 1.0),
        ValueError,
        "assignment_entropy: codebook has D=5, x has D=4",
    ),
    "mask of the groups": (
        lambda: vqops.assignment_entropy(heads_x, c, 1.0, torch.ones(10, dtype=torch.bool)),
        ValueError,
        r"assignment_entropy: mask must have shape .*\[2, 5\], got \[10\]",
    ),
    "inverse temperature of 0": (
        lambda: vqops.assignment_entropy(heads_x, c, 0),
        ValueError,
        "assignment_entropy: inverse_temperature must be positive and finite, got 0",
    ),
    "infinite inverse temperature": (
        lambda: vqops.assignment_entropy(heads_x, c, float("inf")),
        ValueError,
        "inverse_temperature must be positive and finite, got inf",
    ),
    "negative temperature": (
        lambda: vqops.soft_codes(x, c, -1.0),
        ValueError,
        "soft_codes: temperature must be positive and finite, got -1.0",
    ),
    "temperature of nothing": (
        lambda: vqops.soft_codes(x, c, float("nan")),
        ValueError,
        "soft_codes: temperature must be positive and finite, got nan",
    ),
    "temperatures": (
        lambda: vqops.soft_codes(x, c, torch.ones(5)),
        ValueError,
        r"soft_codes: temperature must have shape \(\) = \[\], got \[5\]",
    ),
    "temperature of integers": (
        lambda: vqops.soft_codes(x, c, torch.tensor(1)),
        TypeError,
        "soft_codes: temperature must be float32, .*got torch.int64",
    ),
    "temperature elsewhere": (
        lambda: vqops.soft_codes(x, c, torch.ones((), device="meta")),
        ValueError,
        "soft_codes: temperature is on meta, x is on cpu",
    ),
    "k of 0": (
        lambda: vqops.nearest_topk(x, c, 0),
        ValueError,
        r"nearest_topk: k must be from 1 to min\(K=3, 32\), got 0",
    ),
    "k above K": (lambda: vqops.nearest_topk(x, c, 4), ValueError, r"k must be from 1 to min\(K=3, 32\), got 4"),
    "gradient": (lambda: vqops.quantize(x, c, gradient="ste"), ValueError, "gradient must be one of .*got 'ste'"),
    "no level": (
        lambda: vqops.residual_quantize(x, []),
        ValueError,
        "residual_quantize: codebooks must have from 1 to 64 levels, got 0",
    ),
    "one codebook for all levels": (
        lambda: vqops.residual_quantize(x, c),
        ValueError,
        r"residual_quantize: codebooks must be \[Q, K, D\] or a list of codebooks, got \[3, 4\]",
    ),
    "a preparation for all levels": (
        lambda: vqops.residual_quantize(x, vqops.prepare(c)),
        TypeError,
        r"codebooks must be a tensor \[Q, K, D\] or a list of codebooks, got PreparedCodebook",
    ),
    "D of a level": (
        lambda: vqops.residual_quantize(x, [c, torch.zeros(3, 5)]),
        ValueError,
        "residual_quantize: codebook has D=5, x has D=4",
    ),
    "dtypes of levels": (
        lambda: vqops.residual_quantize(x, [c, c.double()]),
        ValueError,
        r"one dtype and number of axes, got torch.float32 \[3, 4\] for level 0, torch.float64 \[3, 4\] for level 1",
    ),
    "axes of levels": (
        lambda: vqops.residual_quantize(heads_x, [heads_c, c]),
        ValueError,
        r"one dtype and number of axes, got torch.float32 \[2, 3, 4\] for level 0, torch.float32 \[3, 4\] for level 1",
    ),
    "more levels than codebooks": (
        lambda: vqops.residual_quantize(x, [c], levels=2),
        ValueError,
        "residual_quantize: levels must be from 0 to the number of codebooks, 1, got 2",
    ),
    "negative levels": (lambda: vqops.residual_quantize(x, [c], levels=-1), ValueError, "levels must be from .*got -1"),
    "levels of floats": (
        lambda: vqops.residual_quantize(x, [c], levels=1.0),
        TypeError,
        "levels must be an int or an int64 tensor, got float",
    ),
    "a tensor of float levels": (
        lambda: vqops.residual_quantize(x, [c], levels=torch.ones(())),
        TypeError,
        "levels must be an int or an int64 tensor, got torch.float32",
    ),
    "several levels": (
        lambda: vqops.residual_quantize(x, [c], levels=torch.ones(2, dtype=torch.int64)),
        ValueError,
        r"residual_quantize: levels must have shape \(\) = \[\], got \[2\]",
    ),
    "levels elsewhere": (
        lambda: vqops.residual_quantize(x, [c], levels=torch.ones((), dtype=torch.int64, device="meta")),
        ValueError,
        "residual_quantize: levels is on meta, x is on cpu",
    ),
    "gradient of levels": (
        lambda: vqops.residual_quantize(x, [c], gradient="ste"),
        ValueError,
        "residual_quantize: gradient must be one of .*got 'ste'",
    ),
    "shape of the weight": (
        lambda: vqops.quantize(x, c, weight=torch.ones(4)),
        ValueError,
        r"quantize: weight must have shape .*\[5\], got \[4\]",
    ),
    "prepared metric": (lambda: vqops.prepare(c, "l2"), ValueError, "prepare: metric must be one of .*got 'l2'"),
    "indices of floats": (
        lambda: vqops.code_sums(x, torch.zeros(5), 3),
        TypeError,
        "indices must be int64, got torch.float32",
    ),
    "shape of the indices": (
        lambda: vqops.code_sums(x, torch.zeros(4, dtype=torch.int64), 3),
        ValueError,
        r"indices must have shape .*\[5\], got \[4\]",
    ),
    "index above": (
        lambda: vqops.code_sums(x, torch.full((5,), 3), 3),
        IndexError,
        r"indices must be -1 or a code in \[0, 3\), got values from 3 to 3",
    ),
    "index below": (lambda: vqops.code_sums(x, torch.full((5,), -2), 3), IndexError, "got values from -2 to -2"),
    "no codes": (
        lambda: vqops.code_sums(x, torch.full((5,), -1), 0),
        ValueError,
        "num_codes must be at least 1, got 0",
    ),
    "heads without heads": (
        lambda: vqops.code_sums(x, torch.zeros(5, dtype=torch.int64), 3, heads=True),
        ValueError,
        r"x must be \[H, N, D\] with heads=True, got \[5, 4\]",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_arguments(case):
    call, error, message = OTHERS[case]
    with pytest.raises(error, match=message):
        call()


def ema_arguments(**changes):
    given = {
        "cluster_size": torch.ones(1, 3),
        "embed_avg": torch.ones(1, 3, 2),
        "embed": torch.ones(1, 3, 2),
        "counts": torch.zeros(1, 3),
        "sums": torch.zeros(1, 3, 2),
        "decay": 0.5,
    }
    return given | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"cluster_size": torch.ones(1, 3).double()}, TypeError, "cluster_size must be float32, got torch.float64"),
        ({"embed": torch.ones(1, 3, 2).bfloat16()}, TypeError, "embed must be float32, got torch.bfloat16"),
        ({"embed_avg": torch.ones(3, 2)}, ValueError, r"embed_avg must be \[H, K, D\], got \[3, 2\]"),
        ({"sums": torch.ones(1, 3, 1)}, ValueError, r"sums must have shape .*\[1, 3, 2\], got \[1, 3, 1\]"),
        ({"counts": torch.ones(1, 4)}, ValueError, r"counts must have shape .*\[1, 3\], got \[1, 4\]"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape .*\[1, 3\], got \[3\]"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
        ({"decay": torch.tensor(0.5).double()}, TypeError, "decay must be a number or .*got torch.float64"),
        ({"decay": torch.ones(1)}, TypeError, r"decay must be a number or .*got torch.float32 \[1\]"),
        # From a CPU to a GPU it would be a copy that the host waits for, which no CUDA graph may hold.
        ({"decay": torch.tensor(0.5, device="meta")}, ValueError, "decay is on meta"),
        ({"embed_avg": torch.ones(2).expand(1, 3, 2)}, ValueError, "embed_avg is expanded, so its elements share"),
        ({"metric": "l2"}, ValueError, "metric must be one of .*got 'l2'"),
        ({"sums": torch.ones(1, 3, 2, device="meta")}, ValueError, "sums is on meta"),
    ],
)
def test_a_refused_update_changes_nothing(changes, error, message):
    given = ema_arguments(**changes)
    before = {
        name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor) and not value.is_meta
    }
    with pytest.raises(error, match=f"ema_update_: .*{message}"):
        vqops.ema_update_(**given)
    UNCHANGED.same({name: given[name] for name in before}, before)


def test_compiled_kernels_check_for_themselves():
    """The raw ops have no Python checks before them: what would read out of bounds is refused in C++."""
    ops = torch.ops.vqops
    rows = torch.zeros(1, 5, 4)
    for wrong in (
        lambda: ops.nearest(rows, torch.zeros(1, 3, 5)),
        lambda: ops.nearest(rows[0], torch.zeros(3, 4)),
        lambda: ops.nearest(rows, torch.zeros(1, 0, 4)),
        lambda: ops.nearest(rows, torch.zeros(1, 3, 4), torch.ones(1, 4, dtype=torch.bool)),
        lambda: ops.nearest_topk(rows, torch.zeros(1, 3, 4), 4),
        lambda: ops.sample(rows, torch.zeros(1, 3, 4), torch.ones(()), torch.zeros(1, dtype=torch.int64)),
        lambda: ops.sample(rows, torch.zeros(1, 3, 4), torch.ones(2), torch.zeros(2, dtype=torch.int64)),
        lambda: ops.code_sums(rows, torch.full((1, 5), 3), 3),
        lambda: ops.nearest(rows, torch.zeros(1, 3, 4), None, "euclidean", torch.zeros(8, dtype=torch.uint8)),
        lambda: ops.nearest(rows.long(), torch.zeros(1, 3, 4)),
        lambda: ops.residual_quantize(rows, []),
        lambda: ops.residual_quantize(rows, [torch.zeros(1, 3, 4), torch.zeros(1, 3, 5)]),
        lambda: ops.residual_quantize(rows, [torch.zeros(1, 3, 4), torch.zeros(1, 3, 4).double()]),
        lambda: ops.residual_quantize(rows, [torch.zeros(1, 3, 4)], None, torch.ones(())),
        lambda: ops.residual_quantize(rows.repeat(1, 50, 1), [torch.zeros(1, 3, 4)], prepared=[torch.zeros(8).byte()]),
        lambda: ops.residual_quantize(rows, [torch.zeros(1, 3, 4)], prepared=[]),
        lambda: ops.residual_quantize_backward(rows, None, rows, rows, [4], torch.zeros(1, 5, 1).long()),
        lambda: ops.residual_quantize_backward(rows, None, rows, rows, [5], torch.full((1, 5, 1), 5)),
        lambda: ops.residual_quantize_backward(rows, None, rows, rows, [5], torch.zeros(1, 5, 2).long()),
        lambda: ops.residual_quantize_backward(rows[:, :4], None, rows, rows, [5], torch.zeros(1, 5, 1).long()),
        lambda: ops.residual_quantize_backward(None, rows, rows, rows, [5], torch.zeros(1, 5, 1).long()),
    ):
        with pytest.raises(RuntimeError) as refused:
            wrong()
        assert not re.search(r"/csrc/", str(refused.value)), "a file of the build, where a name within csrc is enough"
