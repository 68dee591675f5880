"""Steps in CUDA graphs, as docs/gpu.md has them, on a CPU: a replay calls again what was called at the capture."""

import copy
import re
from pathlib import Path

import pytest
import torch
from graphs import Graph, Recording, stand_in
from promises import REPEATS
from torch._dynamo.utils import counters

from vqops import HierarchicalVQ, ResidualVQ, VectorQuantize
from vqops.dispatch import calls
from vqops.quantizers.codebook import codebook as codebook_module
from vqops.quantizers.codebook import shared_seeds
from vqops.quantizers.options import numbers

PAGE = Path(__file__).parents[2] / "docs/gpu.md"


@pytest.fixture
def captured(monkeypatch):
    for module in (codebook_module, shared_seeds, numbers):
        monkeypatch.setattr(module, "is_captured", lambda device: True)


def test_the_page_about_it(monkeypatch):
    _, _, section = PAGE.read_text().partition("## Small batches\n")
    first, second = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    counters.clear()
    compiles = torch.compile
    made = []

    def compiled(function, mode, fullgraph):
        made.append(mode)
        return compiles(function, backend="aot_eager", fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", compiled)
    stand_in(monkeypatch)
    found = {}
    exec(first.replace('"cuda"', '"cpu"'), found)
    assert made == ["reduce-overhead"] and counters["stats"]["unique_graphs"] == 1
    models = [found[name] for name in ("encoder", "decoder", "vq")]
    before = copy.deepcopy(models)
    exec(second, found)
    graphed = [dict(model.state_dict()) for model in models]

    # The same, step by step: the capture of the stand-in runs its step.
    found["encoder"], found["decoder"], found["vq"] = before
    parameters = [p for model in before[:2] for p in model.parameters()]
    found["optimizer"] = torch.optim.SGD(parameters, lr=0.1)
    for batch in (0, 1, 2, 2, *range(3, 8)):
        found["static"].copy_(found["batches"][batch])
        loss = found["step"]()
    REPEATS.same(graphed, [dict(model.state_dict()) for model in before])
    REPEATS.same(found["captured"], loss)


OPTIONS = {
    "rotation": {},
    "cosine": {"use_cosine_sim": True, "heads": 2},
    "learnable": {"learnable_codebook": True, "threshold_ema_dead_code": 2},
    "weights": {"codebook_diversity_loss_weight": 0.1, "orthogonal_reg_weight": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_replay_is_a_step_and_takes_new_numbers(name, captured):
    torch.manual_seed(0)
    one = VectorQuantize(4, 16, **OPTIONS[name])
    x, static = torch.randn(6, 60, 4), torch.empty(60, 4)

    def step(vq, rows):
        rows = rows.clone().requires_grad_()
        quantized, indices, loss = vq(rows)
        (grad,) = torch.autograd.grad(quantized.square().sum() + loss, rows)
        return quantized.detach(), indices, loss.detach(), grad

    other, graph = copy.deepcopy(one), Graph()
    for vq in (one, other):
        torch.manual_seed(1)
        vq(x[0])
    static.copy_(x[1])
    torch.manual_seed(1)
    with Recording(graph):
        results = step(one, static)
    torch.manual_seed(1)
    step(other, x[1])
    for rows in x[2:]:
        for vq in (one, other):
            vq.commitment_weight, vq.decay = rows[0, 0].sigmoid().item(), 0.5
        torch.manual_seed(1)
        static.copy_(rows)
        graph.replay()
        torch.manual_seed(1)
        REPEATS.same(results, step(other, rows))
    REPEATS.same(dict(one.state_dict()), dict(other.state_dict()))


def test_what_a_graph_can_not_hold_is_refused(captured):
    x = torch.randn(2, 9, 4)
    with pytest.raises(RuntimeError, match="VectorQuantize: kmeans_init waits for a first batch, and a CUDA graph"):
        VectorQuantize(4, 8, kmeans_init=True)(x)
    with pytest.raises(RuntimeError, match="dropout of levels draws on the host, and the CUDA graph"):
        ResidualVQ(dim=4, codebook_size=8, num_quantizers=3, quantize_dropout=True)(x)
    hierarchical = HierarchicalVQ(dim=4, codebook_size=8, scales=(1, 3), nested_dropout=0.5)
    with pytest.raises(RuntimeError, match="dropout of levels draws on the host"):
        hierarchical(x.mT)


def test_a_compiled_step_asks_for_no_capture(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not calls.is_captured(torch.device("cuda"))


@pytest.mark.parametrize("name", ["rotation", "cosine", "learnable"])  # autocast has no `meta`
def test_a_step_is_on_the_device_alone(name):
    """On `meta`, whose tensors have no values: nothing is read, no shape follows from data, nothing comes from the
    host."""
    vq = VectorQuantize(4, 16, **OPTIONS[name]).to("meta")
    x = torch.empty(3, 7, 4, device="meta", requires_grad=True)
    graph = Graph()
    with Recording(graph):
        quantized, _, loss = vq(x)
        (quantized.sum() + loss).backward()
    devices = {result.device.type for *_, results in graph.calls for result in results}
    assert devices == {"meta"}
