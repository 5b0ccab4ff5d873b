"""The encoder in use, from files: one DICOM after a cold start, and a folder of them.

    pytest benchmarks/bench_encoder_files.py

ViT-S/16 at 224 px, `--precision auto` of this machine, all cores. Asserted first: the features of a
file are those of its prepared square.

`start`: a fresh Python that imports spcxr, loads the encoder and embeds one DICOM of 1024 x 1024,
against one that imports torch and decodes the same file by pydicom. The disk's cache is warm.

`folder`: 32 DICOM files of 2048 x 2048 (12 bit, uncompressed) to features, against `encode alone`,
the same squares when they are prepared already, and `read alone`: decoding and preparing them in
the threads that `folder` has. Both share the cores, so the most of `folder` is what is left by
reading: 1 / (1 / encode + 1 / read), with each on all cores.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from record import CORES

import spcxr
from spcxr.data.phantom_dicom import save, to_dataset
from spcxr.data.phantom_draw import draw
from spcxr.data.presets import Preprocess
from spcxr.data.study import read_study
from spcxr.models.vit import build_vit
from spcxr.models.weights import save_model_folder
from spcxr.train.batches import prefetch

SIDE, ONE, MANY, FILES = 224, 1024, 2048, 32

pytestmark = [
    pytest.mark.parametrize("device", ["cpu"]),
    pytest.mark.parametrize("threads", [CORES], indirect=True),
]


def dicom(path, number, side):
    phantom = draw(number, size_px=512)
    pixels = Image.fromarray(phantom.pixels.astype(np.int32)).resize((side, side))
    large = np.asarray(pixels).clip(0, 4095).astype(np.uint16)
    save(to_dataset(replace(phantom, pixels=large), f"p{number}"), path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    save_model_folder(
        folder / "model",
        build_vit("vit_small", image_px=SIDE, patch_px=16),
        preprocess=Preprocess(size_px=SIDE).to_dict(),
        mean=0.5,
        std=0.25,
        task=None,
        head=None,
        provenance={},
    )
    dicom(folder / "one.dcm", 0, ONE)
    # Four drawings under eight names each: decoding takes as long whatever is drawn.
    drawn = [dicom(folder / f"drawn-{i}.dcm", i, MANY) for i in range(4)]
    for i in range(FILES):
        (folder / f"{i:02d}.dcm").write_bytes(drawn[i % 4].read_bytes())
    return folder


FILE = "sys.argv[1] + '/one.dcm'"
START = {
    "spcxr": f"import sys, spcxr; spcxr.load_encoder(sys.argv[1] + '/model')({FILE})",
    "torch and pydicom": f"import sys, torch, pydicom; pydicom.dcmread({FILE}).pixel_array",
}


@pytest.mark.parametrize("what", START)
def test_start(timed, place, threads, what):
    def run():
        subprocess.run([sys.executable, "-W", "ignore", "-c", START[what], place], check=True)

    run()  # into the disk's cache
    timed(run, what=what, group="start", rounds=7)
    if what == "spcxr":
        timed.target("speed", at_least=1 / 1.5, of="torch and pydicom")


def work(place, what):
    """The call, and what it gives of the first file."""
    encoder = spcxr.load_encoder(place / "model", device="cpu")
    paths = [place / f"{i:02d}.dcm" for i in range(FILES)]

    def read(path):
        return encoder.preprocess(read_study(path)).pixels

    if what == "folder":
        return lambda: encoder(paths, batch_size=16).cls
    if what == "read alone":
        return lambda: [made for _, made in prefetch(read, paths, threads=CORES, ahead=16)]
    squares = np.stack([read(path) for path in paths])
    halves = [squares[i : i + 16] for i in range(0, FILES, 16)]
    return lambda: torch.cat([encoder.encode(half).cls for half in halves])


@pytest.mark.parametrize("what", ["folder", "encode alone", "read alone"])
def test_folder(timed, place, threads, what):
    call = work(place, what)
    if what == "folder":
        torch.testing.assert_close(call(), work(place, "encode alone")(), rtol=1e-5, atol=1e-5)
    timed(call, what=what, group="folder", images=FILES, rounds=5)
    if "median_us" in timed.row:
        timed.row["images_s"] = 1e6 / timed.row["median_us_an_image"]
    if what == "folder":
        timed.target("speed", at_least=0.5, of="encode alone")
