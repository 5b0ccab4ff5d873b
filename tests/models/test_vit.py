"""The encoder: shapes, keys, DINO's methods, positions at other sizes, gradients."""

import pytest
import torch
import torch.nn.functional as F

from spcxr.errors import SpcxrError
from spcxr.models.positions import resize_positions
from spcxr.models.sequences import DENSE
from spcxr.models.vit import VIT_SIZES, VisionTransformer, build_vit
from spcxr.ops.patches import patchify, unpatchify


def tiny(image_px=(32, 48), patch_px=16, depth=4, **settings):
    torch.manual_seed(0)
    return VisionTransformer(
        image_px=image_px, patch_px=patch_px, width=24, depth=depth, heads=3, **settings
    ).eval()


@pytest.mark.parametrize("patch_px", [8, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_of_non_square_images(patch_px, channels):
    sides = (2 * patch_px, 5 * patch_px)
    encoder = tiny(sides, patch_px, channels=channels)
    images = torch.randn(3, channels, *sides)
    tokens = encoder.forward_features(images)
    assert tokens.shape == (3, 11, 24)
    assert torch.equal(encoder(images), tokens[:, 0])
    assert torch.allclose(tokens.mean(-1), torch.zeros(3, 11), atol=1e-5)  # the final norm ran


def test_state_dict_has_timms_keys():
    block = {
        f"blocks.{i}.{name}.{kind}"
        for i in range(4)
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    patch = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    wanted = {"cls_token", "pos_embed", "norm.weight", "norm.bias"} | patch | block
    state = tiny().state_dict()
    assert set(state) == wanted
    assert state["pos_embed"].shape == (1, 7, 24)
    assert state["blocks.0.attn.qkv.weight"].shape == (72, 24)


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8)]
)
def test_sizes_are_those_of_the_literature(name, millions):
    """Parameters of the RGB encoder without its head, as timm counts them."""
    with torch.device("meta"):
        encoder = build_vit(name, image_px=224, channels=3)
    assert encoder.width == VIT_SIZES[name].width
    count = sum(p.numel() for p in encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def attend(qkv):
    """The formula, head by head."""
    query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
    weights = torch.softmax(query @ key.transpose(-1, -2) / qkv.shape[-1] ** 0.5, -1)
    return (weights @ value).transpose(1, 2).flatten(2)


def test_one_block_equals_the_formula():
    encoder = tiny(depth=1)
    block, x = encoder.blocks[0], torch.randn(2, 7, 24)
    normed = F.layer_norm(x, (24,), block.norm1.weight, block.norm1.bias, eps=1e-6)
    qkv = (normed @ block.attn.qkv.weight.T).reshape(2, 7, 3, 3, 8)
    y = x + attend(qkv) @ block.attn.proj.weight.T
    normed = F.layer_norm(y, (24,), eps=1e-6)
    wanted = y + F.gelu(normed @ block.mlp.fc1.weight.T) @ block.mlp.fc2.weight.T
    assert torch.allclose(block(x), wanted, atol=1e-5)


def test_patch_embedding_reads_the_order_of_patchify():
    encoder, images = tiny(channels=3), torch.randn(2, 3, 32, 48)
    filters = encoder.patch_embed.proj
    wanted = patchify(images, 16) @ filters.weight.flatten(1).T + filters.bias
    assert torch.allclose(encoder.patch_embed(images), wanted, atol=1e-5)
    assert torch.equal(unpatchify(patchify(images, 16), (2, 3), 16), images)


def test_intermediate_layers():
    encoder, images = tiny(), torch.randn(2, 1, 32, 48)
    tokens = encoder.forward_features(images)
    (last,) = encoder.get_intermediate_layers(images)
    assert torch.equal(last, tokens[:, 1:])
    pairs = encoder.get_intermediate_layers(images, 4, return_class_token=True)
    assert torch.equal(pairs[-1][1], tokens[:, 0])
    chosen = encoder.get_intermediate_layers(images, [0, 3])
    assert torch.equal(chosen[0], pairs[0][0])
    assert torch.equal(chosen[1], pairs[3][0])
    (plane,) = encoder.get_intermediate_layers(images, 1, reshape=True)
    assert plane.shape == (2, 24, 2, 3)
    assert torch.equal(plane[:, :, 1, 2], last[:, 5])
    (raw,) = encoder.get_intermediate_layers(images, norm=False)
    assert torch.allclose(encoder.norm(raw), last)
    assert not torch.allclose(raw, last)


@pytest.mark.parametrize("n", [0, 5, [4], [-1], []])
def test_intermediate_layers_that_are_not_there(n):
    with pytest.raises(SpcxrError, match="an encoder with 4"):
        tiny().get_intermediate_layers(torch.zeros(1, 1, 32, 48), n)


def test_positions_resample_smoothly_and_keep_cls():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 14), torch.linspace(-1, 1, 14), indexing="ij")
    plane = torch.stack([y, x], -1).reshape(1, 196, 2)
    positions = torch.cat([torch.full((1, 1, 2), 9.0), plane], 1)
    assert resize_positions(positions, (14, 14), (14, 14)) is positions
    wide = resize_positions(positions, (14, 14), (7, 28))
    assert wide.shape == (1, 1 + 196, 2)
    assert torch.equal(wide[:, 0], positions[:, 0])
    rows = wide[0, 1:].view(7, 28, 2)
    assert torch.allclose(rows[..., 0], rows[:, :1, 0].expand(-1, 28), atol=1e-5)
    assert bool((rows[1:, 0, 0] > rows[:-1, 0, 0]).all())
    assert bool((rows[0, 2:-2, 1].diff() > 0).all())
    with pytest.raises(SpcxrError, match="do not fit a grid of 7x7"):
        resize_positions(positions, (7, 7), (14, 14))


