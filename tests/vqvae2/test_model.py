"""The VQ-VAE-2 network: shapes at any size, what each level sees and changes, its file."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from promises import COPIES, REPEATS, UNCHANGED
from torch.testing import assert_close

pytest.importorskip("safetensors")

from safetensors.torch import save_file

from vqops.vqvae2 import VQVAE2, InputError, TrainOptions, VQVAE2Config, load_model, save_model
from vqops.vqvae2.networks.checkpoint import KIND, read_file, write_file
from vqops.vqvae2.networks.vqvae2 import DOUBLED, UpsampledConv, pad_to_multiple

SMALL = VQVAE2Config(channels=8, codebook_size=16, code_dim=4)


def small_model(**changes) -> VQVAE2:
    torch.manual_seed(0)
    return VQVAE2(replace(SMALL, **changes))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("size", [(32, 32), (28, 28), (5, 5), (1, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("image_channels", [1, 3])
def test_any_size_goes_in_and_comes_out(levels, size, image_channels):
    model = small_model(levels=levels, image_channels=image_channels)
    output = model(torch.rand(2, image_channels, *size))
    assert output.reconstruction.shape == (2, image_channels, *size)
    assert output.codebook_loss.shape == ()
    assert [index.shape[1:] for index in output.indices] == list(model.config.code_sizes(*size))


@pytest.mark.parametrize(
    "size, levels, expected",
    [((32, 32), 2, ((8, 8), (4, 4))), ((28, 28), 3, ((8, 8), (4, 4), (2, 2))), ((1, 9), 2, ((2, 4), (1, 2)))],
)
def test_code_sizes(size, levels, expected):
    assert VQVAE2Config(levels=levels).code_sizes(*size) == expected


@pytest.mark.parametrize(
    "strides, size, expected",
    [
        ((2,), (33, 16), ((17, 8),)),
        ((16,), (32, 40), ((2, 3),)),
        ((8, 4), (32, 50), ((4, 8), (1, 2))),
        ((2, 4), (29, 35), ((16, 20), (4, 5))),
        ((2, 2, 4), (17, 30), ((16, 16), (8, 8), (2, 2))),
    ],
    ids=str,
)
def test_strides_decide_the_code_sizes(strides, size, expected):
    model = small_model(levels=len(strides), strides=strides)
    images = torch.rand(4, 3, *size)
    output = model(images)
    assert output.reconstruction.shape == images.shape
    assert tuple(index.shape[1:] for index in output.indices) == model.config.code_sizes(*size) == expected
    model.eval()
    decoded = model.decode(model.encode(images))
    assert decoded.shape[-2:] == tuple(strides[0] * extent for extent in expected[0])
    assert_close(decoded[..., : size[0], : size[1]], model(images).reconstruction)


def test_a_code_stands_beside_all_that_it_covers():
    model, images = small_model(levels=3, strides=(2, 4, 2)), torch.rand(2, 3, 32, 16)
    model(images)
    codes, indices, _ = model.eval().quantize(images)
    covered = (1, 4, 8)  # bottom codes under a code of each level, along an axis
    for quantize, index, own, times in zip(model.quantizers, indices, codes.split(4, dim=1), covered, strict=True):
        chosen = quantize.get_codes_from_indices(index)
        assert len(chosen.unique()) > 4
        COPIES.same(own, chosen.repeat_interleave(times, 2).repeat_interleave(times, 3))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_default_strides(levels):
    default, named = small_model(levels=levels), small_model(levels=levels, strides=(4, 2, 2)[:levels])
    REPEATS.same(named.state_dict(), default.state_dict())


@pytest.mark.parametrize(
    "levels, strides, got", [(2, (4,), "4"), (1, (4, 2), "4 2"), (2, (4, 3), "4 3"), (1, (1,), "1"), (1, (32,), "32")]
)
def test_strides_that_are_refused(levels, strides, got):
    message = f"^strides must be {levels} number.* of levels {levels}, of 2, 4, 8 or 16, got {got}$"
    for kind in (VQVAE2Config, TrainOptions):
        with pytest.raises(InputError, match=message):
            kind(levels=levels, strides=strides)


@pytest.mark.parametrize(
    "width, expected", [(4, [0, 1, 2, 3]), (3, [0, 1, 2, 1]), (2, [0, 1, 0, 1]), (1, [0, 0, 0, 0])]
)
def test_padding_reflects_at_the_right_and_bottom(width, expected):
    images = torch.arange(float(width)).reshape(1, 1, 1, width)
    assert pad_to_multiple(images, 4)[0, 0].tolist() == [expected] * 4


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_weight_receives_a_gradient(levels, codebook):
    model = small_model(levels=levels, codebook=codebook)
    images = torch.rand(8, 3, 32, 32)  # more vectors than codes at the top, so that no code is its vector exactly
    output = model(images)
    ((output.reconstruction - images).square().mean() + output.codebook_loss).backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


def test_reconstruction_error_reaches_every_level():
    """Without the commitment loss too: each level's encoder is trained by the picture it helps to make."""
    model = small_model(levels=3)
    model(torch.rand(2, 3, 32, 32)).reconstruction.square().mean().backward()
    assert all(encoder[0].weight.grad.abs().sum() > 0 for encoder in model.encoders)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_changes_the_output(level):
    model = small_model(levels=3)
    model(torch.rand(4, 3, 32, 32))  # starts the codebooks
    model.eval()
    indices = model.encode(torch.rand(2, 3, 32, 32))
    changed = [(index + 1) % 16 if i == level else index for i, index in enumerate(indices)]
    assert not torch.allclose(model.decode(changed), model.decode(indices))


