"""Which implementation an op takes: the one that is named, or on CUDA what a record of the GPU says."""

import os
import subprocess
import sys
from collections import namedtuple
from functools import partial

import pytest
import torch
import vqops._C as _C
from promises import COPIES, INDICES
from torch.fx.experimental.symbolic_shapes import ShapeEnv, has_free_unbacked_symbols

import vqops
from vqops import pytorch, reference, triton_kernels
from vqops.dispatch import choice, library
from vqops.dispatch.choice import Table, choose
from vqops.dispatch.regimes import ANY, Call, Regime
from vqops.pytorch.codebook import packed_bytes as pytorch_bytes
from vqops.triton_kernels.layout import packed_bytes

ops = torch.ops.vqops


# The one that is named


@pytest.fixture(autouse=True)
def nothing_is_named():
    yield
    vqops.use_implementation(None)


def test_everything_follows_the_one_that_is_named():
    """VectorQuantize too, in its forward, its backward and its first codebook."""
    took = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            took.append(str(func))
            return func(*args, **(kwargs or {}))

    with vqops.use_implementation("pytorch"), Watch():
        vq = vqops.VectorQuantize(dim=4, codebook_size=8, kmeans_init=True, kmeans_iters=2)
        quantized, *_ = vq(torch.randn(2, 30, 4, requires_grad=True))
        quantized.sum().backward()
    ours = {name for name in took if name.startswith("vqops.") and "check_first_run" not in name}
    expected = {"quantize", "quantize_backward", "ema_update_"}
    assert expected <= {name.removeprefix("vqops.").removesuffix("_pytorch.default") for name in ours}
    assert all(name.endswith("_pytorch.default") for name in ours), ours


def test_with_gives_back_what_was_named_before():
    def first():
        return vqops.implementations()["nearest"]["cpu"][0]

    assert first() == "compiled"
    vqops.use_implementation("pytorch")
    with vqops.use_implementation("reference"):
        assert first() == "reference"
        with vqops.use_implementation(None):
            assert first() == "compiled"
        assert first() == "reference"
    assert first() == "pytorch"
    vqops.use_implementation(None)
    assert first() == "compiled"


def test_a_call_names_its_own():
    x, c = torch.randn(5, 3), torch.randn(4, 3)
    with vqops.use_implementation("reference"):
        assert vqops.prepare(c, implementation="pytorch").packed.numel() > 0
        assert vqops.prepare(c).packed.numel() == 0
        INDICES.same(vqops.nearest(x, c, implementation="compiled"), vqops.nearest(x, c))


def test_an_op_without_it_takes_its_default():
    x, c, targets = torch.randn(5, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 3, -1])
    from vqops.ops.cross_entropy import code_cross_entropy

    expected = code_cross_entropy(x, c, targets)
    with vqops.use_implementation("compiled"):
        torch.testing.assert_close(code_cross_entropy(x, c, targets), expected)


def test_a_preparation_belongs_to_the_one_that_was_named():
    c = torch.randn(4, 3)
    with vqops.use_implementation("pytorch"):
        prepared = vqops.prepare(c)
        vqops.nearest(torch.randn(5, 3), prepared)
    with pytest.raises(ValueError, match="implementation is None, but the codebook was prepared with 'pytorch'"):
        vqops.nearest(torch.randn(5, 3), prepared)


def test_a_graph_keeps_what_was_named_when_it_was_traced():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    search = torch.compile(lambda x, c: vqops.nearest(x, c), fullgraph=True, backend=keep)
    x, c = torch.randn(5, 3), torch.randn(4, 3)
    with vqops.use_implementation("reference"):
        search(x, c)
    search(x, c)  # another choice is another graph
    assert "nearest_reference" in graphs[0] and "nearest_reference" not in graphs[1]


@pytest.mark.parametrize("name", ["fastest", "Compiled", ""])
def test_an_unknown_name(name):
    with pytest.raises(ValueError, match="use_implementation: name must be one of .*'pytorch'.*got " + repr(name)):
        vqops.use_implementation(name)
    assert choice.named is None


