"""The encoder for other programs: files, arrays or tensors in, features out.

Preprocessing comes with the weights, so that a caller cannot get it wrong by silence.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from spcxr.data.presets import Preprocess
from spcxr.errors import SpcxrError
from spcxr.infer.encoder_inputs import Radiograph, Shower, Shown, listed, several_of
from spcxr.infer.foreign_settings import of_another_library, settle
from spcxr.infer.reading import quiet
from spcxr.infer.tensor_encoder import (
    Features,
    RaggedFeatures,
    TensorEncoder,
    device_of,
    dtype_of,
)
from spcxr.models.attention_maps import cls_attention, rollout
from spcxr.models.weights import load_model_folder
from spcxr.train.batches import prefetch

log = logging.getLogger(__name__)

THREADS = 2  # that read and prepare files while the network works
Inputs = Radiograph | Sequence[Radiograph] | Tensor | Sequence[Tensor]


class Encoder(TensorEncoder):
    """A trained encoder with the preprocessing of its weights; `load_encoder` makes it.

    Called with radiographs it reads, prepares and encodes them, and returns `Features`. What is
    done depends on what is given:

    - files (DICOM, PNG, JPEG, TIFF, WebP) and numpy arrays (``[H, W]`` or ``[B, H, W]``, uint8,
      uint16, or float in [0, 1]; dark air, bright bone) are radiographs: they get the whole
      preprocessing of the weights (``preprocess``: grey levels, fit, size);
    - torch tensors ``[B, S, S]`` or ``[B, 1, S, S]`` of uint8 or uint16 are images that were
      prepared by it already: they are resampled to the network's size and normalised;
    - torch tensors ``[B, C, H, W]`` of floats are what the network reads, normalised by ``mean``
      and ``std``: nothing is done to them. Other sides than the network's own must be multiples of
      its patch. Values that cannot be of normalised images are refused (on a GPU this is looked
      at once, since looking waits for the device; never while ``torch.compile`` traces).

    Weights are frozen until ``requires_grad_()``; then gradients reach them, and they always reach
    a float tensor that requires them. Else `spcxr.models.fast` computes, in ``dtype``.
    May be called by several threads at once, copied to worker processes, and be part of a module.

    Attributes
    ----------
    vit
        the network (float32), for whoever wants to train it.
    preprocess, mean, std
        what its images went through; mean and std of pixels in [0, 1], ``[1, C, 1, 1]``.
    dtype
        of the computation; features are float32.
    notes
        what was assumed or rewritten when the weights were read.

    >>> from spcxr.data.presets import Preprocess
    >>> from spcxr.models.vit import VisionTransformer
    >>> vit = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> encoder = Encoder(vit, Preprocess(size_px=32), (0.5,), (0.25,))
    >>> radiographs = np.random.default_rng(0).random((3, 80, 64))
    >>> features = encoder(radiographs)
    >>> features.cls.shape, features.patches.shape
    (torch.Size([3, 24]), torch.Size([3, 2, 2, 24]))
    >>> [grid.shape for grid in encoder(radiographs[0], keep_aspect=True).patches]
    [torch.Size([2, 2, 24])]
    """

    # --- images in, features out ------------------------------------------------------------

    if TYPE_CHECKING:  # nn.Module's own says nothing of types

        @overload
        def __call__(
            self,
            inputs: Inputs,
            visible: Any = None,
            *,
            batch_size: int = 16,
            keep_aspect: Literal[False] = False,
        ) -> Features: ...

        @overload
        def __call__(
            self,
            inputs: Inputs,
            visible: Any = None,
            *,
            batch_size: int = 16,
            keep_aspect: Literal[True],
        ) -> RaggedFeatures: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self,
        inputs: Inputs,
        visible: Any = None,
        *,
        batch_size: int = 16,
        keep_aspect: bool = False,
    ) -> Features | RaggedFeatures:
        """Encode radiographs or tensors (see the class).

        Parameters
        ----------
        inputs
            a path, a numpy array, or a list of them (they may be mixed); a torch tensor, or a list
            of them.
        visible
            which patches are read, for each image: bool ``[Gh, Gw]`` of patches, True = read, or a
            mask of pixels ``[H, W]`` (lungs, say) on the grid of the image as given: patches that
            it touches are read, and all of an image in which it is empty (`patches_touched`).
            Nothing is spent on the others, nothing of them is seen, and their features are 0.
            Of a single path or array ``[H, W]``, the mask alone will do.
        batch_size
            radiographs at a time; the next ones are read and prepared meanwhile. Tensors are one
            batch, as given.
        keep_aspect
            do not bring images to one size: each radiograph fills, whole and undistorted, about as
            many patches as the network's own size has, in its own aspect; float tensors are a list
            of ``[C, H, W]`` and stay as they are. They are packed without padding, and none looks
            at another.

        What is odd about radiographs that can be used is logged, once for each oddity.

        Raises
        ------
        Rejected
            the first file or array that cannot be used, with the reason; nothing is returned.
        SpcxrError
            inputs or masks of another shape, type or range.
        """
        if isinstance(inputs, Tensor):
            if keep_aspect:
                raise SpcxrError("keep_aspect is for files, arrays or a list of tensors [C, H, W]")
            return self._of_tensor(inputs, visible)
        if _is_one(inputs) and np.ndim(visible) == 2:
            visible = [visible]
        if not isinstance(inputs, str | Path | np.ndarray):
            items: list[Any] = several_of(inputs)
            if items and all(isinstance(one, Tensor) for one in items):
                if keep_aspect:
                    return self._ragged(items, visible)
                return self._of_tensor(_stacked(items), visible)
            inputs = items
        several = self._shown(listed(inputs), visible, batch_size, keep_aspect)
        with quiet(), closing(several):
            made = [self._of_shown(batch, keep_aspect) for batch in several]
        cls = torch.cat([features.cls for features in made])
        if keep_aspect:
            return RaggedFeatures(cls, [grid for features in made for grid in features.patches])
        return Features(cls, torch.cat([f.patches for f in made if isinstance(f, Features)]))

    # --- where it looks ---------------------------------------------------------------------

    def attention(self, image: Radiograph | Tensor, layer: int = -1, visible: Any = None) -> Tensor:
        """How much the cls token looks at each patch of one image, in one block (`cls_attention`).

        Computed beside the fused kernel, in float32.

        Returns
        -------
        ``[heads, Gh, Gw]`` in [0, 1]. `Preprocess.to_original` brings a map of the square back
        onto the file's pixels.

        >>> from spcxr.data.presets import Preprocess
        >>> from spcxr.models.vit import VisionTransformer
        >>> vit = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
        >>> encoder = Encoder(vit, Preprocess(size_px=32), (0.5,), (0.25,))
        >>> encoder.attention(np.random.default_rng(0).random((80, 64)), layer=0).shape
        torch.Size([3, 2, 2])
        """
        images, grid = self._one(image, visible)
        return cls_attention(self.vit, images, layer, grid)[0].clone()

    def rollout(self, image: Radiograph | Tensor, visible: Any = None) -> Tensor:
        """How much each patch of one image reaches the cls token through all blocks (`rollout`).

        Returns
        -------
        ``[Gh, Gw]`` in [0, 1].
        """
        images, grid = self._one(image, visible)
        return rollout(self.vit, images, grid)[0].clone()

    def _one(self, image: Radiograph | Tensor, visible: Any) -> tuple[Tensor, Tensor | None]:
        """Of one image: normalised, ``[1, C, H, W]``, and the patches of it that are read."""
        mask = None if visible is None else [visible]
        if isinstance(image, Tensor):
            images = image[None] if image.ndim == 3 and image.is_floating_point() else image
            images = self._prepared(images)
            return images, self._grids(mask, images)
        found = listed(image)
        if len(found) != 1:
            raise SpcxrError(f"{len(found)} images; give one")
        with quiet():
            shown = self._shower(False)(found[0], 0, visible)
        grid = None if shown.visible is None else shown.visible[None].to(self.mean.device)
        return self._normal(shown.pixels[None], self.vit.image_px), grid

    # --- inputs -----------------------------------------------------------------------------

    def _shower(self, keep_aspect: bool) -> Shower:
        return Shower(self.preprocess, self.vit.image_px, self.vit.patch_px, keep_aspect)

    def _shown(
        self, items: list[Radiograph], visible: Any, batch_size: int, keep_aspect: bool
    ) -> Generator[list[Shown], None, None]:
        """Radiographs in batches, in order, read and prepared by threads ahead of their use."""
        if batch_size < 1:
            raise SpcxrError(f"batch_size is {batch_size}; give 1 or more")
        if visible is not None and len(visible) != len(items):
            raise SpcxrError(f"{len(visible)} masks for {len(items)} images; give one each")
        masks = [None] * len(items) if visible is None else list(visible)
        keys, show = zip(items, range(len(items)), masks, strict=True), self._shower(keep_aspect)
        fetched = prefetch(lambda key: show(*key), keys, threads=THREADS, ahead=batch_size)
        odd: dict[str, list[str]] = {}
        with closing(fetched):
            while several := [shown for _, shown in itertools.islice(fetched, batch_size)]:
                for shown in several:
                    for note in shown.notes:
                        odd.setdefault(note, []).append(shown.name)
                yield several
        for note, (first, *others) in odd.items():
            more = f" (and {len(others)} more)" if others else ""
            log.warning("%s%s: %s", first, more, note)

    # --- computing --------------------------------------------------------------------------

    def _of_shown(self, batch: list[Shown], keep_aspect: bool) -> Features | RaggedFeatures:
        grids = [shown.visible for shown in batch if shown.visible is not None]
        if keep_aspect:
            sizes = [(shown.pixels.shape[0], shown.pixels.shape[1]) for shown in batch]
            images = [
                self._normal(shown.pixels[None], size)[0]
                for shown, size in zip(batch, sizes, strict=True)
            ]
            return self._ragged(images, grids or None)
        squares = np.stack([shown.pixels for shown in batch])
        return self.encode(squares, torch.stack(grids) if grids else None)


def _is_one(inputs: Any) -> bool:
    return isinstance(inputs, str | Path) or (isinstance(inputs, np.ndarray) and inputs.ndim == 2)


def _stacked(tensors: list[Tensor]) -> Tensor:
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        raise SpcxrError("tensors of several sizes; give keep_aspect=True, or one size")
    return torch.stack(tensors)


# --- from a path ----------------------------------------------------------------------------


def load_encoder(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    heads: int | None = None,
) -> Encoder:
    """Load an encoder for use: frozen, in eval mode, with the preprocessing of its images.

    Parameters
    ----------
    path
        a run of spcxr-train, its ``model/`` folder or a copy of that; or weights of another
        library, a file or a folder of timm, DINO, MAE or Hugging Face (RAD-DINO), as
        `models.foreign` reads them. Pickles are never run.
    device
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` or a `torch.device`.
    dtype
        what is computed in: ``auto`` (bfloat16 where the device multiplies it in hardware),
        ``bf16``, ``fp32`` or the `torch.dtype`. Features are float32 in any case.
    preprocess, mean, std
        for weights of another library alone, which do not say how their images were made: a
        `Preprocess`, or some of its settings (``{"preset": "rad-dino", "fit": "crop"}``, the size
        being the network's), mean and std of pixels in [0, 1]. Without them the whole image is
        fitted into the network's square (``minmax``, ``pad``), mean and std are those beside the
        weights or, of 3 channels, ImageNet's. What was assumed is in ``encoder.notes``, and in a
        warning.
    heads
        of attention, for such weights of an unusual size.

    Raises
    ------
    SpcxrError
        nothing there, a torn file, weights of another architecture, a pickle that holds more than
        tensors, values that are not finite, or settings that these weights have of their own.

    >>> import tempfile
    >>> from spcxr.models.vit import build_vit
    >>> from spcxr.models.weights import save_model_folder
    >>> with tempfile.TemporaryDirectory() as place:
    ...     given = {"preprocess": Preprocess(size_px=32).to_dict(), "mean": 0.5, "std": 0.25}
    ...     vit = build_vit("vit_tiny", image_px=32)
    ...     save_model_folder(place + "/a", vit, task=None, head=None, provenance={}, **given)
    ...     encoder = load_encoder(place + "/a", device="cpu", dtype="fp32")
    PosixPath('...')
    >>> encoder([np.eye(64), np.random.default_rng(0).random((50, 40))])
    Traceback (most recent call last):
    spcxr.data.study.Rejected: image 0: it has only two grey levels: a mask or a drawing, ...
    >>> encoder(np.random.default_rng(0).random((2, 50, 40))).cls.shape
    torch.Size([2, 192])
    """
    path, where = Path(path), device_of(device)
    computed_in = dtype_of(dtype, where)
    # Also within torch.inference_mode: its tensors could never be trained, nor counted.
    with torch.inference_mode(False):
        if of_another_library(path):
            found = settle(path, preprocess, mean, std, heads)
            made = Encoder(*found[:-1], dtype=computed_in, notes=found.notes)
        elif any(one is not None for one in (preprocess, mean, std, heads)):
            raise SpcxrError(
                f"{path}: preprocess, mean, std and heads come with these weights; leave them out"
            )
        else:
            loaded = load_model_folder(path.parent if path.is_file() else path)
            made = Encoder(
                loaded.encoder,
                Preprocess.from_dict(loaded.config["preprocess"]),
                loaded.config["pretrained_cfg"]["mean"],
                loaded.config["pretrained_cfg"]["std"],
                computed_in,
            )
        return made.to(where)
