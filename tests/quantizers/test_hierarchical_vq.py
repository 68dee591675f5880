"""HierarchicalVQ by itself: values by hand, masks, nested dropout, state, refusals, and the page about it."""

import copy
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from hierarchy import AXES, CODES, DIM, FIXED, batch, step
from promises import COPIES, INDICES, REPEATS, UNCHANGED
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from vqops import HierarchicalVQ, VectorQuantize
from vqops.quantizers.interface.nested_dropout import nested_cutoff

APART = {"shared_codebook": False, "nested_dropout": 0.6, "share_quant_resi": 2}
SMALL = {"dim": DIM, "codebook_size": CODES, "scales": (1, 4, 8)}


def by_hand(codes, scales, **options):
    given = {"codebook_size": len(codes), "kmeans_init": False, "threshold_ema_dead_code": 0, "quant_resi": 0}
    vq = HierarchicalVQ(dim=1, scales=scales, **(given | options))
    vq.vq.codebook = torch.tensor(codes)
    return vq


def test_two_levels_by_hand():
    vq = by_hand([[2.0], [-1.0], [1.25]], (1, 2)).eval()
    x = torch.tensor([[[1.0, 3.0]], [[-1.0, -1.0]]])
    output, indices, loss = vq(x)
    # Means 2 and -1, the codes 0 and 1; what is left is -1, 1 and 0, 0.
    INDICES.same(list(indices), [torch.tensor([[0], [1]]), torch.tensor([[1, 2], [1, 1]])])
    assert_close(output, torch.tensor([[[1.0, 3.25]], [[-2.0, -2.0]]]))
    assert loss == 0
    assert_close(vq.get_output_from_indices(indices), output)
    assert_close(vq.get_output_from_indices(indices[:1]), torch.tensor([[[2.0, 2.0]], [[-1.0, -1.0]]]))
    # The loss of a step: level 0 is exact, of level 1 there are (0, 0.0625, 1, 1) / 4.
    assert_close(by_hand([[2.0], [-1.0], [1.25]], (1, 2), decay=1.0)(x)[2], torch.tensor(2.0625 / 4 / 2))


def test_a_shared_codebook_learns_level_by_level():
    """One code, decay 0: the code is the mean of the level before."""
    vq = by_hand([[5.0]], (1, 2), decay=0.0, commitment_weight=1.0)
    loss = vq(torch.tensor([[[1.0, 3.0]]]))[2]
    # Level 0: 2 against 5, after it the code is 2. Level 1: (1, 3) - 5 against 2, after it the code is their mean.
    assert_close(vq.vq.codebook, torch.tensor([[-3.0]]))
    assert_close(loss, torch.tensor((9 + (36 + 16) / 2) / 2))
    separate = by_hand([[5.0]], (1, 2), decay=0.0, shared_codebook=True)
    assert separate.get_vq(0) is separate.get_vq(1)


def test_masked_means_by_hand():
    vq = by_hand([[2.0], [-1.0], [1.0]], (1, 2)).eval()
    x = torch.tensor([[[1.0, 3.0, 50.0, 60.0]], [[50.0, 60.0, 70.0, 80.0]]])
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    output, indices, _ = vq(x, mask=mask)
    # Mean 2; then the cells (-1, 1) and none: the nearest codes of 0 are -1 and 1, the first has the lower index.
    INDICES.same(list(indices), [torch.tensor([[0], [-1]]), torch.tensor([[1, -1], [-1, -1]])])
    assert_close(output, torch.tensor([[[1.0, 1.25, 0.0, 0.0]], [[0.0] * 4]]))
    assert_close(vq(x, lens=torch.tensor([2, 0]))[0], output)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("channel_first", [True, False])
def test_the_output_of_indices_is_the_output(axes, channel_first):
    positions, options = AXES[axes]
    vq = HierarchicalVQ(**(FIXED | options), channel_first=channel_first, share_quant_resi=2).eval()
    x, mask = batch(positions, channel_first), torch.rand(3, *positions) < 0.7
    output, indices, _ = vq(x, mask=mask)
    decoded = vq.get_output_from_indices(indices, positions)
    kept = mask.unsqueeze(1 if channel_first else -1)
    assert_close(decoded.where(kept, 0), output)
    assert (output.where(kept, 0) == output).all() and output.shape == x.shape