def test_one_that_cannot_run_here_says_why(monkeypatch):
    x = torch.zeros(1, 2, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_kernels, "why_not", triton_kernels.why_not.__wrapped__)
    with pytest.raises(RuntimeError, match="nearest: implementation 'triton' can't run: it runs on CUDA, or on"):
        ops.nearest_triton(x, x)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    if not library.is_compiled("nearest", "cuda"):
        with pytest.raises(RuntimeError, match="nearest: implementation 'compiled' has no kernel for"):
            ops.nearest_compiled.default.redispatch(cuda, x, x)


@pytest.mark.parametrize(
    "gpu, compilers, why",
    [
        ({}, ["gcc"], None),
        ({"major": 12, "minor": 0}, ["clang"], None),
        ({"name": "Tesla T4", "major": 7, "minor": 5}, ["gcc"], "need sm_80 or newer, Tesla T4 is sm_75"),
        ({"shared_memory_per_block_optin": 65536}, ["gcc"], "shared memory a block, NVIDIA L4 has 65536"),
        ({}, [], "Triton needs a C compiler"),
    ],
)
def test_why_triton_cannot_run_on_a_gpu(monkeypatch, gpu, compilers, why):
    facts = {"name": "NVIDIA L4", "major": 8, "minor": 9, "shared_memory_per_block_optin": 101376, **gpu}
    properties = namedtuple("Properties", facts)(**facts)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton_kernels.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.delenv("CC", raising=False)
    found = triton_kernels.why_not.__wrapped__(torch.device("cuda", 0))
    assert found is None if why is None else why in found
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton_kernels.why_not.__wrapped__(torch.device("cuda", 0)) == "its kernels are for NVIDIA GPUs"


@pytest.mark.parametrize(
    "value, printed",
    [("pytorch", "pytorch"), ("", "compiled"), ("fast", "ValueError: VQOPS_IMPLEMENTATION must be one of")],
)
def test_the_variable(value, printed):
    code = "import vqops; print(vqops.implementations()['nearest']['cpu'][0])"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "VQOPS_IMPLEMENTATION": value}, capture_output=True, text=True
    )
    assert printed in (ran.stdout or ran.stderr)


# How it decides


def everything(_implementation):
    return True


TABLE = (
    Regime("nearest", "compiled", D=(1, 64), K=(512, 1024), N=(1000, ANY[1])),
    Regime("nearest", "triton", D=(1, 128), dtypes=(torch.float32, torch.bfloat16)),
    Regime("nearest", "compiled", dtypes=(torch.float64,)),
    Regime("prepare", "triton", K=(2, 2000)),
)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    "op, call, expected",
    [
        ("nearest", Call(64, 512, 1000, (F32, F32)), "compiled"),
        ("nearest", Call(64, 512, 999, (F32, F32)), "triton"),
        ("nearest", Call(64, 512, 999, (F32, F32), 65535), "triton"),
        ("nearest", Call(64, 512, 999, (F32, F32), 65536), "pytorch"),  # more heads than its grid has
        ("nearest", Call(65, 512, 1000, (BF16, F32)), "triton"),
        ("nearest", Call(65, 1025, 10**9, (F32, torch.float16)), "pytorch"),
        ("nearest", Call(129, 600, 1000, (F32, F32)), "pytorch"),
        ("nearest", Call(129, 600, 1000, (F64, F64)), "compiled"),
        ("nearest", Call(129, 600, 1000, (F64, F32)), "pytorch"),
        ("nearest_topk", Call(64, 512, 1000, (F32, F32)), "pytorch"),
        ("prepare", Call(64, 2, None, (F32,)), "triton"),
        ("prepare", Call(64, 1, None, (F32,)), "pytorch"),
    ],
)
def test_the_first_row_that_holds_decides(op, call, expected):
    assert choose(TABLE, op, call, everything) == expected
    assert choose((), op, call, everything) == "pytorch"


