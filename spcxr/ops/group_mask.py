"""Groups: unions of random axis-aligned rectangles that hide part of an image (GMML, SPCXR §3)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch, philox

PLACEMENTS = ("uniform", "corner")
MAX_SIDE = 4096
MAX_BLOCKS = 1 << 15
DEFAULT_BLOCK = 0.3  # the longest block side, as a fraction of the grid's (every ancestor's)


class GroupMask(NamedTuple):
    """``blocks [B, K, 4]`` int32 (top, left, height, width; height 0 pads) and ``mask [B, Gh, Gw]``
    bool, True = masked: the union of the blocks."""

    blocks: Tensor
    mask: Tensor


class Law(NamedTuple):
    """The law in whole numbers, so that every backend does the same integer arithmetic."""

    grid: list[int]  # height, width
    target: list[int]  # lowest number of masked cells and span, in 1/128 cell
    sides: list[int]  # lowest height, span, lowest width, span, in 1/65536 unit
    torus: bool
    max_blocks: int  # K: four times the blocks that tile the grid, and 64

    @classmethod
    def of(
        cls,
        grid: tuple[int, int],
        ratio: tuple[float, float],
        block: tuple[float, float] | None,
        placement: str,
    ) -> Law:
        """Check the parameters of `group_mask` and round them.

        >>> Law.of((14, 14), (0.5, 0.75), None, "uniform").max_blocks
        184
        """
        if len(grid) != 2 or not 1 <= min(grid) <= max(grid) <= MAX_SIDE:
            raise SpcxrError(f"mask grid {tuple(grid)}; give two sides of 1 to {MAX_SIDE} units")
        if not 0 <= ratio[0] <= ratio[1] <= 1:
            raise SpcxrError(f"mask ratio {tuple(ratio)}; give 0 <= low <= high <= 1")
        if block is not None and not 1 <= block[0] <= block[1] <= MAX_SIDE:
            raise SpcxrError(
                f"block sides {tuple(block)}; give 1 <= low <= high <= {MAX_SIDE} units"
            )
        if placement not in PLACEMENTS:
            raise SpcxrError(f"no placement {placement!r}; choose from: {', '.join(PLACEMENTS)}")
        cells = grid[0] * grid[1]
        low, high = (int(r * cells * 128 + 0.5) for r in ratio)
        sides = []
        for side in grid:
            a, b = block if block is not None else (1.0, max(1.0, DEFAULT_BLOCK * side))
            first, last = (int(min(x, side) * 65536 + 0.5) for x in (a, b))
            sides += [first, last - first]
        # Mean side = low + span / 2; (2 low + span) is twice that, hence the 2**34.
        mean_area = (2 * sides[0] + sides[1]) * (2 * sides[2] + sides[3])
        blocks = 64 + 4 * -(-cells * 2**34 // mean_area)
        if blocks > MAX_BLOCKS:
            raise SpcxrError(
                f"blocks of {tuple(block or ())} units are too small for a {grid[0]}x{grid[1]} "
                f"grid ({blocks} of at most {MAX_BLOCKS}); give larger blocks or a coarser grid"
            )
        return cls(
            list(grid), [low, high - low], sides, placement == "uniform", -(-blocks // 8) * 8
        )


def group_mask(
    image_ids: Tensor,
    *,
    seed: int,
    epoch: int,
    grid: tuple[int, int],
    ratio: tuple[float, float] = (0.5, 0.75),
    block: tuple[float, float] | None = None,
    placement: str = "uniform",
    backend: str = "auto",
) -> GroupMask:
    """Sample the groups of a batch: rectangles until their union covers the target.

    The target of an image is ``U(ratio) * Gh * Gw`` cells. Height and width of a rectangle are
    uniform in ``[1, 0.3 side)``, rounded to units. Overlap is counted once, and the last rectangle
    may pass the target: with the default ratio 64 % are masked on average at 14x14.

    The grid is in *units*: patches for groups of whole patches, pixels for pixel rectangles. An
    image's groups depend on (seed, epoch, image id) and the law alone; they are the same, bit for
    bit, in every backend. For the groups of a second view give ``philox.fold_in(seed, view)``.

    Parameters
    ----------
    image_ids
        ``[B]`` int64 in [0, 2**48), on the device where the result is wanted.
    seed, epoch
        0 <= seed < 2**63, 0 <= epoch < 2**32.
    grid
        ``(Gh, Gw)`` units, 1 to 4096 a side.
    ratio
        lowest and highest target; the ancestors' mask ratio m is ``(min(0.5, m), m)``.
    block
        shortest and longest side in units, both axes (default: 1 and 0.3 of the side).
    placement
        ``uniform`` (ours) places rectangles uniformly on the torus, so that every cell is masked
        with the same probability; a rectangle that wraps is listed as up to four blocks. ``corner``
        is the law of GMML, SiT and MC-SSL: the corner is uniform in ``[0, side - 1)`` and what
        passes the border is cut off, so the top and left are seldom masked.
    backend
        ``auto``, or one of `dispatch.BACKENDS`.

    Returns
    -------
    `GroupMask`. K is fixed by grid and block: 184 for 14x14 patches, 240 for 224x224 pixels. An
    image whose K blocks are used up stops short of its target: ratios near 1, and `corner` on grids
    of two to five units a side, whose last row no unit block can reach.

    Raises
    ------
    SpcxrError
        parameters out of range; `dispatch.BackendUnavailable` with the reason.

    >>> blocks, mask = group_mask(torch.arange(2), seed=0, epoch=0, grid=(14, 14))
    >>> blocks.shape, mask.shape, bool((mask.float().mean((1, 2)) >= 0.5).all())
    (torch.Size([2, 184, 4]), torch.Size([2, 14, 14]), True)
    """
    philox.check_key(seed, epoch)
    if image_ids.is_cpu:
        philox.check_ids(image_ids)  # elsewhere the kernels check: no synchronisation here
    law = Law.of(grid, ratio, block, placement)
    kernel = dispatch.kernel("group_mask", backend, image_ids.device.type, _REFERENCE)
    return GroupMask(*kernel(image_ids, seed, epoch, *law))


def reference(
    image_ids: Tensor,
    *,
    seed: int,
    epoch: int,
    grid: tuple[int, int],
    ratio: tuple[float, float] = (0.5, 0.75),
    block: tuple[float, float] | None = None,
    placement: str = "uniform",
) -> GroupMask:
    """`group_mask` in plain torch and numpy: what every backend must equal bit for bit.

    >>> ids = torch.arange(3)
    >>> a = reference(ids, seed=1, epoch=0, grid=(4, 6))
    >>> b = group_mask(ids, seed=1, epoch=0, grid=(4, 6))
    >>> torch.equal(a.blocks, b.blocks) and torch.equal(a.mask, b.mask)
    True
    """
    return GroupMask(*_by_law(image_ids, seed, epoch, *Law.of(grid, ratio, block, placement)))


def _by_law(
    image_ids: Tensor,
    seed: int,
    epoch: int,
    grid: list[int],
    target: list[int],
    sides: list[int],
    torus: bool,
    max_blocks: int,
) -> tuple[Tensor, Tensor]:
    """Draw everything at once, then walk through each image's rectangles."""
    words = philox.words(image_ids.cpu(), 1 + max_blocks, seed=seed, epoch=epoch, stream="groups")
    draws = words.numpy()
    # Block 0 of the stream is the target's, block 1 + j the j-th rectangle's.
    goals = (target[0] + (draws[:, 0, 0] * target[1] >> 32) + 127) >> 7
    bounds = np.array([g if torus else max(g - 1, 1) for g in grid])
    corners = draws[:, 1:, :2] * bounds >> 32
    lows, spans = np.array(sides[::2]), np.array(sides[1::2])
    # At least a unit: `lows` is one or more. The whole side at most: rounding may pass it by one.
    sizes = np.minimum((lows + (draws[:, 1:, 2:] * spans >> 32) + 32768) >> 16, np.array(grid))
    blocks = np.zeros((len(image_ids), max_blocks, 4), dtype=np.int32)
    mask = np.zeros((len(image_ids), *grid), dtype=bool)
    for b in range(len(image_ids)):
        covered, listed = 0, 0
        for corner, size in zip(corners[b].tolist(), sizes[b].tolist(), strict=True):
            if covered >= goals[b] or listed + 4 > max_blocks:
                break
            for top, left, height, width in _pieces(corner, size, grid, torus):
                cells = mask[b, top : top + height, left : left + width]
                covered += cells.size - int(np.count_nonzero(cells))
                cells[:] = True
                blocks[b, listed] = top, left, height, width
                listed += 1
    device = image_ids.device
    return torch.from_numpy(blocks).to(device), torch.from_numpy(mask).to(device)


