"""One training step of a segmenter, from the network's input to updated weights, against MONAI's
own UNETR.

    pytest benchmarks/bench_segment_step.py        (MONAI's ViT needs einops: pip install einops)

ViT-S/16 at 224 px, feature size 16, one structure, 4 images: Dice + cross-entropy, clipping, AdamW.
Both have the same decoder (MONAI's blocks, `UNETRDecoder`: its numbers of parameters are asserted
equal first), MONAI's loss is its DiceCELoss, and both losses are asserted to begin alike and to
fall. The default decoder, a U-Net that the encoder joins (`UNetDecoder`), is timed beside them.
Ours computes as it does by default: in bfloat16 on a CPU that multiplies it in hardware, else in
float32. MONAI is timed as its documents use it, in float32, and in our precision.
"""

import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR
from record import CORES

from spcxr.models.decoder import Segmenter, build_decoder
from spcxr.models.vit import build_vit
from spcxr.recipes.mask_losses import dice_and_ce
from spcxr.train.device import autocast, pick_precision
from spcxr.train.optim import build_adamw, set_rates, take_step

SIDE, BATCH, RATE, DECAY, CLIP = 224, 4, 1e-3, 0.05, 3.0
TARGET = 1.3
DECODER = ("encoder1", "encoder2", "encoder3", "encoder4")
DECODER += ("decoder5", "decoder4", "decoder3", "decoder2", "out")


def build(kind="unetr"):
    """Ours with a decoder of this kind, and MONAI's of the same width, depth and UNETR decoder."""
    torch.manual_seed(0)
    encoder = build_vit("vit_small", image_px=SIDE, patch_px=16)
    ours = Segmenter(encoder, build_decoder({"structures": ["lung"], "decoder": kind}, encoder))
    theirs = UNETR(
        in_channels=1,
        out_channels=2,
        img_size=SIDE,
        feature_size=16,
        hidden_size=384,
        mlp_dim=1536,
        num_heads=6,
        spatial_dims=2,
    )
    return ours.train(), theirs.train()


def drawn(device):
    """Images ``[B, 1, S, S]`` with a bright square each, and their masks ``[B, S, S]`` uint8."""
    torch.manual_seed(1)
    masks = torch.zeros(BATCH, SIDE, SIDE, dtype=torch.uint8)
    masks[:, 40:150, 60:180] = 1
    images = masks[:, None] + 0.3 * torch.randn(BATCH, 1, SIDE, SIDE)
    return images.to(device), masks.to(device)


def our_step(ours, images, masks, precision):
    optimizer = build_adamw(ours, layer_decay=1.0)

    def step():
        set_rates(optimizer, lr=RATE, weight_decay=DECAY)
        with autocast(images.device, precision):
            loss = dice_and_ce(ours(images), masks)
        loss.backward()
        return take_step(optimizer, loss, clip=CLIP).loss

    return step


def their_step(theirs, images, masks, precision):
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, weight_decay=DECAY)
    between = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    target = masks[:, None].long()

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, precision):
            logits = theirs(images)
        loss = between(logits.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("threads", [CORES], indirect=True)
def test_default_decoder(timed, device, threads):
    precision = pick_precision("auto", torch.device(device))
    step = our_step(build("unet")[0].to(device), *drawn(device), precision)
    assert step() > step()
    timed(step, what="spcxr, U-Net", group=device, images=BATCH, rounds=5, graph=False, memory=True)


@pytest.mark.parametrize("threads", [CORES], indirect=True)
@pytest.mark.parametrize("what", ["spcxr", "MONAI", "MONAI (our precision)"])
def test_segment_step(timed, device, what, threads):
    pytest.importorskip("einops", reason="MONAI's ViT needs einops: pip install einops")
    precision = pick_precision("auto", torch.device(device))
    if what == "MONAI (our precision)" and precision == "fp32":
        pytest.skip("ours is float32 here, as MONAI's")
    ours, theirs = (model.to(device) for model in build())
    decoder = sum(count(getattr(theirs, name)) for name in DECODER)
    assert count(ours.decoder) == decoder
    data = drawn(device)
    mine = our_step(ours, *data, precision)
    plain = their_step(theirs, *data, "fp32" if what == "MONAI" else precision)
    first, begun = mine(), plain()
    assert first == pytest.approx(begun, rel=0.3)  # other weights, one law of drawing them
    assert mine() < first
    assert plain() < begun
    call = mine if what == "spcxr" else plain
    timed(call, what=what, group=device, images=BATCH, rounds=5, graph=False, memory=True)
    if what == "spcxr":
        timed.target("speed", at_least=TARGET, of="MONAI")
        same = "MONAI" if precision == "fp32" else "MONAI (our precision)"
        timed.target("peak_mib", at_most=1.0, of=same)
