"""Masks of several structures: columns of their own, run lengths, indexed files, files in order."""

import re

import numpy as np
import pytest
from PIL import Image

from spcxr.config import ConfigError
from spcxr.data.manifest import Manifest, concatenate
from spcxr.data.masks import Mask, decode_runs, read_classes, read_indexed, read_mask
from spcxr.data.raster import ORIENTATION
from spcxr.data.store import Store
from spcxr.data.structures import Structures, settle_structures
from spcxr.data.study import Rejected, read_study
from spcxr.errors import SpcxrError
from spcxr.recipes.prepare import PrepareConfig, run

SIDE = 8
LEFT, RIGHT, HEART = (np.zeros((SIDE, SIDE), np.uint8) for _ in range(3))
LEFT[:, :3], RIGHT[:, 5:], HEART[4:, 2:6] = 255, 255, 255


def write(folder, name, pixels, **options):
    Image.fromarray(pixels).save(folder / name, **options)
    return name


@pytest.fixture
def folder(tmp_path):
    pixels = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    for name in "abc":
        write(tmp_path, f"{name}.png", pixels)
    for name, mask in {"l": LEFT, "r": RIGHT, "h": HEART}.items():
        write(tmp_path, f"{name}.png", mask)
    return tmp_path


def prepared(folder, text, *flags, name="store"):
    (folder / "m.csv").write_text(text)
    made = PrepareConfig(
        sources=(str(folder / "m.csv"),),
        out=str(folder / name),
        size_px=SIDE,
        structures=flags,
        workers=0,
        split_ratios=(1.0, 0.0, 0.0),
    )
    return Store.open(run(made))


def expected():
    """Left 1, right 2, heart 3; the heart is last, and wins where it overlaps."""
    made = (LEFT > 0).astype(np.uint8)
    made[RIGHT > 0] = 2
    made[HEART > 0] = 3
    return made


def test_each_structure_in_a_column_of_its_own(folder):
    runs = " ".join(f"{row * SIDE + 3} 4" for row in range(4, 8))
    text = (
        "path,mask:left,mask:right,rle:heart,covid\n"
        f"a.png,l.png,r.png,{runs},1\n"
        "b.png,l.png,-1,-1,0\n"  # known to be absent
        "c.png,l.png,r.png,,\n"  # the heart is not known: nor is what is background
    )
    store = prepared(folder, text)
    assert store.structures == ("left", "right", "heart")
    assert store.manifest.labels == ("covid",)
    masks = store.masks([0, 1, 2])
    np.testing.assert_array_equal(masks[0], expected())
    np.testing.assert_array_equal(masks[1], LEFT > 0)
    assert (masks[2] == 255).all()
    assert store.manifest.masked.tolist() == [True, True, False]
    (note,) = [n for n in store.manifest.notes if "some structures only" in n]
    assert "1 rows" in note
    chosen = prepared(folder, text, "heart", "left", name="chosen")
    assert chosen.structures == ("heart", "left")
    # left comes later and wins
    assert chosen.masks([0])[0].tolist()[-1] == [2, 2, 2, 1, 1, 1, 0, 0]