# Nested dropout


@pytest.mark.parametrize("lowest", [1, 2])
def test_the_output_and_loss_are_those_of_the_levels_before_the_cutoff(lowest):
    vq = HierarchicalVQ(**(FIXED | SMALL), nested_dropout=0.7, nested_dropout_min_levels=lowest, share_quant_resi=0)
    cutoffs = []
    for seed in range(12):
        whole, x = copy.deepcopy(vq), batch((8,))
        whole.nested_dropout = 0.0
        fewer = copy.deepcopy(whole)
        found, expected = step(vq, x, seed, return_cutoff=True), step(whole, x, seed, return_cutoff=True)
        for a, b in zip(found["indices"], expected["indices"], strict=True):
            INDICES.same(a, b)
        assert_close(vq.state_dict(), whole.state_dict())
        (cutoff,) = found["cutoff"]
        assert expected["cutoff"] == [None]
        cutoffs.append(cutoff)
        kept = 3 if cutoff is None else cutoff + 1
        fewer.level_shapes, fewer.num_levels = fewer.level_shapes[:kept], kept
        fewer.choose_phi = lambda level, vq=fewer: vq.phi_levels[level]
        cut = step(fewer, x, seed)
        for name in ("output", "loss", "grad of x"):
            assert_close(found[name], cut[name], msg=lambda text, name=name: f"{name}: {text}")
    assert set(cutoffs) == {None, *range(lowest - 1, 2)}
    assert vq.eval()(x, return_cutoff=True)[3] is None


def test_every_parameter_has_a_gradient_whatever_is_left_out():
    """As DistributedDataParallel wants it."""
    vq = HierarchicalVQ(**(FIXED | SMALL), nested_dropout=1.0, share_quant_resi=0)
    output, _, loss, cutoff = vq(batch((8,)), return_cutoff=True)
    (output.sum() + loss).backward()
    assert cutoff < 2 and all(p.grad is not None for p in vq.parameters())
    assert (vq.phi_levels[2].conv.weight.grad == 0).all() and vq.phi_levels[0].conv.weight.grad.abs().max() > 0


def test_cutoffs_follow_the_seed():
    cutoffs = [int(nested_cutoff(torch.tensor(seed), 0.5, 1, 4)) for seed in range(50)]
    assert set(cutoffs) == {1, 2, 3, 4}
    expected = []
    for seed in range(50):
        draws = random.Random(seed)
        expected.append(draws.randrange(1, 4) if draws.random() < 0.5 else 4)
    assert cutoffs == expected
    torch.library.opcheck(nested_cutoff, (torch.tensor(3), 0.5, 1, 4))


# State


def copies(vq):
    return copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))


@pytest.mark.parametrize("shared", [True, False])
def test_copies_and_pickles(shared):
    vq = HierarchicalVQ(**SMALL, shared_codebook=shared, nested_dropout=0.5)
    vq(batch((8,), b=30))
    x = batch((8,))
    for twin in copies(vq):
        COPIES.same(twin.state_dict(), vq.state_dict())
        INDICES.same(list(twin.eval()(x)[1]), list(vq.eval()(x)[1]))
        twin.train()(x)
    assert not any("seed" in name for name in vq.state_dict())


def test_a_module_without_memory_that_is_assigned_its_state():
    source = HierarchicalVQ(**(FIXED | SMALL)).eval()
    with torch.device("meta"):
        vq = HierarchicalVQ(**SMALL, nested_dropout=1.0)
    vq.load_state_dict(source.state_dict(), assign=True)
    x = batch((8,))
    INDICES.same(list(vq.eval()(x)[1]), list(source(x)[1]))
    assert vq.train()(x, return_cutoff=True)[3] < 2


def test_export_in_eval():
    positions, options = AXES["image"]
    vq = HierarchicalVQ(**(FIXED | options)).eval()
    axes = ({0: torch.export.Dim("b", min=2, max=64)},)
    program = torch.export.export(vq, (batch(positions),), dynamic_shapes=axes)
    x = batch(positions, b=5)
    output, indices, _ = program.module()(x)
    INDICES.same(list(indices), list(vq(x)[1]))
    assert_close(output, vq(x)[0])


