"""Copies of a module that follow it, sharding, and what the host remembers of the device's state."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from ema_pytorch import EMA
from promises import COPIES, INDICES, UNCHANGED
from ranks import WORLD, results_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import vqops
from vqops import VectorQuantize

DIM, CODES = 8, 40


def model(**options):
    return torch.nn.Sequential(torch.nn.Linear(DIM, DIM), VectorQuantize(DIM, CODES, **options))


def train(net, steps=3):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(200, DIM))[2].backward()
        optimizer.step()


COPIERS = {
    "AveragedModel": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "ema_pytorch": lambda net: EMA(net, beta=0.9, update_every=1, update_after_step=0),
}


def follow(follower, net):
    follower.update_parameters(net) if isinstance(follower, AveragedModel) else follower.update()


@pytest.mark.parametrize("options", [{}, {"kmeans_init": True}, {"learnable_codebook": True}], ids=str)
@pytest.mark.parametrize("copier", COPIERS)
def test_an_average_of_models_follows_and_evaluates(copier, options):
    """Made before the first batch, and searched between its updates, which write through `.data`."""
    net = model(**options)
    follower = COPIERS[copier](net)
    for _ in range(4):
        train(net, 1)
        follow(follower, net)
        averaged = follower.module if isinstance(follower, AveragedModel) else follower.ema_model
        averaged.eval()
        vq, x = averaged[1], torch.randn(200, DIM)
        codes = vq.codebook.detach().clone()
        indices = vq(averaged[0](x))[1]
        INDICES.same(indices, vqops.nearest(averaged[0](x).detach(), codes, implementation="reference"))
        UNCHANGED.same(vq.codebook.detach(), codes)  # no k-means of its own
    assert (codes - net[1].codebook).abs().max() > 0


@pytest.mark.parametrize("write", ["fill_", "copy_", "state_dict", "data"])
def test_an_initted_that_was_written_in_place_counts(write):
    source = VectorQuantize(DIM, CODES, kmeans_init=True)
    twin = copy.deepcopy(source)
    source(torch.randn(200, DIM))
    before = source.codebook.clone()
    with torch.no_grad():
        for (_, old), (_, new) in zip(twin._codebook.named_buffers(), source._codebook.named_buffers(), strict=True):
            if old.dtype != torch.bool:
                old.copy_(new)
    if write == "fill_":
        twin._codebook.initted.fill_(True)
    elif write == "copy_":
        twin._codebook.initted.copy_(source._codebook.initted)
    elif write == "data":
        twin._codebook.initted.data = torch.tensor(True)
    else:
        twin.state_dict()["_codebook.initted"].fill_(True)
    twin.eval()(torch.randn(200, DIM))
    COPIES.same(twin.codebook, before)


def test_k_means_with_too_few_vectors_says_so_once(recwarn):
    vq = VectorQuantize(DIM, CODES, kmeans_init=True)
    vq(torch.randn(CODES - 1, DIM))
    vq(torch.randn(CODES - 1, DIM))
    said = [str(w.message) for w in recwarn if "k-means" in str(w.message)]
    assert said == ["VectorQuantize: k-means starts with 39 vectors for codebook_size=40: some codes are equal"]
    VectorQuantize(DIM, CODES, kmeans_init=True)(torch.randn(CODES, DIM))
    assert len([w for w in recwarn if "k-means" in str(w.message)]) == 1


INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"codebook_dim": 4}], ids=str)
def test_indices_of_any_integer_dtype(dtype, options):
    vq = VectorQuantize(DIM, CODES, **options).eval()
    x = torch.randn(2, 20, DIM)
    quantized, indices, _ = vq(x)
    given = indices.to(dtype)
    COPIES.same(vq.get_codes_from_indices(given), vq.get_codes_from_indices(indices))
    assert_close(vq.get_output_from_indices(given), quantized)
    COPIES.same(vq(x, given)[1], vq(x, indices)[1])
    a, b = copy.deepcopy(vq).train(), copy.deepcopy(vq).train()
    a.update_indices(x, given), b.update_indices(x, indices)
    COPIES.same(a.codebook, b.codebook)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_other_indices_are_refused(dtype):
    with pytest.raises(TypeError, match="VectorQuantize: indices must be int64, got torch"):
        VectorQuantize(DIM, CODES).get_codes_from_indices(torch.ones(5, dtype=dtype))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two processes that train under FSDP2 with parameters in bfloat16: the results of each."""
    return results_of(__file__, tmp_path_factory.mktemp("sharded"))


def test_fsdp2_keeps_the_codebook_in_float32(sharded):
    for results in sharded:
        assert results["dtypes"] == {torch.float32}
        assert results["given"] == torch.bfloat16
    first, second = (results["state"] for results in sharded)
    for name, value in first.items():
        COPIES.same(value, second[name], where=name)
    assert first["cluster_size"].sum() > CODES  # it has learnt


def run_sharded(folder: str, rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    net = model(kmeans_init=True, threshold_ema_dead_code=1.0)
    fully_shard(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    given = []
    net[1].register_forward_pre_hook(lambda module, arguments: given.append(arguments[0].dtype))
    torch.manual_seed(rank)
    for _ in range(3):
        quantized, _, loss = net(torch.randn(200, DIM))
        (quantized.float().sum() + loss).backward()
    buffers = dict(net[1]._codebook.named_buffers())
    dtypes = {value.dtype for value in buffers.values() if value.is_floating_point()}
    state = {name: value for name, value in buffers.items() if "." not in name}
    torch.save({"dtypes": dtypes, "given": given[-1], "state": state}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_sharded(sys.argv[1], int(sys.argv[2]))
