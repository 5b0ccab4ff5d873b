"""The one random generator: Philox4x32-10 (Salmon et al., SC'11), counter-based.

A number depends on (seed, epoch, image id, stream, index) alone: not on the batch, its order, the
device, the worker or the world size. ``csrc/core/philox.h`` and ``kernels/philox.py`` hold the
same layout, and tests hold all three to the same words::

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (index of the block of four words, epoch, id low 32, id high 16 | stream << 16)
    stream  = number of the name | view << 8          "crop-1" is the stream "crop" of view 1
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops.checks import traced

# A number, once given, stays: reusing one would repeat another stream's randomness.
STREAMS = {"groups": 1, "crop": 2, "noise": 3, "kind": 4, "depth": 5, "shuffle": 6, "label": 7}
MAX_VIEWS = 256
MAX_IMAGE_ID = 2**48

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Fits of least relative (sine: of sin(pi x / 2) / x by x**2) or absolute (cosine) error, rounded to
# float32; from the highest power down.
_LOG1P_OVER_T = (
    *(0.087222435, -0.14366788, 0.14952283, -0.16562402, 0.19956833, -0.25002074, 0.33334187),
    *(-0.49999988, 1.0),
)
_SINE_OVER_X = (0.00015148513, -0.0046737664, 0.07968968, -0.6459637, 1.5707964)
_COSINE = (-2.3824918e-05, 0.00091772486, -0.02086269, 0.25366932, -1.2337005, 1.0)
_CHUNK = 1 << 15  # blocks computed at a time: the eight working arrays stay in the L2 cache


def stream_number(stream: str) -> int:
    """The 16 bits a stream adds to the counter.

    >>> stream_number("groups"), stream_number("crop-1")
    (1, 258)
    >>> stream_number("dice")
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: no random stream 'dice'; add it to STREAMS in spcxr/ops/philox.py
    """
    name, dash, view = stream.partition("-")
    if name not in STREAMS or (dash and not view.isdecimal()):
        raise SpcxrError(f"no random stream {stream!r}; add it to STREAMS in spcxr/ops/philox.py")
    number = int(view) if dash else 0
    if number >= MAX_VIEWS:
        raise SpcxrError(f"random stream {stream!r}: views are numbered 0 to {MAX_VIEWS - 1}")
    return STREAMS[name] | number << 8


def philox4x32(counter: tuple[Any, ...], key: tuple[int, int]) -> tuple[Any, ...]:
    """Ten rounds of Philox4x32 on int64 tensors, or uint64 arrays, that hold 32-bit words.

    Parameters
    ----------
    counter
        four of them that broadcast against each other, values in [0, 2**32).
    key
        two ints in [0, 2**32).

    Returns
    -------
    four of the broadcast shape, values in [0, 2**32).

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(int(w)) for w in philox4x32((zero,) * 4, (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product may pass 2**63 and wrap; its 64 bits are still the right ones.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) & _LOW) ^ (c1 ^ k0)
        c2 = ((p0 >> 32) & _LOW) ^ (c3 ^ k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def check_ids(image_ids: Tensor) -> None:
    """Refuse image ids that are not ``[B]`` int64 in [0, 2**48)."""
    if image_ids.dtype != torch.int64 or image_ids.dim() != 1:
        raise SpcxrError(
            f"image ids are {image_ids.dtype} of shape {tuple(image_ids.shape)}; give [B] int64"
        )
    if traced(image_ids) or len(image_ids) == 0:
        return
    if not 0 <= int(image_ids.min()) <= int(image_ids.max()) < MAX_IMAGE_ID:
        raise SpcxrError("an image id is negative or 2**48 and more; number images from 0")


def check_key(seed: int, epoch: int) -> None:
    """Refuse a seed outside [0, 2**63) or an epoch outside [0, 2**32)."""
    if not 0 <= seed < 2**63 or not 0 <= epoch < 2**32:
        raise SpcxrError(f"seed {seed}, epoch {epoch}; give 0 <= seed < 2**63, 0 <= epoch < 2**32")


def words(image_ids: Tensor, count: int, *, seed: int, epoch: int, stream: str) -> Tensor:
    """Raw 32-bit words, ``[B, count, 4]`` int64: block ``i`` of image ``b`` at ``[b, i]``.

    >>> words(torch.tensor([7]), 1, seed=1, epoch=2, stream="groups").shape
    torch.Size([1, 1, 4])
    """
    check_ids(image_ids)
    check_key(seed, epoch)
    key, top = (seed & _LOW, seed >> 32), stream_number(stream) << 16
    if image_ids.device.type == "cpu" and not traced(image_ids):
        # numpy's small operations cost a third of torch's: most of a loader's fixed cost.
        array = image_ids.numpy().astype(np.uint64)
        made = np.empty((len(array), count, 4), np.int64)
        _fill(made, array, np.arange(count, dtype=np.uint64), np.uint64(epoch), top, key)
        return torch.from_numpy(made)
    device = image_ids.device
    found = torch.empty(len(image_ids), count, 4, dtype=torch.int64, device=device)
    fixed = torch.tensor(epoch, dtype=torch.int64, device=device)
    _fill(found, image_ids, torch.arange(count, device=device), fixed, top, key)
    return found


def _fill(made: Any, ids: Any, index: Any, epoch: Any, top: int, key: tuple[int, int]) -> None:
    """Blocks into ``made [B, count, 4]``, as many at a time as the L2 cache holds."""
    columns = max(min(len(index), _CHUNK), 1)
    rows = max(_CHUNK // columns, 1)
    for b in range(0, len(ids), rows):
        some = ids[b : b + rows, None]
        for i in range(0, len(index), columns):
            counter = (index[None, i : i + columns], epoch, some & _LOW, some >> 32 | top)
            for word, values in enumerate(philox4x32(counter, key)):
                made[b : b + rows, i : i + columns, word] = values


def uniform(image_ids: Tensor, n: int, *, seed: int, epoch: int, stream: str) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-32.

    Parameters
    ----------
    image_ids
        ``[B]`` int64 in [0, 2**48), on any device.
    n
        numbers an image.
    stream
        a name of `STREAMS`, or name-view as in ``crop-1``.

    Returns
    -------
    ``[B, n]`` float64 on the device of ``image_ids``; the same bits on every device.

    Raises
    ------
    SpcxrError
        unknown stream; ids, seed or epoch out of range.

    >>> a = uniform(torch.tensor([3, 5]), 2, seed=0, epoch=0, stream="crop")
    >>> b = uniform(torch.tensor([5]), 2, seed=0, epoch=0, stream="crop")
    >>> bool((a[1] == b[0]).all())
    True
    """
    blocks = words(image_ids, math.ceil(n / 4), seed=seed, epoch=epoch, stream=stream)
    return blocks.flatten(1)[:, :n].double() * 2.0**-32


def normal(
    image_ids: Tensor,
    n: int,
    *,
    seed: int,
    epoch: int,
    stream: str,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers by Box-Muller: words (0, 1) and (2, 3) of a block make two each.

    Additions, multiplications and square roots of float32 alone, each rounded by itself, in the
    order of ``csrc/core/normal.h``: the same bits in every backend and on every device.

    Parameters
    ----------
    image_ids
        ``[B]`` int64 in [0, 2**48).
    n
        numbers an image.
    stream
        a name of `STREAMS`, or name-view as in ``noise-1``.
    device
        where to compute (default: that of ``image_ids``).

    Returns
    -------
    ``[B, n]`` float32, \\|value\\| < 5.77.

    Raises
    ------
    SpcxrError
        unknown stream; ids, seed or epoch out of range.

    >>> normal(torch.arange(2), 5, seed=0, epoch=0, stream="noise").shape
    torch.Size([2, 5])
    """
    if device is not None:
        image_ids = image_ids.to(device)
    blocks = words(image_ids, math.ceil(n / 4), seed=seed, epoch=epoch, stream=stream)
    return box_muller(blocks).flatten(1)[:, :n]


def box_muller(blocks: Tensor) -> Tensor:
    """Words ``[..., 4]`` int64 -> as many normal numbers, float32.

    >>> box_muller(torch.tensor([[0, 0, 1 << 31, 3 << 30]]))
    tensor([[ 5.7681,  0.0000,  0.0000, -1.1774]])
    """
    pairs = blocks.unflatten(-1, (2, 2))
    radius = _radius(pairs[..., 0])
    # A quarter turn is one unit: the upper two bits count quarters, the next 24 the rest.
    x = (pairs[..., 1] >> 6 & 0xFFFFFF).float() * 2.0**-24
    z = x * x
    s = radius * (x * _horner(_SINE_OVER_X, z))
    c = radius * _horner(_COSINE, z)
    quarter = pairs[..., 1] >> 30
    odd = (quarter & 1).bool()
    first, second = torch.where(odd, s, c), torch.where(odd, c, s)
    first = torch.where((quarter == 1) | (quarter == 2), -first, first)
    return torch.stack([first, torch.where(quarter >= 2, -second, second)], -1).flatten(-2)


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u) for u = (the word's upper 24 bits + 1) / 2**24."""
    bits = ((word >> 8) + 1).float().view(torch.int32)
    # 0x3F3504F3 is sqrt(1/2): the mantissa comes to [sqrt(1/2), sqrt(2)).
    exponent = bits - 0x3F3504F3 >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    minus_log = (24 - exponent).float() * 0.6931472 - t * _horner(_LOG1P_OVER_T, t)
    # torch's float32 root on the CPU is not the nearest float; that of a double, rounded, is.
    return (2.0 * minus_log).double().sqrt().float()


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """A polynomial, coefficients from the highest power down; every step rounded by itself."""
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total.mul_(x).add_(coefficient)
    return total


def fold_in(seed: int, number: int) -> int:
    """A new seed for, say, the second view: as unrelated to ``seed`` as another seed would be.

    >>> fold_in(1, 0) != fold_in(1, 1) != fold_in(2, 1)
    True
    """
    check_key(seed, number)
    counter = torch.tensor([number, 0, 0, _LOW], dtype=torch.int64)
    low, high, _, _ = philox4x32(tuple(counter.unbind()), (seed & _LOW, seed >> 32))
    return int(low) | (int(high) & 0x7FFFFFFF) << 32
