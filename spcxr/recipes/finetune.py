"""What `classify` and `segment` share before training: their settings, images, rows and encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spcxr.config import Config, ConfigError, setting
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.infer.predict import Normalisation
from spcxr.models.foreign import is_foreign
from spcxr.models.vit import VIT_SIZES, VisionTransformer, build_vit
from spcxr.models.weights import load_encoder_weights, load_model_folder
from spcxr.recipes.images import open_images
from spcxr.train.augment import Augmentation
from spcxr.train.distributed import World

SCRATCH = "scratch"
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Settings of every downstream task.

    The recipe is medical_mae's (arXiv 2210.12843: AdamW, base lr 2.5e-4, layer decay .55, weight
    decay .05, min lr 1e-5, warm-up, cosine), with two changes for the few hundred labelled images
    this is mostly used on: 30 epochs instead of 75 with drop path .1 instead of .2 (strong
    regularisation leaves short runs underfitted), and the rate is not scaled down below a batch
    of 256 (Adam's steps do not shrink with the batch, so small batches would hardly move).
    """

    data: str = setting(help="store, manifest CSV or image folder")
    init: str = setting(
        help="run, model folder or weights (.safetensors, .pth) to start from, or 'scratch'"
    )
    out: str = setting(help="run folder to write")
    model: str | None = setting(
        None, "encoder for scratch or a bare file: vit_small if not given", choices=tuple(VIT_SIZES)
    )
    image_px: int | None = setting(
        None, "side of the input: the init's, for scratch the store's, if not given", low=16
    )
    patch_px: int | None = setting(None, "side of a patch: the init's, else 16", low=4)
    train_splits: tuple[str, ...] = setting(("train",), "splits to learn from")
    val_splits: tuple[str, ...] = setting(("val",), "splits to choose the best epoch by")
    test_splits: tuple[str, ...] = setting(("test",), "splits for the final metrics ('' for none)")
    label_fraction: float = setting(
        1.0, "share of the training patients to use, nested by seed", low=0.0, high=1.0
    )
    epochs: int = setting(30, "passes over the training rows", low=1)
    validate_every_epochs: int = setting(
        1, "epochs between validations, and one after the last; few labels make short epochs", low=1
    )
    batch_size: int = setting(32, "images a step", low=1)
    base_lr: float | None = setting(
        None,
        "peak rate at a batch up to 256: classify 2.5e-4, with --freeze 2e-3, segment 1e-3",
        low=0.0,
    )
    min_lr: float = setting(1e-5, "rate at the end", low=0.0)
    warmup_epochs: float | None = setting(
        None, "epochs of linear warm-up: a tenth of all if not given", low=0.0
    )
    layer_decay: float | None = setting(
        None,
        "rate of each block over the next: .55, for scratch 1, if not given",
        low=0.0,
        high=1.0,
    )
    weight_decay: float = setting(0.05, "AdamW's", low=0.0)
    clip: float = setting(3.0, "largest gradient norm", low=0.0)
    ema: float = setting(
        0.0, "decay of a moving average of all weights, judged and exported; 0: none", low=0.0
    )
    drop_path: float = setting(0.1, "stochastic depth of the last block", low=0.0, high=0.9)
    freeze: bool = setting(False, "keep the encoder as it is and train the head alone")
    crop_scale: tuple[float, float] = setting((0.7, 1.0), "share of the image's area kept")
    rotation_deg: float = setting(7.0, "largest rotation", low=0.0, high=180.0)
    brightness: float = setting(0.1, "largest shift, share of the range", low=0.0, high=1.0)
    contrast: float = setting(0.1, "largest relative change of contrast", low=0.0, high=1.0)
    flip_p: float = setting(
        0.0, "probability of a mirror image (moves the heart)", low=0.0, high=1.0
    )
    stretch: float = setting(
        0.0, "largest relative change of width and height, each by itself", low=0.0, high=0.5
    )
    elastic: float = setting(
        0.0,
        "elastic deformation: deviation of its displacements, share of the side",
        low=0.0,
        high=0.1,
    )
    seed: int = setting(0, "of weights, order and augmentation", low=0)
    seeds: int = setting(1, "runs with seed, seed + 1, ..., and what they differ by", low=1)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "bf16 where it is fast, or", choices=("auto", "bf16", "fp32"))
    resume: str = setting("auto", "go on with the run in --out", choices=("auto", "never"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_fraction <= 0:
            raise ConfigError("label_fraction is 0; give a share of the training patients above 0")
        if self.ema >= 1:
            raise ConfigError(f"ema is {self.ema:g}: it would never move; give less than 1")
        if self.freeze and self.init == SCRATCH:
            raise ConfigError("freeze with init scratch trains on random features; give an --init")
        if not self.train_splits or not self.val_splits:
            raise ConfigError("train_splits and val_splits must name a split each")
        self._refuse_shared_splits()
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs is {self.warmup_epochs:g} of {self.epochs} epochs; choose fewer"
            )

    def _refuse_shared_splits(self) -> None:
        """What a model learned from, or was chosen by, says nothing of how it does elsewhere."""
        seen: dict[str, str] = {}
        for names, flag in self.splits:
            for name in dict.fromkeys(name.lower() for name in names):
                if name in seen:
                    raise ConfigError(
                        f"split {name!r} is given to {seen[name]} and {flag}: nothing is judged by "
                        "rows that it was learned from or chosen by; name it once"
                    )
                seen[name] = flag

    @property
    def splits(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Splits to learn from, to choose by and to test on, each with its flag, for messages."""
        return (
            (self.train_splits, "--train-splits"),
            (self.val_splits, "--val-splits"),
            (self.test_splits, "--test-splits"),
        )

    @property
    def encoder_px(self) -> int | None:
        """The side of what the encoder is shown, where it is not the init's."""
        return self.image_px

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is."""
        return self.freeze

    @property
    def usual_lr(self) -> float:
        """``base_lr`` if none is given. A head alone needs larger steps than an encoder bears."""
        return 2e-3 if self.freeze else 2.5e-4

    @property
    def peak_lr(self) -> float:
        """The rate after warm-up."""
        base = self.usual_lr if self.base_lr is None else self.base_lr
        return base * max(self.batch_size, 256) / 256

    @property
    def warmup(self) -> float:
        """Epochs of warm-up in force."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def decay_per_layer(self) -> float:
        """Layer decay in force: fresh weights need the same rate everywhere."""
        if self.layer_decay is not None:
            return self.layer_decay
        return 1.0 if self.init == SCRATCH else 0.55

    @property
    def augmentation(self) -> Augmentation:
        """How far training images are changed."""
        return Augmentation(
            crop_scale=self.crop_scale,
            rotation_deg=self.rotation_deg,
            brightness=self.brightness,
            contrast=self.contrast,
            flip_p=self.flip_p,
            stretch=self.stretch,
            elastic=self.elastic,
        )


def take_fraction(
    patients: NDArray[np.str_], strata: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose a share of the patients, stratum by stratum, at least one of each.

    Smaller shares of one seed are subsets of larger ones. All rows of a patient go together; a
    patient belongs to the stratum of the first row.

    Parameters
    ----------
    patients, strata
        ``(n,)`` pseudonym and stratum (a class, say) of each row.

    Returns
    -------
    ``(n,)`` bool, the rows of the chosen patients.

    >>> who = np.array(["a", "a", "b", "c", "d"])
    >>> take_fraction(who, np.array([0, 0, 0, 1, 1]), 0.5, seed=1).sum() in (2, 3)
    True
    """
    names, first = np.unique(patients, return_index=True)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen: list[str] = []
    for stratum in np.unique(strata[first]):
        members = order[strata[first][order] == stratum]
        chosen += names[members[: max(round(fraction * len(members)), 1)]].tolist()
    return np.isin(patients, chosen)


# --- the start ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where training begins: the images, the encoder, how pixels are normalised for it.

    ``origin`` is the line that says so in the log.
    """

    store: Store
    encoder: VisionTransformer
    normalisation: Normalisation
    origin: str


def begin(
    config: FinetuneConfig, folder: Path, world: World | None = None, place: Path | None = None
) -> Start:
    """Open the images (prepare them into ``RUN/store`` if need be) and build the encoder.

    An init brings its size, its patches, its preprocessing and the mean and std its pixels were
    normalised by; weights of another library bring nothing else, and ``scratch`` nothing at all.

    Parameters
    ----------
    world
        the processes that train together, the first of which prepares; none: this one alone.
    place
        where to prepare the images instead of ``RUN/store``.

    Raises
    ------
    SpcxrError
        an init that is none, that asks for images prepared otherwise, or that is not the model
        named by ``--model`` or ``--patch-px``.
    """
    torch.manual_seed(config.seed)
    place, first = place or folder / "store", (world or World(torch.device("cpu"))).once
    if config.init == SCRATCH or is_foreign(config.init):
        return _begin_plain(config, place, first)
    found = load_model_folder(config.init)
    given, wanted = found.encoder, found.config["preprocess"]
    _refuse_other_shape(config, given)
    image_px = config.encoder_px or given.image_px
    size = _side(config.image_px or image_px)
    opened = partial(open_images, config.data, place, size_px=size, wanted=wanted, init=config.init)
    store = Store.open(first(lambda: str(opened().path)))
    encoder = VisionTransformer(
        image_px=image_px,
        patch_px=given.patch_px,
        width=given.width,
        depth=given.depth,
        heads=given.heads,
        mlp_ratio=given.mlp_ratio,
        drop_path=_drop_path(config),
    )
    report = load_encoder_weights(encoder, config.init)
    numbers = found.config["pretrained_cfg"]
    # Three-channel weights become one filter for the grey image: so does their normalisation.
    normalisation = Normalisation(float(np.mean(numbers["mean"])), float(np.mean(numbers["std"])))
    return Start(store, encoder, normalisation, f"encoder from {config.init}: {report}")


def _begin_plain(
    config: FinetuneConfig, place: Path, first: Callable[[Callable[[], str]], str]
) -> Start:
    """From fresh weights, or those of a file that says nothing of its images."""
    opened = partial(open_images, config.data, place, size_px=config.image_px or 224)
    store = Store.open(first(lambda: str(opened().path)))
    encoder = build_vit(
        config.model or "vit_small",
        image_px=config.encoder_px or store.preprocess.size_px,
        patch_px=config.patch_px or 16,
        drop_path=_drop_path(config),
    )
    normalisation = Normalisation(store.mean, store.std)
    if config.init == SCRATCH:
        return Start(store, encoder, normalisation, "encoder from scratch")
    report = load_encoder_weights(encoder, config.init)
    said = f"encoder from {config.init}, normalised by the store's mean and std: {report}"
    return Start(store, encoder, normalisation, said)


def _drop_path(config: FinetuneConfig) -> float:
    """None for a frozen encoder: it must give the same features in every epoch."""
    return 0.0 if config.frozen else config.drop_path


def _side(image_px: int | tuple[int, int]) -> int:
    return image_px if isinstance(image_px, int) else max(image_px)


def _refuse_other_shape(config: FinetuneConfig, given: VisionTransformer) -> None:
    """The flags may repeat what the init is, not contradict it (``image_px`` is resampled)."""
    if config.patch_px not in (None, given.patch_px):
        raise SpcxrError(
            f"{config.init}: has patches of {given.patch_px} px, not {config.patch_px}; "
            "leave --patch-px out"
        )
    if config.model is not None:
        size = VIT_SIZES[config.model]
        if (given.width, given.depth, given.heads) != tuple(size):
            raise SpcxrError(
                f"{config.init}: is no {config.model} (width {given.width}, depth {given.depth}, "
                f"heads {given.heads}); leave --model out"
            )


# --- the rows -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cohort:
    """The rows to learn from, to choose the best epoch by and to test on, each ``(n,)``."""

    train: Rows
    val: Rows
    test: Rows

    @property
    def judged(self) -> Rows:
        """The rows that are predicted at the end: validation, then test."""
        return np.concatenate([self.val, self.test])

    @property
    def parts(self) -> dict[str, slice]:
        """Where in `judged` the rows of ``validation`` and, if there are any, ``test`` stand."""
        parts = {"validation": slice(0, len(self.val)), "test": slice(len(self.val), None)}
        return parts if len(self.test) else {"validation": parts["validation"]}


def rows_of(store: Store, splits: tuple[str, ...], flag: str) -> Rows:
    """Rows of the named splits.

    Raises
    ------
    SpcxrError
        no row in one of them.
    """
    found = store.manifest.splits
    if missing := [s for s in splits if not len(store.manifest.rows(s))]:
        raise SpcxrError(
            f"{store.path}: no row in split {missing[0]!r}; it has {', '.join(found) or 'none'}: "
            f"choose with {flag}"
        )
    return store.manifest.rows(splits)