def test_drawn_codes():
    vq = HierarchicalVQ(**(FIXED | SMALL), stochastic_sample_codes=True, decay=1.0)
    x = batch((8,), b=40)
    nearest = vq.eval()(x)[1]
    INDICES.same(list(vq.train()(x, sample_codebook_temp=0.0)[1]), list(nearest))
    drawn = vq(x, sample_codebook_temp=100.0)[1]
    assert (drawn[2] != nearest[2]).float().mean() > 0.8 and len(drawn[2].unique()) == CODES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("axes", AXES)
def test_casts(dtype, axes):
    positions, options = AXES[axes]
    vq = HierarchicalVQ(**(FIXED | options)).to(dtype)
    assert vq.phi_shared.conv.weight.dtype == dtype
    assert {b.dtype for b in vq.vq._codebook.buffers() if b.is_floating_point()} == {torch.float32}
    x, mask = batch(positions).to(dtype), torch.rand(3, *positions) < 0.7
    for arguments in ({}, {"mask": mask}):
        found = step(vq, x, **arguments)
        assert found["output"].dtype == found["grad of x"].dtype == dtype
        assert found["loss"].dtype == torch.promote_types(dtype, torch.float32)
        assert found["output"].isfinite().all() and found["loss"] > 0
    indices = vq.eval()(x)[1]
    assert_close(vq.get_output_from_indices(indices, positions), vq(x)[0])


def test_bfloat16_without_convolution_takes_any_dtype():
    vq = HierarchicalVQ(**(FIXED | SMALL), quant_resi=0)
    assert vq(batch((8,)).bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"kmeans_init": True, "threshold_ema_dead_code": 2}], ids=str)
def test_no_samples(training, options):
    vq = HierarchicalVQ(**(FIXED | SMALL | options), nested_dropout=0.5).train(training)
    before = copy.deepcopy(vq.state_dict())
    found = step(vq, batch((8,), b=0))
    assert found["output"].shape == (0, DIM, 8) and found["loss"] == 0
    assert [each.shape for each in found["indices"]] == [(0, 1), (0, 4), (0, 8)]
    UNCHANGED.same(vq.state_dict(), before)


def test_whole_training_with_k_means_and_dead_codes():
    vq = HierarchicalVQ(**SMALL, nested_dropout=0.5)
    for _ in range(3):
        found = step(vq, batch((8,), b=30))
    assert found["loss"].isfinite() and vq.vq._codebook.initted
    assert len(vq.vq.codebook.unique(dim=0)) == CODES


@pytest.mark.filterwarnings("ignore:HierarchicalVQ. k-means starts")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("options", [{}, FIXED], ids=["k-means", "fixed"])
def test_a_level_that_fails_leaves_the_state(shared, options):
    vq = HierarchicalVQ(**(SMALL | options), shared_codebook=shared)
    vq.train()
    before, failed = copy.deepcopy(vq.state_dict()), []

    def fail(module, given):
        failed.append(given[0].shape)
        if len(failed) == 3:
            raise RuntimeError("out of memory")

    handle = vq.phi_shared.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        vq(batch((8,)))
    assert len(failed) == 3
    UNCHANGED.same(vq.state_dict(), before)
    handle.remove()
    vq(batch((8,)))
    assert all((b._codebook.embed != a).any() for b, a in zip(vq.vqs or [vq.vq], embeds(before), strict=True))


def embeds(state):
    return [value for name, value in state.items() if name.endswith("_codebook.embed")]


def test_activation_checkpointing_is_an_error():
    vq = HierarchicalVQ(**(FIXED | SMALL))
    loss = checkpoint(vq, batch((8,)).requires_grad_(), use_reentrant=False)[2]
    before = copy.deepcopy(vq.state_dict())
    with pytest.raises(RuntimeError, match="HierarchicalVQ: forward runs again inside backward"):
        loss.backward()
    UNCHANGED.same(vq.state_dict(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, APART], ids=["shared", "separate"])