def test_indexed_files_and_files_in_order_say_the_same(folder):
    write(folder, "i.png", np.array([0, 10, 20, 30], np.uint8)[expected()])
    palette = Image.fromarray(np.array([0, 10, 20, 30], np.uint8)[expected()], "P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    palette.save(folder / "p.png")
    text = "path,mask_path\na.png,i.png\nb.png,p.png\nc.png,\n"
    store = prepared(folder, text, "left=10", "right=20", "heart=30")
    assert store.structures == ("left", "right", "heart")
    for mask in store.masks([0, 1]):
        np.testing.assert_array_equal(mask, expected())
    assert (store.masks([2]) == 255).all()
    text = "path,mask_path\na.png,l.png|r.png|h.png\nb.png,\n"
    by_place = prepared(folder, text, "left", "right", "heart", name="by-place")
    np.testing.assert_array_equal(by_place.masks([0])[0], expected())
    union = prepared(folder, text, "thorax", name="union")
    assert union.structures == ("thorax",)
    np.testing.assert_array_equal(union.masks([0])[0], expected() > 0)


def test_stores_of_other_structures_are_not_joined(folder):
    one = prepared(folder, "path,mask_path\na.png,l.png\n", name="one")
    two = prepared(folder, "path,mask_path\nb.png,r.png\n", "heart", name="two")
    bare = prepared(folder, "path\nc.png\n", name="bare")
    made = PrepareConfig(sources=(str(two.path), str(bare.path)), out=str(folder / "joined"))
    assert Store.open(run(made)).structures == ("heart",)
    with pytest.raises(SpcxrError, match=r"masks show heart, and those of .* lung; join stores"):
        run(PrepareConfig(sources=(str(one.path), str(two.path)), out=str(folder / "never")))


@pytest.mark.parametrize(
    ("header", "row", "flags", "said"),
    [
        ("path,mask:h,mask_path", "a.png,h.png,l.png", (), "in mask_path and in columns"),
        ("path,mask:h,rle:h", "a.png,h.png,1 2", (), "row 2 has h in mask:h and in rle:h"),
        ("path,mask:h", "a.png,../h.png", (), "column 'mask:h': ../h.png leaves the root"),
        ("path,mask:h", "a.png,h.png", ("x",), "no column mask:x; .* are of: h"),
        ("path,mask_path", "a.png,l.png", ("x", "y"), "a.png has 1 mask files for 2 structures"),
        ("path,mask_path", "a.png,l.png", ("x=1", "y=1"), "a value from 1 to 254 of its own"),
        ("path,mask_path", "a.png,l.png", ("x=1", "y"), "a value from 1 to 254"),
        ("path,mask_path", "a.png,l.png", ("x=255",), "a value from 1 to 254"),
        ("path,mask_path", "a.png,l.png", ("x", "x"), "a name of its own"),
    ],
)
def test_columns_and_flags_that_contradict_each_other(folder, header, row, flags, said):
    with pytest.raises((SpcxrError, ConfigError), match=said) as error:
        prepared(folder, f"{header}\n{row}\n", *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("header", "cell", "flags", "said"),
    [
        ("rle:h", "1 2 3", (), "no pairs 'start length'"),
        ("rle:h", "60 6", (), "run 60 6, which is not within the 8 x 8 pixels 1 to 64"),
        ("rle:h", "0 6", (), "run 0 6"),
        ("mask_path", "seven.png", ("h=1",), "holds the value 7; --structures names 0, 1, 255"),
        ("mask_path", "colour.png", ("h=1",), "a colour picture"),
        ("mask:h", "colour.png", (), "a colour picture; save a grey mask for each structure"),
        ("mask:h", "small.png", (), "its mask small.png is 4 x 8 pixels and the image 8 x 8"),
        ("mask:h", "two.png", (), r"up to 2; .*--structures NAME=VALUE"),
    ],
)
def test_masks_that_do_not_fit_are_rejected_with_the_reason(folder, header, cell, flags, said):
    write(folder, "seven.png", 7 * (HEART // 255))
    write(folder, "two.png", 2 * (HEART // 255))
    write(folder, "colour.png", np.stack([HEART, LEFT, RIGHT], -1))
    write(folder, "small.png", HEART[:, :4])
    text = f"path,{header}\na.png,{cell}\nb.png,{'-1' if ':' in header else ''}\n"
    store = prepared(folder, text, *flags)
    assert len(store) == 1
    reason = (folder / "store" / "rejected.csv").read_text()
    assert re.search(said, reason.replace(chr(34) * 2, chr(34))), reason


def test_a_grey_picture_saved_in_colour_is_a_mask(tmp_path):
    write(tmp_path, "grey.png", np.repeat(expected()[..., None], 3, -1))
    np.testing.assert_array_equal(read_indexed(tmp_path / "grey.png", (1, 2, 3)), expected())
    write(tmp_path, "heart.png", np.repeat(HEART[..., None], 3, -1))
    np.testing.assert_array_equal(read_mask(tmp_path / "heart.png"), HEART > 0)


def test_indexed_masks_turn_as_their_images_do(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels = np.zeros((4, 9), np.uint8)
    pixels[:2, :3], pixels[3, 8] = 2, 255
    write(tmp_path, "m.png", pixels, exif=exif)
    turned = read_study(tmp_path / "m.png").pixels
    assert turned.shape == (9, 4)
    found = read_indexed(tmp_path / "m.png", (2,))
    np.testing.assert_array_equal(found, np.where(turned == 2, 1, turned))


def test_runs_are_counted_along_the_rows_from_1():
    assert decode_runs("1 1 4 3", (2, 3)).tolist() == [[1, 0, 0], [1, 1, 1]]
    assert not decode_runs("-1", (2, 3)).any()
    parts = (Mask(runs="1 4", number=2), Mask(runs="3 2", number=1))
    made = read_classes("", parts, (1, 5), SpcxrError)
    assert made.tolist() == [[2, 2, 2, 2, 0]]  # class 2 is later, whatever the order of the parts


def test_manifests_of_several_kinds_together(folder):
    drawn = Manifest.from_columns({"path": ["a.png"], "mask:heart": ["h.png"]}, root=folder)
    other = Manifest.from_columns({"path": ["b.png"], "mask:lung": ["l.png"]}, root=folder)
    both, structures = settle_structures(concatenate([drawn, other]), (), "both")
    assert structures == Structures(("heart", "lung"), columns=True)
    assert both.masked.tolist() == [False, False]
    assert "2 rows have masks of some" in both.notes[-1]
    files = Manifest.from_columns({"path": ["b.png"], "mask_path": ["l.png"]}, root=folder)
    with pytest.raises(SpcxrError, match="keep one kind"):
        settle_structures(concatenate([drawn, files]), (), "both")


def test_an_unreadable_mask_is_named(tmp_path):
    (tmp_path / "t.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(Rejected, match=r"t.png: its mask cannot be read"):
        read_indexed(tmp_path / "t.png", (1,))


@pytest.mark.parametrize("labels", [(0, 128, 255), (0, 85, 170), (0, 1, 255)])
def test_a_map_of_several_labels_is_no_binary_mask(tmp_path, labels):
    """Cut in the middle of the range it would be a mask of some of them."""
    made = (LEFT > 0) + 2 * (RIGHT > 0).astype(np.uint8)
    write(tmp_path, "m.png", np.array(labels, np.uint8)[made])
    with pytest.raises(Rejected, match=rf"areas of the value {labels[1]} .*--structures NAME=V"):
        read_mask(tmp_path / "m.png")


def test_soft_edges_and_jpegs_are_binary_masks(tmp_path):
    inside = np.hypot(*np.mgrid[-150:150, -150:150]) < 90
    plain = Image.fromarray(np.uint8(255) * inside)
    for name, picture, options in (
        ("small.png", plain.resize((80, 80)), {}),
        ("large.png", plain.resize((50, 50)).resize((300, 300)), {}),
        ("good.jpg", plain, {"quality": 95}),
        ("poor.jpg", plain, {"quality": 5}),
    ):
        picture.save(tmp_path / name, **options)
        found = np.asarray(Image.fromarray(read_mask(tmp_path / name)).resize((300, 300), 0))
        assert (found != inside).mean() < 0.02, name


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.stack([HEART * 0 + 255, HEART], -1), "transparent pixels"),
        (HEART / np.float32(300), "in floating point"),
        (HEART.astype(np.int32) - 1, "the value -1"),
        (HEART.astype(np.int32) * 1000, "the value 255000"),
    ],
)
def test_masks_that_leave_open_what_they_show(tmp_path, pixels, said):
    """Each was read without a word: as the whole image, as nothing, as unknown."""
    write(tmp_path, "m.tif", pixels)
    with pytest.raises(Rejected, match=said) as error:
        read_mask(tmp_path / "m.tif")
    assert "\n" not in str(error.value)


def test_a_mask_of_several_pages_is_refused(tmp_path):
    pages = [Image.fromarray(mask) for mask in (LEFT, RIGHT)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    for read in (read_mask, lambda file: read_indexed(file, (255,))):
        with pytest.raises(Rejected, match="its mask has 2 pages"):
            read(tmp_path / "m.tif")


def test_a_mask_without_an_orientation_is_of_the_upright_image(folder):
    """Exif says that the image stands on its head; its mask, which says nothing, is not turned."""
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    ramp = np.asarray(Image.open(folder / "a.png"))
    write(folder, "turned.png", ramp[::-1, ::-1].copy(), exif=exif)
    store = prepared(folder, "path,mask_path\nturned.png,l.png\n")
    assert (np.diff(store.images([0])[0].ravel().astype(int)) > 0).all()
    np.testing.assert_array_equal(store.masks([0])[0], LEFT > 0)
