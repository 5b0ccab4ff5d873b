"""One fine-tuning step, from stored pixels to updated weights, against the same in plain PyTorch.

    pytest benchmarks/bench_finetune_step.py

ViT-S/16 at 224 px, 8 images (64 on CUDA) of 256 x 256 uint8, 14 labels of which a tenth is unknown,
layer decay .55, clipping, AdamW; a warp and a change of light drawn for each image, the same in
both. The twin has timm-style blocks (`plain_step.py`), a linear head on concat(cls, mean patch),
resamples by `F.interpolate`, warps by `F.grid_sample`, and groups its parameters as timm does. Both
start from the same weights; losses and gradient norms of two steps are asserted equal first. In
bfloat16 on a CPU that multiplies it in hardware and on CUDA; in float32 elsewhere, where products
of matrices leave little to gain: the target is that of bfloat16. It is judged against the twin in
our precision, and against the twin as it is without autocast.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_step import Encoder
from record import CORES
from torch import nn

from spcxr.infer.predict import Normalisation
from spcxr.models.heads import ClassificationHead, Classifier
from spcxr.models.vit import build_vit
from spcxr.recipes.fitting import augmented
from spcxr.recipes.losses import masked_bce
from spcxr.train.augment import Augmentation
from spcxr.train.device import NATIVE_BF16, autocast, cpu_flags
from spcxr.train.optim import build_adamw, layer_of, set_rates, take_step

SIDE, PATCH, SOURCE, LABELS = 224, 16, 256, 14
SHAPE = {"width": 384, "depth": 12, "heads": 6}
RATE, DECAY, LAYER_DECAY, CLIP = 2.5e-4, 0.05, 0.55, 3.0
MEAN, STD = 0.5, 0.25
LAW = Augmentation()
TARGET = 1.5


class Twin(nn.Module):
    """The plain encoder with a linear head."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder(SIDE, PATCH, **SHAPE)
        self.head = nn.Linear(2 * SHAPE["width"], LABELS)

    def forward(self, images):
        tokens = self.encoder.norm(self.encoder(images)[-1])
        return self.head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))


def build(device):
    """Ours and the plain twin, with the same weights."""
    torch.manual_seed(0)
    encoder = build_vit("vit_small", image_px=SIDE, patch_px=PATCH)
    ours = Classifier(encoder, ClassificationHead(width=encoder.width, classes=LABELS))
    twin = Twin()
    twin.encoder.load_state_dict(encoder.state_dict())
    twin.head.load_state_dict(ours.head.fc.state_dict())
    return ours.to(device).train(), twin.to(device).train()


def drawn(batch):
    """Stored pixels ``(B, S, S)``, their rows, and labels with some unknown."""
    rng = np.random.default_rng(0)
    values = (rng.random((batch, LABELS)) < 0.3).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    pixels = rng.integers(0, 256, (batch, SOURCE, SOURCE)).astype(np.uint8)
    return np.arange(batch), pixels, torch.from_numpy(values)


def course_of(ours, device):
    """What `augmented` takes of a course."""
    return SimpleNamespace(
        config=SimpleNamespace(seed=0, augmentation=LAW),
        frames=None,
        start=SimpleNamespace(normalisation=Normalisation(MEAN, STD), encoder=ours.encoder),
        compute=SimpleNamespace(device=torch.device(device)),
    )


def our_step(ours, data, precision, device):
    rows, pixels, values = data
    course = course_of(ours, device)
    optimizer, values = build_adamw(ours, layer_decay=LAYER_DECAY), values.to(device)

    def step():
        set_rates(optimizer, lr=RATE, weight_decay=DECAY)
        images, _ = augmented(course, rows, pixels, epoch=0)
        with autocast(torch.device(device), precision):
            loss = masked_bce(ours(images).float(), values)
        loss.backward()
        told = take_step(optimizer, loss, clip=CLIP)
        return told.loss, told.grad_norm

    return step


def groups_of(twin):
    """Parameters by layer, and by whether they decay, as timm groups them."""
    made = {}
    for name, parameter in twin.named_parameters():
        inside = name.startswith("encoder.")
        layer = layer_of(name.removeprefix("encoder."), SHAPE["depth"]) if inside else 13
        key = (layer, parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token")))
        made.setdefault(key, []).append(parameter)
    return [
        {"params": p, "lr": RATE * LAYER_DECAY ** (13 - n), "weight_decay": DECAY if d else 0.0}
        for (n, d), p in made.items()
    ]


def plain_step(twin, data, warps, precision, device):
    _, pixels, values = data
    optimizer = torch.optim.AdamW(groups_of(twin), fused=True)
    trained, values = list(twin.parameters()), values.to(device)
    known = ~torch.isnan(values)
    target = values.nan_to_num(0.0)

    def step():
        images = torch.from_numpy(pixels).to(device)[:, None].float() / 255
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        grid = F.affine_grid(warps.theta.to(device), images.shape, align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
        gain, shift = (v.to(device)[:, None, None, None] for v in (warps.gain, warps.shift))
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (((images - mean) * gain + mean + shift).clamp(0, 1) - MEAN) / STD
        with autocast(torch.device(device), precision):
            logits = twin(images)
        losses = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        loss = (losses * known).sum() / known.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return float(loss.detach()), float(norm)

    return step


@pytest.mark.parametrize("threads", [CORES], indirect=True)
@pytest.mark.parametrize("what", ["spcxr", "plain", "plain (fp32)", "plain (compiled)"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_finetune_step(timed, device, precision, what, threads):
    native = device == "cuda" or not NATIVE_BF16.isdisjoint(cpu_flags())
    if (precision == "bf16") != native:
        pytest.skip("bf16 is emulated on this CPU" if precision == "bf16" else "bf16 is timed here")
    if what == "plain (compiled)" and device == "cpu":
        pytest.skip("torch.compile of the whole twin takes minutes on a CPU")
    if what == "plain (fp32)" and precision == "fp32":
        pytest.skip("that is the plain twin")
    batch = 64 if device == "cuda" else 8
    data = drawn(batch)
    ours, twin = build(device)
    mine = our_step(ours, data, precision, device)
    warps = augmented(course_of(ours, device), *data[:2], epoch=0)[1]
    plain = plain_step(twin, data, warps, precision, device)
    # Loss and gradient norm, and again after an update.
    for tolerance in (5e-3 if precision == "fp32" else 2e-2, 5e-2):
        assert mine() == pytest.approx(plain(), rel=tolerance)
    if what == "plain (compiled)":
        twin.encoder.compile()
    if what == "plain (fp32)":
        plain = plain_step(twin, data, warps, "fp32", device)
    call = mine if what == "spcxr" else plain
    timed(call, what=what, group=precision, images=batch, rounds=7, graph=False)
    if what == "spcxr":
        timed.target("speed", at_least=TARGET, of="plain")
        if precision == "bf16":
            timed.target("speed", at_least=TARGET, of="plain (fp32)")
