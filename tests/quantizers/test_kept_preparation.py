"""Codes that stay as they are, in eval or frozen, are prepared once, and again exactly when their values are others."""

import copy
import pickle
import threading

import pytest
import torch
from promises import INDICES, REPEATS
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import vqops
from vqops import VectorQuantize
from vqops.quantizers.codebook import preparation

DIM, CODES = 16, 300
pytestmark = pytest.mark.skipif(
    not preparation.is_compiled("prepare", "cpu"), reason="no compiled kernels here, so nothing is prepared"
)


@pytest.fixture
def prepared(monkeypatch):
    """The number of preparations so far: whenever the op has changed what is packed."""
    count = 0
    op = torch.ops.vqops.keep_prepared_

    def counting(x, codes, packed, stamp, metric):
        nonlocal count
        before = stamp.clone()
        op(x, codes, packed, stamp, metric)
        count += int((stamp != before).any())

    monkeypatch.setattr(torch.ops.vqops, "keep_prepared_", counting)
    return lambda: count


def assert_nearest(vq, x):
    found = vq(x)
    metric = "cosine" if vq.use_cosine_sim else "euclidean"
    INDICES.same(found[1], vqops.nearest(x, vq.codebook.detach(), metric=metric, implementation="reference"))
    return found


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"learnable_codebook": True}], ids=str)
def test_eval_prepares_once(prepared, options):
    vq = VectorQuantize(DIM, CODES, **options).eval()
    for rows in (500, 97, 3, 1, 200):
        assert_nearest(vq, torch.randn(rows, DIM))
    assert prepared() == 1


def test_frozen_training_prepares_once(prepared):
    vq = VectorQuantize(DIM, CODES, freeze_codebook=True)
    for _ in range(3):
        assert_nearest(vq, torch.randn(200, DIM))
    assert prepared() == 1


def test_a_parameter_without_a_gradient_is_prepared_once(prepared):
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True).requires_grad_(False).eval()
    for _ in range(3):
        assert_nearest(vq, torch.randn(200, DIM))
    assert prepared() == 1


def test_a_step_that_learns_keeps_nothing(prepared):
    vq = VectorQuantize(DIM, CODES)
    for _ in range(3):
        vq(torch.randn(200, DIM))
    assert prepared() == 0 and vq._codebook.preparation.memory is None


