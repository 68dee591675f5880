"""Two processes are one with the joint batch, and their codebooks stay equal to the last bit.

Run by pytest it starts the two processes, which run this file as a script.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from vqops import VectorQuantize

WORLD, DIM, CODES, STEPS = 2, 4, 16, 3
EMA, DEAD = {"decay": 0.9}, {"threshold_ema_dead_code": 1.5}
KMEANS = {"kmeans_init": True, "kmeans_iters": 4}
NAN, COMPILED, OTHER_SEED = "nan", "compiled", "other seed"

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
    "k-means": (EMA | KMEANS, (60, 35), ()),
    "k-means, empty": (EMA | KMEANS, (60, 0), ()),
    "k-means, few rows": (EMA | KMEANS, (3, 5), ()),
    "everything": (EMA | DEAD | KMEANS | {"use_cosine_sim": True, "codebook_dim": 3}, (60, 35), (NAN, OTHER_SEED)),
    "learnable": ({"learnable_codebook": True} | DEAD | KMEANS, (60, 35), ()),
    "compiled": (EMA | DEAD | KMEANS, (60, 35), (COMPILED,)),
}


def batches(name: str):
    """For each step, the rows of each rank."""
    _, sizes, special = CASES[name]
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        rows = [torch.randn(size, DIM, generator=generator) for size in sizes]
        if NAN in special:
            rows[0][3, 1], rows[1][::2] = torch.inf, torch.nan
        yield rows


def train(name: str, rank: int | None) -> dict:
    """The state after the steps, as one of the ranks or (None) as one process with the joint batch."""
    options, _, special = CASES[name]
    torch.manual_seed(0)
    vq = VectorQuantize(DIM, CODES, **options)
    run = torch.compile(vq, fullgraph=True, backend="aot_eager") if COMPILED in special and rank is not None else vq
    torch.manual_seed(rank if rank and OTHER_SEED in special else 0)
    collectives = 0
    all_reduce = dist.all_reduce

    def counting(*arguments, **keywords):
        nonlocal collectives
        collectives += 1
        return all_reduce(*arguments, **keywords)

    for rows in batches(name):
        if run is vq:
            dist.all_reduce = counting
        collectives = 0
        run(torch.cat(rows) if rank is None else rows[rank])
        dist.all_reduce = all_reduce
    return vq.state_dict() | {"collectives": collectives}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The states of the two ranks, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(WORLD)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(ranks, name):
    first, second = (states[name] for states in ranks)
    joint = train(name, None)
    for key, value in joint.items():
        if key != "collectives":
            assert torch.equal(first[key], second[key]), key
            assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_one_collective_a_step(ranks):
    """With dead codes, a second one of a few numbers: which rows there are."""
    assert ranks[0]["ema"]["collectives"] == 1
    assert ranks[0]["dead codes"]["collectives"] == 2


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    states = {name: train(name, rank) for name in CASES}
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