def _pieces(
    corner: list[int], size: list[int], grid: list[int], torus: bool
) -> list[tuple[int, int, int, int]]:
    """A rectangle cut at the border; what passes it comes back at the other side of a torus.

    >>> _pieces([3, 0], [2, 2], [4, 4], True)
    [(3, 0, 1, 2), (0, 0, 1, 2)]
    """
    spans = []
    for start, length, side in zip(corner, size, grid, strict=True):
        inside = min(length, side - start)
        wrapped = [(0, length - inside)] if torus and length > inside else []
        spans.append([(start, inside), *wrapped])
    return [(r, c, h, w) for (r, h), (c, w) in itertools.product(*spans)]


def _fake(
    image_ids: Tensor,
    seed: int,
    epoch: int,
    grid: list[int],
    target: list[int],
    sides: list[int],
    torus: bool,
    max_blocks: int,
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the native op, for torch.compile and torch.export."""
    size = image_ids.shape[0]
    blocks = image_ids.new_empty((size, max_blocks, 4), dtype=torch.int32)
    return blocks, image_ids.new_empty((size, *grid), dtype=torch.bool)


dispatch.register_fake("group_mask", _fake)
_REFERENCE = dispatch.register_reference(
    "group_mask(Tensor image_ids, SymInt seed, SymInt epoch, int[] grid, int[] target, "
    "int[] sides, bool torus, int max_blocks) -> (Tensor blocks, Tensor mask)",
    _by_law,
    _fake,
)