def test_what_is_not_built_is_passed_over():
    call = Call(64, 512, 1000, (F32, F32))
    assert choose(TABLE, "nearest", call, "triton".__eq__) == "triton"
    assert choose(TABLE, "nearest", call, lambda _: False) == "pytorch"


def test_calls():
    x, c = torch.zeros(2, 20, 5, dtype=BF16), torch.zeros(2, 7, 5)
    assert choice.call_of({"x": x, "codebook": c, "mask": None}) == Call(5, 7, 40, (BF16, F32), 2)
    assert choice.call_of({"codebook": c}) == Call(5, 7, None, (F32,), 2)
    assert choice.call_of({"x": x, "codebooks": [c, c[:, :3]], "mask": None}) == Call(5, 7, 40, (BF16, F32), 2)
    assert choice.call_of({"x": x, "indices": None, "num_codes": 9}) == Call(5, 9, 40, (BF16,), 2)
    assert choice.call_of({"cluster_size": None, "embed_avg": c, "embed": None}) == Call(5, 7, None, (F32,), 2)


def test_every_op_chooses_on_cuda():
    for name in library.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vqops::{name}", "CUDA"), name


def test_a_call_of_the_same_sizes_is_looked_up_once(monkeypatch):
    looked_up, found = [], Table(TABLE, "record")
    monkeypatch.setattr(choice, "table", lambda device: found)
    monkeypatch.setattr(choice, "choose", lambda rows, op, *_: looked_up.append((rows, op)) or "pytorch")
    x, c = torch.randn(1, 40, 5), torch.randn(1, 7, 5)
    for given in ({"x": x, "codebook": c}, {"x": x + 1, "codebook": c}, {"x": x[:, 1:], "codebook": c}):
        assert library.default_on_cuda("nearest", given) == "pytorch"
    library.default_on_cuda("quantize", {"x": x, "codebook": c})
    found = Table(TABLE, "record")  # another one, as after a check
    library.default_on_cuda("nearest", {"x": x, "codebook": c})
    assert looked_up == [(TABLE, op) for op in ("nearest", "nearest", "quantize", "nearest")]


# Fake preparations


def on_fake_cuda():
    return torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())


def test_a_fake_preparation_on_cuda_leaves_its_size_open(monkeypatch):
    """Whatever the table says, so that a graph holds for every implementation."""
    for rows in ((), TABLE):
        monkeypatch.setattr(choice, "table", lambda device, rows=rows: Table(rows, "record"))
        with on_fake_cuda():
            packed = ops.prepare(torch.empty(2, 300, 20, device="cuda"))
        assert packed.device.type == "cuda" and packed.dtype == torch.uint8 and packed.dim() == 1
        assert has_free_unbacked_symbols(packed)


def test_the_size_of_an_implementation_is_known():
    with on_fake_cuda():
        codebook = torch.empty(2, 300, 20, device="cuda")
        assert ops.prepare_reference(codebook).shape == (0,)
        assert ops.prepare_pytorch(codebook).shape == (pytorch_bytes(2, 300, 20),)
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

    kernels = {"nearest": (search, 4), "prepare": (codebook, None), "quantize": (quantize, 10)}
    for op, (module, prepared) in {**kernels, "quantize_backward": (quantize_backward, None)}.items():
        monkeypatch.setattr(module, op, noting(f"{op}: triton", getattr(module, op), prepared))
    composed = partial(reference.quantize, find_nearest=ops.nearest, sum_codes=ops.code_sums)
    fallbacks = {op: getattr(pytorch, op) for op in (*kernels, "quantize_backward")} | {"quantize": composed}
    with torch.library._scoped_library("vqops", "IMPL") as scope:

        def raise_curtain(*table):
            monkeypatch.setattr(choice, "table", lambda device: Table(table, "record"))
            for op, fallback in fallbacks.items():
                place = kernels.get(op, (None, None))[1]
                noted = noting(f"{op}: pytorch", fallback, place)
                kernel = library.by_regime(op, noted, composed=fallback is composed)
                scope.impl(op, kernel, "CPU", allow_override=True)
            return took

        yield raise_curtain


