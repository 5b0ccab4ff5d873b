"""The GMML objective: its formula, its gradients, that it learns."""

import pytest
import torch
import torch.nn.functional as F

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.corruption import Corruption, sample_fill
from spcxr.objectives.gmml import build_gmml, read_blocks
from spcxr.objectives.objective import View
from spcxr.objectives.table import OBJECTIVES
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.patches import patchify
from spcxr.ops.views import whole_views


def tiny(depth=4, image_px=(32, 48)):
    torch.manual_seed(0)
    return build_gmml(
        VisionTransformer(image_px=image_px, patch_px=16, width=24, depth=depth, heads=3)
    )


def a_batch(batch=3):
    torch.manual_seed(1)
    clean, mask = torch.randn(batch, 1, 32, 48), torch.rand(batch, 32, 48) < 0.4
    return torch.where(mask[:, None], torch.randn_like(clean), clean), clean, mask


def loss_of(objective, corrupted, clean, mask):
    """The objective on whole images that are normalised already."""
    rebuilt = objective.rebuild(patchify(corrupted, 16), (2, 3))
    return masked_reconstruction_loss(rebuilt, whole_views(clean, patch_px=16), mask)


def test_the_loss_equals_the_plain_formula():
    objective = tiny()
    corrupted, clean, mask = a_batch()
    encoder, head = objective.encoder, objective.head
    tokens = encoder.patch_embed(corrupted)
    tokens = torch.cat([encoder.cls_token.expand(3, 1, 24), tokens], 1) + encoder.pos_embed
    outputs = []
    for block in encoder.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    mean = (outputs[1] + outputs[2] + outputs[3]) / 3
    hidden = F.layer_norm(mean, (24,), encoder.norm.weight, encoder.norm.bias, 1e-6)[:, 1:]
    for layer in (0, 2, 4):
        hidden = F.gelu(F.linear(hidden, head.mlp[layer].weight, head.mlp[layer].bias))
    rows = F.linear(hidden, head.to_pixels.weight, head.to_pixels.bias)
    total, count = 0.0, 0
    for b in range(3):
        for patch in range(6):
            y, x = 16 * (patch // 3), 16 * (patch % 3)
            guess = rows[b, patch].view(16, 16)
            hit = mask[b, y : y + 16, x : x + 16]
            error = (guess - clean[b, 0, y : y + 16, x : x + 16]).abs()
            total += error[hit].sum().item()
            count += int(hit.sum())
    loss = loss_of(objective, corrupted, clean, mask)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_gradients_reach_every_parameter():
    objective = tiny()
    loss_of(objective, *a_batch()).backward()
    silent = [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_visible_pixels_do_not_count():
    objective = tiny()
    corrupted, clean, mask = a_batch()
    loss = loss_of(objective, corrupted, clean, mask)
    unseen, seen = clean + 9.0 * ~mask[:, None], clean + 9.0 * mask[:, None]
    assert torch.equal(loss_of(objective, corrupted, unseen, mask), loss)
    assert not torch.equal(loss_of(objective, corrupted, seen, mask), loss)


def test_nothing_masked_is_a_loss_of_zero():
    objective = tiny()
    corrupted, clean, mask = a_batch()
    loss = loss_of(objective, corrupted, clean, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0.0
    assert all(bool(torch.isfinite(p.grad).all()) for p in objective.parameters())


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (5, 7, 9, 11)), (24, (11, 15, 19, 23)), (2, (0, 1)), (1, (0,))]
)
def test_blocks_read(depth, blocks):
    assert read_blocks(depth) == blocks


def test_the_table_builds_on_an_encoder():
    encoder = tiny().encoder
    for entry in OBJECTIVES.values():
        assert entry.build(encoder).encoder is encoder


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_cuda_equals_the_cpu():
    ids, law, images = torch.arange(4), Corruption(), torch.randn(4, 1, 32, 48)
    fill = sample_fill(ids, law, seed=0, epoch=0, size=(32, 48), patch_px=16)
    views, objective, losses = whole_views(images, patch_px=16), tiny(), []
    for device in ("cpu", "cuda"):
        there, hidden = views.to(device), fill.to(device)
        view = View(there, hidden, None, torch.ones((), device=device))
        losses.append(objective.to(device)([view])["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_learns():
    objective = tiny().train()
    batch = a_batch()
    smooth = torch.linspace(-1, 1, 48).expand(3, 1, 32, 48).contiguous()
    corrupted = torch.where(batch[2][:, None], torch.zeros(()), smooth)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = loss_of(objective, corrupted, smooth, batch[2])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
