"""MAE on group masks: its loss is the plain formula, and hidden pixels are never encoded."""

import pytest
import torch
import torch.nn.functional as F

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.corruption import Corruption, sample_fill
from spcxr.objectives.mae import MAE, build_mae
from spcxr.objectives.objective import whole_view
from spcxr.objectives.table import OBJECTIVES
from spcxr.ops.patches import patchify

LAW = OBJECTIVES["mae"].hides(Corruption(fills=("noise", "shuffle")))


def tiny(**settings):
    torch.manual_seed(0)
    encoder = VisionTransformer(image_px=(32, 48), patch_px=16, width=24, depth=3, heads=3)
    return MAE(encoder, build_mae(encoder).decoder, **settings)


def a_batch(batch=4):
    torch.manual_seed(1)
    clean = torch.randn(batch, 1, 32, 48)
    fill = sample_fill(torch.arange(batch), LAW, seed=0, epoch=0, size=(32, 48), patch_px=16)
    return clean, whole_view(clean, fill, patch_px=16)


def by_hand(objective, clean, mask, normalise):
    """One image at a time, without packing."""
    encoder, decoder = objective.encoder, objective.decoder
    total, count = 0.0, 0
    for image, hidden in zip(clean, mask.flatten(1), strict=True):
        rows = patchify(image[None], 16)[0]
        tokens = F.linear(rows, encoder.patch_embed.proj.weight.flatten(1))
        tokens = tokens + encoder.patch_embed.proj.bias + encoder.pos_embed[0, 1:]
        first = encoder.cls_token[0] + encoder.pos_embed[0, :1]
        seen = torch.cat([first, tokens[~hidden]])[None]
        for block in encoder.blocks:
            seen = block(seen)
        seen = decoder.embed(encoder.norm(seen))[0]
        whole = decoder.mask_token.repeat(7, 1)
        whole[torch.cat([torch.tensor([True]), ~hidden])] = seen
        whole = (whole + decoder.pos_embed[0])[None]
        for block in decoder.blocks:
            whole = block(whole)
        rebuilt = decoder.to_pixels(decoder.norm(whole))[0, 1:]
        if normalise:
            rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True) + 1e-6).sqrt()
        total = total + (rebuilt - rows)[hidden].square().sum()
        count += int(hidden.sum()) * 256
    return total / count


@pytest.mark.parametrize("normalise", [False, True])
def test_the_loss_equals_the_plain_formula(normalise):
    objective, (clean, view) = tiny(normalise_patches=normalise), a_batch()
    fill = view.fill
    assert len(set(fill.mask.flatten(1).sum(1).tolist())) > 1  # ragged
    losses = objective([view])
    wanted = by_hand(objective, clean, fill.mask, normalise)
    torch.testing.assert_close(losses["loss"], wanted)
    assert losses["mse"] == losses["loss"]
    mine = torch.autograd.grad(losses["loss"], list(objective.parameters()))
    theirs = torch.autograd.grad(wanted, list(objective.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_hidden_pixels_are_not_encoded():
    objective, (clean, view) = tiny(), a_batch()
    rebuilt, fill = objective.reconstruct(view), view.fill
    hidden = fill.mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    other = whole_view(torch.where(hidden, 100.0, clean), fill, patch_px=16)
    assert torch.equal(objective.reconstruct(other), rebuilt)
    changed = whole_view(clean + 0.1, fill, patch_px=16)
    assert not torch.allclose(objective.reconstruct(changed), rebuilt)


def test_everything_hidden_and_nothing_hidden():
    objective, (_, view) = tiny(), a_batch()
    fill = view.fill
    fill.mask[0], fill.mask[1] = True, False
    loss = objective([view])["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in objective.parameters())
    fill.mask[:] = False
    assert objective([view])["loss"] == 0


def test_whole_patches_are_hidden_and_nothing_fills_them():
    fill = a_batch()[1].fill
    assert fill.mask.shape == (4, 2, 3)
    assert (LAW.align_patches, LAW.alien_ratio, LAW.fills) == (True, 0.0, ("zeros",))


def test_bfloat16_rows_are_taken():
    objective, (_, view) = tiny(), a_batch()
    with torch.autocast("cpu", torch.bfloat16):
        low = objective([view], dtype=torch.bfloat16)["loss"]
    assert low.item() == pytest.approx(objective([view])["loss"].item(), rel=0.02)
