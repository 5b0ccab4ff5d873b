"""A classifier that reads the lungs' patches alone against the same one that reads all of them.

    pytest benchmarks/bench_attend_lungs.py

ViT-S/16 at 224 px, 3 classes, 8 images (64 on CUDA), of which 40 % of the patches touch the lungs
(30 to 50 % an image, so that counts differ): the classifier in eval mode from normalised images to
logits, and a training step (forward, backward, AdamW). bfloat16 where the CPU multiplies it in
hardware and on CUDA, float32 elsewhere. Asserted first: the restricted logits equal those of whole
images whose other patches no token looks at, left out of the mean. What finding the lungs costs is
told apart: with masks of the data, or in training, where each image is segmented once a run, it is
`patches_touched` alone, which all restricted rows hold; `with the segmenter` adds a ViT-S UNETR at
224 px (16 channels) for each image, as a model with a segmenter inside pays it in `evaluate`.
"""

import pytest
import torch
from record import CORES

from spcxr.models.decoder import Segmenter, UNETRDecoder
from spcxr.models.heads import ClassificationHead, Classifier
from spcxr.models.regions import LungFinder, patches_touched
from spcxr.models.vit import build_vit
from spcxr.train.device import NATIVE_BF16, autocast, cpu_flags
from spcxr.train.optim import build_adamw, set_rates, take_step

SIDE, PATCH, CLASSES = 224, 16, 3
GRID = SIDE // PATCH
TARGET = 1.8
TOLERANCE = {"bf16": 5e-2, "fp32": 1e-3}


def lung_masks(count, device):
    """``[B, h, w]`` bool: two upright rectangles an image that touch their own patches alone."""
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    margin = PATCH // 4
    for i in range(count):
        tall = (8, 10, 12)[i % 3]  # in patches; a lung is 4 wide
        top = PATCH * (GRID - tall) // 2
        rows = slice(top + margin, top + PATCH * tall - margin)
        for left in (2 * PATCH, 8 * PATCH):
            masks[i, rows, left + margin : left + 4 * PATCH - margin] = True
    return masks.to(device)


def build(device):
    torch.manual_seed(0)
    encoder = build_vit("vit_small", image_px=SIDE, patch_px=PATCH)
    model = Classifier(encoder, ClassificationHead(width=encoder.width, classes=CLASSES))
    model.head.fc.weight.data.normal_()
    return model.to(device)


def finder(device):
    encoder = build_vit("vit_small", image_px=SIDE, patch_px=PATCH)
    decoder = UNETRDecoder(width=encoder.width, patch_px=PATCH, out_channels=2)
    return LungFinder(Segmenter(encoder, decoder), 0.5, 0.25).to(device)


def masked(model, images, visible):
    """The plain way: all patches encoded, none of the hidden looked at, a mean over the rest."""
    tokens = model.encoder.forward_features(images, key_mask=~visible)
    kept = visible.flatten(1)[..., None].to(tokens.dtype)
    mean = (tokens[:, 1:] * kept).sum(1) / kept.sum(1)
    features = torch.cat([tokens[:, 0], mean], 1)
    return model.head.fc((features - model.head.mean) / model.head.deviation)


def step_of(model, labels):
    optimizer = build_adamw(model)
    set_rates(optimizer, lr=1e-4, weight_decay=0.05)

    def step(logits):
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return take_step(optimizer, loss, clip=3.0).loss

    return step


def check(model, images, masks, precision):
    visible = patches_touched(masks, PATCH)
    share = visible.float().mean().item()
    assert 0.37 < share < 0.43, share
    with torch.no_grad(), autocast(images.device, precision):
        ours, wanted = model(images, visible).float(), masked(model, images, visible).float()
    difference = (ours - wanted).norm() / wanted.norm()
    assert difference < TOLERANCE[precision], difference
    return share


@pytest.mark.parametrize("threads", [CORES], indirect=True)
@pytest.mark.parametrize("what", ["lungs", "lungs with the segmenter", "whole"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_attend_lungs(timed, device, precision, mode, what, threads):
    native = device == "cuda" or not NATIVE_BF16.isdisjoint(cpu_flags())
    if (precision == "bf16") != native:
        pytest.skip("bf16 is emulated on this CPU" if precision == "bf16" else "bf16 is timed here")
    if mode == "train" and what == "lungs with the segmenter":
        pytest.skip("in training each image is segmented once a run, not once a step")
    count = 64 if device == "cuda" else 8
    model = build(device).train(mode == "train")
    images = torch.randn(count, 1, SIDE, SIDE, device=device)
    masks = lung_masks(count, device)
    share = check(model, images, masks, precision)
    segmenter = finder(device)
    step = step_of(model, torch.arange(count, device=device) % CLASSES)

    def forward():
        if what == "whole":
            return model(images)
        if what == "lungs with the segmenter":
            segmenter.masks(images)  # found, and not used: untrained, it finds no lungs
        return model(images, patches_touched(masks, PATCH))

    def call():
        with torch.set_grad_enabled(mode == "train"), autocast(torch.device(device), precision):
            logits = forward()
        return step(logits) if mode == "train" else logits

    call()
    rounds = 5 if device == "cpu" else 0
    timed(call, what=what, group=f"{mode} {precision}", images=count, rounds=rounds, graph=False)
    timed.row["share_read"] = share
    if what == "lungs":
        timed.target("speed", at_least=TARGET, of="whole")
