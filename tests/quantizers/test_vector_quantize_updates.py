"""How the codes of VectorQuantize are updated: averages moved, kept back, weighted; given indices; expired codes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from promises import INDICES, REPEATS, UNCHANGED
from quantizers import state
from torch.testing import assert_close

from vqops import VectorQuantize
from vqops.quantizers.codebook import codebook as codebook_module

DIM, CODES = 4, 8
HEADS = {
    "one": {},
    "shared": {"heads": 2, "codebook_dim": 2},
    "separate": {"heads": 2, "separate_codebook_per_head": True},
}


def test_the_decay_can_be_set_between_steps():
    vq, twin = VectorQuantize(3, 8, decay=0.5), VectorQuantize(3, 8, decay=0.9)
    twin.load_state_dict(vq.state_dict())
    vq.decay = 0.9
    x = torch.randn(40, 3)
    vq(x), twin(x)
    assert vq.decay == 0.9
    REPEATS.same(vq.codebook, twin.codebook)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        vq.decay = 1.5
    assert vq.decay == 0.9


def assert_same(vq, other, **tolerances):
    assert_close(vq.state_dict(), other if isinstance(other, dict) else other.state_dict(), **tolerances)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_an_accumulated_step_is_a_step_with_all_batches(heads, use_cosine_sim):
    vq = VectorQuantize(DIM, CODES, use_cosine_sim=use_cosine_sim, **HEADS[heads])
    joint = copy.deepcopy(vq)
    for _ in range(2):
        parts = [torch.randn(n, DIM) for n in (20, 0, 7, 30)]
        before = state(vq)
        for part in parts[:-1]:
            vq(part, accum_ema_update=True)
            UNCHANGED.same(vq.state_dict(), before)
        vq(parts[-1])
        joint(torch.cat(parts))
        assert_same(vq, joint, rtol=1e-5, atol=1e-6)


def test_an_accumulated_step_of_an_empty_batch():
    vq, joint = VectorQuantize(DIM, CODES), VectorQuantize(DIM, CODES)
    joint.load_state_dict(vq.state_dict())
    x = torch.randn(20, DIM)
    vq(x, accum_ema_update=True)
    vq(x[:0])
    joint(x)
    assert_same(vq, joint)


def test_a_new_state_forgets_what_was_accumulated():
    vq = VectorQuantize(DIM, CODES)
    twin = copy.deepcopy(vq)
    x = torch.randn(20, DIM)
    vq(x + 5, accum_ema_update=True)
    vq.load_state_dict(twin.state_dict())
    vq(x), twin(x)
    assert_same(vq, twin)
    vq(x + 5, accum_ema_update=True)
    vq.codebook = twin.codebook = torch.randn(CODES, DIM)
    vq(x), twin(x)
    assert_same(vq, twin)


def test_what_was_accumulated_is_copied():
    vq = VectorQuantize(DIM, CODES)
    x = torch.randn(20, DIM)
    vq(x, accum_ema_update=True)
    twin = copy.deepcopy(vq.bfloat16())
    assert {t.dtype for t in twin._codebook.pending} == {torch.float32}
    vq(x), twin(x)
    assert_same(vq, twin)


@pytest.mark.parametrize("heads", HEADS)
def test_weights_scale_the_step_of_each_code(heads):
    vq = VectorQuantize(DIM, CODES, decay=0.5, **HEADS[heads])
    before, full = state(vq), copy.deepcopy(vq)
    x = torch.randn(50, DIM)
    weight = torch.linspace(0, 1, CODES)
    full(x)
    vq(x, ema_update_weight=weight)
    for name in ("cluster_size", "embed_avg"):
        old, new = before[f"_codebook.{name}"], getattr(full._codebook, name)
        w = weight if name == "cluster_size" else weight.unsqueeze(-1)
        assert_close(getattr(vq._codebook, name), old + w * (new - old))


def test_a_function_of_the_sums_gives_the_weights():
    vq = VectorQuantize(DIM, CODES)
    twin = copy.deepcopy(vq)
    x = torch.randn(50, DIM)
    seen = []

    def weight(sums, counts):
        seen.append((sums, counts))
        return (counts > 5).float()

    indices = vq(x, ema_update_weight=weight)[1]
    ((sums, counts),) = seen
    INDICES.same(counts, F.one_hot(indices, CODES).sum(0).float()[None])
    assert_close(sums, (F.one_hot(indices, CODES).float().T @ x)[None])
    twin(x, ema_update_weight=(counts > 5).float())
    assert_same(vq, twin)


def test_a_weight_that_is_not_a_number_leaves_the_code():
    vq = VectorQuantize(DIM, CODES)
    twin = copy.deepcopy(vq)
    weight = torch.ones(CODES)
    weight[3] = torch.nan
    x = torch.randn(50, DIM)
    vq(x, ema_update_weight=weight)
    twin(x, ema_update_weight=weight.nan_to_num(0))
    assert_same(vq, twin)


def test_manual_updates_move_the_codes_when_told():
    vq = VectorQuantize(DIM, CODES, manual_ema_update=True)
    codes = vq.codebook.clone()
    for _ in range(3):
        vq(torch.randn(50, DIM))
        UNCHANGED.same(vq.codebook, codes)
    size, average = vq._codebook.cluster_size, vq._codebook.embed_avg
    total = size.sum()
    vq._codebook.update_ema()
    smoothed = (size + 1e-5) / (total + CODES * 1e-5) * total
    assert_close(vq.codebook, average[0] / smoothed[0, :, None])


def test_without_updates_only_dead_codes_move():
    vq = VectorQuantize(DIM, CODES, ema_update=False)
    before = state(vq)
    vq(torch.randn(50, DIM))
    UNCHANGED.same(vq.state_dict(), before)
    assert vq.ema_update is False
    vq(torch.randn(50, DIM), ema_update=True)
    assert (vq.codebook != before["_codebook.embed"][0]).any()
    vq = VectorQuantize(DIM, CODES, ema_update=False, threshold_ema_dead_code=2.5)
    codes, x = vq.codebook.clone(), torch.randn(50, DIM)
    vq(x)
    restarted = vq._codebook.cluster_size[0] == 2.5
    assert 0 < restarted.sum() < CODES
    UNCHANGED.same(vq.codebook[~restarted], codes[~restarted])
    assert torch.isin(vq.codebook[restarted], x).all()


def test_a_learnable_codebook_has_no_averages():
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True)
    before = state(vq)
    x = torch.randn(50, DIM)
    vq.update_indices(x, torch.zeros(50, dtype=torch.int64))
    UNCHANGED.same(vq.state_dict(), before)
    with pytest.raises(RuntimeError, match="learnable_codebook is True"):
        vq._codebook.update_ema()


# Given indices


@pytest.mark.parametrize(
    "options", [{}, {"use_cosine_sim": True}, {"codebook_dim": 3}, {"manual_ema_update": True}], ids=str
)
@pytest.mark.parametrize("heads", HEADS)
def test_given_indices_update_as_forward_does(heads, options):
    vq = VectorQuantize(DIM, CODES, accept_image_fmap=True, **HEADS[heads] | options)
    twin = copy.deepcopy(vq).eval()
    x = torch.randn(2, DIM, 5, 6)
    x[0, 1, 2, 3] = torch.nan
    mask = torch.rand(2, 5, 6) < 0.7
    mask[0, 2, 3] = True
    indices = vq(x, mask=mask)[1]
    twin.update_indices(x, indices)
    assert_same(twin, vq)
    everything = indices.clamp_min(0)
    vq.update_indices(x, indices)
    twin.update_ema_indices(x, everything, mask=mask)
    assert_same(twin, vq)


def test_given_indices_that_do_not_fit():
    vq = VectorQuantize(DIM, CODES)
    before = state(vq)
    x = torch.randn(5, DIM)
    for indices, error in ((torch.full((5,), 8), IndexError), (torch.zeros(4, dtype=torch.int64), ValueError)):
        with pytest.raises(error, match="indices"):
            vq.update_indices(x, indices)
    with pytest.raises(ValueError, match="mask must have shape"):
        vq.update_indices(x, torch.zeros(5, dtype=torch.int64), torch.ones(4, dtype=torch.bool))
    UNCHANGED.same(vq.state_dict(), before)


# Expired codes


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_expired_codes_restart_from_the_vectors(heads, use_cosine_sim):
    options = {"threshold_ema_dead_code": 2.0, "use_cosine_sim": use_cosine_sim, "accept_image_fmap": True}
    vq = VectorQuantize(DIM, CODES, **HEADS[heads], **options)
    vq._codebook.cluster_size.fill_(3)
    vq._codebook.cluster_size[:, ::2] = 1
    before = state(vq)
    x = torch.randn(2, DIM, 5, 6)
    x[:, 0, :, ::2] = torch.nan
    vq.eval().expire_codes_(x)
    UNCHANGED.same(vq.state_dict(), before)
    vq.train().expire_codes_(x)
    size, codes = vq._codebook.cluster_size, vq._codebook.embed
    assert (size[:, ::2] == 2).all() and (size[:, 1::2] == 3).all()
    UNCHANGED.same(codes[:, 1::2], before["_codebook.embed"][:, 1::2])
    rows = vq._layout.rows(x, vq.project_in).detach()
    rows = F.normalize(rows, dim=-1) if use_cosine_sim else rows
    distance = (codes[:, ::2, None] - rows[:, None]).norm(dim=-1).nan_to_num(torch.inf).amin(-1)
    assert (distance < 1e-6).all()
    assert_close(vq._codebook.embed_avg[:, ::2], 2 * codes[:, ::2])


def test_nothing_expires_without_a_threshold_or_a_row():
    for vq, x in (
        (VectorQuantize(DIM, CODES), torch.randn(5, DIM)),
        (VectorQuantize(DIM, CODES, threshold_ema_dead_code=2), torch.randn(0, DIM)),
        (VectorQuantize(DIM, CODES, threshold_ema_dead_code=2), torch.full((5, DIM), torch.nan)),
    ):
        before = state(vq)
        vq.expire_codes_(x)
        UNCHANGED.same(vq.state_dict(), before)


# Failures


def fail(*_, **__):
    raise RuntimeError("lost rank")


@pytest.mark.parametrize("name", ["cluster_size", "embed_avg", "embed"])
def test_an_expanded_buffer_is_an_error_before_any_change(name):
    vq = VectorQuantize(3, 8)
    given = vq.state_dict()
    given[f"_codebook.{name}"] = given[f"_codebook.{name}"][:, :1].expand_as(given[f"_codebook.{name}"])
    vq.load_state_dict(given, assign=True)
    before = state(vq)
    with pytest.raises(ValueError, match=f"{name} is expanded, so its elements share memory"):
        vq(torch.randn(2, 9, 3))
    UNCHANGED.same(vq.state_dict(), before)


@pytest.mark.parametrize("name", ["cluster_size", "embed_avg"])
def test_a_buffer_that_was_left_behind_is_an_error(name):
    """Not a step of nothing, which is what PyTorch makes of ops on the meta device."""
    vq = VectorQuantize(3, 8)
    setattr(vq._codebook, name, getattr(vq._codebook, name).to("meta"))
    before = vq.codebook.clone()
    with pytest.raises(ValueError, match=r"embed_avg is on (meta, x is on cpu|cpu, x is on meta)"):
        vq(torch.randn(2, 9, 3))
    UNCHANGED.same(vq.codebook, before)


@pytest.mark.parametrize("lost", ["project_out", "weight", "move_averages_"])
@pytest.mark.parametrize("options", [{}, {"learnable_codebook": True}], ids=str)
def test_a_first_call_that_fails_takes_its_k_means_back(options, lost, monkeypatch):
    vq = VectorQuantize(3, 8, codebook_dim=2, kmeans_init=True, threshold_ema_dead_code=2, **options)
    before, x = state(vq), torch.randn(9, 3)
    with monkeypatch.context() as patch:
        if lost == "project_out":
            patch.setattr(vq.project_out, "forward", fail)
        if lost == "move_averages_":
            patch.setattr(codebook_module, lost, fail)
        with pytest.raises(RuntimeError, match="lost rank"):
            vq(x, ema_update_weight=fail if lost == "weight" else None)
    UNCHANGED.same(vq.state_dict(), before)
    vq(x)
    assert vq._codebook.initted and (vq.codebook != before["_codebook.embed"][0]).any()


def test_a_failed_step_keeps_what_was_accumulated(monkeypatch):
    vq = VectorQuantize(DIM, CODES)
    twin, x = copy.deepcopy(vq), torch.randn(20, DIM)
    for module in (vq, twin):
        module(x, accum_ema_update=True)
    with pytest.raises(RuntimeError, match="lost rank"):
        vq(x, ema_update_weight=fail)
    vq(x), twin(x)
    assert_same(vq, twin)
