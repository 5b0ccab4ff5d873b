"""Visible patches alone, images of many sizes, hidden keys: all equal the plain encoder."""

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.models.blocks import DropPath
from spcxr.models.sequences import Sequences, pack_images, sequences_of
from spcxr.models.vit import VisionTransformer
from spcxr.ops.masked_patch_gather import Packed, visible_patch_gather
from spcxr.ops.views import whole_views


def tiny(depth=3, **settings):
    torch.manual_seed(0)
    return VisionTransformer(
        image_px=(32, 48), patch_px=16, width=24, depth=depth, heads=3, **settings
    ).eval()


def batch(count=3, sides=(32, 48)):
    return torch.randn(count, 1, *sides, generator=torch.Generator().manual_seed(1))


SOME = torch.tensor(
    [
        [[True, False, True], [False, True, True]],
        [[False, False, False], [False, False, True]],
        [[False, False, False], [False, False, False]],
    ]
)


def test_all_patches_packed_are_the_dense_tokens():
    encoder, images = tiny(), batch()
    packed = encoder.encode_visible(images)
    assert packed.cu_seqlens.tolist() == [0, 7, 14, 21]
    assert packed.ids.tolist() == [-1, 0, 1, 2, 3, 4, 5] * 3
    wanted = encoder.forward_features(images)
    torch.testing.assert_close(packed.tokens.view(3, 7, 24), wanted, rtol=1e-5, atol=1e-5)


def test_visible_patches_see_what_a_key_mask_leaves():
    """Two ways to the same answer: encode the visible alone, or all with the others hidden."""
    encoder, images = tiny(), batch()
    packed = encoder.encode_visible(images, SOME)
    assert packed.cu_seqlens.tolist() == [0, 5, 7, 8]
    dense = encoder.forward_features(images, key_mask=~SOME)
    kept = torch.cat([torch.ones(3, 1, dtype=torch.bool), SOME.flatten(1)], 1)
    torch.testing.assert_close(packed.tokens, dense[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder(images, visible=SOME), packed.cls)
    torch.testing.assert_close(encoder(images, key_mask=~SOME), dense[:, 0])
    assert not torch.allclose(encoder(images), packed.cls, atol=1e-3)


def test_images_of_many_sizes_are_as_each_alone():
    encoder = tiny()
    images = [batch(1, sides)[0] for sides in ((32, 48), (64, 16), (32, 48), (16, 16))]
    packed = encoder.encode_visible(images)
    alone = torch.cat([encoder.forward_features(image[None])[0] for image in images])
    torch.testing.assert_close(packed.tokens, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder(images), packed.cls)
    masks = [torch.rand(h // 16, w // 16) < 0.5 for _, h, w in (i.shape for i in images)]
    some = encoder(images, visible=masks)
    for n, (image, mask) in enumerate(zip(images, masks, strict=True)):
        one = encoder(image[None], visible=mask[None])[0]
        torch.testing.assert_close(some[n], one, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_dense_encoder():
    encoder, images = tiny(), batch()

    def gradients(tokens):
        loss = tokens.reshape(-1, 24).square().mul(torch.arange(24)).sum()
        return torch.autograd.grad(loss, list(encoder.parameters()))

    packed = gradients(encoder.encode_visible(images).tokens)
    for mine, wanted in zip(packed, gradients(encoder.forward_features(images)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_rows_of_the_gather_go_in_as_they_come():
    """`visible_patch_gather` with spare rows: they change nothing, and no number is waited for."""
    encoder = tiny()
    pixels = torch.randint(0, 256, (3, 1, 32, 48), dtype=torch.uint8)
    views = whole_views(pixels, patch_px=16, scale=1 / 64, shift=-2.0)
    packed = encoder.encode_packed(visible_patch_gather(views, ~SOME, rows=9))
    wanted = encoder.encode_visible(pixels / 64 - 2, SOME)
    torch.testing.assert_close(packed.tokens[:8], wanted.tokens, rtol=1e-4, atol=1e-4)
    assert packed.ids.tolist()[:8] == wanted.ids.tolist()
    assert packed.ids[8:].eq(-1).all()
    assert packed.tokens.isfinite().all()


def test_an_empty_batch_is_encoded():
    assert tiny(depth=1)(batch(0), visible=SOME[:0]).shape == (0, 24)


def test_stochastic_depth_drops_whole_images():
    sequences, _, _ = sequences_of(torch.tensor([0, 2, 5, 9], dtype=torch.int32), 10, 4)
    torch.manual_seed(0)
    branch = DropPath(0.5).train()(torch.zeros(13, 4), torch.ones(13, 4), sequences)
    images = sequences.image_of_row
    assert images.tolist() == [0] * 3 + [1] * 4 + [2] * 5 + [3]
    factors = [branch[images == n].unique().tolist() for n in range(3)]
    assert all(f in ([0.0], [2.0]) for f in factors)
    torch.manual_seed(0)
    dense = DropPath(0.5).train()(torch.zeros(3, 2, 4), torch.ones(3, 2, 4), Sequences())
    assert dense[:, 0, 0].tolist() == [f[0] for f in factors]


def test_packed_encoder_compiles_whole():
    encoder = tiny(depth=1)
    packed, _ = pack_images(batch(), SOME, 16)
    compiled = torch.compile(encoder.encode_packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(packed).tokens, encoder.encode_packed(packed).tokens)


def test_packed_encoder_exports_with_a_dynamic_batch():
    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = tiny(depth=1)

        def forward(self, rows, ids, starts):
            return self.encoder.encode_packed(Packed(rows, ids, starts)).tokens

    some, _ = pack_images(batch(), SOME, 16)
    more, _ = pack_images(batch(5), None, 16)
    count, images, encode = torch.export.Dim("rows"), torch.export.Dim("images", min=3), Encode()
    sizes = {"rows": {0: count}, "ids": {0: count}, "starts": {0: images}}
    program = torch.export.export(encode, tuple(some), dynamic_shapes=sizes)
    torch.testing.assert_close(program.module()(*more), encode(*more))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (lambda: ((batch(),), {"visible": SOME[:2]}), "2 masks for 3 images"),
        (lambda: ((batch(),), {"visible": SOME[:, :, :2]}), r"give bool of that grid"),
        (lambda: ((batch(),), {"visible": SOME.int()}), r"int32 for an image of 2x3"),
        (lambda: ((batch(),), {"key_mask": SOME[:, :1]}), r"give \[3, 2, 3\] bool"),
        (lambda: ((batch(),), {"visible": SOME, "key_mask": SOME}), "give it or visible"),
        (lambda: (([],), {}), "no images"),
        (lambda: (([torch.zeros(32, 32)],), {}), r"give \[C, H, W\]"),
        (lambda: ((batch(2),), {"visible": [SOME[0], SOME[0, :1]]}), "masks of several sizes"),
        (lambda: (([torch.zeros(1, 30, 32)],), {}), "does not divide into patches"),
        (lambda: (([torch.zeros(3, 32, 32)],), {}), "1-channel"),
    ],
)
def test_bad_input_is_refused(words, said):
    images, masks = words()
    with pytest.raises(SpcxrError, match=said):
        tiny(depth=1)(*images, **masks)