def row(op, **bounds) -> Regime:
    return Regime(op, "triton", **bounds)


def test_each_call_takes_its_regime(on_stage):
    x, c = torch.randn(2, 40, 6), torch.randn(2, 30, 6)
    expected = vqops.nearest(x, c), vqops.nearest(x[:, :5], c)
    took = on_stage(row("nearest", N=(20, ANY[1])))
    INDICES.same(vqops.nearest(x, c), expected[0])
    INDICES.same(vqops.nearest(x[:, :5], c), expected[1])
    vqops.nearest(x.double(), c)
    assert took == ["nearest: triton", "nearest: pytorch", "nearest: pytorch"]


@pytest.mark.parametrize(
    "table, took",
    [
        ([], "nearest: pytorch, prepared"),
        ([row("nearest"), row("prepare")], "nearest: triton, prepared"),
        ([row("nearest")], "nearest: triton"),
        ([row("prepare")], "nearest: pytorch"),
        ([row("nearest", N=(50, ANY[1])), row("prepare")], "nearest: pytorch"),
        ([row("nearest"), row("prepare", dtypes=(torch.bfloat16,))], "nearest: triton"),
    ],
)
def test_a_preparation_is_used_by_who_made_it(on_stage, table, took):
    x, c = torch.randn(40, 6), torch.randn(30, 6)
    expected = vqops.nearest(x, c)
    taken = on_stage(*table)
    INDICES.same(vqops.nearest(x, vqops.prepare(c)), expected)
    assert taken[1] == took


def test_a_preparation_of_another_kernel_is_left_alone(on_stage, monkeypatch):
    x, c = torch.randn(400, 6), torch.randn(300, 6)
    expected = vqops.nearest(x, c)
    monkeypatch.setattr(library, "available", lambda name, device: ["compiled", "triton"])
    took = on_stage(Regime("nearest", "compiled"), row("prepare"))
    INDICES.same(vqops.nearest(x, vqops.prepare(c)), expected)
    assert took == ["prepare: triton"]


def test_preparations_of_levels_are_used_by_who_made_them(monkeypatch):
    x, c, calls = torch.randn(1, 40, 6), torch.randn(1, 30, 6), []
    table = [Regime("residual_quantize", "reference")]
    monkeypatch.setattr(choice, "table", lambda device: Table(tuple(table), "record"))
    monkeypatch.setattr(library, "available", lambda name, device: ["pytorch", "reference"])
    monkeypatch.setattr(ops, "residual_quantize_reference", lambda *given: calls.append(given[-1]))
    run, packed = library.by_regime("residual_quantize", lambda *given: calls.append(given[-1])), [vqops.prepare(c[0])]
    how = None, None, "euclidean", "straight_through", True, False, 0.0, True, False
    run(x, [c], *how, packed)
    table.append(Regime("prepare", "reference"))
    run(x, [c], *how, packed)
    assert calls == [None, packed]


def test_quantize_in_pytorch_searches_by_the_regime_of_the_search(on_stage):
    x, c = torch.randn(40, 6), torch.randn(30, 6)
    expected = vqops.quantize(x, c)
    took = on_stage(row("nearest"), row("prepare"))
    COPIES.same(vqops.quantize(x, vqops.prepare(c)).quantized, expected.quantized)
    assert took == ["prepare: triton", "quantize: pytorch, prepared", "nearest: triton, prepared"]
    took.clear()
    on_stage(row("quantize"), row("prepare"))
    COPIES.same(vqops.quantize(x, vqops.prepare(c)).quantized, expected.quantized)
    assert took == ["prepare: triton", "quantize: triton, prepared"]


@pytest.mark.parametrize("forward, backward", [("triton", "triton"), ("triton", "pytorch"), ("pytorch", "triton")])
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
    assert [t.split(": ")[1] for t in took] == ["pytorch", "triton", "pytorch", "triton"]
