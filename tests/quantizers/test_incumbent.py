"""Against the installed vector-quantize-pytorch: the same results wherever it is right."""

import itertools
from functools import partial

import pytest
import torch
from promises import INDICES
from side_by_side import (
    CLOSE,
    CODES,
    DIM,
    GRADIENTS,
    HEADS,
    LAYOUTS,
    METRICS,
    assert_same_state,
    assert_same_step,
    both,
    incumbent,
)
from torch.testing import assert_close

from vqops import VectorQuantize
from vqops.quantizers.codebook import kmeans
from vqops.quantizers.codebook.random_rows import RandomRows

PRODUCT = list(itertools.product(METRICS, LAYOUTS, HEADS, GRADIENTS))
# Every pair of two options once or more.
SAMPLE = [case for i, case in enumerate(PRODUCT) if i % 7 == 0]


def case_list(cases):
    return pytest.mark.parametrize("metric, layout, heads, gradient", cases, ids=["-".join(case) for case in cases])


def several_steps_and_eval(metric, layout, heads, gradient):
    shape, options = LAYOUTS[layout]
    theirs, ours = both(**HEADS[heads], **GRADIENTS[gradient], **options, **METRICS[metric])
    for _ in range(3):
        assert_same_step(theirs, ours, torch.randn(shape), return_loss_breakdown=True)
    theirs.eval(), ours.eval()
    if metric != "learnable":
        assert_same_step(theirs, ours, torch.randn(shape))
    indices = ours(torch.randn(shape))[1]
    if "shared" not in heads:  # theirs leaves the heads apart
        CLOSE(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
        if "projected" not in heads or not options:  # with channels first, theirs projects the wrong axis
            CLOSE(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))


@case_list(SAMPLE)
def test_several_steps_and_eval(metric, layout, heads, gradient):
    several_steps_and_eval(metric, layout, heads, gradient)


@pytest.mark.slow
@case_list([case for case in PRODUCT if case not in SAMPLE])
def test_several_steps_and_eval_of_every_combination(metric, layout, heads, gradient):
    several_steps_and_eval(metric, layout, heads, gradient)


