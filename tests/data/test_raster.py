"""PNG, JPEG, TIFF and WebP as they are found: every mode, orientation, damage."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from spcxr.data.study import Rejected, read_study

RAMP = np.add.outer(np.arange(60) * 2, np.arange(90)).astype(np.uint8)  # 0 .. 207
DEEP = RAMP.astype(np.uint16) * 300 + 7
NOISE = np.random.default_rng(0).integers(0, 256, (60, 90)).astype(np.uint8)


def save(tmp_path, image, kind, **options):
    path = tmp_path / "image"
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, kind, **options)
    return path


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("pixels", "bits"), [(RAMP, 8), (DEEP, 16)])
def test_lossless_grey(kind, pixels, bits, tmp_path):
    study = read_study(save(tmp_path, pixels, kind))
    np.testing.assert_array_equal(study.pixels, pixels)
    assert (study.pixels.dtype, study.bits, study.notes) == (pixels.dtype, bits, ())
    assert (study.window, study.spacing_mm, study.patient_id, study.age) == (None,) * 4


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff(compression, tmp_path):
    study = read_study(save(tmp_path, DEEP, "TIFF", compression=compression))
    np.testing.assert_array_equal(study.pixels, DEEP)


def tiff(pixels: bytes, order: str, photometric: int, bits: int, shape=DEEP.shape) -> bytes:
    """A minimal one-strip TIFF, written by hand: byte orders and tags as old software has them."""
    height, width = shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(pixels))]
    entries = b"".join(struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value)
                       for tag, value in tags)  # fmt: skip
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    return mark + struct.pack(order + "I", 8 + len(pixels)) + pixels + directory


@pytest.mark.parametrize("order", "<>")
def test_tiff_byte_orders(order, tmp_path):
    (tmp_path / "x").write_bytes(tiff(DEEP.astype(order + "u2").tobytes(), order, 1, 16))
    study = read_study(tmp_path / "x")
    np.testing.assert_array_equal(study.pixels, DEEP)
    assert study.pixels.dtype.isnative


@pytest.mark.parametrize(("pixels", "bits", "top"), [(RAMP, 8, 255), (DEEP, 16, 65535)])
def test_tiff_white_is_zero(pixels, bits, top, tmp_path):
    (tmp_path / "x").write_bytes(tiff(pixels.tobytes(), "<", 0, bits))
    np.testing.assert_array_equal(read_study(tmp_path / "x").pixels, top - pixels)


def test_tiff_twelve_bits(tmp_path):
    pixels = DEEP >> 4
    pairs = pixels.reshape(-1, 2).astype(np.uint32)  # two pixels in three bytes, high bits first
    packed = (pairs[:, :1] << 12) | pairs[:, 1:]
    data = np.concatenate([packed >> 16, (packed >> 8) & 255, packed & 255], axis=1)
    (tmp_path / "x").write_bytes(tiff(data.astype(np.uint8).tobytes(), "<", 1, 12))
    study = read_study(tmp_path / "x")
    np.testing.assert_array_equal(study.pixels, pixels)
    assert study.bits == 12


GREY = Image.fromarray(RAMP)
OPAQUE = Image.merge("LA", [GREY, Image.new("L", GREY.size, 255)])


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (GREY.convert("RGB"), "PNG"),
        (GREY.convert("RGBA"), "PNG"),
        (OPAQUE, "PNG"),
        (GREY.convert("P"), "PNG"),
        (GREY.convert("RGB"), "TIFF"),
        (GREY.convert("RGB"), "WEBP"),
    ],
    ids=lambda v: getattr(v, "mode", v),
)
def test_grey_in_other_clothes_is_exact_and_not_noted(image, kind, tmp_path):
    options = {"lossless": True} if kind == "WEBP" else {}
    study = read_study(save(tmp_path, image, kind, **options))
    np.testing.assert_array_equal(study.pixels, RAMP)
    assert study.notes == ()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_near(mode, tmp_path):
    study = read_study(save(tmp_path, GREY.convert(mode), "JPEG", quality=95))
    assert np.abs(study.pixels.astype(int) - RAMP).mean() < 2
    assert study.notes == ()


def test_colour_becomes_luminance_with_a_note(tmp_path):
    colours = np.stack([RAMP, np.flipud(RAMP), np.fliplr(RAMP)], -1)
    study = read_study(save(tmp_path, colours, "PNG"))
    expected = colours @ np.array([0.299, 0.587, 0.114])
    assert np.abs(study.pixels - expected).max() <= 1
    assert study.notes == ("a colour picture, read by its luminance",)


def test_transparency_lies_on_black(tmp_path):
    alpha = np.full_like(RAMP, 255)
    alpha[:10], alpha[10:20] = 0, 128
    layered = Image.merge("RGBA", [GREY] * 3 + [Image.fromarray(alpha)])
    study = read_study(save(tmp_path, layered, "PNG"))
    assert (study.pixels[:10] == 0).all()
    assert np.abs(study.pixels[10:20].astype(int) - RAMP[10:20] * (128 / 255)).max() <= 1
    np.testing.assert_array_equal(study.pixels[20:], RAMP[20:])
    assert study.notes == ("transparent pixels taken as black",)


UPRIGHT = {  # EXIF 2.32, tag 274: where the stored first row and column belong
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_orientation_is_applied(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    study = read_study(save(tmp_path, GREY, kind, exif=exif))
    expected = UPRIGHT[orientation](RAMP)
    assert study.pixels.shape == expected.shape
    assert np.abs(study.pixels.astype(int) - expected).max() <= (4 if kind == "JPEG" else 0)
    assert (study.notes != ()) == (orientation != 1)


def test_several_pages_are_refused(tmp_path):
    for kind in ("TIFF", "PNG", "WEBP"):
        other = Image.fromarray(np.flipud(RAMP).copy())
        path = save(tmp_path, GREY, kind, save_all=True, append_images=[other])
        with pytest.raises(Rejected, match="2 pages"):
            read_study(path)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (RAMP.astype(np.float32), "floating point"),
        (RAMP.astype(np.int32) - 50, "do not fit 16 bits"),
        (RAMP > 100, "two grey levels"),
        (np.full((9, 9), 5, np.uint8), "same value"),
    ],
)
def test_pixels_without_a_meaning_are_refused(pixels, reason, tmp_path):
    with pytest.raises(Rejected, match=reason):
        read_study(save(tmp_path, pixels, "TIFF"))


def test_limit_is_settable(tmp_path):
    path = save(tmp_path, RAMP, "PNG")
    assert read_study(path, max_pixels=5400).pixels.shape == (60, 90)
    with pytest.raises(Rejected, match="90 x 60 pixels, over the limit of 5399"):
        read_study(path, max_pixels=5399)


@pytest.mark.parametrize(
    ("side", "reason"), [(10_000, "over the limit"), (60_000, "than Pillow decodes")]
)
def test_bombs_are_refused_undecoded(side, reason, tmp_path):
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10_000)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(Rejected, match=reason):
        read_study(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_cut_short_anywhere_is_refused(kind, tmp_path):
    data = save(tmp_path, NOISE, kind).read_bytes()
    for keep in (1, 20, 100, len(data) // 2, int(len(data) * 0.9), len(data) - 200):
        (tmp_path / "cut").write_bytes(data[:keep])
        with pytest.raises(Rejected):
            read_study(tmp_path / "cut")


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    rng = np.random.default_rng(3)
    seeds = []
    for pixels, kind in ((NOISE, "PNG"), (DEEP, "PNG"), (RAMP, "JPEG"), (DEEP, "TIFF")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        seeds.append(buffer.getvalue())
    read_count = 0
    for _ in range(400):
        data = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.integers(min(len(data), 600))] = rng.choice([0, 255, rng.integers(256)])
        (tmp_path / "x").write_bytes(data)
        try:
            read_study(tmp_path / "x")
            read_count += 1
        except Rejected:
            pass
    assert 20 < read_count < 400


@pytest.mark.shared
def test_shared_originals(shared_data):
    notes = {}
    for path in sorted((shared_data / "originals").iterdir()):
        study = read_study(path)
        assert min(study.pixels.shape) > 300
        assert study.bits == 8
        notes[path.name] = study.notes
    assert len(notes) == 13
    # A WebP that calls itself .jpg, an RGBA export and two coloured figures are among them.
    assert notes["cxnet__766p.jpg"] == ()
    assert sum(any("colour" in n for n in said) for said in notes.values()) == 2
    assert sum(any("transparent" in n for n in said) for said in notes.values()) == 1
