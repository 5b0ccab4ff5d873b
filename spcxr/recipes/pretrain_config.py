"""The settings of `pretrain`."""

from __future__ import annotations

from dataclasses import dataclass

from spcxr.config import Config, ConfigError, setting
from spcxr.models.vit import VIT_SIZES
from spcxr.objectives.corruption import FILLS, Corruption
from spcxr.objectives.table import OBJECTIVES
from spcxr.ops.group_mask import PLACEMENTS
from spcxr.recipes.views import ViewLaw


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Settings of `pretrain`.

    The defaults are GMML's (arXiv 2205.14986), with medical_mae's crops for chest X-rays
    (arXiv 2210.12843); SPCXR's own values are not known.
    """

    data: str = setting(help="store, manifest CSV or image folder")
    out: str = setting(help="run folder to write")
    model: str = setting("vit_small", "encoder", choices=tuple(VIT_SIZES))
    image_px: int = setting(224, "side of the encoder's input", low=16)
    patch_px: int = setting(16, "side of a patch", low=4)
    objective: str = setting(
        "gmml", "what is learned; mae hides whole patches, unfilled", choices=tuple(OBJECTIVES)
    )
    init: str | None = setting(None, "run, model folder or .safetensors to start from")
    splits: tuple[str, ...] = setting((), "splits to learn from; all but val*, test*, drift*")
    epochs: int = setting(800, "passes over the images", low=1)
    batch_size: int = setting(64, "images at a time", low=1)
    accumulate: int = setting(1, "batches a step", low=1)
    base_lr: float = setting(5e-4, "peak rate, times images a step / 256", low=0.0)
    min_lr: float = setting(1e-6, "rate at the end", low=0.0)
    warmup_epochs: float | None = setting(
        None, "epochs of linear warm-up: 10, or a tenth of a shorter run, if not given", low=0.0
    )
    weight_decay: float = setting(0.04, "AdamW's, at the start", low=0.0)
    weight_decay_end: float = setting(0.4, "and at the end", low=0.0)
    clip: float = setting(3.0, "largest gradient norm, 0 for any", low=0.0)
    drop_path: float = setting(0.1, "stochastic depth of the last block", low=0.0, high=0.9)
    mask_ratio: float = setting(0.75, "largest share hidden by groups", low=0.01, high=1.0)
    alien_ratio: float = setting(
        0.3, "share pasted from another image, in those images; 0 for never", low=0.0, high=1.0
    )
    fill: tuple[str, ...] = setting(("noise",), "what hides: " + ", ".join(FILLS), choices=FILLS)
    placement: str = setting("uniform", "where groups lie", choices=PLACEMENTS)
    align: str = setting("pixel", "groups of pixels or of patches", choices=("pixel", "patch"))
    crop_scale: tuple[float, float] = setting((0.5, 1.0), "share of the image's area seen")
    flip_p: float = setting(0.5, "probability of a mirror image", low=0.0, high=1.0)
    sample_every: int = setting(10, "epochs between pictures in samples/, 0 for none", low=0)
    save_every_epochs: int = setting(1, "epochs between checkpoints", low=1)
    save_every_s: float = setting(600.0, "longest time between checkpoints", low=1.0)
    seed: int = setting(0, "of weights, order, crops, masks and noise", low=0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "bf16 where it is fast, or", choices=("auto", "bf16", "fp32"))
    resume: str = setting("auto", "go on with the run in --out", choices=("auto", "never"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_px % self.patch_px:
            raise ConfigError(
                f"image_px {self.image_px} does not divide into patches of {self.patch_px}; "
                f"choose --image-px {self.image_px // self.patch_px * self.patch_px}"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale is {self.crop_scale}; give 0 < low <= high <= 1")
        if not self.fill:
            raise ConfigError(f"fill is empty; choose from: {', '.join(FILLS)}")
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"warmup_epochs {self.warmup} of {self.epochs} epochs leaves nothing; lower it"
            )

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in force."""
        return min(10.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def images_a_step(self) -> int:
        """Images between two updates."""
        return self.batch_size * self.accumulate

    @property
    def law(self) -> ViewLaw:
        """How images become views."""
        corruption = Corruption(
            mask_ratio=self.mask_ratio,
            alien_ratio=self.alien_ratio,
            fills=self.fill,
            placement=self.placement,
            align_patches=self.align == "patch",
        )
        return ViewLaw(
            image_px=self.image_px,
            patch_px=self.patch_px,
            crop_scale=self.crop_scale,
            flip_p=self.flip_p,
            corruption=OBJECTIVES[self.objective].hides(corruption),
            seed=self.seed,
        )
