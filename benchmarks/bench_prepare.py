"""How fast `spcxr-train prepare` is against a bare decode + resize loop, in what memory.

    pytest benchmarks/bench_prepare.py [--prepare-seconds 15] [--prepare-files 20000]

Inputs have real sizes and noise (so that compression is as slow as on patients): 2000 x 2000
12-bit DICOM, raw and JPEG 2000, and 1024 x 1024 PNG and JPEG. Correctness is asserted before
anything is timed. Prepare runs in processes of its own, once: its row's microseconds are the whole
process, `prepare_images_per_s` is without interpreter start and imports. `--basetemp DIR` puts the
inputs there.

"Cores x bare" is cores over the bare loop's CPU seconds an image: JPEG 2000's decoder takes two
threads by itself, so its wall clock is no rate of one core. CPU seconds stand beside the rates:
they say the same on a machine that others use too. Beside it stands the literal ratio, rate over
cores x the bare loop's rate in one process, which counts such a decoder's threads twice.

Targets: rate >= 0.85 x cores x bare (by both ratios), a peak that does not grow with the files
(four times as many: at most 5 % more in parent and in worker), at most 50 us to read an image from
the store.
"""

import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)
from record import CORES

from spcxr.data.presets import Preprocess
from spcxr.data.store import Store
from spcxr.data.study import read_study
from spcxr.recipes.prepare import PrepareConfig, run

SIZE = 224
DISTINCT = 6  # different images a kind; more files are hard links to them
KINDS = ("dicom_raw", "dicom_j2k", "png", "jpeg")

# The CPU and the disk are what is measured; each process sets its own threads.
pytestmark = [
    pytest.mark.parametrize("device", ["cpu"]),
    pytest.mark.parametrize("threads", [CORES], indirect=True),
]