def test_top_level_conditions_the_bottom_codes():
    model = small_model(levels=2)
    images = torch.rand(4, 3, 32, 32)
    model(images)
    model.eval()
    _, before, _ = model.quantize(images)
    with torch.no_grad():
        model.decoders[1][-1].bias += 10 * torch.randn(4)
    _, after, _ = model.quantize(images)
    REPEATS.same(before[1], after[1])
    assert (before[0] != after[0]).any()


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_decoding_the_codes_is_reconstructing(levels):
    model = small_model(levels=levels)
    images = torch.rand(2, 3, 28, 28)
    model(images)
    model.eval()
    assert_close(model.decode(model.encode(images))[..., :28, :28], model(images).reconstruction)


def test_evaluation_updates_nothing_and_training_moves_the_codebook():
    model = small_model()
    model(torch.rand(2, 3, 32, 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()(torch.rand(2, 3, 32, 32))
    UNCHANGED.same(model.state_dict(), before)
    codebook = model.quantizers[0].codebook.clone()
    model.train()(torch.rand(2, 3, 32, 32))
    assert (model.quantizers[0].codebook != codebook).any()


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_file_keeps_weights_and_configuration(tmp_path, codebook):
    model = small_model(levels=3, strides=(2, 4, 2), codebook=codebook, restart_below=(0.5, 0.25, 0.125))
    images = torch.rand(2, 3, 32, 32)
    model(images)
    save_model(tmp_path / "model.safetensors", model, TrainOptions(), step=7)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    COPIES.same(loaded.state_dict(), model.state_dict())
    assert_close(loaded(images).reconstruction, model.eval()(images).reconstruction)


@pytest.mark.parametrize(
    "name, written",
    [
        ("strides", {"strides": (4, 2)}),
        ("version", {"version": 1}),
        ("version", {"version": 1, "bottleneck": "gumbel", "image_values": 3072}),
    ],
    ids=str,
)
def test_what_an_earlier_file_does_not_say(tmp_path, name, written):
    """It has the strides of the default, and is of the first version of the network."""
    model, path = small_model(**written), tmp_path / "model.safetensors"
    images = torch.rand(2, 3, 32, 32)
    model(images)
    save_model(path, model.eval(), TrainOptions(), step=7)
    description, tensors = read_file(path, KIND)
    del description["model"][name]
    write_file(path, tensors, description)
    loaded = load_model(path)
    assert loaded.config.version == model.config.version
    assert_close(loaded(images).reconstruction, model(images).reconstruction)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (0, 2, 3, 3)], ids=str)
def test_upsampled_conv_is_a_convolution_of_the_enlarged_map(shape):
    module = UpsampledConv(shape[1], 4).double()
    x = torch.randn(shape, dtype=torch.float64)
    enlarged = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert_close(module(x), F.conv2d(enlarged, module.weight, module.bias, padding=1))


def test_what_is_flat_has_no_checkerboard():
    flat = torch.randn(8)[:, None, None].expand(1, 8, 6, 6)

    def unevenness(version):
        torch.manual_seed(0)
        return DOUBLED[version](8, 3)(flat)[:, :, 1:-1, 1:-1].std((2, 3)).max()  # the border sees the padding

    assert unevenness(2) < 1e-5
    assert unevenness(1) > 0.01


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_model(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_model(path)
    save_file({"weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"another model than vqops\.vqvae2.*'format': 'pt'"):
        load_model(path)
    description = {"kind": "vqops.vqvae2", "vqops": "9.9", "model": {"unheard_of": 1}}
    save_file({"weight": torch.zeros(1)}, path, metadata={"vqops": json.dumps(description)})
    with pytest.raises(InputError, match=r"written by vqops 9\.9"):
        load_model(path)
