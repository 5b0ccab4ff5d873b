"""An encoder and the numbers of its images: tensors in, features out, with the checks between.

What reads files (`spcxr.infer.encoder`) stands on it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.data.presets import Preprocess
from spcxr.errors import SpcxrError
from spcxr.infer.normalise import GREY, network_input
from spcxr.models.fast import for_inference
from spcxr.models.regions import patches_touched
from spcxr.models.vit import VisionTransformer
from spcxr.ops.checks import traced
from spcxr.ops.patches import patch_grid
from spcxr.train.device import autocast, pick_device, pick_precision

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SOME = 8  # values of each weight that are looked at
T = TypeVar("T")


class Features(NamedTuple):
    """What an encoder makes of images: ``cls [B, D]`` and ``patches [B, Gh, Gw, D]``, float32.

    Patches that were not read (``visible=``) are 0.
    """

    cls: Tensor
    patches: Tensor


class RaggedFeatures(NamedTuple):
    """`Features` of images of several sizes: ``patches`` is a list of ``[Gh, Gw, D]``."""

    cls: Tensor
    patches: list[Tensor]


class FastCopy(NamedTuple):
    """The network made for speed, and how to tell that it is of other weights than there are now:
    ``state`` of each weight, and some ``values`` of those that ``views`` look at."""

    state: list[Any]
    views: list[Tensor]
    values: Tensor | None
    vit: VisionTransformer


class TensorEncoder(nn.Module):
    """What `Encoder` (see there) does with tensors, and how it is part of other programs."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        preprocess: Preprocess,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.preprocess, self.dtype, self.notes = preprocess, dtype, tuple(notes)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        # Of black and of white, once normalised.
        self.black = min(-m / s for m, s in zip(mean, std, strict=True))
        self.white = max((1 - m) / s for m, s in zip(mean, std, strict=True))
        self.eval()
        self._looked = False
        self._fast: FastCopy | None = None

    def encode(self, squares: NDArray[Any] | Tensor, visible: Tensor | None = None) -> Features:
        """Prepared images ``[B, S, S]`` uint8 or uint16 (`Prepared.pixels`) -> `Features`.

        They are resampled to the network's size and normalised as its training images were.
        ``visible [B, Gh, Gw]`` bool: the patches that are read.

        >>> vit = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
        >>> encoder = TensorEncoder(vit, Preprocess(size_px=64), (0.5,), (0.25,))
        >>> encoder.encode(torch.zeros(5, 64, 64, dtype=torch.uint8)).patches.shape
        torch.Size([5, 2, 2, 24])
        """
        return self._features(self._of_squares(torch.as_tensor(squares)), visible)

    def forward_features(self, images: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """`VisionTransformer.forward_features` of normalised images: ``[B, 1 + N, D]`` float32."""
        images = self._looked_at(images)
        hidden = None if key_mask is None else key_mask.to(images.device)
        run = self._through(lambda vit, cast: vit.forward_features(cast(images), hidden), images)
        return run.float()

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """`VisionTransformer.get_intermediate_layers` of normalised images, in float32.

        Returns
        -------
        a tuple of patches ``[B, N, D]`` (``reshape``: ``[B, D, Gh, Gw]``), or of pairs (patches,
        cls ``[B, D]``).
        """
        x = self._looked_at(x)
        pairs = self._through(
            lambda vit, cast: vit.get_intermediate_layers(
                cast(x), n, reshape, return_class_token=True, norm=norm
            ),
            x,
        )
        if return_class_token:
            return tuple((patches.float(), cls.float()) for patches, cls in pairs)
        return tuple(patches.float() for patches, _ in pairs)

    # --- tensors in ------------------------------------------------------------------------

    def _normal(self, pixels: NDArray[Any] | Tensor, size: tuple[int, int]) -> Tensor:
        """Prepared ``[B, h, w]`` of integers -> what the network reads, ``[B, C, *size]``."""
        return (network_input(pixels, size, GREY, self.mean.device) - self.mean) / self.std

    def _prepared(self, images: Tensor) -> Tensor:
        """A tensor as it was given -> what the network reads."""
        if images.is_floating_point():
            if images.ndim != 4:
                raise SpcxrError(
                    f"a tensor {list(images.shape)} of floats; give [B, C, H, W], normalised"
                )
            return self._looked_at(images)
        grey = images.ndim == 4 and images.shape[1] == 1
        return self._of_squares(images[:, 0] if grey else images)

    def _of_squares(self, squares: Tensor) -> Tensor:
        """Prepared images ``[B, S, S]`` -> what the network reads."""
        shape, kinds = squares.shape, (torch.uint8, torch.uint16)
        if squares.dtype not in kinds or len(shape) != 3 or shape[1] != shape[2]:
            raise SpcxrError(
                f"a tensor {list(shape)} of {squares.dtype}; give [B, S, S] of uint8 or uint16 "
                "(grey and prepared), [B, C, H, W] of normalised floats, or numpy arrays"
            )
        return self._normal(squares, self.vit.image_px)

    def _looked_at(self, images: Tensor) -> Tensor:
        """Normalised images on the network's device; refuse what cannot be normalised images."""
        images = images.to(self.mean.device)
        on_cpu = images.device.type == "cpu"
        if traced(images) or not images.numel() or not (on_cpu or not self._looked):
            return images
        self._looked = True
        low, high = (float(value) for value in images.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SpcxrError("images with pixels that are not finite; mend or leave them out")
        slack = self.white - self.black  # for images that were augmented, and for noise
        what = (
            f"values from {low:.4g} to {high:.4g}, but this network reads (x - mean) / std, black "
            f"{self.black:.4g} to white {self.white:.4g}; give files, numpy arrays or uint8 "
            "tensors to have that done"
        )
        if low < self.black - slack or high > self.white + slack:
            raise SpcxrError(what)
        if self.black < 0 <= low < high <= 1:
            warnings.warn(f"{what} (these look like pixels in [0, 1])", stacklevel=5)
        return images

    def _grids(self, visible: Any, images: Tensor) -> Tensor | None:
        """Masks of patches ``[B, Gh, Gw]`` or of pixels ``[B, H, W]`` -> bool of patches."""
        if visible is None:
            return None
        if not isinstance(visible, Tensor):
            visible = torch.stack([torch.as_tensor(mask) for mask in visible])
        size = (images.shape[2], images.shape[3])
        grid = patch_grid(*size, self.vit.patch_px)
        seen = visible.to(images.device) != 0
        if tuple(visible.shape) == (len(images), *grid):
            return seen
        if tuple(visible.shape) == (len(images), *size):
            return patches_touched(seen, self.vit.patch_px)
        raise SpcxrError(
            f"visible is {list(visible.shape)}; give the patches {[len(images), *grid]} or the "
            f"pixels {[len(images), *size]} of the images"
        )

    # --- computing --------------------------------------------------------------------------

    def _of_tensor(self, given: Tensor, visible: Any) -> Features:
        images = self._prepared(given)
        return self._features(images, self._grids(visible, images))

    def _features(self, images: Tensor, visible: Tensor | None) -> Features:
        """Of normalised images of one size."""
        grid = patch_grid(images.shape[2], images.shape[3], self.vit.patch_px)
        if visible is None:
            tokens = self._through(lambda vit, cast: vit.forward_features(cast(images)), images)
            tokens = tokens.float()
            return Features(tokens[:, 0], tokens[:, 1:].unflatten(1, grid))
        seen = visible.to(images.device)
        packed = self._through(lambda vit, cast: vit.encode_visible(cast(images), seen), images)
        found = packed.tokens.float()
        place = seen.flatten().nonzero()[:, 0]
        flat = found.new_zeros(seen.numel(), found.shape[1])
        flat = flat.index_copy(0, place, found[packed.ids >= 0])
        cls = found[packed.cu_seqlens[:-1]]
        return Features(cls, flat.view(len(images), *grid, -1))

    def _ragged(self, images: list[Tensor], visible: Any) -> RaggedFeatures:
        """Of normalised images of several sizes, ``[C, H, W]`` each."""
        given = [self._looked_at(image) for image in images]
        if bad := [list(image.shape) for image in given if image.ndim != 3]:
            raise SpcxrError(f"a tensor {bad[0]} among images of several sizes; give [C, H, W]")
        grids = [patch_grid(x.shape[1], x.shape[2], self.vit.patch_px) for x in given]
        if visible is None:
            seen = [torch.ones(grid, dtype=torch.bool, device=self.mean.device) for grid in grids]
        elif len(visible) != len(given):
            raise SpcxrError(f"{len(visible)} masks for {len(given)} images; give one each")
        else:
            pairs = zip(visible, given, strict=True)
            seen = [self._grids([mask], image[None])[0] for mask, image in pairs]  # type: ignore[index]
        packed = self._through(
            lambda vit, cast: vit.encode_visible(
                [cast(image) for image in given], None if visible is None else seen
            ),
            *given,
        )
        found = packed.tokens.float()
        rows = found[packed.ids >= 0].split([int(mask.sum()) for mask in seen])
        patches = []
        for mask, some in zip(seen, rows, strict=True):
            flat = found.new_zeros(mask.numel(), found.shape[1])
            place = mask.flatten().nonzero()[:, 0]
            patches.append(flat.index_copy(0, place, some).view(*mask.shape, -1))
        return RaggedFeatures(found[packed.cu_seqlens[:-1]], patches)

    def _through(
        self, work: Callable[[VisionTransformer, Callable[[Tensor], Tensor]], T], *images: Tensor
    ) -> T:
        """Let the network work: the fast copy, or the plain network where gradients are wanted.

        ``work`` is given the network, and what brings images to the type that it computes in.
        torch.compile is given the plain one too: what it has traced would not hear of weights
        that change. So it is while weights may learn: fused optimisers do not count their steps.
        """
        learning = any(weight.requires_grad for weight in self.vit.parameters())
        wanted = torch.is_grad_enabled() and any(image.requires_grad for image in images)
        if torch.compiler.is_compiling() or learning or wanted:
            if learning:
                self._fast = None
            precision = "bf16" if self.dtype == torch.bfloat16 else "fp32"
            with autocast(self.mean.device, precision):
                return work(self.vit, lambda x: x.to(self.vit.cls_token.dtype))
        with torch.no_grad():
            return work(self._frozen(), lambda x: x.to(self.dtype))

    def _frozen(self) -> VisionTransformer:
        """The fast copy of the network as it is now; made anew where weights have changed.

        Two threads may both make it: the same, once too often.
        """
        weights = list(self.vit.parameters())
        state = [
            (id(w), w.device, w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights
        ]
        fast = self._fast
        if fast is None or fast.state != state or _changed(fast):
            with torch.inference_mode(False):
                views = _views(weights)
                values = torch.cat(views) if views else None
                fast = FastCopy(state, views, values, for_inference(self.vit, self.dtype))
            self._fast = fast
        return fast.vit

    # --- as a module ------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> TensorEncoder:
        """``to``, ``cuda``, ``float``: the fast copy is of the weights as they were."""
        self._fast = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without the fast copy, which is made again there."""
        return {**self.__dict__, "_fast": None}

    def extra_repr(self) -> str:
        """What prints beside the network: preset, size, and the type it computes in."""
        return f"{self.preprocess}, dtype={self.dtype}"


def _views(weights: list[nn.Parameter]) -> list[Tensor]:
    """A few values of each weight: what is written through ``.data`` is not counted by torch.

    On a GPU none: looking would wait for the device.
    """
    if any(weight.device.type != "cpu" for weight in weights):
        return []
    return [w.detach().reshape(-1)[:: max(1, w.numel() // SOME)] for w in weights]


def _changed(fast: FastCopy) -> bool:
    return fast.values is not None and not torch.equal(torch.cat(fast.views), fast.values)


def device_of(device: str | torch.device) -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, or a device, where there is one.

    >>> device_of("cpu")
    device(type='cpu')
    """
    name = str(device)
    if not name.startswith("cuda:"):
        return pick_device(name)
    pick_device("cuda")  # refuses where there is none
    return torch.device(name)


def dtype_of(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """``auto``, ``bf16``, ``fp32``, or the type itself, for a device.

    >>> dtype_of("bf16", torch.device("cpu"))
    torch.bfloat16
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise SpcxrError(f"dtype is {dtype}; choose one of: auto, bf16, fp32")
        return dtype
    return DTYPES[pick_precision(dtype, device)]