@pytest.mark.parametrize("options", [{"decay": 0.99}, {"decay": 0.0}, {"decay": 1.0}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_averages(options, use_cosine_sim):
    theirs, ours = both(use_cosine_sim=use_cosine_sim, **options)
    for _ in range(6):
        # Rows for every code: with decay=0 a code without one becomes 0 / 0 there.
        x = torch.cat([ours.codebook + 0.01 * torch.randn(CODES, DIM), torch.randn(80, DIM)])
        assert_same_step(theirs, ours, x)


@pytest.mark.parametrize("commitment_weight", [0.0, 0.25])
@pytest.mark.parametrize("metric", METRICS)
def test_commitment_weight(commitment_weight, metric):
    theirs, ours = both(commitment_weight=commitment_weight, **METRICS[metric])
    assert_same_step(theirs, ours, torch.randn(50, DIM))


@pytest.mark.parametrize("metric", METRICS)
def test_freezing(metric):
    theirs, ours = both(freeze_codebook=True, **METRICS[metric])
    assert_same_step(theirs, ours, torch.randn(50, DIM))
    assert_same_step(theirs, ours, torch.randn(50, DIM), freeze_codebook=False)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("metric", ["euclidean", "learnable"])
@pytest.mark.parametrize("layout", ["rows", "channel_first"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_masks(metric, layout, gradient, padding):
    """Where theirs trains with a mask: one head, no projection, and not cosine, whose loss compares unlike vectors."""
    shape, options = LAYOUTS[layout]
    theirs, ours = both(
        return_zeros_for_masked_padding=padding, **METRICS[metric], **options, **GRADIENTS[gradient]
    )
    for _ in range(2):
        assert_same_step(theirs, ours, torch.randn(shape), mask=torch.rand(3, 40) < 0.7)
    if layout == "rows":  # with channels first, theirs takes the features for the length
        assert_same_step(theirs, ours, torch.randn(shape), lens=torch.tensor([40, 0, 13]))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_masks_in_eval(metric, heads):
    theirs, ours = both(**METRICS[metric], **HEADS[heads])
    theirs.eval(), ours.eval()
    assert_same_step(theirs, ours, torch.randn(3, 40, DIM), mask=torch.rand(3, 40) < 0.7)


UPDATES = {
    "off": ({"ema_update": False}, [{}, {"ema_update": True}, {}]),
    "off_for_once": ({}, [{"ema_update": False}, {}]),
    "manual": ({"manual_ema_update": True}, [{}, {}]),
    "accumulated": ({}, [{"accum_ema_update": True}, {"accum_ema_update": True}, {}, {}]),
    "weighted": ({}, [{"ema_update_weight": torch.linspace(0, 1, CODES)}, {}]),
    "weighted_by_a_function": ({}, [{"ema_update_weight": lambda sums, counts: counts / (1 + counts)}, {}]),
}


@pytest.mark.parametrize("heads", ["one", "shared", "separate"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("update", UPDATES)
def test_ways_to_update(update, metric, heads):
    options, steps = UPDATES[update]
    theirs, ours = both(**options, **METRICS[metric], **HEADS[heads])
    if (update, heads) == ("weighted", "separate"):  # theirs wants a weight for each head
        steps = [{"ema_update_weight": torch.rand(2, CODES)}]
    for arguments in steps:
        assert_same_step(theirs, ours, torch.randn(3, 40, DIM), **arguments)
    assert theirs.ema_update == ours.ema_update
    for vq in (theirs, ours):
        vq._codebook.update_ema()
    assert_same_state(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("update", [name for name in UPDATES if name != "weighted"])
def test_ways_to_update_every_combination(update, metric, heads, layout):
    shape, layouts = LAYOUTS[layout]
    options, steps = UPDATES[update]
    theirs, ours = both(**options, **METRICS[metric], **HEADS[heads], **layouts, decay=0.9, rotation_trick=False)
    for arguments in steps:
        assert_same_step(theirs, ours, torch.randn(shape), **arguments)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "layout, heads",
    [
        (layout, heads)
        for layout, heads in itertools.product(LAYOUTS, HEADS)
        if layout not in ("image", "volume") or HEADS[heads].get("heads", 1) == 1  # theirs fails on their indices
    ],
)
def test_updates_with_given_indices(layout, metric, heads):
    shape, options = LAYOUTS[layout]
    theirs, ours = both(**METRICS[metric], **HEADS[heads], **options)
    x = torch.randn(shape)
    indices = torch.randint_like(ours.eval()(x)[1], CODES)
    if layout == "single":
        shape, x, indices = (1, *shape), x.unsqueeze(0), indices.unsqueeze(0)  # theirs can't take one token a sample
    for vq in (theirs, ours):
        vq.update_indices(x, indices)
        vq.update_ema_indices(x, indices, **({"mask": torch.rand(shape[:2]) < 2} if layout == "rows" else {}))
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("gradient", ["rotation", "straight_through"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metric", METRICS)
def test_topk(metric, layout, gradient):
    shape, options = LAYOUTS[layout]
    theirs, ours = both(**METRICS[metric], **GRADIENTS[gradient], **options, commitment_weight=0.5)
    mask = {"mask": torch.rand(3, 40) < 0.7} if layout in ("rows", "channel_first") else {}
    for arguments in ({"topk": 3}, {"topk": CODES + 1}, {"topk": 1} | mask):
        assert_same_step(theirs, ours, torch.randn(shape), **arguments)
    x = torch.randn(shape)
    theirs.eval(), ours.eval()
    for a, b in zip(ours(x, topk=3, **mask), theirs(x, topk=3, **mask), strict=True):
        CLOSE(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("metric", METRICS)
def test_cross_entropy_of_given_indices(metric, heads, training):
    theirs, ours = both(**METRICS[metric], **HEADS[heads])
    x = torch.randn(3, 40, DIM)
    indices = torch.randint_like(ours.eval()(x)[1], -1, CODES)
    results = []
    for vq in (theirs, ours):
        given = x.clone().requires_grad_()
        # Without freezing, theirs computes the gradient with the codes that the update has made since.
        quantized, loss = vq.train(training)(given, indices=indices, freeze_codebook=metric != "learnable")
        loss.backward()
        grads = [p.grad for name, p in vq.named_parameters() if "project_in" in name]
        if training and metric == "learnable":
            grads.append(vq._codebook.embed.grad)
        results.append((quantized, loss, given.grad, grads))
    (quantized, loss, grad, grads), (our_quantized, our_loss, our_grad, our_grads) = results
    CLOSE(our_loss, loss)
    CLOSE(our_grad, grad)
    CLOSE(our_grads, grads)
    if heads == "one":  # theirs returns the others without joining heads or projecting
        CLOSE(our_quantized, quantized)
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("metric", METRICS)
def test_dead_codes(metric):
    """The same codes die, with the same counts, and restart from rows of the batch."""
    theirs, ours = both(threshold_ema_dead_code=1.9, **METRICS[metric])
    x = torch.randn(3, 40, DIM)
    dead = None
    for vq in (theirs, ours):
        vq(x)
        restarted = vq._codebook.cluster_size[0] == 1.9
        dead = restarted if dead is None else dead
        assert restarted.any()
        INDICES.same(restarted, dead)
        rows = torch.nn.functional.normalize(x, dim=-1) if metric == "cosine" else x
        distance = (vq.codebook[dead][:, None] - rows.flatten(0, 1)).norm(dim=-1)
        assert (distance.min(1).values < 1e-6).all()
        CLOSE(vq._codebook.embed_avg[0, dead], 1.9 * vq.codebook[dead])
    for name, value in ours._codebook.state_dict().items():
        if value.dim():
            CLOSE(value[0, ~dead], getattr(theirs._codebook, name)[0, ~dead])


@pytest.mark.parametrize("heads", ["one", "projected", "separate", "separate_projected"])
@pytest.mark.parametrize("metric", METRICS)
def test_k_means_from_the_same_start(metric, heads, monkeypatch):
    theirs, ours = both(kmeans_init=True, **HEADS[heads], **METRICS[metric])
    theirs._codebook.sample_fn = lambda rows, num: rows[:, :num]

    def first_rows(x, valid, num_codes, sync):
        here = torch.ones(len(x), num_codes, dtype=torch.bool)
        return RandomRows(x[:, :num_codes].float(), here)

    monkeypatch.setattr(kmeans, "random_rows", first_rows)
    x = torch.randn(3, 100, DIM)
    for _ in range(3):
        assert_same_step(theirs, ours, x)
    assert theirs._codebook.initted and ours._codebook.initted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    theirs, ours = both()
    x = torch.randn(50, DIM).to(dtype)
    (quantized, indices, loss), (our_quantized, our_indices, our_loss) = theirs(x), ours(x)
    INDICES.same(indices, our_indices)
    assert our_quantized.dtype == dtype
    assert_close(our_quantized, quantized)
    assert our_loss.dtype == loss.dtype
    assert_close(our_loss.to(dtype), loss.to(dtype))  # theirs adds up in the dtype of x
    assert_same_state(theirs, ours)


@pytest.mark.parametrize(
    "options", [*HEADS.values(), {"kmeans_init": True}, {"learnable_codebook": True}, {"use_cosine_sim": True}], ids=str
)
@pytest.mark.parametrize("trained", [False, True])
def test_checkpoints_load_in_both_directions(options, trained, tmp_path):
    own = partial(VectorQuantize, DIM, CODES)
    for source, target in ((incumbent, own), (own, incumbent)):
        written, read = source(**options), target(**options)
        if trained:
            written(torch.randn(100, DIM))
        torch.save(written.state_dict(), tmp_path / "model.pt")
        read.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        x = torch.randn(50, DIM)
        if trained or "kmeans_init" not in options:
            a, b = written.eval()(x), read.eval()(x)
            INDICES.same(a[1], b[1])
            CLOSE(a[0], b[0])
        else:
            assert not read._codebook.initted
            read(x)
            assert read._codebook.initted