CHANGES = {
    "step": lambda vq: (vq.train()(torch.randn(200, DIM)), vq.eval()),
    "setter": lambda vq: setattr(vq, "codebook", torch.randn(CODES, DIM)),
    "in place": lambda vq: vq._codebook.embed.mul_(-1),
    "through .data, which counts no version": lambda vq: vq._codebook.embed.data.mul_(-1),
    "one value through .data": lambda vq: vq._codebook.embed.data[0, 7].add_(torch.eye(DIM)[3], alpha=3.0),
    "the signs of a feature": lambda vq: vq._codebook.embed.data[..., 1].neg_(),
    "a feature doubled": lambda vq: vq._codebook.embed.data[..., 1].mul_(2),
    "all signs": lambda vq: vq._codebook.embed.data.neg_(),
    "two codes swapped": lambda vq: vq._codebook.embed.data.copy_(vq._codebook.embed.data.flip(1).clone()),
    "load_state_dict": lambda vq: vq.load_state_dict(VectorQuantize(DIM, CODES).state_dict()),
    "assigned": lambda vq: vq.load_state_dict(VectorQuantize(DIM, CODES).state_dict(), assign=True),
    "another tensor": lambda vq: vq._codebook._buffers.update(embed=torch.randn(1, CODES, DIM)),
    "dtype and back": lambda vq: (vq.double(), setattr(vq, "codebook", torch.randn(CODES, DIM))),
    "a numpy view": lambda vq: vq._codebook.embed.numpy().__imul__(-1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_value_is_another_preparation(prepared, change):
    vq, x = VectorQuantize(DIM, CODES).eval(), torch.randn(200, DIM)
    for _ in range(2):
        assert_nearest(vq, x)
    before = prepared()
    CHANGES[change](vq)
    for _ in range(2):
        assert_nearest(vq, x)
    assert prepared() == before + 1


def test_codes_that_are_computed_are_prepared_once(prepared):
    vq = VectorQuantize(DIM, CODES, affine_param=True)
    vq(torch.randn(200, DIM))
    vq.eval()
    for _ in range(3):
        x = torch.randn(200, DIM)
        INDICES.same(vq(x)[1], vqops.nearest(x, vq._codebook.codes(False)[0], implementation="reference"))
    assert prepared() == 1


def test_codes_of_a_bridge_are_not_kept(prepared):
    """Threads that share the module may make different ones, under autocast and not."""
    vq = VectorQuantize(DIM, CODES, vq_bridge=torch.nn.Linear(DIM, DIM)).eval()
    vq(torch.randn(200, DIM))
    assert prepared() == 0


def test_codes_in_float64(prepared):
    vq, x = VectorQuantize(DIM, CODES, learnable_codebook=True).double().eval(), torch.randn(200, DIM)
    for _ in range(3):
        assert_nearest(vq, x)
        vq._codebook.embed.data[..., 3].neg_()
    assert prepared() == 3


def test_a_call_on_fake_tensors_keeps_nothing():
    vq = VectorQuantize(DIM, CODES).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        vq(torch.randn(200, DIM))
    assert vq._codebook.preparation.memory is None
    assert_nearest(vq, torch.randn(200, DIM))


def test_copies_prepare_for_themselves():
    vq, x = VectorQuantize(DIM, CODES).eval(), torch.randn(200, DIM)
    vq(x)
    for twin in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        assert twin._codebook.preparation.memory is None
        twin.codebook = -vq.codebook
        assert_nearest(twin, x)
    assert_nearest(vq, x)


@pytest.mark.parametrize("options", [{}, {"vq_bridge": torch.nn.Linear(DIM, DIM)}], ids=str)
def test_inference_mode(options):
    vq, x = VectorQuantize(DIM, CODES, **options).eval(), torch.randn(200, DIM)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode()):
        with mode:
            codes = vq._codebook.codes(False)[0]
            INDICES.same(vq(x)[1], vqops.nearest(x, codes, implementation="reference"))
            prepared = vqops.prepare(codes.clone())
            INDICES.same(vqops.nearest(x, prepared), vqops.nearest(x, codes, implementation="reference"))
        vq._codebook.embed.data.mul_(-1)


def test_topk_uses_it(prepared):
    vq, x = VectorQuantize(DIM, CODES).eval(), torch.randn(200, DIM)
    expected = vqops.nearest_topk(x, vq.codebook, 5, implementation="reference")[0]
    for _ in range(2):
        INDICES.same(vq(x, topk=5)[1], expected)
    assert prepared() == 1


def test_another_implementation_is_asked_without_it():
    vq, x = VectorQuantize(DIM, CODES).eval(), torch.randn(200, DIM)
    vq(x)
    with vqops.use_implementation("reference"):
        assert_nearest(vq, x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_sees_new_values(backend):
    torch._dynamo.reset()
    counters.clear()
    vq = VectorQuantize(DIM, CODES).eval()
    compiled = torch.compile(vq, fullgraph=True, backend=backend)
    for step in range(4):
        x = torch.randn(200, DIM)
        with torch.no_grad():
            INDICES.same(compiled(x)[1], vqops.nearest(x, vq.codebook, implementation="reference"))
        if step % 2:
            vq._codebook.embed.data.mul_(-1)
        else:
            vq.load_state_dict(VectorQuantize(DIM, CODES).state_dict())
    assert counters["stats"]["unique_graphs"] <= 2  # the first makes the memory


def test_threads_share_a_module():
    """The first search of one prepares while the others wait, and not one of them reads half a preparation."""
    for _ in range(20):
        vq, x = VectorQuantize(DIM, CODES).eval(), torch.randn(200, DIM)
        expected = vqops.nearest(x, vq.codebook, implementation="reference")
        results, start = [], threading.Barrier(4)

        def search(vq=vq, x=x, results=results, start=start):
            start.wait()
            results.append(vq(x)[1])

        threads = [threading.Thread(target=search) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        for found in results:
            INDICES.same(found, expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (2, 1000, 33), (1, 70_000, 1)])
def test_every_value_counts(shape):
    """The hash of a codebook: equal for equal bytes, another for each value that changes."""
    op, codes = torch.ops.vqops.keep_prepared_, torch.randn(shape)
    x = torch.randn(shape[0], 200, shape[2])
    packed = torch.empty(preparation.kernels.packed_bytes("cpu", *shape), dtype=torch.uint8)
    stamp = torch.zeros(2, dtype=torch.int64)

    def hashed():
        op(x, codes, packed, stamp, "euclidean")
        return stamp[1].item()

    first, seen = hashed(), set()
    for place in torch.randperm(codes.numel())[:50]:
        value = codes.view(-1)[place].clone()
        codes.view(-1)[place] += 1
        seen.add(hashed())
        codes.view(-1)[place] = value
    assert first not in seen and len(seen) == min(50, codes.numel())
    REPEATS.same(torch.tensor(hashed()), torch.tensor(first))
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        stamp.zero_()
        assert hashed() == first
        torch.set_num_threads(before)
