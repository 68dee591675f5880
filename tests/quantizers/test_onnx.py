"""torch.onnx.export: what ONNX Runtime computes from the model is what the module gives in eval."""

import math
import re
from pathlib import Path

import pytest
import torch
from promises import COPIES, INDICES, ORDER
from torch import nn
from torch.testing import assert_close

import vqops
from vqops import VectorQuantize

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

MASK = torch.rand(2, 25, generator=torch.Generator().manual_seed(0)) > 0.3
LENS = torch.tensor([25, 7])

# name: options of VectorQuantize, arguments of forward
CASES = {
    "plain": ({"dim": 4, "codebook_size": 50}, {}),
    "one_code": ({"dim": 4, "codebook_size": 1}, {}),
    "one_feature": ({"dim": 1, "codebook_size": 3}, {}),
    "many_codes": ({"dim": 9, "codebook_size": 5000}, {}),
    "cosine": ({"dim": 12, "codebook_size": 130, "use_cosine_sim": True}, {"mask": MASK}),
    "heads": ({"dim": 8, "codebook_size": 70, "heads": 2, "codebook_dim": 4}, {"lens": LENS}),
    "separate_heads": (
        {"dim": 8, "codebook_size": 70, "heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}
        | {"layernorm_after_project_in": True},
        {"mask": MASK},
    ),
    "image": ({"dim": 5, "codebook_size": 70, "accept_image_fmap": True, "kmeans_init": True}, {}),
    "learnable": (
        {"dim": 4, "codebook_size": 20, "learnable_codebook": True, "return_zeros_for_masked_padding": False},
        {"mask": MASK},
    ),
    "topk": ({"dim": 4, "codebook_size": 130}, {"topk": 3, "mask": MASK}),
    "topk_cosine": ({"dim": 4, "codebook_size": 20, "use_cosine_sim": True, "codebook_dim": 3}, {"topk": 20}),
}


def exported(module: nn.Module, arguments: dict, free: str | None = "b", program=None):
    """The model of a call with these arguments by name, and a function that runs it. `free`: the batch may change."""
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    axes = {name: {0: torch.export.Dim.DYNAMIC} if free and name in tensors else None for name in arguments}
    options = {"dynamic_shapes": axes} if program is None else {}
    model = torch.onnx.export(
        module if program is None else program, kwargs=arguments, dynamo=True, verbose=False, **options
    ).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(**given):
        results = session.run(None, {name: given[name].numpy() for name in names})
        return [torch.from_numpy(result) for result in results]

    return model, run


def rows_of(vq: VectorQuantize, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Vectors of which some are codes, and some are no numbers."""
    x = torch.randn(batch, 25, vq.dim)
    x[0, 1, 0], x[0, 2, -1] = math.nan, math.inf
    x[1, :5] = 0
    if not vq.has_projections:
        codes = vq.codebook if vq.codebook.dim() == 2 else vq.codebook.transpose(0, 1).flatten(1)
        x[1, 5:] = codes.detach()[torch.arange(20) % len(codes)].repeat(1, vq.dim // codes.shape[1])
    x = x.to(dtype)
    return x.view(batch, 5, 5, vq.dim).movedim(-1, 1).contiguous() if vq.accept_image_fmap else x


def check(found, expected, same_values: bool):
    quantized, indices, loss = found
    INDICES.same(indices, expected[1])
    if same_values:
        COPIES.same(quantized, expected[0], equal_nan=True)
    else:
        assert_close(quantized, expected[0].detach(), equal_nan=True)
    assert_close(loss, expected[2].detach(), equal_nan=True)


SLOW = {"plain", "one_code", "one_feature", "learnable", "topk_cosine"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_a_quantizer(name):
    options, arguments = CASES[name]
    vq = VectorQuantize(**options)
    with torch.no_grad():  # two equal codes
        vq.codebook[..., -1, :] = vq.codebook[..., 0, :]
    if options.get("kmeans_init"):
        vq(torch.randn(2, 5, 20, 20))
    elif vq.codebook_size > 3:
        with torch.no_grad():  # one that is no code
            vq.codebook[..., 2, 0] = math.nan
    vq.eval()
    x = rows_of(vq)
    _, run = exported(vq, {"x": x, **arguments})
    check(run(x=x, **arguments), vq(x, **arguments), not vq.has_projections)
    # Another batch.
    arguments = {key: torch.cat([t, t, t]) if isinstance(t, torch.Tensor) else t for key, t in arguments.items()}
    x = torch.cat([x, x.flip(0), rows_of(vq)])
    check(run(x=x, **arguments), vq(x, **arguments), not vq.has_projections)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype):
    vq = VectorQuantize(4, 70).eval()
    x = rows_of(vq, dtype=dtype)
    if dtype == torch.float64:
        x[0, 4:6] = 1e200  # whose distances overflow
    _, run = exported(vq, {"x": x})
    check(run(x=x), vq(x), True)


class OfIndices(nn.Module):
    def __init__(self, vq: VectorQuantize):
        super().__init__()
        self.vq = vq

    def forward(self, indices):
        return self.vq.get_codes_from_indices(indices), self.vq.get_output_from_indices(indices)


@pytest.mark.parametrize("heads", [1, 2])
def test_from_indices(heads):
    decoder = OfIndices(VectorQuantize(8, 20, heads=heads, codebook_dim=3, separate_codebook_per_head=True)).eval()
    indices = torch.randint(-1, 20, (2, 25) + (heads,) * (heads > 1))
    _, run = exported(decoder, {"indices": indices})
    for found, expected in zip(run(indices=indices), decoder(indices), strict=True):
        assert_close(found, expected.detach())


class Ops(nn.Module):
    """The ops by themselves, of a codebook that is prepared and one that is not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(130, 9))
        self.prepared = vqops.prepare(self.codes, "cosine")

    def forward(self, x, mask):
        found = vqops.quantize(x, self.codes, mask)
        turned = vqops.quantize(x, self.prepared, mask, metric="cosine", gradient="rotation")
        both = [vqops.nearest_topk(x, self.codes, 4, mask, metric) for metric in ("euclidean", "cosine")]
        inside = vqops.nearest(x, vqops.prepare(self.codes))
        named = vqops.nearest(x, self.codes, implementation="reference")
        return *found[:3], *turned[:3], *both[0], *both[1], inside, named


@pytest.mark.parametrize("ahead", [pytest.param(False, marks=pytest.mark.slow), True], ids=["module", "program"])
def test_ops(ahead):
    """Of a module, and of a program that torch.export made before."""
    module, x, mask = Ops(), torch.randn(40, 9), torch.rand(40) > 0.2
    x[3, 0], x[5], x[6] = math.nan, 0, 1e-9
    given = {"x": x, "mask": mask}
    axes = {name: {0: torch.export.Dim.DYNAMIC} for name in given}
    program = torch.export.export(module, (), given, dynamic_shapes=axes) if ahead else None
    _, run = exported(module, given, program=program)
    for rows in (40, 17):
        ORDER.same(run(x=x[:rows], mask=mask[:rows]), list(module(x[:rows], mask[:rows])), equal_nan=True)


def test_neither_the_codes_nor_the_graph_are_there_twice():
    graphs = []
    for codes in (2000, 5000):
        model, _ = exported(VectorQuantize(16, codes).eval(), {"x": torch.randn(2, 9, 16)})
        assert [tensor.dims[:] for tensor in model.graph.initializer if len(tensor.raw_data) > 4096] == [[1, codes, 16]]
        assert model.ByteSize() < 4 * codes * 16 + 250_000
        graphs.append([node.op_type for node in model.graph.node])
    assert graphs[0] == graphs[1]


def test_a_training_step_is_refused():
    with pytest.raises(torch.onnx.OnnxExporterError, match="vqops"):
        exported(VectorQuantize(4, 20).train(), {"x": torch.randn(2, 9, 4)})


def test_the_page_about_it(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs/export.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block, found)
    assert [found[name].shape for name in ("quantized", "indices", "loss")] == [(3, 100, 64), (3, 100), ()]


def test_levels_that_the_model_is_told():
    """`residual_quantize`, with as many levels as a tensor says."""
    codebooks, module = [torch.randn(40, 4), torch.randn(9, 4) / 2], nn.Module()
    module.forward = lambda x, levels: tuple(vqops.residual_quantize(x, codebooks, levels=levels)[:3])
    x, levels = torch.randn(30, 4), torch.tensor(2)
    free = {"x": {0: torch.export.Dim.DYNAMIC}, "levels": None}
    program = torch.export.export(module, (x, levels), dynamic_shapes=free)
    _, run = exported(module, {"x": x, "levels": levels}, program=program)
    for N, number in ((30, 2), (77, 1), (5, 0)):
        x, levels = torch.randn(N, 4), torch.tensor(number)
        quantized, indices, error = run(x=x, levels=levels)
        expected = vqops.residual_quantize(x, codebooks, levels=levels)
        INDICES.same(indices, expected.indices)
        COPIES.same(quantized, expected.quantized)
        assert_close(error, expected.error)
