"""Which implementation an op takes on CUDA: the table, what it must rest on, and how it decides."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import vqops._C as _C
from promises import COPIES, INDICES
from torch.fx.experimental.symbolic_shapes import ShapeEnv, has_free_unbacked_symbols

import vqops
from vqops import info, reference, triton_kernels
from vqops.dispatch import choice, library
from vqops.dispatch.choice import ANY, ON_CUDA, Call, Regime, choose
from vqops.triton_kernels.layout import packed_bytes

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
WITHOUT_ROWS = ("prepare", "ema_update_")
# The benchmark that shows an op, where it has none of its own name.
SHOWN_BY = {"prepare": "nearest", "search_statistics": "nearest", "quantize": "training step"}
ops = torch.ops.vqops
GPU = "NVIDIA H200"


# What a row must rest on


def unproven(row: Regime, results: Path = RESULTS) -> str | None:
    """Why a row may not stand in the table, or None."""
    if row.op not in library.OPS or row.implementation not in library.IMPLEMENTATIONS:
        return "no such op or implementation"
    if row.op in WITHOUT_ROWS and row.N != ANY:
        return f"{row.op} has no rows to count"
    folder = results / row.results
    if not folder.is_dir():
        return f"there is no {folder}"
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    if not any(line.get("stage") == "test" and line.get("outcome") == "passed" for line in lines):
        return "the tests have not passed there"
    shown = [line for line in lines if line.get("op") == SHOWN_BY.get(row.op, row.op)]
    shown = [line for line in shown if row.holds(measured(line)) and line["method"].startswith("vqops ")]
    ours = [line for line in shown if line["method"] == f"vqops {row.implementation}"]
    if not ours:
        return "nothing in the regime has been measured"
    for line in ours:
        if "failed" in line or line.get("wrong"):
            return f"it was wrong: {line}"
        rivals = (other["p50_ms"] for other in shown if key(other) == key(line) and "p50_ms" in other)
        if line["p50_ms"] > min(rivals):
            return f"it was not the fastest: {line}"
    return None


def measured(line: dict) -> Call:
    return Call(line["D"], line["K"], line["N"], (getattr(torch, line["dtype"]),), line["device"])


def key(line: dict) -> list:
    return [line.get(name) for name in ("N", "D", "K", "dtype", "indices", "gradient")]


def test_every_row_rests_on_a_committed_run():
    assert [(row, unproven(row)) for row in ON_CUDA if unproven(row)] == []


def lines_of(**changes) -> list[dict]:
    bench = {"op": "nearest", "N": 1 << 20, "D": 64, "K": 512, "dtype": "float32", "wrong": 0, "device": GPU}
    return [
        {"stage": "test", "outcome": "passed"},
        bench | {"method": "ceiling: gemm", "p50_ms": 0.1},
        bench | {"method": "vqops triton", "p50_ms": 1.0} | changes,
        bench | {"method": "vqops compiled", "p50_ms": 2.0},
        bench | {"method": "cdist + argmin", "p50_ms": 0.5},
    ]


@pytest.mark.parametrize(
    "row, lines, why",
    [
        ({}, lines_of(), None),
        ({"D": (64, 64), "N": (1 << 20, 1 << 20)}, lines_of(), None),
        ({}, None, "there is no"),
        ({}, lines_of()[1:], "the tests have not passed"),
        ({"K": (1024, 4096)}, lines_of(), "nothing in the regime"),
        ({"dtypes": (torch.bfloat16,)}, lines_of(), "nothing in the regime"),
        ({"device": GPU}, lines_of(), None),
        ({"device": "NVIDIA A100-SXM4-80GB"}, lines_of(), "nothing in the regime"),
        ({}, lines_of(wrong=1), "it was wrong"),
        ({}, lines_of(failed="out of memory"), "it was wrong"),
        ({}, lines_of(p50_ms=2.5), "it was not the fastest"),
        ({"op": "nearset"}, lines_of(), "no such op"),
        ({"op": "prepare"}, lines_of(), None),
        ({"op": "prepare", "N": (1, 5)}, lines_of(), "has no rows"),
    ],
)
def test_what_a_row_must_rest_on(tmp_path, row, lines, why):
    if lines is not None:
        (tmp_path / "gpu").mkdir()
        (tmp_path / "gpu/kernels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = unproven(Regime(**{"op": "nearest", "implementation": "triton", "results": "gpu"} | row), tmp_path)
    assert found is None if why is None else why in found


# How it decides


def everything(_implementation):
    return True


TABLE = (
    Regime("nearest", "compiled", "run", D=(1, 64), K=(512, 1024), N=(1000, ANY[1])),
    Regime("nearest", "triton", "run", D=(1, 128), dtypes=(torch.float32, torch.bfloat16)),
    Regime("nearest", "compiled", "run", dtypes=(torch.float64,)),
    Regime("prepare", "triton", "run", K=(2, 2000)),
    Regime("search_statistics", "triton", "run", device=GPU),
)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    "op, call, expected",
    [
        ("nearest", Call(64, 512, 1000, (F32, F32), GPU), "compiled"),
        ("nearest", Call(64, 512, 999, (F32, F32), GPU), "triton"),
        ("nearest", Call(65, 512, 1000, (BF16, F32), GPU), "triton"),
        ("nearest", Call(65, 1025, 10**9, (F32, torch.float16), GPU), "reference"),
        ("nearest", Call(129, 600, 1000, (F32, F32), GPU), "reference"),
        ("nearest", Call(129, 600, 1000, (F64, F64), GPU), "compiled"),
        ("nearest", Call(129, 600, 1000, (F64, F32), GPU), "reference"),
        ("nearest_topk", Call(64, 512, 1000, (F32, F32), GPU), "reference"),
        ("prepare", Call(64, 2, None, (F32,), GPU), "triton"),
        ("prepare", Call(64, 1, None, (F32,), GPU), "reference"),
        ("search_statistics", Call(64, 512, 1000, (F32, F32), GPU), "triton"),
        ("search_statistics", Call(64, 512, 1000, (F32, F32), "NVIDIA L4"), "reference"),
    ],
)
def test_the_first_row_that_holds_decides(op, call, expected):
    assert choose(TABLE, op, call, everything) == expected
    assert choose((), op, call, everything) == "reference"


def test_what_is_not_built_is_passed_over():
    call = Call(64, 512, 1000, (F32, F32), GPU)
    assert choose(TABLE, "nearest", call, "triton".__eq__) == "triton"
    assert choose(TABLE, "nearest", call, lambda _: False) == "reference"


def test_calls():
    x, c = torch.zeros(2, 20, 5, dtype=BF16), torch.zeros(2, 7, 5)
    assert choice.call_of({"x": x, "codebook": c, "mask": None}) == Call(5, 7, 40, (BF16, F32), "cpu")
    assert choice.call_of({"codebook": c}) == Call(5, 7, None, (F32,), "cpu")
    assert choice.call_of({"x": x, "indices": None, "num_codes": 9}) == Call(5, 9, 40, (BF16,), "cpu")
    assert choice.call_of({"cluster_size": None, "embed_avg": c, "embed": None}) == Call(5, 7, None, (F32,), "cpu")


def test_every_op_chooses_on_cuda():
    for name in library.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vqops::{name}", "CUDA"), name


def test_there_has_been_no_run_so_everything_takes_the_reference():
    assert ON_CUDA == ()
    assert all(by_device["cuda"][0] == "reference" for by_device in vqops.implementations().values())
    assert "No kernel has been confirmed on a GPU yet" in info.report()


needs_triton = pytest.mark.skipif(not triton_kernels.has("nearest"), reason="Triton is not installed")


@needs_triton
def test_what_is_said_of_a_table(monkeypatch):
    monkeypatch.setattr(choice, "ON_CUDA", TABLE[1:2])
    assert vqops.implementations()["nearest"]["cuda"] == ["triton", "reference"]
    assert vqops.implementations()["quantize"]["cuda"] == ["reference", "triton"]
    report = info.report()
    assert "nearest  triton  any  1 to 128  any  any  float32, bfloat16  run" in report and "No kernel" not in report
    assert [info.bounds(each) for each in (ANY, (5, ANY[1]), (0, 9), (3, 3))] == ["any", "5 and more", "0 to 9", "3"]


# Fake preparations


def on_fake_cuda():
    return torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())


def test_a_fake_preparation_on_cuda_leaves_its_size_open(monkeypatch):
    """Whatever the table says, so that a graph holds for every implementation."""
    for table in ((), TABLE):
        monkeypatch.setattr(choice, "ON_CUDA", table)
        with on_fake_cuda():
            packed = ops.prepare(torch.empty(2, 300, 20, device="cuda"))
        assert packed.device.type == "cuda" and packed.dtype == torch.uint8 and packed.dim() == 1
        assert has_free_unbacked_symbols(packed)


def test_the_size_of_an_implementation_is_known():
    with on_fake_cuda():
        codebook = torch.empty(2, 300, 20, device="cuda")
        assert ops.prepare_reference(codebook).shape == (0,)
        if triton_kernels.has("prepare"):
            assert ops.prepare_triton(codebook).shape == (packed_bytes(2, 300, 20),)
        if library.is_compiled("prepare", "cuda"):
            assert ops.prepare_compiled(codebook).shape == (_C.packed_bytes("cuda", 2, 300, 20),)
        else:
            with pytest.raises(ValueError, match="without CUDA"):
                _C.packed_bytes("cuda", 2, 300, 20)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 300, 20), (3, 33, 17)])
def test_the_size_on_the_cpu_is_that_of_the_kernel(shape):
    expected = ops.prepare(torch.randn(shape))
    with torch._subclasses.FakeTensorMode():
        for op in (ops.prepare, ops.prepare_compiled):
            assert op(torch.empty(shape)).shape == expected.shape == (_C.packed_bytes("cpu", *shape),)


def prepared_search(x, c):
    return vqops.nearest(x, vqops.prepare(c))


def test_a_preparation_of_open_size_exports():
    class Module(torch.nn.Module):
        def forward(self, x, c):
            return prepared_search(x, c)

    with on_fake_cuda():
        x, c = torch.empty(30, 4, device="cuda"), torch.empty(9, 4, device="cuda")
    program = torch.export.export(Module(), (x, c), dynamic_shapes=({0: torch.export.Dim("rows", min=2)}, None))
    assert "vqops.prepare" in str(program.graph)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_preparation_of_open_size_compiles(backend):
    """A codebook of symbolic size leaves the size of its preparation open on the CPU too."""
    compiled = torch.compile(prepared_search, fullgraph=True, backend=backend, dynamic=True)
    for K in (9, 70, 200):
        x, c = torch.randn(30, 4), torch.randn(K, 4)
        INDICES.same(compiled(x, c), vqops.nearest(x, c))


# On the CPU, in the interpreter: what `vqops::name` does there in the place of CUDA.


@pytest.fixture
def on_stage(monkeypatch):
    """on_stage(*table): from then on ops on the CPU pick by the table. Returns what they took, a list that grows."""
    if not triton_kernels.runs_on("nearest", "cpu"):
        pytest.skip("Triton is not installed, or not in its interpreter")
    from vqops.triton_kernels import codebook, quantize, quantize_backward, search

    took = []

    def noting(what, call, prepared=None):
        def noted(*arguments, **named):
            used = prepared is not None and len(arguments) > prepared and arguments[prepared] is not None
            took.append(what + ", prepared" * used)
            return call(*arguments, **named)

        return noted

    kernels = {"nearest": (search, 4), "prepare": (codebook, None), "quantize": (quantize, 9)}
    for op, (module, prepared) in {**kernels, "quantize_backward": (quantize_backward, None)}.items():
        monkeypatch.setattr(module, op, noting(f"{op}: triton", getattr(module, op), prepared))
    composed = partial(reference.quantize, find_nearest=ops.nearest, sum_codes=ops.code_sums)
    fallbacks = {op: getattr(reference, op) for op in (*kernels, "quantize_backward")} | {"quantize": composed}
    with torch.library._scoped_library("vqops", "IMPL") as scope:

        def raise_curtain(*table):
            monkeypatch.setattr(choice, "ON_CUDA", table)
            for op, fallback in fallbacks.items():
                kernel = library.by_regime(op, noting(f"{op}: reference", fallback))
                scope.impl(op, kernel, "CPU", allow_override=True)
            return took

        yield raise_curtain


def row(op, **bounds) -> Regime:
    return Regime(op, "triton", "run", **bounds)


def test_each_call_takes_its_regime(on_stage):
    x, c = torch.randn(2, 40, 6), torch.randn(2, 30, 6)
    expected = vqops.nearest(x, c), vqops.nearest(x[:, :5], c)
    took = on_stage(row("nearest", N=(20, ANY[1])))
    INDICES.same(vqops.nearest(x, c), expected[0])
    INDICES.same(vqops.nearest(x[:, :5], c), expected[1])
    vqops.nearest(x.double(), c)
    assert took == ["nearest: triton", "nearest: reference", "nearest: reference"]


@pytest.mark.parametrize(
    "table, packed, took",
    [
        ([], False, "nearest: reference"),
        ([row("nearest"), row("prepare")], True, "nearest: triton, prepared"),
        ([row("nearest")], False, "nearest: triton"),
        ([row("prepare")], True, "nearest: reference"),
        ([row("nearest", N=(50, ANY[1])), row("prepare")], True, "nearest: reference"),
        ([row("nearest"), row("prepare", dtypes=(torch.bfloat16,))], False, "nearest: triton"),
    ],
)
def test_a_preparation_is_used_by_who_made_it(on_stage, table, packed, took):
    x, c = torch.randn(40, 6), torch.randn(30, 6)
    expected = vqops.nearest(x, c)
    taken = on_stage(*table)
    prepared = vqops.prepare(c)
    assert (prepared.packed.numel() > 0) == packed
    INDICES.same(vqops.nearest(x, prepared), expected)
    assert taken[1] == took


def test_a_preparation_of_another_kernel_is_left_alone(on_stage, monkeypatch):
    x, c = torch.randn(400, 6), torch.randn(300, 6)
    expected = vqops.nearest(x, c)
    monkeypatch.setattr(library, "available", lambda name, device: ["compiled", "triton"])
    took = on_stage(Regime("nearest", "compiled", "run"), row("prepare"))
    INDICES.same(vqops.nearest(x, vqops.prepare(c)), expected)
    assert took == ["prepare: triton"]


def test_quantize_by_reference_searches_by_the_regime_of_the_search(on_stage):
    x, c = torch.randn(40, 6), torch.randn(30, 6)
    expected = vqops.quantize(x, c)
    took = on_stage(row("nearest"), row("prepare"))
    COPIES.same(vqops.quantize(x, vqops.prepare(c)).quantized, expected.quantized)
    assert took == ["prepare: triton", "quantize: reference", "nearest: triton, prepared"]
    took.clear()
    on_stage(row("quantize"), row("prepare"))
    COPIES.same(vqops.quantize(x, vqops.prepare(c)).quantized, expected.quantized)
    assert took == ["prepare: triton", "quantize: triton, prepared"]


@pytest.mark.parametrize("forward, backward", [("triton", "triton"), ("triton", "reference"), ("reference", "triton")])
def test_a_backward_has_a_regime_of_its_own(on_stage, forward, backward):
    def gradients(call):
        inputs = [x.clone().requires_grad_(), c.clone().requires_grad_()]
        found = call(*inputs)
        return torch.autograd.grad(found.quantized.square().sum() + found.error.sum(), inputs)

    x, c = torch.randn(40, 6), torch.randn(30, 6)
    call = partial(vqops.quantize, gradient="rotation", codebook_error_scale=0.5)
    expected = gradients(call)
    table = [row("quantize")] * (forward == "triton") + [row("quantize_backward")] * (backward == "triton")
    took = on_stage(*table)
    for each in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(gradients(each), expected)
        assert [t for t in took if "nearest" not in t] == [f"quantize: {forward}", f"quantize_backward: {backward}"]
        took.clear()


def test_compiled_for_any_number_of_rows(on_stage):
    took = on_stage(row("nearest", N=(35, ANY[1])))
    compiled = torch.compile(vqops.nearest, fullgraph=True, backend="aot_eager", dynamic=True)
    c = torch.randn(30, 6)
    for N in (30, 40, 34, 35):
        x = torch.randn(N, 6)
        INDICES.same(compiled(x, c), vqops.nearest(x, c, implementation="reference"))
    assert [t.split(": ")[1] for t in took] == ["reference", "triton", "reference", "triton"]
