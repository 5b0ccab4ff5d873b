"""Attention recomputed beside the kernels: equal to torch's own, to the kernels', and to a sum."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spcxr.errors import SpcxrError
from spcxr.models.attention_maps import cls_attention, rollout
from spcxr.models.vit import VisionTransformer

DEPTH, HEADS, WIDTH = 3, 3, 24


@pytest.fixture
def encoder():
    """Weights so large that attention is far from even."""
    torch.manual_seed(0)
    made = VisionTransformer(image_px=32, patch_px=8, width=WIDTH, depth=DEPTH, heads=HEADS)
    for block in made.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
    return made


@pytest.fixture
def images():
    return torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(1))


def torchs_own(encoder, images, hidden=None):
    """Weights ``[B, heads, T, T]`` of every block, by `multi_head_attention_forward`."""
    found, tokens = [], encoder.embed(images)
    for block in encoder.blocks:
        x = block.norm1(tokens).transpose(0, 1)
        out, weights = F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, block.attn.qkv.weight, block.attn.qkv.bias, None, None, False,
            0.0, block.attn.proj.weight, block.attn.proj.bias, training=False,
            key_padding_mask=hidden, average_attn_weights=False,
        )  # fmt: skip
        found.append(weights)
        tokens = tokens + out.transpose(0, 1)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return found


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_cls_attention_equals_torchs_own(encoder, images, layer):
    made = cls_attention(encoder, images, layer)
    assert made.shape == (2, HEADS, 4, 6)
    expected = torchs_own(encoder, images)[layer][:, :, 0, 1:].unflatten(2, (4, 6))
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.02  # not even


def test_rollout_equals_the_papers_product(encoder, images):
    product = np.eye(25)
    for weights in torchs_own(encoder, images[:1]):
        mean = weights[0].mean(0).detach().numpy().astype(np.float64)
        block = 0.5 * mean + 0.5 * np.eye(25)
        product = (block / block.sum(1, keepdims=True)) @ product
    made = rollout(encoder, images)
    assert made.shape == (2, 4, 6)
    np.testing.assert_allclose(made[0].numpy(), product[0, 1:].reshape(4, 6), atol=1e-5)
    assert made[1].sum() < 1


@pytest.mark.parametrize("what", ["cls", "rollout"])
def test_patches_that_are_not_read_get_nothing_and_tell_nothing(encoder, images, what):
    visible = torch.zeros(2, 4, 6, dtype=torch.bool)
    visible[0, 1:3, 2:5], visible[1, 0, 0] = True, True
    other = images.clone()
    hidden = ~visible.repeat_interleave(8, 1).repeat_interleave(8, 2)
    other[hidden[:, None]] = 9.0
    made, changed = (
        cls_attention(encoder, x, visible=visible)
        if what == "cls"
        else rollout(encoder, x, visible)
        for x in (images, other)
    )
    torch.testing.assert_close(made, changed)
    shown = made if what == "rollout" else made.sum(1)
    assert (shown[~visible] == 0).all()
    assert (shown[visible] > 0).all()
    if what == "cls":
        padded = F.pad(~visible.flatten(1), (1, 0))
        expected = torchs_own(encoder, images, padded)[-1][:, :, 0, 1:].unflatten(2, (4, 6))
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_the_encoder_is_left_as_it_was(encoder, images):
    encoder.train()
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    cls_attention(encoder, images, 0)  # leaves after the first block
    rollout(encoder, images)
    assert encoder.training
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in state.items())


def test_what_the_encoder_does_not_have(encoder, images):
    with pytest.raises(SpcxrError, match="block 3 of an encoder with 3"):
        cls_attention(encoder, images, 3)
    with pytest.raises(SpcxrError, match=r"visible is \(2, 4, 4\) .*give \[2, 4, 6\] bool"):
        rollout(encoder, images, torch.ones(2, 4, 4, dtype=torch.bool))
