"""HierarchicalVQ in two processes is that of one with the joint batch, and leaves out the same levels.

Run by pytest it starts the two processes, which run this file as a script.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from hierarchy import CODES, DIM
from promises import RANKS
from ranks import WORLD, results_of
from torch.testing import assert_close

from vqops import HierarchicalVQ

STEPS = 8
OPTIONS = {"dim": DIM, "codebook_size": CODES, "scales": (1, 4, 8), "decay": 0.8, "share_quant_resi": 2}
DROPPED = {"nested_dropout": 0.7}
FIXED = {"kmeans_init": False, "threshold_ema_dead_code": 0}
CASES = {
    "plain": FIXED | DROPPED,
    "separate": FIXED | DROPPED | {"shared_codebook": False},
    "k-means and dead codes": DROPPED,
    "masked": DROPPED | {"threshold_ema_dead_code": 1.0},
    "compiled": FIXED | DROPPED,
    "in DDP": DROPPED,
}
APART = DROPPED | FIXED | {"sync_codebook": False}


def train(options: dict, name: str, rank: int | None, seeds: list | None = None) -> dict:
    """What comes of the steps as one of the ranks or (None) as one process with the joint batch and these seeds."""
    torch.manual_seed(0)
    vq = HierarchicalVQ(**OPTIONS, **options)
    run = vq
    if name == "compiled" and rank is not None:
        run = torch.compile(vq, fullgraph=True, backend="aot_eager")
    if name == "in DDP" and rank is not None:
        run = torch.nn.parallel.DistributedDataParallel(vq)
    data, found = torch.Generator().manual_seed(7), {"seeds": [], "cutoffs": [], "outputs": [], "collectives": []}
    torch.manual_seed(rank or 0)  # ranks that are seeded differently
    all_reduce, count = dist.all_reduce, 0

    def counting(*arguments, **keywords):
        nonlocal count
        count += 1
        return all_reduce(*arguments, **keywords)

    for number in range(STEPS):
        x = torch.randn(WORLD * 20, DIM, 8, generator=data)
        mask = torch.rand(WORLD * 20, 8, generator=data) < (0.7 if name == "masked" else 2)
        if rank is not None:
            x, mask = (t.chunk(WORLD)[rank] for t in (x, mask))
        if seeds is not None:
            vq.seeds.draw = lambda *_, number=number: drawn_once(seeds, number)
        if run is vq:
            dist.all_reduce = counting
        count = 0
        vq.zero_grad()
        output, _, loss, *cutoff = run(x, mask=mask, return_cutoff=run is vq)
        dist.all_reduce = all_reduce
        (output.square().mean() + loss).backward()
        found["outputs"].append(output.detach())
        found["cutoffs"] += cutoff
        found["collectives"].append(count)
        found["seeds"].append(vq.seeds.last)
    found["grads"] = [p.grad for p in vq.parameters()]
    return found | {"state": vq.state_dict()}


def drawn_once(seeds: list, number: int) -> torch.Tensor:
    """As one of the ranks does: in the first step it draws its part of the seed."""
    if number == 0:
        torch.randint(2**31, ())
    return seeds[number]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(ranks, name):
    both = [results[name] for results in ranks]
    seeds = both[0]["seeds"]
    RANKS.same(both[1]["seeds"], seeds)
    assert len({int(seed) for seed in seeds}) == STEPS
    joint = train(CASES[name], name, None, seeds)
    for key, value in joint["state"].items():
        RANKS.same(both[0]["state"][key], both[1]["state"][key], where=key)
        assert_close(both[0]["state"][key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for number, expected in enumerate(joint["outputs"]):
        assert_close(torch.cat([each["outputs"][number] for each in both]), expected, rtol=1e-4, atol=1e-5)
    if both[0]["cutoffs"]:
        assert both[0]["cutoffs"] == both[1]["cutoffs"] == joint["cutoffs"]
        assert len(set(joint["cutoffs"])) == 3
    if name != "masked":  # where the mean of the ranks' means is another
        for *grads, expected in zip(*(each["grads"] for each in both), joint["grads"], strict=True):
            assert_close(sum(grads) / WORLD, expected, rtol=1e-3, atol=1e-5)


def test_one_collective_more_in_the_first_step(ranks):
    """Besides that of each level, and with dead codes a small one more."""
    for results in ranks:
        assert results["plain"]["collectives"] == [4] + [3] * (STEPS - 1)
        assert results["k-means and dead codes"]["collectives"][1:] == [6] * (STEPS - 1)


def test_ranks_of_their_own(ranks):
    """sync_codebook=False: nothing is exchanged, and each leaves out what it draws."""
    first, second = (results["apart"] for results in ranks)
    assert first["collectives"] == second["collectives"] == [0] * STEPS
    assert first["cutoffs"] != second["cutoffs"]
    assert first["seeds"] == [None] * STEPS


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    states = {name: train(options, name, rank) for name, options in CASES.items()}
    states["apart"] = train(APART, "apart", rank)
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
