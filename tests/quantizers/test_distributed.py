"""Two processes are one with the joint batch, and their codebooks stay equal to the last bit.

Run by pytest it starts the two processes, which run this file as a script.
"""

import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from promises import RANKS
from ranks import WORLD, results_of
from torch.testing import assert_close

from vqops import VectorQuantize

DIM, CODES, STEPS = 4, 16, 3
EMA, DEAD = {"decay": 0.9}, {"threshold_ema_dead_code": 1.5}
KMEANS = {"kmeans_init": True, "kmeans_iters": 4}
HEADS = {"heads": 2, "codebook_dim": 2}
SEPARATE = HEADS | {"separate_codebook_per_head": True}
NAN, COMPILED, OTHER_SEED, MASKED, ACCUMULATED, WEIGHTED, GIVEN, EXPIRED, WRAPPED = (
    "nan", "compiled", "other seed", "masked", "accumulated", "weighted", "given indices", "expired", "in DDP"
)

# name: options, rows of each rank, specialities
CASES = {
    "ema": (EMA, (30, 30), ()),
    "unequal": (EMA, (50, 10), ()),
    "empty": (EMA | DEAD, (0, 40), ()),
    "all empty": (EMA | DEAD, (0, 0), ()),
    "cosine": (EMA | DEAD | {"use_cosine_sim": True}, (20, 40), ()),
    "nan rows": (EMA | DEAD, (30, 30), (NAN,)),
    "dead codes": (EMA | DEAD, (30, 25), ()),
    "fewer rows than codes": (EMA | DEAD, (5, 6), ()),
    "other seeds": (EMA | DEAD, (30, 25), (OTHER_SEED,)),
    "dead codes without sync_kmeans": (EMA | DEAD | {"sync_kmeans": False}, (30, 25), (OTHER_SEED,)),
    "k-means": (EMA | KMEANS, (60, 35), ()),
    "k-means, empty": (EMA | KMEANS, (60, 0), ()),
    "k-means, few rows": (EMA | KMEANS, (3, 5), ()),
    "learnable": ({"learnable_codebook": True} | DEAD | KMEANS, (60, 35), ()),
    "compiled": (EMA | DEAD | KMEANS, (60, 35), (COMPILED,)),
    "heads": (EMA | DEAD | KMEANS | HEADS, (60, 35), (MASKED,)),
    "separate heads": (EMA | DEAD | KMEANS | SEPARATE, (0, 60), (MASKED, NAN, OTHER_SEED)),
    "accumulated": (EMA | DEAD, (30, 0), (ACCUMULATED,)),
    "weighted": (EMA | SEPARATE, (30, 20), (WEIGHTED,)),
    "manual": (EMA | DEAD | {"manual_ema_update": True}, (30, 20), ()),
    "only dead codes": (DEAD | {"ema_update": False}, (30, 20), (OTHER_SEED,)),
    "given indices": (EMA | DEAD | SEPARATE, (30, 20), (GIVEN, MASKED)),
    "in DDP": (EMA | DEAD | KMEANS | {"codebook_dim": 3}, (30, 40), (WRAPPED, OTHER_SEED)),
    "expired": (DEAD | SEPARATE, (0, 20), (EXPIRED, OTHER_SEED)),
    "affine": (EMA | {"affine_param": True, "sync_affine_param": True, "threshold_ema_dead_code": 0.8}, (30, 50), ()),
    "in place": (
        {"learnable_codebook": True, "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.5)},
        (30, 30),
        (),
    ),
    "everything": (
        EMA | DEAD | KMEANS | HEADS | {"use_cosine_sim": True, "codebook_dim": 3}, (60, 35), (NAN, MASKED, OTHER_SEED)
    ),
}
# Without one batch: k-means on the rows of the fullest rank, or nothing exchanged at all.
APART = {
    "k-means apart": (EMA | KMEANS | DEAD | {"sync_kmeans": False}, (20, 60), (OTHER_SEED,)),
    "k-means alone": (KMEANS | {"sync_kmeans": False, "freeze_codebook": True}, (20, 60), (OTHER_SEED,)),
    "heads apart": (EMA | KMEANS | DEAD | SEPARATE | {"sync_kmeans": False}, (0, 60), (OTHER_SEED, MASKED)),
    "codebook apart": (EMA | KMEANS | DEAD | {"sync_codebook": False}, (40, 60), ()),
}


def batches(name: str):
    """For each step, the rows of each rank."""
    _, sizes, special = (CASES | APART)[name]
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        rows = [torch.randn(size, DIM, generator=generator) for size in sizes]
        if NAN in special:
            rows[0][3:4, 1], rows[1][::2] = torch.inf, torch.nan
        yield rows


def call(vq, special, x: torch.Tensor, number: int) -> None:
    """Step `number` of the case with the rows x, all of it decided by the values of the rows."""
    arguments = {}
    if MASKED in special:
        arguments["mask"] = x[:, 0] > -0.5
    if ACCUMULATED in special:
        arguments["accum_ema_update"] = number < STEPS - 1
    if WEIGHTED in special:
        arguments["ema_update_weight"] = lambda sums, counts: counts / (1 + counts)
    if GIVEN in special:
        vq.update_indices(x, (x.view(-1, 2, 2).sum(-1) * 2).round().long().clamp(-1, CODES - 1), **arguments)
    elif EXPIRED in special:
        vq._codebook.cluster_size[:, number::STEPS] = 0
        vq.expire_codes_(x)
    else:
        vq(x, **arguments)


def train(name: str, rank: int | None, rows_of=torch.cat, seed: int = 0) -> dict:
    """The state after the steps, as one of the ranks or (None) as one process with the joint batch."""
    options, _, special = (CASES | APART)[name]
    torch.manual_seed(0)
    vq = VectorQuantize(DIM, CODES, **options)
    run = torch.compile(vq, fullgraph=True, backend="aot_eager") if COMPILED in special and rank is not None else vq
    if WRAPPED in special and rank is not None:
        run = torch.nn.parallel.DistributedDataParallel(vq)
    torch.manual_seed(rank if rank and OTHER_SEED in special else seed)
    collectives = 0
    all_reduce = dist.all_reduce

    def counting(*arguments, **keywords):
        nonlocal collectives
        collectives += 1
        return all_reduce(*arguments, **keywords)

    for number, rows in enumerate(batches(name)):
        if run is vq:
            dist.all_reduce = counting
        collectives = 0
        call(run, special, rows_of(rows) if rank is None else rows[rank], number)
        dist.all_reduce = all_reduce
    return vq.state_dict() | {"collectives": collectives}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The states of the two ranks, by case."""
    return results_of(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(ranks, name):
    first, second = (states[name] for states in ranks)
    joint = train(name, None)
    for key, value in joint.items():
        if key != "collectives":
            RANKS.same(first[key], second[key], where=key)
            assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["k-means apart", "heads apart"])
def test_ranks_stay_equal_with_dead_codes_whatever_the_flags(ranks, name):
    """The rest of the flags is among the cases above."""
    first, second = (states[name] for states in ranks)
    for key, value in first.items():
        RANKS.same(value, second[key], where=key)
    assert first["_codebook.initted"] and len(first["_codebook.embed"][0].unique(dim=0)) == CODES


def test_k_means_of_the_fullest_rank(ranks):
    alone = train("k-means alone", None, rows_of=lambda rows: rows[1], seed=1)
    for states in ranks:
        for key, value in states["k-means alone"].items():
            if key != "collectives":
                assert_close(value, alone[key])


def test_a_codebook_a_rank(ranks):
    """sync_codebook=False: each rank is a process of its own, and waits for nobody."""
    for rank in range(WORLD):
        alone = train("codebook apart", None, rows_of=lambda rows, rank=rank: rows[rank])
        assert ranks[rank]["codebook apart"].pop("collectives") == 0
        for key, value in ranks[rank]["codebook apart"].items():
            assert_close(value, alone[key])


def test_one_collective_a_step(ranks):
    """With dead codes, a second one of a few numbers: which rows there are."""
    assert ranks[0]["ema"]["collectives"] == 1
    assert ranks[0]["weighted"]["collectives"] == 1
    assert ranks[0]["dead codes"]["collectives"] == 2
    assert ranks[0]["everything"]["collectives"] == 2


def test_an_eval_call_on_one_rank_waits_for_nobody(ranks):
    """Before the first batch it is an error, at once; an `initted` that was written in place is enough to go on."""
    assert ranks[1]["alone"]["message"].startswith(
        "VectorQuantize: kmeans_init waits for a first batch in training, of all 2 ranks"
    )
    assert ranks[1]["alone"]["indices"].max() < CODES


def evaluate_alone() -> dict:
    vq, x = VectorQuantize(DIM, CODES, kmeans_init=True).eval(), torch.randn(20, DIM)
    with pytest.raises(RuntimeError) as refused:
        vq(x)
    vq._codebook.initted.fill_(True)  # as a copy of buffers does
    return {"message": str(refused.value), "indices": vq(x)[1]}


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    states = {name: train(name, rank) for name in CASES | APART}
    if rank == 1:
        states["alone"] = evaluate_alone()
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