@pytest.mark.filterwarnings("ignore:HierarchicalVQ. k-means starts")
def test_one_graph_from_the_first_call(options, training):
    torch._dynamo.reset()
    counters.clear()
    eager = HierarchicalVQ(**(SMALL | {"scales": (1, 4)} | options)).train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x, mask = batch((10,), b=8), torch.rand(8, 10) < 0.7
        expected, found = step(eager, x, seed, mask=mask), step(compiled, x, seed, mask=mask)
        for a, b in zip(found.pop("indices"), expected.pop("indices"), strict=True):
            INDICES.same(a, b)
        expected = {name.replace("grad of ", "grad of _orig_mod."): value for name, value in expected.items()}
        found["grad of _orig_mod.x"] = found.pop("grad of x")
        assert_close(found, expected)
        assert_close(other.state_dict(), eager.state_dict())
    assert counters["stats"]["unique_graphs"] == 2  # with k-means, and after


# Calls

CALLS = [
    (lambda vq, x, i: vq(x[:, :4]), ValueError, r"x must be \[b, dim, n\] with dim=6, got \[3, 4, 8\]"),
    (lambda vq, x, i: vq(x.unsqueeze(-1)), ValueError, r"x must be \[b, dim, n\] with dim=6, got \[3, 6, 8, 1\]"),
    (lambda vq, x, i: vq(x[..., :0]), ValueError, r"x must have at least one position, got \[3, 6, 0\]"),
    (lambda vq, x, i: vq(x.long()), TypeError, "x must be float32, float64, float16 or bfloat16, got torch.int64"),
    (lambda vq, x, i: vq(x.double()), TypeError, "x must be torch.float32 as the convolutions are, got torch.float64"),
    (lambda vq, x, i: vq(x.to("meta")), ValueError, "codebook is on cpu, x is on meta"),
    (lambda vq, x, i: vq(x, mask=x[:, 0]), TypeError, "mask must be bool, True for vectors to quantize, got torch.flo"),
    (lambda vq, x, i: vq(x, mask=x[:, 0, :4] > 0), ValueError, r"mask must have shape \[3, 8\], got \[3, 4\]"),
    (lambda vq, x, i: vq(x, mask=x[:, 0] > 0, lens=i[0][:, 0]), ValueError, "mask and lens can't both be given"),
    (lambda vq, x, i: vq(x, lens=torch.tensor([8])), ValueError, r"lens must have shape \[3\], got \[1\]"),
    (lambda vq, x, i: vq(x, sample_codebook_temp=-1), ValueError, "sample_codebook_temp must be finite and at least 0"),
    (lambda vq, x, i: vq(x, i[0]), TypeError, "indices must be a list or tuple of tensors, got Tensor"),
    (lambda vq, x, i: vq(x, i[:2]), ValueError, "indices must be of all 3 levels, got 2"),
    (lambda vq, x, i: vq(x[:2], i), ValueError, r"level 0: indices must have shape \[2, 1\], got \[3, 1\]"),
    (lambda vq, x, i: vq.get_output_from_indices([]), ValueError, "indices must be of 1 to 3 levels, got 0"),
    (lambda vq, x, i: vq.get_output_from_indices(i * 2), ValueError, "indices must be of 1 to 3 levels, got 6"),
    (lambda vq, x, i: vq.get_output_from_indices(i[1:]), ValueError, r"level 0: indices must have shape \[3, 1\], got"),
    (lambda vq, x, i: vq.get_output_from_indices([i[0] + CODES]), IndexError, "level 0: indices must be -1 or a code"),
    (lambda vq, x, i: vq.get_output_from_indices([x]), TypeError, "level 0: indices must be int64, got torch.float32"),
    (lambda vq, x, i: vq.get_output_from_indices(i, (2, 2)), ValueError, "full_shape must be an integer or 1 of them"),
    (lambda vq, x, i: vq.get_output_from_indices(i, 0), ValueError, "full_shape must be an integer of at least 1, got"),
]


@pytest.mark.parametrize("call, error, message", CALLS, ids=[message for *_, message in CALLS])
def test_wrong_calls(call, error, message):
    vq = HierarchicalVQ(**(FIXED | SMALL))
    x, before = batch((8,)), copy.deepcopy(vq.state_dict())
    indices = vq.eval()(x)[1]
    *_, text = message.rpartition("level 0: ")
    with pytest.raises(error, match=f"^HierarchicalVQ{', level 0' * (text != message)}: {text}"):
        call(vq.train(), x, indices)
    UNCHANGED.same(vq.state_dict(), before)