def chest_like(seed, side, bits):
    """Smooth lungs and ribs plus detector noise of about 1 % of the range."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    lungs = sum(np.exp(-(((x - c) / 0.16) ** 2) - ((y - 0.5) / 0.3) ** 2) for c in (0.3, 0.7))
    ribs = 0.05 * np.sin(60 * y + 8 * (x - 0.5) ** 2 + seed)
    image = 0.75 - 0.5 * lungs + ribs + rng.normal(0, 0.01, (side, side)).astype(np.float32)
    return (np.clip(image, 0, 1) * (2**bits - 1)).astype(np.uint16 if bits > 8 else np.uint8)


def write_dicom(file, pixels, syntax):
    made = pydicom.Dataset()
    made.SOPClassUID, made.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    made.Modality, made.BodyPartExamined, made.PatientID = "DX", "CHEST", file.stem
    made.set_pixel_data(pixels, "MONOCHROME2", 12)
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax != ExplicitVRLittleEndian:
        made.compress(syntax)
    made.save_as(file, enforce_file_format=True)


def write_originals(folder):
    """``DISTINCT`` files of each kind; kind -> files."""
    kinds = {kind: [] for kind in KINDS}
    for seed in range(DISTINCT):
        large, small = chest_like(seed, 2000, 12), Image.fromarray(chest_like(seed, 1024, 8))
        for kind, syntax in (
            ("dicom_raw", ExplicitVRLittleEndian),
            ("dicom_j2k", JPEG2000Lossless),
        ):
            kinds[kind].append(folder / f"{kind}-{seed}.dcm")
            write_dicom(kinds[kind][-1], large, syntax)
        for kind in ("png", "jpeg"):
            kinds[kind].append(folder / f"{kind}-{seed}.{kind}")
            small.save(kinds[kind][-1])
    return kinds


def bare(file):
    """The least anyone could write: decode, antialiased resize, min-max to 8 bit."""
    if file.suffix == ".dcm":
        image = Image.fromarray(pydicom.dcmread(file).pixel_array.astype(np.float32))
    else:
        image = Image.open(file).convert("L")
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)
    low, high = small.min(), small.max()
    return ((small - low) * (255 / (high - low))).astype(np.uint8)


def bare_rate(files, seconds):
    """Of one process, warm: images a second, and CPU seconds an image."""
    for file in files:
        bare(file)
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        for file in files:
            bare(file)
        count += len(files)
    return count / (time.perf_counter() - start), (time.process_time() - cpu) / count


def links(files, folder, count):
    folder.mkdir()
    for i in range(count):
        os.link(files[i % len(files)], folder / f"{i:06d}{files[0].suffix}")
    return folder


def assert_correct(files, folder):
    """The store holds what `read_study` and `Preprocess` give, and what the bare loop gives."""
    store = Store.open(
        run(settings(links(files, folder / "few", len(files)), folder / "few-store"))
    )
    for row, file in enumerate(files):
        got = store.images([row])[0]
        np.testing.assert_array_equal(got, Preprocess(size_px=SIZE)(read_study(file)).pixels)
        difference = np.abs(got.astype(int) - bare(file)).mean()
        # min-max before the resize (ours) or after it (bare): levels differ, the picture does not
        assert np.corrcoef(got.ravel(), bare(file).ravel())[0, 1] > 0.999, difference
    assert (store.path / "rejected.csv").read_text().count("\n") == 1


def settings(source, out, workers=CORES):
    return PrepareConfig(sources=(str(source),), out=str(out), size_px=SIZE, workers=workers)


def prepare_apart(source, out):
    """Prepare in a process of its own: seconds, CPU seconds, peak MiB of parent and of any worker.

    The parent's peak is VmHWM: ru_maxrss would inherit ours across exec.
    """
    code = (
        "import json, re, resource, time\n"
        "from spcxr.recipes.prepare import PrepareConfig, run\n"
        "if __name__ == '__main__':\n"
        "    start = time.perf_counter()\n"
        f"    run(PrepareConfig(sources=({str(source)!r},), out={str(out)!r}, size_px={SIZE},"
        f" workers={CORES}))\n"
        "    took = time.perf_counter() - start\n"
        "    mine, theirs = (resource.getrusage(who) for who in (0, resource.RUSAGE_CHILDREN))\n"
        "    cpu = sum(r.ru_utime + r.ru_stime for r in (mine, theirs))\n"
        "    peak = int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "    print(json.dumps([took, cpu, peak / 1024, theirs.ru_maxrss / 1024]))\n"
    )
    script = out.with_suffix(".py")
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """``small_store(n)``: a store of n tiny images, prepared once, and the parent's peak MiB."""
    folder = tmp_path_factory.mktemp("small")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    Image.fromarray(pixels).save(folder / "small.png")

    @functools.cache
    def made(count):
        source = links([folder / "small.png"], folder / f"in{count}", count)
        return folder / f"store{count}", prepare_apart(source, folder / f"store{count}")[2]

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_prepare(timed, originals, tmp_path, pytestconfig, kind):
    """Bare and prepared rates of one kind, taken in turns (other work on this machine drifts)."""
    seconds, files = pytestconfig.getoption("--prepare-seconds"), originals[kind]
    assert_correct(files, tmp_path)
    first, bare_cpu = bare_rate(files, seconds / 4)
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        together = sum(rate for rate, _ in pool.starmap(bare_rate, [(files, seconds)] * CORES))
    count = max(8 * CORES, int(first * CORES * seconds / 2))
    short = prepare_apart(links(files, tmp_path / "n", count), tmp_path / "n-store")
    source = links(files, tmp_path / "4n", 4 * count)
    long = timed(
        lambda: prepare_apart(source, tmp_path / "4n-store"),
        what="prepare",
        group=kind,
        images=4 * count,
        rounds=1,
    )
    last, last_cpu = bare_rate(files, seconds / 4)
    single, bare_cpu, rate = max(first, last), min(bare_cpu, last_cpu), 4 * count / long[0]
    timed.row |= {
        "bare_images_per_s": single,
        "bare_images_per_s_all_cores": together,
        "prepare_images_per_s": rate,
        "of_cores_times_bare": rate * bare_cpu / CORES,
        "of_cores_times_bare_literal": rate / (CORES * single),
        "of_bare_on_all_cores": rate / together,
        "bare_cpu_ms_per_image": bare_cpu * 1e3,
        "prepare_cpu_ms_per_image": long[1] / (4 * count) * 1e3,
        "bare_cpu_of_prepare_cpu": bare_cpu / (long[1] / (4 * count)),
        "peak_parent_mib": [short[2], long[2]],
        "peak_worker_mib": [short[3], long[3]],
        "growth_of_parent": long[2] / short[2],
        "growth_of_worker": long[3] / short[3],
    }
    timed.target("of_cores_times_bare", at_least=0.85)
    timed.target("of_cores_times_bare_literal", at_least=0.85)
    timed.target("growth_of_parent", at_most=1.05)
    timed.target("growth_of_worker", at_most=1.05)


def test_many_small_files(timed, small_store, pytestconfig):
    """What the parent holds for each file: tiny files, so that only the count matters."""
    count = pytestconfig.getoption("--prepare-files")
    few = small_store(count // 10)[1]
    many = timed(
        lambda: small_store(count)[1],
        what="prepare",
        group="many small files",
        images=count,
        rounds=1,
    )
    timed.row |= {
        "peak_parent_mib": [few, many],
        "parent_kib_per_file": (many - few) * 1024 / (count - count // 10),
    }


@pytest.mark.parametrize("batch", [64, 1])
def test_read(timed, small_store, pytestconfig, batch):
    """`Store.images`, warm: 64 random rows at once, and one by one."""
    store = Store.open(small_store(pytestconfig.getoption("--prepare-files"))[0])
    store.images(np.arange(len(store)))
    wanted = np.random.default_rng(0).integers(0, len(store), (4096, batch))
    turns = itertools.cycle(wanted)
    timed(
        lambda: store.images(next(turns)),
        what=f"batches of {batch}",
        group="store read",
        images=batch,
    )
    timed.target("median_us_an_image", at_most=50)
