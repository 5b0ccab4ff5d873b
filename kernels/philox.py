"""The generator in Triton: Philox4x32-10, and normal numbers whose bits are the same everywhere.

The layout of key and counter is that of ``spcxr/ops/philox.py``, the steps of a normal number are
those of ``csrc/core/normal.h``: compile what calls `normal4` with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

MAX_IMAGE_ID = tl.constexpr(2**48)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32, scalars or tiles."""
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(m0, c0), m0 * c0
        high1, low1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def stream_words(index, image_id, stream, k0, k1, epoch):
    """Blocks ``index`` (uint32) of one image's stream. Key and epoch are bits in int32."""
    k0, k1 = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True)
    c1 = epoch.to(tl.uint32, bitcast=True)
    c2 = (image_id & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((image_id >> 32) | (stream << 16)).to(tl.uint32)
    return philox4x32(index, c1, c2, c3, k0, k1)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) for u = (word's upper 24 bits + 1) / 2**24."""
    bits = ((word >> 8) + 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = t * 0.087222435 - 0.14366788
    p = p * t + 0.14952283
    p = p * t - 0.16562402
    p = p * t + 0.19956833
    p = p * t - 0.25002074
    p = p * t + 0.33334187
    p = p * t - 0.49999988
    p = p * t + 1.0
    minus_log = (24 - exponent).to(tl.float32) * 0.6931472 - t * p
    return tl.sqrt_rn(2.0 * minus_log)


@triton.jit
def _normal_pair(word0, word1):
    radius = _radius(word0)
    x = ((word1 >> 6) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2**-24
    z = x * x
    s = z * 0.00015148513 - 0.0046737664
    s = s * z + 0.07968968
    s = s * z - 0.6459637
    s = radius * (x * (s * z + 1.5707964))
    c = z * -2.3824918e-05 + 0.00091772486
    c = c * z - 0.02086269
    c = c * z + 0.25366932
    c = c * z - 1.2337005
    c = radius * (c * z + 1.0)
    quarter = word1 >> 30
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, s, c), tl.where(odd, c, s)
    # A product by -1, for Triton's minus is 0 - x, which makes +0 of +0.
    first *= tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
    second *= tl.where(quarter >= 2, -1.0, 1.0)
    return first, second


@triton.jit
def normal4(index, image_id, stream, k0, k1, epoch):
    """Numbers 4 * index to 4 * index + 3 of a stream, side by side: n blocks make 4 n numbers."""
    w0, w1, w2, w3 = stream_words(index, image_id, stream, k0, k1, epoch)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


def signed(word: int) -> int:
    """The int32 with the bits of an unsigned word: Triton types an int by its value."""
    return word - 2**32 if word >= 2**31 else word


def key_words(seed: int, epoch: int) -> tuple[int, int, int]:
    """Seed low and high, epoch: the bits of unsigned words in int32.

    >>> key_words(2**31, 3)
    (-2147483648, 0, 3)
    """
    return signed(seed & 0xFFFFFFFF), signed(seed >> 32), signed(epoch)
