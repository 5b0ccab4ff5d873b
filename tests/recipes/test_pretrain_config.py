"""Settings of `pretrain` that are refused, each by one line that names the remedy."""

import pytest

from spcxr.config import ConfigError
from spcxr.errors import SpcxrError
from spcxr.recipes.finetune import rows_of
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.pretrain_start import choose_rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_px": (100,)}, "does not divide into patches of 8; choose --image-px 96"),
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


def test_splits_are_found_in_any_case(make_store):
    """As the manifest's author wrote them: prepare reads names of splits in lower case."""
    store = make_store(splits=["Train", "Val"] * 32)
    _, rows, watched = choose_rows(PretrainConfig(data="s", out="a", splits=("Train",)), store)
    assert len(rows) == len(watched) == 32
    _, rows, watched = choose_rows(
        PretrainConfig(data="s", out="a", splits=("Train", "VAL")), store
    )
    assert (len(rows), len(watched)) == (64, 0)
    assert len(rows_of(store, ("VAL",), "--val-splits")) == 32
    with pytest.raises(SpcxrError, match="no row in split 'valid'; it has train, val"):
        rows_of(store, ("valid",), "--val-splits")