def test_an_image_of_another_size_uses_resampled_positions():
    encoder = tiny()
    images = torch.randn(1, 1, 64, 64)
    other = tiny((64, 64))
    state = encoder.state_dict()
    state["pos_embed"] = resize_positions(state["pos_embed"], (2, 3), (4, 4))
    other.load_state_dict(state)
    assert torch.allclose(encoder.forward_features(images), other.forward_features(images))


def test_drop_path_drops_whole_images_in_training_only():
    encoder = tiny(drop_path=0.9, depth=2)
    assert [b.drop_path.rate for b in encoder.blocks] == pytest.approx([0.0, 0.9])
    drop = encoder.blocks[1].drop_path
    ones, none = torch.ones(20000, 1, 2), torch.zeros(20000, 1, 2)
    assert torch.equal(drop(none, ones, DENSE), ones)
    drop.train()
    dropped = drop(none, ones, DENSE)
    assert torch.equal(dropped[..., 0], dropped[..., 1])
    assert dropped.unique().tolist() == pytest.approx([0.0, 10.0])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)


def test_survivors_are_the_branches_that_count():
    """Given, they replace what training would draw, and work in eval mode too."""
    encoder, images = tiny(drop_path=0.5, depth=2), torch.randn(3, 1, 32, 48)
    tokens = encoder.embed(images)
    factors = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]]).repeat(3, 1, 1)
    factors[2] = 0.0
    (found,) = encoder.train().outputs_of(tokens, [1], survivors=factors)
    a, b = encoder.blocks
    wanted = tokens + a.attn(a.norm1(tokens))
    wanted = wanted + 2.0 * b.attn(b.norm1(wanted))
    wanted = wanted + b.mlp(b.norm2(wanted))
    wanted[2] = tokens[2]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("survivors", [None, torch.tensor([[[0.0, 2.0], [2.0, 2.0]]] * 3)])
def test_recomputed_blocks_give_the_same_gradients(survivors):
    encoder, images = tiny(drop_path=0.5, depth=2).train(), torch.randn(3, 1, 32, 48)
    found = []
    for encoder.recompute in (False, True):
        torch.manual_seed(5)
        (out,) = encoder.outputs_of(encoder.embed(images), [1], survivors=survivors)
        found.append(torch.autograd.grad(out.square().sum(), list(encoder.blocks.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_reach_every_parameter():
    encoder = tiny().train()
    encoder.forward_features(torch.randn(2, 1, 32, 48)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_px": 100}, "100x100 px does not divide into patches of 16"),
        ({"image_px": (8, 32)}, "8x32 px does not divide"),
        ({"width": 25}, "25 does not divide into 3 heads"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ],
)
def test_refuses_what_cannot_be_built(settings, message):
    usual = {"image_px": 32, "patch_px": 16, "width": 24, "depth": 1, "heads": 3}
    with pytest.raises(SpcxrError, match=message):
        VisionTransformer(**(usual | settings))


def test_refuses_images_it_cannot_read():
    with pytest.raises(SpcxrError, match=r"takes \[B, 1, H, W\]"):
        tiny()(torch.zeros(1, 3, 32, 48))
    with pytest.raises(SpcxrError, match="33x48 px does not divide"):
        tiny()(torch.zeros(1, 1, 33, 48))


def test_bf16_autocast_stays_near_fp32():
    encoder, images = tiny(), torch.randn(1, 1, 32, 48)
    exact = encoder.forward_features(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder.forward_features(images)
    assert (rough.float() - exact).abs().max() < 0.1
