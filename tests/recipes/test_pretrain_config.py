"""Settings of `pretrain` that are refused, each by one line that names the remedy."""

import pytest

from spcxr.config import ConfigError
from spcxr.recipes.pretrain_config import PretrainConfig


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_px": 100}, "does not divide into patches of 8; choose --image-px 96"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale is \(0\.0, 1\.0\); give 0 < low"),
        ({"warmup_epochs": 3.0}, "warmup_epochs 3.0 of 3 epochs leaves nothing"),
        ({"fill": ("fog",)}, "fill is 'fog'; choose one of"),
        ({"fill": ()}, "fill is empty"),
        ({"model": "vit_huge"}, "model is 'vit_huge'; choose one of"),
        ({"mask_ratio": 1.5}, r"mask_ratio is 1.5; it must lie in"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(ConfigError, match=said):
        PretrainConfig(**{"data": "s", "out": "a", "epochs": 3, "patch_px": 8, **changes})
