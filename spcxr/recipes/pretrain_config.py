"""The settings of `pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spcxr.config import Config, ConfigError, setting
from spcxr.models.vit import VIT_SIZES
from spcxr.objectives.corruption import FILLS, Corruption
from spcxr.objectives.table import OBJECTIVES
from spcxr.ops.group_mask import PLACEMENTS
from spcxr.recipes.views import ViewLaw
from spcxr.train.trackers import TRACKERS

SWITCH = ("auto", "on", "off")
PARALLEL = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Settings of `pretrain`.

    The defaults are GMML's (arXiv 2205.14986), with medical_mae's crops for chest X-rays
    (arXiv 2210.12843); SPCXR's own values are not known.
    """

    data: str = setting(help="store, manifest CSV or image folder")
    out: str = setting(help="run folder to write")
    model: str = setting("vit_small", "encoder", choices=tuple(VIT_SIZES))
    image_px: tuple[int, ...] = setting((224,), "sides of the encoder's input: S, or H,W", low=16)
    patch_px: int = setting(16, "side of a patch", low=4)
    channels: int = setting(1, "of the encoder: 1, or 3 for grey given thrice", low=1, high=3)
    objective: str = setting("gmml", "what is learned", choices=tuple(OBJECTIVES))
    init: str | None = setting(
        None, "weights to start from: a run, a model folder, or timm's / DINO's / MAE's file"
    )
    splits: tuple[str, ...] = setting((), "splits to learn from; all but val*, test*, drift*")
    site_weights: tuple[str, ...] = setting((), "how often sites are seen, as a=2,b=0.5; 1 each")
    epochs: int = setting(800, "passes over the images", low=1)
    batch_size: int = setting(64, "images a step, over all processes", low=1)
    accumulate: int = setting(1, "parts a process takes its images of a step in", low=1)
    base_lr: float = setting(5e-4, "peak rate, times batch_size / 256", low=0.0)
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
    normalise_patches: bool = setting(False, "mae: a patch's own mean and deviation as target")
    reconstruction_weight: float = setting(
        1.0, "sit, mcssl: of rebuilding; sit 5 on few images", low=0.0
    )
    teacher_momentum: float = setting(
        0.996, "sit, mcssl: of the teacher at the start, 1 at the end", low=0.0, high=1.0
    )
    teacher_temperature: float = setting(0.07, "mcssl: after 30 epochs, .04 at first", low=0.01)
    prototypes: int = setting(8192, "mcssl: what images and patches are sorted into", low=2)
    local_views: int = setting(8, "mcssl: small clean views of an image", low=0)
    sample_every: int = setting(10, "epochs between pictures in samples/, 0 for none", low=0)
    probe: str | None = setting(None, "labelled store for k-NN and a linear probe of the encoder")
    probe_every: int = setting(10, "epochs between probes", low=1)
    save_every_epochs: int = setting(1, "epochs between checkpoints", low=1)
    save_every_s: float = setting(600.0, "longest time between checkpoints", low=1.0)
    keep_last: int = setting(1, "checkpoints to keep beside the best", low=1)
    keep_every_epochs: int = setting(0, "and one each so many epochs, 0 for none", low=0)
    track: tuple[str, ...] = setting(
        (), "also log to: " + ", ".join(TRACKERS), choices=tuple(TRACKERS)
    )
    seed: int = setting(0, "of weights, order, crops, masks and noise", low=0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "bf16 where it is fast, or", choices=("auto", "bf16", "fp32"))
    compile: str = setting("auto", "torch.compile of the blocks: on GPUs, or", choices=SWITCH)
    recompute: bool = setting(False, "blocks again in the backward pass: less memory, more time")
    parallel: str = setting(
        "auto", "weights on each process, or shared out: ViT-L on GPUs, or", choices=PARALLEL
    )
    resume: str = setting("auto", "go on with the run in --out", choices=("auto", "never"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_px) not in (1, 2):
            raise ConfigError(f"image_px is {self.image_px}; give one side, or height,width")
        if odd := [side for side in self.image_px if side % self.patch_px]:
            raise ConfigError(
                f"image_px {odd[0]} does not divide into patches of {self.patch_px}; "
                f"choose --image-px {odd[0] // self.patch_px * self.patch_px}"
            )
        if self.channels == 2:
            raise ConfigError("channels is 2; choose 1 or 3")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size {self.batch_size} does not divide into {self.accumulate} parts; "
                "change --accumulate or --batch-size"
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
    def size(self) -> tuple[int, int]:
        """Height and width of the encoder's input."""
        return self.image_px[0], self.image_px[-1]

    @property
    def local_size(self) -> tuple[int, int]:
        """Height and width of small views: 96 of 224 px, in whole patches."""
        patches = [max(round(side * 96 / 224 / self.patch_px), 1) for side in self.size]
        return patches[0] * self.patch_px, patches[1] * self.patch_px

    def part(self, processes: int) -> int:
        """Images of a step that one of so many processes takes at a time.

        Raises
        ------
        ConfigError
            a step that does not divide, or into odd parts (images stand in pairs).
        """
        parts = processes * self.accumulate
        size, rest = divmod(self.batch_size, parts)
        if rest or not size or (parts > 1 and size % 2):
            raise ConfigError(
                f"batch_size {self.batch_size} does not divide into {processes} processes x "
                f"{self.accumulate} parts of an even number of images; choose --batch-size "
                f"{max(round(self.batch_size / (2 * parts)), 1) * 2 * parts}"
            )
        return size

    def law(self, drop_rates: tuple[float, ...]) -> ViewLaw:
        """How images become views; ``drop_rates`` are the encoder's blocks'."""
        entry = OBJECTIVES[self.objective]
        corruption = Corruption(
            mask_ratio=self.mask_ratio,
            alien_ratio=self.alien_ratio,
            fills=self.fill,
            placement=self.placement,
            align_patches=self.align == "patch",
        )
        return ViewLaw(
            size=self.size,
            patch_px=self.patch_px,
            channels=self.channels,
            crop_scale=self.crop_scale,
            flip_p=self.flip_p,
            corruption=entry.hides(corruption),
            drop_rates=drop_rates,
            seed=self.seed,
            corrupted=entry.corrupted,
            local=self.local_views if entry.local else 0,
            local_size=self.local_size,
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the objective is built with."""
        return {name: getattr(self, name) for name in OBJECTIVES[self.objective].options}
