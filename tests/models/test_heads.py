"""Heads and the segmentation decoder."""

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.models.decoder import DECODERS, Segmenter, UNETRDecoder, decoder_blocks
from spcxr.models.heads import ClassificationHead, Classifier, ReconstructionHead
from spcxr.models.vit import VisionTransformer
from spcxr.ops.patches import unpatchify


def tiny(image_px, patch_px, depth=4):
    torch.manual_seed(0)
    return VisionTransformer(image_px=image_px, patch_px=patch_px, width=24, depth=depth, heads=3)


def all_learn(model):
    return [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]


def test_reconstruction_head_is_a_transposed_convolution():
    torch.manual_seed(0)
    head = ReconstructionHead(width=24, patch_px=8, channels=2)
    tokens = torch.randn(3, 6, 24)
    hidden = head.mlp(tokens).transpose(1, 2).reshape(3, 24, 2, 3)
    filters = head.to_pixels.weight.T.reshape(24, 2, 8, 8)
    wanted = torch.nn.functional.conv_transpose2d(hidden, filters, stride=8)
    assert torch.allclose(unpatchify(head(tokens), (2, 3), 8), wanted, atol=1e-5)
    assert [type(m).__name__ for m in head.mlp] == ["Linear", "GELU"] * 3


def test_classification_head_reads_cls_and_mean_patch():
    head = ClassificationHead(width=2, classes=4)
    head.fc.weight.data = torch.eye(4)
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [5.0, 7.0]]])
    assert torch.equal(head(tokens), torch.tensor([[1.0, 2.0, 4.0, 6.0]]))


def test_classification_head_standardises_its_features():
    head = ClassificationHead(width=2, classes=4)
    head.fc.weight.data = torch.eye(4)
    features = torch.tensor([[1.0, 10.0, 5.0, 0.0], [3.0, 30.0, 5.0, 0.0]])
    head.standardise(features)
    tokens = torch.tensor([[[3.0, 30.0], [5.0, 0.0]]])
    # Deviations are 1, 10, 0, 0: what does not vary is divided by a tenth of their mean.
    assert torch.allclose(head(tokens), torch.tensor([[1.0, 1.0, 0.0, 0.0]]), atol=1e-5)
    assert torch.allclose(head.deviation, torch.tensor([1.0, 10.0, 0.275, 0.275]), atol=1e-5)
    head.standardise(features[:1])
    assert head(tokens).isfinite().all()


def test_classifier_learns_everywhere():
    model = Classifier(tiny((32, 48), 16), ClassificationHead(width=24, classes=3))
    logits = model(torch.randn(5, 1, 32, 48))
    assert logits.shape == (5, 3)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1])).backward()
    assert all_learn(model) == []


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize(("patch_px", "sides"), [(16, (32, 64)), (8, (32, 48))])
def test_segmenter_learns_everywhere(patch_px, sides, kind):
    model = Segmenter(
        tiny(sides, patch_px, depth=6),
        DECODERS[kind](width=24, patch_px=patch_px, out_channels=2, base_channels=4),
    )
    logits = model(torch.randn(2, 1, *sides))
    assert logits.shape == (2, 2, *sides)
    (logits * torch.randn_like(logits)).sum().backward()
    silent = all_learn(model)
    assert [n for n in silent if "transp" in n or "weight" in n] == []


def test_shallow_features_enter_at_high_resolution():
    """UNETR's wiring: z3 rises most, z9 least, z12 is the bottom (arXiv 2103.10504, figure 2)."""
    model = Segmenter(
        tiny((32, 32), 16, depth=12),
        UNETRDecoder(width=24, patch_px=16, out_channels=1, base_channels=4),
    )
    seen = {}
    for name in ("encoder2", "encoder3", "encoder4", "decoder5"):
        block = getattr(model.decoder, name)
        block.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    images = torch.randn(2, 1, 32, 32)
    model(images)
    wanted = model.encoder.get_intermediate_layers(images, [2, 5, 8, 11], reshape=True)
    for name, feature in zip(("encoder2", "encoder3", "encoder4", "decoder5"), wanted, strict=True):
        assert torch.equal(seen[name], feature), name


@pytest.mark.parametrize("patch_px", [16, 8])
def test_a_unet_reads_all_depths_at_its_bottom_and_the_image_at_every_level(patch_px):
    torch.manual_seed(0)
    decoder = DECODERS["unet"](width=24, patch_px=patch_px, out_channels=1, base_channels=4)
    seen = []
    for part in [*decoder.down, decoder.bottom]:
        part.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    images, grid = torch.randn(1, 1, 64, 96), (64 // patch_px, 96 // patch_px)
    features = [torch.randn(1, 24, *grid) for _ in range(4)]
    before = decoder(images, features)
    assert seen == [(64 >> k, 96 >> k) for k in range(len(decoder.down) + 1)]
    assert seen[-1] == grid
    for depth in range(4):
        others = list(features)
        others[depth] = torch.randn(1, 24, *grid)
        assert not torch.allclose(decoder(images, others), before), depth


@pytest.mark.parametrize("kind", DECODERS)
def test_segmenter_takes_other_sizes(kind):
    decoder = DECODERS[kind](width=24, patch_px=16, out_channels=3, base_channels=4)
    model = Segmenter(tiny((32, 32), 16), decoder).eval()
    assert model(torch.randn(1, 1, 48, 80)).shape == (1, 3, 48, 80)


@pytest.mark.parametrize(("kind", "base_channels"), [("unet", 16), ("unetr", 4)])
def test_decoder_learns_a_lung_sized_square(kind, base_channels):
    """Sixty steps on one picture: the decoder can localise, not only run."""
    torch.manual_seed(0)
    decoder = DECODERS[kind](width=24, patch_px=16, out_channels=1, base_channels=base_channels)
    model = Segmenter(tiny((32, 32), 16), decoder)
    image, target = torch.randn(2, 1, 32, 32) * 0.1, torch.zeros(2, 1, 32, 32)
    target[0, :, 4:20, 6:15] = 1
    target[1, :, 12:30, 17:28] = 1
    image += target
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(image), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = model(image) > 0
    dice = 2 * (found * target).sum() / (found.sum() + target.sum())
    assert dice > 0.95


@pytest.mark.parametrize(("kind", "name"), [("unet", "U-Net"), ("unetr", "UNETR")])
def test_decoder_refuses_other_patches(kind, name):
    with pytest.raises(SpcxrError, match=f"patches of 14 px; the {name} decoder takes 16 or 8"):
        DECODERS[kind](width=24, patch_px=14, out_channels=1)


def test_decoders_read_four_depths():
    with pytest.raises(SpcxrError, match="the decoders read 4 depths"):
        decoder_blocks(3)
    assert decoder_blocks(24) == (5, 11, 17, 23)
