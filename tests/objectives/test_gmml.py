"""The GMML objective: its formula, its gradients, that it learns, and ten recorded losses.

To record the losses anew after a change on purpose:
``python tests/objectives/test_gmml.py`` (and say in CHANGELOG why they moved).
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.corruption import Corruption, corrupt, sample_crops, sample_plan
from spcxr.objectives.gmml import build_gmml, masked_l1, read_blocks
from spcxr.objectives.table import OBJECTIVES
from spcxr.ops.crop_resize import crop_resize
from spcxr.ops.philox import normal

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "gmml.json"


def tiny(depth=4, image_px=(32, 48)):
    torch.manual_seed(0)
    return build_gmml(
        VisionTransformer(image_px=image_px, patch_px=16, width=24, depth=depth, heads=3)
    )


def a_batch(batch=3):
    torch.manual_seed(1)
    clean, mask = torch.randn(batch, 1, 32, 48), torch.rand(batch, 32, 48) < 0.4
    return torch.where(mask[:, None], torch.randn_like(clean), clean), clean, mask


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
    losses = objective(corrupted, clean, mask)
    assert losses["loss"].item() == pytest.approx(total / count, rel=1e-5)
    assert losses["l1"].item() == losses["loss"].item()
    assert not losses["l1"].requires_grad


def test_gradients_reach_every_parameter():
    objective = tiny()
    objective(*a_batch())["loss"].backward()
    silent = [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_visible_pixels_do_not_count():
    objective = tiny()
    corrupted, clean, mask = a_batch()
    loss = objective(corrupted, clean, mask)["loss"]
    assert torch.equal(objective(corrupted, clean + 9.0 * ~mask[:, None], mask)["loss"], loss)
    assert not torch.equal(objective(corrupted, clean + 9.0 * mask[:, None], mask)["loss"], loss)


def test_nothing_masked_is_a_loss_of_zero():
    objective = tiny()
    corrupted, clean, mask = a_batch()
    loss = objective(corrupted, clean, torch.zeros_like(mask))["loss"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(bool(torch.isfinite(p.grad).all()) for p in objective.parameters())


def test_the_loss_is_taken_in_fp32():
    images = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    loss = masked_l1(images, torch.zeros_like(images), torch.ones(1, 64, 64, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (5, 7, 9, 11)), (24, (11, 15, 19, 23)), (2, (0, 1)), (1, (0,))]
)
def test_blocks_read(depth, blocks):
    assert read_blocks(depth) == blocks


def test_the_table_builds_on_an_encoder():
    encoder = tiny().encoder
    for build in OBJECTIVES.values():
        assert build(encoder).encoder is encoder


def scans(batch, side):
    """Drawn pictures from sines alone: the same bits wherever they are made."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    pictures = [
        (127 + 80 * torch.sin(x / (3.0 + i) + i) * torch.cos(y / (5.0 + i))).round()
        for i in range(batch)
    ]
    return torch.stack(pictures)[:, None].to(torch.uint8)


def ten_steps():
    """Crop, corrupt, rebuild, step: the whole of pretraining in small, with fixed weights."""
    objective = tiny(image_px=(32, 32)).train()
    with torch.no_grad():
        for index, parameter in enumerate(objective.parameters()):
            if parameter.ndim > 1:
                number, count = torch.tensor([index]), parameter.numel()
                values = normal(number, count, seed=1, epoch=0, stream="noise")
                size = math.sqrt(2 / parameter[0].numel())  # activations near 1 in every layer
                parameter.copy_(size * values.view_as(parameter))
    optimiser = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    sources, ids, losses = scans(6, 48), torch.arange(6) + 100, []
    for epoch in range(10):
        crops = sample_crops(ids, seed=7, epoch=epoch, source_px=48)
        clean = crop_resize(sources, crops.boxes, crops.flip, (32, 32)) / 255 * 4 - 1
        law = Corruption(fills=("noise", "zeros", "other", "shuffle"))
        plan = sample_plan(ids, law, seed=7, epoch=epoch, shape=(1, 32, 32), patch_px=16)
        corrupted, mask = corrupt(clean, plan)
        loss = objective(corrupted, clean, mask)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_ten_losses_are_the_recorded_ones():
    golden = json.loads(GOLDEN.read_text())
    assert ten_steps() == pytest.approx(golden["losses"], rel=golden["relative_tolerance"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_cuda_equals_the_cpu():
    ids, law, images = torch.arange(4), Corruption(), torch.randn(4, 1, 32, 48)
    objective, losses = tiny(), []
    for device in ("cpu", "cuda"):
        plan = sample_plan(ids, law, seed=0, epoch=0, shape=(1, 32, 48), patch_px=16, device=device)
        clean = images.to(device)
        corrupted, mask = corrupt(clean, plan)
        losses.append(objective.to(device)(corrupted, clean, mask)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_learns():
    objective = tiny().train()
    batch = a_batch()
    smooth = torch.linspace(-1, 1, 48).expand(3, 1, 32, 48).contiguous()
    corrupted = torch.where(batch[2][:, None], torch.zeros(()), smooth)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = objective(corrupted, smooth, batch[2])["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({"losses": ten_steps(), "relative_tolerance": 1e-3}, indent=1) + "\n"
    )
