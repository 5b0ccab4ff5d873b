"""Ten steps of each objective from fixed weights, and their losses on record in tests/golden.

To record losses anew after a change on purpose: ``python tests/objectives/golden_steps.py sit``
(and say in CHANGELOG why they moved).
"""

import json
import math
import sys
from pathlib import Path

import torch

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.corruption import Corruption, sample_crops, sample_fill
from spcxr.objectives.objective import Progress, View
from spcxr.objectives.table import OBJECTIVES
from spcxr.ops.philox import normal
from spcxr.ops.views import Views

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SMALL = {"mcssl": {"prototypes": 64, "hidden": 32}}
LOCAL = 2


def scans(batch, side):
    """Drawn pictures from sines alone: the same bits wherever they are made."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    pictures = [
        (127 + 80 * torch.sin(x / (3.0 + i) + i) * torch.cos(y / (5.0 + i))).round()
        for i in range(batch)
    ]
    return torch.stack(pictures)[:, None].to(torch.uint8)


def with_fixed_weights(name):
    """A tiny objective whose every matrix is drawn by Philox; the teacher is the student's twin."""
    torch.manual_seed(0)
    encoder = VisionTransformer(image_px=(32, 32), patch_px=16, width=24, depth=4, heads=3)
    objective = OBJECTIVES[name].build(encoder, **SMALL.get(name, {})).train()
    learned = [p for p in objective.parameters() if p.requires_grad]
    with torch.no_grad():
        for index, parameter in enumerate(learned):
            if parameter.ndim > 1:
                number, count = torch.tensor([index]), parameter.numel()
                values = normal(number, count, seed=1, epoch=0, stream="noise")
                size = math.sqrt(2 / parameter[0].numel())  # activations near 1 in every layer
                parameter.copy_(size * values.view_as(parameter))
    if hasattr(objective, "teacher"):
        objective.teacher.follow(encoder, objective.projection, 0.0)
    return objective


def draw(sources, ids, name, epoch):
    """The views of a batch: corrupted ones of 32 px, and local ones of 16 px where it has them."""
    entry, levels = OBJECTIVES[name], torch.ones(len(ids))
    law = entry.hides(Corruption(fills=("noise", "zeros", "other", "shuffle")))
    found = []
    for number in range(entry.corrupted + LOCAL * entry.local):
        local = number >= entry.corrupted
        size, scale = ((16, 16), (0.05, 0.5)) if local else ((32, 32), (0.5, 1.0))
        keys = {"seed": 7, "epoch": epoch, "view": number}
        crops = sample_crops(ids, **keys, source_px=48, scale=scale)
        views = Views(sources, *crops, levels * 4 / 255, -levels, size, 16)
        fill = None if local else sample_fill(ids, law, **keys, size=size, patch_px=16)
        found.append(View(views, fill, None, torch.ones(())))
    return found


def ten_steps(name, steps=10):
    """Crop, corrupt, learn: the whole of pretraining in small; an epoch is three steps."""
    objective = with_fixed_weights(name)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3)
    sources, ids, losses = scans(6, 48), torch.arange(6) + 100, []
    for step in range(steps):
        objective.begin_step(Progress(step, epoch_steps=3, total_steps=10))
        loss = objective(draw(sources, ids, name, step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        objective.end_backward()
        optimiser.step()
        objective.end_step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        record = {"losses": ten_steps(chosen), "relative_tolerance": 1e-3}
        (GOLDEN / f"{chosen}.json").write_text(json.dumps(record, indent=1) + "\n")