OPTIONS = [
    ({"accept_image_fmap": True, "accept_3d_fmap": True}, ValueError, "accept_image_fmap and accept_3d_fmap can't"),
    ({"scales": ()}, TypeError, r"scales must be a sequence, the grid of each level, got \(\)"),
    ({"scales": 4}, TypeError, "scales must be a sequence, the grid of each level, got 4"),
    ({"scales": (1, 0)}, ValueError, r"scales\[1\] must be an integer of at least 1, got 0"),
    ({"scales": (1, 2.5)}, ValueError, r"scales\[1\] must be an integer of at least 1, got 2.5"),
    ({"scales": (1, (2, 2))}, ValueError, r"scales\[1\] must be an integer or 1 of them, got \(2, 2\)"),
    ({"scales": (4, 2)}, ValueError, r"scales must not shrink, got \(4,\) before \(2,\) at level 1"),
    ({"codebook_size": (4, 8)}, ValueError, r"codebook_size must be an integer or 3 of them, got \(4, 8\)"),
    ({"codebook_size": (4, 8, 8)}, ValueError, "codebook_size must be one for all levels with shared_codebook"),
    ({"codebook_size": 0}, ValueError, "codebook_size must be an integer of at least 1, got 0"),
    ({"dim": 0}, ValueError, "dim must be an integer of at least 1, got 0"),
    ({"nested_dropout": 1.5}, ValueError, r"nested_dropout must be in \[0, 1\], got 1.5"),
    ({"nested_dropout_min_levels": 0}, ValueError, "nested_dropout_min_levels must be an integer of at least 1, got 0"),
    ({"quant_resi": "half"}, TypeError, "quant_resi must be a number, got str"),
    ({"share_quant_resi": 1.5}, TypeError, "share_quant_resi must be an integer, got 1.5"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=[message for *_, message in OPTIONS])
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"^HierarchicalVQ: {message}"):
        HierarchicalVQ(**(SMALL | options))


def test_given_indices_of_minus_one_are_left_out():
    vq = HierarchicalVQ(**(FIXED | SMALL)).eval()
    x = batch((8,))
    indices = vq(x)[1]
    nothing = [torch.full_like(each, -1) for each in indices]
    assert vq(x, nothing)[1] == 0
    first = [indices[0].int(), *nothing[1:]]
    rows = vq.pool_residual(x, (1,))[0].mT
    expected = VectorQuantize(DIM, CODES).eval()
    expected.codebook = vq.vq.codebook
    assert_close(vq(x, first)[1], expected(rows, indices[0])[1] / 3)
    given = x.clone().requires_grad_()
    vq(given, indices)[1].backward()
    assert given.grad.abs().max() > 0
    output, loss, cutoff = vq.train()(x, indices, return_cutoff=True)
    assert output.shape == x.shape and loss > 0 and cutoff is None


def test_subclasses_are_named():
    class Named(HierarchicalVQ):
        pass

    with pytest.raises(ValueError, match=r"^Named: dim must be"):
        Named(**(SMALL | {"dim": 0}))
    with pytest.raises(ValueError, match=r"^Named: sample_codebook_temp must be"):
        Named(**SMALL)(batch((8,)), sample_codebook_temp=-1.0)
    with pytest.warns(UserWarning, match=r"^Named: k-means starts with 3 vectors"):
        Named(**SMALL)(batch((8,)))


def test_deterministic():
    """Equal steps are equal to the bit where torch is told to be deterministic, as here."""
    vq = HierarchicalVQ(**SMALL, nested_dropout=0.5)
    twin, x = copy.deepcopy(vq), batch((8,), b=30)
    for module in (vq, twin):
        torch.manual_seed(3)
        module(x)
    REPEATS.same(twin.state_dict(), vq.state_dict())


@pytest.mark.slow
def test_the_page_about_it(capsys):
    page = Path(__file__).parents[2] / "docs/var.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    found = {}
    exec(block, found)
    assert found["error"] < 0.05 * found["images"].var()
    assert found["nats"] < 0.6 * torch.tensor(found["CODES"]).log()
    assert found["pictures"].shape == (16, 1, 16, 16) and found["pictures"].abs().max() < 2
    assert "nats a code of 4.16" in capsys.readouterr().out
