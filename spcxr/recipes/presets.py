"""Fine-tuning recipes of papers, by name: settings below those of the ``--config`` file and flags.

What is not named here is ours (`ClassifyConfig`). The images are changed by ours throughout: one
crop of fixed aspect, bilinear, a rotation, a shift of light. Neither recipe's RandAugment is taken
over (it solarises, posterises and shears), nor random erasing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2210.12843 (medical_mae), fine-tuning a ViT-S on ChestX-ray14 from MAE: AdamW, base
    # rate for a batch of 256, no mixup, no smoothing, no clipping. Left behind: RandAugment, and
    # its head on one token. The area of its crops is not told: ours.
    "medical-mae": {
        "epochs": 75,
        "batch_size": 256,
        "base_lr": 2.5e-4,
        "min_lr": 1e-5,
        "warmup_epochs": 5.0,
        "layer_decay": 0.55,
        "weight_decay": 0.05,
        "clip": 0.0,
        "drop_path": 0.2,
        "flip_p": 0.5,
    },
    # arXiv 2012.12877 (DeiT), table 9, the training of DeiT-B: AdamW, 5e-4 for a batch of 512 and
    # so half of it for our 256, 300 epochs of batches of 1,024, and the moving average of its code.
    # Left behind: RandAugment, mixup, CutMix, random erasing, repeated augmentation (these mix or
    # hide findings), and the rate that its warm-up begins at. Crops down to 8 % of the area would
    # lose the finding: ours.
    "deit": {
        "epochs": 300,
        "batch_size": 1024,
        "base_lr": 2.5e-4,
        "min_lr": 1e-5,
        "warmup_epochs": 5.0,
        "layer_decay": 1.0,
        "weight_decay": 0.05,
        "clip": 0.0,
        "drop_path": 0.1,
        "label_smoothing": 0.1,
        "ema": 0.99996,
        "rotation_deg": 0.0,
        "flip_p": 0.5,
    },
}
