"""Residual quantizers on two processes: one with the joint batch, with one collective for all levels.

Run by pytest it starts the two processes, which run this file as a script.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from promises import INDICES, RANKS
from ranks import WORLD, results_of
from torch.testing import assert_close

import vqops

DIM, CODES, LEVELS, STEPS = 4, 16, 3, 3
SIZES = {"dim": DIM, "codebook_size": CODES, "num_quantizers": LEVELS}
DEAD, KMEANS = {"threshold_ema_dead_code": 1.5}, {"kmeans_init": True, "kmeans_iters": 4}
DROPOUT = {"quantize_dropout": True}
IN_TURN = {"quant_grad_frac": 0.5}
OTHER_SEED, MASKED, NAN, COMPILED, GROUPED, WRAPPED = "other seed", "masked", "nan", "compiled", "grouped", "in DDP"

# name: options, rows of each rank, specialities
CASES = {
    "plain": ({}, (30, 30), ()),
    "unequal": (DEAD, (50, 10), ()),
    "empty": (DEAD, (0, 40), ()),
    "empty in turn": (DEAD | IN_TURN, (40, 0), ()),
    "all empty": (DEAD, (0, 0), ()),
    "dead codes": (DEAD, (30, 25), (OTHER_SEED, MASKED)),
    "k-means": (KMEANS | DEAD, (60, 35), (OTHER_SEED,)),
    "k-means, few rows": (KMEANS | DEAD | IN_TURN, (3, 5), ()),
    "sizes": (DEAD | {"codebook_size": (4, 30, 9)}, (30, 20), (NAN, OTHER_SEED)),
    "shared": (KMEANS | DEAD | {"shared_codebook": True}, (30, 20), (OTHER_SEED,)),
    "cosine": (KMEANS | DEAD | {"use_cosine_sim": True}, (30, 20), (NAN,)),
    "beam": (KMEANS | DEAD | {"beam_size": 3}, (30, 20), (OTHER_SEED,)),
    "groups": (KMEANS | DEAD | {"groups": 2}, (30, 20), (GROUPED, MASKED)),
    "in DDP": (KMEANS | DEAD | {"codebook_dim": 3}, (30, 40), (WRAPPED, OTHER_SEED)),
    "compiled": (DEAD, (60, 35), (COMPILED,)),
}
# Ranks agree on the levels that they use, but on others than one process draws.
AGREED = {
    "dropout": (DROPOUT | DEAD, (30, 20), (OTHER_SEED,)),
    "dropout of groups": (DROPOUT | {"groups": 2}, (30, 20), (OTHER_SEED, GROUPED)),
    "dropout, compiled": (DROPOUT, (30, 20), (OTHER_SEED, COMPILED)),
}


def batches(name: str, steps: int):
    """For each step, the rows of each rank."""
    _, sizes, special = (CASES | AGREED)[name]
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        rows = [torch.randn(size, DIM, generator=generator) for size in sizes]
        if NAN in special:
            rows[0][3:4, 1], rows[1][::2] = torch.inf, torch.nan
        yield rows


def train(name: str, rank: int | None) -> dict:
    """The state after the steps, as one of the ranks or (None) as one process with the joint batch."""
    options, _, special = (CASES | AGREED)[name]
    torch.manual_seed(0)
    vq = (vqops.GroupedResidualVQ if GROUPED in special else vqops.ResidualVQ)(**SIZES | options)
    run = torch.compile(vq, fullgraph=True, backend="aot_eager") if COMPILED in special and rank is not None else vq
    if WRAPPED in special and rank is not None:
        run = torch.nn.parallel.DistributedDataParallel(vq)
    torch.manual_seed(rank if rank and OTHER_SEED in special else 0)
    collectives, all_reduce, used = [], dist.all_reduce, []

    def counting(*arguments, **keywords):
        collectives.append(1)
        return all_reduce(*arguments, **keywords)

    for rows in batches(name, 12 if name in AGREED else STEPS):
        x = torch.cat(rows) if rank is None else rows[rank]
        if run is vq:
            dist.all_reduce = counting
        collectives.clear()
        _, indices, _ = run(x, mask=x[:, 0] > -0.5 if MASKED in special else None)
        dist.all_reduce = all_reduce
        used.append((indices.flatten(0, -2) >= 0).any(0))
    return vq.state_dict() | {"collectives": len(collectives), "used": torch.stack(used)}


def train_after_failures(rank: int) -> torch.Tensor:
    """The levels of each step, on ranks of which one fails before a collective and tries again."""
    torch.manual_seed(rank)
    vq, used = vqops.ResidualVQ(**SIZES | {"num_quantizers": 8, "quantize_dropout": True, "codebook_dim": 3}), []
    forward = vq.project_out.forward

    def fail(*_):
        raise RuntimeError("out of memory")

    for step in range(8):
        x = torch.randn(20, DIM)
        if rank == 1 and step in (0, 3):
            vq.project_out.forward = fail
            with pytest.raises(RuntimeError, match="out of memory"):
                vq(x)
            vq.project_out.forward = forward
            with pytest.raises(ValueError):
                vq(x, mask=torch.ones(3, dtype=torch.bool))
        used.append((vq(x)[1][0] >= 0).sum())
    return torch.stack(used)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The states of the two ranks, by case."""
    return results_of(__file__, tmp_path_factory.mktemp("ranks"))


def of_codes(states: dict) -> dict:
    return {key: value for key, value in states.items() if key not in ("collectives", "used")}


def test_a_step_that_failed_on_one_rank_is_no_step(ranks):
    levels = [states["levels after failures"] for states in ranks]
    INDICES.same(*levels)
    assert len(levels[0].unique()) > 2


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(ranks, name):
    first, second = (states[name] for states in ranks)
    for key, value in of_codes(train(name, None)).items():
        RANKS.same(first[key], second[key], where=key)
        assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", AGREED)
def test_ranks_use_the_same_levels(ranks, name):
    first, second = (states[name] for states in ranks)
    INDICES.same(first["used"], second["used"])
    assert len(first["used"].unique(dim=0)) == LEVELS
    for key, value in of_codes(first).items():
        RANKS.same(value, second[key], where=key)


def test_one_collective_a_step(ranks):
    """With dead codes, a second one of a few numbers: which rows there are."""
    collectives = {name: ranks[0][name]["collectives"] for name in CASES | AGREED}
    assert collectives["plain"] == collectives["dropout of groups"] == 1
    for name in ("dead codes", "shared", "beam", "groups", "dropout"):
        assert collectives[name] == 2


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    states = {name: train(name, rank) for name in CASES | AGREED}
    torch.save(states | {"levels after failures": train_after_failures(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
