"""HierarchicalVQ against vector-quantize-pytorch's: the same wherever that is right, and what it gets wrong."""

import copy
import itertools

import pytest
import torch
import vector_quantize_pytorch
from hierarchy import AXES, CODES, DIM, FIXED, batch, step
from promises import INDICES, UNCHANGED
from side_by_side import CLOSE
from torch.testing import assert_close

import vqops
from vqops.quantizers.codebook import kmeans
from vqops.quantizers.codebook.random_rows import RandomRows

CONTENTS = {
    "shared": {},
    "separate": {"shared_codebook": False, "share_quant_resi": 0},
    "sizes": {"shared_codebook": False, "codebook_size": (4, CODES, 30), "share_quant_resi": 2},
    "rotation": {"rotation_trick": True, "share_quant_resi": 7, "quant_resi": -0.3},
    "dropout": {"nested_dropout": 0.6, "decay": 0.8, "share_quant_resi": 2},
    "dropout of all but two": {"nested_dropout": 1.0, "nested_dropout_min_levels": 2, "quant_resi": 0.0},
}
PRODUCT = list(itertools.product(AXES, CONTENTS, ("first", "last"), ("whole", "masked")))
SAMPLE = [case for i, case in enumerate(PRODUCT) if i % 5 == 0]


def both(**options):
    options = FIXED | options
    theirs, ours = vector_quantize_pytorch.HierarchicalVQ(**options), vqops.HierarchicalVQ(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same_step(theirs, ours, x, **arguments):
    expected, found = step(theirs, x, **arguments), step(ours, x, **arguments)
    assert found.pop("cutoff") == expected.pop("cutoff")
    for a, b in zip(found.pop("indices"), expected.pop("indices"), strict=True):
        INDICES.same(a, b)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-5 * max(1, value.abs().max().item()) if name.startswith("grad") else 2e-6
        assert_close(found[name], value, rtol=2e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        CLOSE(value, state[name], msg=lambda text, name=name: f"{name}: {text}")


def four_steps_and_eval(axes, content, features, masking):
    positions, options = AXES[axes]
    first = features == "first"
    theirs, ours = both(**options, **CONTENTS[content], channel_first=first)
    arguments = {"return_cutoff": True}
    for _ in range(4):
        if masking == "masked":
            arguments["mask"] = torch.rand(3, *positions) < 0.6
        assert_same_step(theirs, ours, batch(positions, first), **arguments)
    theirs.eval(), ours.eval()
    assert_same_step(theirs, ours, batch(positions, first), **arguments)
    indices = ours(batch(positions, first))[1]
    for full_shape in (None, positions, 9):
        CLOSE(ours.get_output_from_indices(indices, full_shape), theirs.get_output_from_indices(indices, full_shape))
    loaded = vector_quantize_pytorch.HierarchicalVQ(**(FIXED | options | CONTENTS[content]), channel_first=first)
    loaded.load_state_dict(ours.state_dict())
    assert_same_step(loaded.eval(), ours, batch(positions, first))


def case_list(cases):
    names = "axes, content, features, masking"
    return pytest.mark.parametrize(names, cases, ids=["-".join(case) for case in cases])


@case_list(SAMPLE)
def test_four_steps_and_eval(axes, content, features, masking):
    four_steps_and_eval(axes, content, features, masking)


@pytest.mark.slow
@case_list([case for case in PRODUCT if case not in SAMPLE])
def test_four_steps_and_eval_of_every_combination(axes, content, features, masking):
    four_steps_and_eval(axes, content, features, masking)


def test_lens():
    theirs, ours = both(scales=(1, 3, 8))
    for _ in range(2):
        assert_same_step(theirs, ours, batch((10,)), lens=torch.tensor([10, 1, 4]))


@pytest.mark.parametrize("positions", [(2, 2), (3, 9)])
def test_grids_finer_than_the_input(positions):
    theirs, ours = both(scales=(1, 2, 4), accept_image_fmap=True)
    for _ in range(2):
        assert_same_step(theirs, ours, batch(positions))


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_orthogonal_codes(shared, active):
    """That averages don't move, since the loss of theirs is that of the codes after the update."""
    orthogonal = {"orthogonal_reg_weight": 0.3, "orthogonal_reg_active_codes_only": active}
    theirs, ours = both(scales=(1, 4, 8), shared_codebook=shared, decay=1.0, **orthogonal)
    for _ in range(4):
        assert_same_step(theirs, ours, batch((10,)))


def test_one_level():
    theirs, ours = both(scales=[[8]], nested_dropout=1.0)
    assert_same_step(theirs, ours, batch((10,)), return_cutoff=True)


def test_k_means_from_the_same_start(monkeypatch):
    options = {"kmeans_init": True, "scales": (5, 8), "codebook_size": 12}
    theirs, ours = both(**options)
    theirs.vq._codebook.sample_fn = lambda rows, num: rows[:, :num]

    def first_rows(x, valid, num_codes, sync):
        return RandomRows(x[:, :num_codes].float(), torch.ones(len(x), num_codes, dtype=torch.bool))

    monkeypatch.setattr(kmeans, "random_rows", first_rows)
    for _ in range(3):
        assert_same_step(theirs, ours, batch((10,), b=6))


def test_members():
    theirs, ours = both(scales=(1, (2,), 4), codebook_size=(CODES,) * 3)
    for name in (
        *("dim", "spatial_dims", "channel_first", "scales", "level_shapes", "num_levels", "codebook_sizes"),
        *("nested_dropout", "nested_dropout_min_levels", "vqs", "phi_levels"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    x, mask = batch((10,)), torch.rand(3, 10) < 0.5
    for given in (None, mask):
        for a, b in zip(ours.pool_residual(x, (4,), given), theirs.pool_residual(x, (4,), given), strict=True):
            CLOSE(a, b)
    CLOSE(ours.upsample_to_full(x, (13,), 1), theirs.upsample_to_full(x, (13,), 1))
    for count in range(-1, 8):
        theirs, ours = both(scales=(1, 2, 4, 5, 6), share_quant_resi=count)
        places = [
            [(vq.choose_phi(level) is vq.choose_phi(other)) for level in range(5) for other in range(5)]
            for vq in (theirs, ours)
        ]
        assert places[0] == places[1]


# What it gets wrong, a test each that the wheel fails.


def test_a_nan_does_not_spoil_the_codebook():
    theirs, ours = both(scales=(1, 4))
    x = batch((10,))
    x[0, :, 3] = torch.nan
    theirs(x)
    found = step(ours, x)
    assert theirs.vq.codebook.isnan().any()
    assert ours.vq.codebook.isfinite().all()
    assert found["loss"].isnan() and found["output"][0].isnan().all() and found["output"][1:].isfinite().all()
    assert [each[0].unique().tolist() for each in found["indices"]] == [[-1], [-1]]


@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
def test_padding_may_hold_anything(padding):
    theirs, ours = both(scales=(1, 4, 8))
    mask = torch.arange(10) < torch.tensor([[10], [6], [1]])
    x = batch((10,))
    clean, filled = (x.masked_fill(~mask.unsqueeze(1), value) for value in (0.0, padding))
    twin = copy.deepcopy(ours)
    expected, found = step(twin, clean, mask=mask), step(ours, filled, mask=mask)
    assert theirs(filled, mask=mask)[2].isnan()
    for name in expected:
        assert_close(found[name], expected[name])
    assert_close(ours.state_dict(), twin.state_dict())


def test_the_loss_of_a_mask_of_nothing_is_zero():
    theirs, ours = both(scales=(1, 4))
    x, mask, before = batch((10,)), torch.zeros(3, 10, dtype=torch.bool), copy.deepcopy(ours.state_dict())
    assert theirs(x, mask=mask)[2].isnan()
    found = step(ours, x, mask=mask)
    assert found["loss"] == 0 and (found["output"] == 0).all()
    assert all((each == -1).all() for each in found["indices"])
    UNCHANGED.same(ours.state_dict(), before)


def test_autocast():
    theirs, ours = both(scales=(1, 4))
    x = batch((10,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            theirs(x)
        found = step(ours, x)
    assert found["output"].dtype == found["grad of x"].dtype == torch.float32
    assert found["output"].isfinite().all()


def test_masks_of_bfloat16():
    theirs, ours = both(scales=(1, 4))
    x, mask = batch((10,)).bfloat16(), torch.rand(3, 10) < 0.5
    with pytest.raises(RuntimeError):
        theirs.bfloat16()(x, mask=mask)
    assert step(ours.bfloat16(), x, mask=mask)["output"].dtype == torch.bfloat16


def test_a_failed_call_leaves_the_state():
    theirs, ours = both(scales=(1, 4))
    x = batch((10,)).double()
    before = [copy.deepcopy(vq.state_dict()) for vq in (theirs, ours)]
    with pytest.raises(RuntimeError):
        theirs(x)
    assert (theirs.vq.codebook - before[0]["vq._codebook.embed"][0]).abs().max() > 0
    with pytest.raises(TypeError, match=r"HierarchicalVQ: x must be torch.float32 as the convolutions are"):
        ours(x)
    UNCHANGED.same(ours.state_dict(), before[1])


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_first_levels_alone_decode(levels):
    theirs, ours = both(scales=(1, 4, 8), nested_dropout=1.0)
    x = batch((8,))
    indices = ours.eval()(x)[1][:levels]
    if levels < 3:
        with pytest.raises(AssertionError):
            theirs.get_output_from_indices(indices)
    residual, output = x, 0
    for level, each in enumerate(indices):
        rows, _ = ours.pool_residual(residual, ours.level_shapes[level])
        INDICES.same(each, vqops.nearest(rows.mT.detach(), ours.vq.codebook, implementation="reference"))
        added = ours.upsample_to_full(ours.vq.codebook[each].mT, (8,), level)
        residual, output = residual - added, output + added
    assert_close(ours.get_output_from_indices(indices), output)


def test_one_graph():
    torch._dynamo.reset()
    theirs, ours = both(scales=(1, 4))
    with pytest.raises(Exception, match=r"(?i)data-dependent|graph break|unsupported"):
        torch.compile(theirs, fullgraph=True, backend="eager")(batch((10,)))
    torch._dynamo.reset()
    torch.compile(ours, fullgraph=True, backend="eager")(batch((10,)))


def test_given_indices():
    theirs, ours = both(scales=(1, 4))
    x = batch((10,), b=2)
    indices = ours.eval()(x)[1]
    with pytest.raises(AssertionError, match="not implemented"):
        theirs(x, indices)
    output, loss = ours(x, indices)
    assert_close(output, ours(x)[0])
    losses, residual = [], x
    for level, each in enumerate(indices):
        rows = ours.pool_residual(residual, ours.level_shapes[level])[0].mT
        logits = -torch.cdist(rows.double(), ours.vq.codebook.double())
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), each.flatten()))
        residual = residual - ours.upsample_to_full(ours.vq.codebook[each].mT, (10,), level)
    assert_close(loss, torch.stack(losses).mean().float(), rtol=1e-5, atol=1e-6)


def test_the_mean_of_a_cell_of_which_almost_nothing_is_kept():
    theirs, ours = both(scales=(1, 2))
    x, mask = torch.ones(1, DIM, 2**22), torch.zeros(1, 2**22, dtype=torch.bool)
    mask[0, 3] = True
    found, kept = ours.pool_residual(x, (2,), mask)
    assert_close(found, torch.tensor([1.0, 0.0]).expand(1, DIM, 2))
    INDICES.same(kept, torch.tensor([[True, False]]))
    assert theirs.pool_residual(x, (2,), mask)[0].max() < 0.5
