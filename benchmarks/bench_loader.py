"""From a store on disk to what the encoder is shown, and what 10^7 images cost.

    pytest benchmarks/bench_loader.py

`input`: one thread, batches of 256 of 20,000 images of 256 x 256: order, reading, crops and
corruption drawn, cropped, resampled to 224 x 224, masked, cut into patches, rounded to bfloat16.
Against it `torch.utils.data.DataLoader` over the same images memory-mapped, and over PNG files,
with the same law (noise alone) written image by image in eager torch and numpy. `read`: the images
alone. `memory`: what a process of its own holds over epochs. `start`: a store of 10^7 images
(shards are sparse files) from nothing to the first batch. Memory is anonymous memory: files of the
page cache are not counted.

CPU seconds stand beside the rates: they say the same on a machine that others use too.

Targets: 5,000 images a second and core; anonymous memory after the fifth epoch at most 1.05 times
that after the first (10^7 images, 2,048 an epoch: 1.1); 10 s and 1 GiB to start with them.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from bench_prepare import chest_like
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from spcxr.data.manifest import ROWS_IN_A_GROUP, Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store, StoreWriter
from spcxr.objectives.corruption import Corruption
from spcxr.ops.masked_patch_gather import masked_patch_gather
from spcxr.ops.patches import patchify
from spcxr.recipes.views import ViewLaw, draw
from spcxr.train.heap import keep_freed_memory
from spcxr.train.order import Order

IMAGES, SIDE, BATCH = 20_000, 256, 256
MANY, SHARD = 10**7, 2**13  # rows of the sparse store, and of one of its shards
DISTINCT = 32  # pictures; each row is one of them, rolled
HALF, HERE = torch.bfloat16, Path(__file__).parent
GMML = ViewLaw((224, 224), 16, 1, (0.5, 1.0), 0.5, Corruption(), (), seed=0)
NOISE = replace(GMML, corruption=Corruption(alien_ratio=0.0))

pytestmark = pytest.mark.parametrize("device", ["cpu"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    pictures = [chest_like(seed, SIDE, 8) for seed in range(DISTINCT)]
    with StoreWriter(tmp_path_factory.mktemp("loader") / "store", Preprocess(size_px=SIDE)) as to:
        for i in range(IMAGES):
            to.add(np.roll(pictures[i % DISTINCT], i // DISTINCT, axis=1))
        columns = {"path": [f"{i}.png" for i in range(IMAGES)], "split": ["train"] * IMAGES}
        return Store.open(to.finish(Manifest.from_columns(columns, root="/")).path)


@pytest.fixture(scope="module")
def pngs(store, tmp_path_factory):
    """The first 2,000 images as files; more would only fill the disk."""
    folder = tmp_path_factory.mktemp("png")
    for i in range(2000):
        Image.fromarray(store.images([i])[0]).save(folder / f"{i}.png")
    return sorted(folder.iterdir(), key=lambda file: int(file.stem))


# --- what a user would write ----------------------------------------------------------------


class Eager(Dataset):
    """Crop, resample, flip, normalise and mask one image at a time, in eager torch."""

    def __init__(self, read, count, store):
        self.read, self.count = read, count
        self.scale, self.shift = 1 / (255 * store.std), -store.mean / store.std
        self.draw = np.random.default_rng(0)

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        image = torch.from_numpy(self.read(row))[None, None].float()
        top, left, height, width = self.crop()
        part = image[:, :, top : top + height, left : left + width]
        view = F.interpolate(part, (224, 224), mode="bilinear", antialias=True)[0]
        if self.draw.random() < NOISE.flip_p:
            view = view.flip(-1)
        view = view * self.scale + self.shift
        return torch.where(torch.from_numpy(self.mask()), torch.randn_like(view), view)

    def crop(self):
        """As torchvision's RandomResizedCrop draws it."""
        for _ in range(10):
            area = self.draw.uniform(*NOISE.crop_scale) * SIDE**2
            aspect = math.exp(self.draw.uniform(math.log(3 / 4), math.log(4 / 3)))
            height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if height <= SIDE and width <= SIDE:
                top, left = self.draw.integers(0, (SIDE - height + 1, SIDE - width + 1))
                return int(top), int(left), height, width
        return 0, 0, SIDE, SIDE

    def mask(self, side=224):
        """Rectangles until enough is hidden, counted anew for each, as the ancestors do."""
        hidden = np.zeros((side, side), bool)
        target = self.draw.uniform(0.5, 0.75) * side**2
        while hidden.sum() < target:
            top, left = self.draw.integers(0, side - 1, 2)
            rows, columns = self.draw.uniform(1, 0.3 * side, 2).round().astype(int)
            hidden[top : top + rows, left : left + columns] = True
        return hidden


def batches(dataset):
    """Rows of patches, batch after batch, for ever."""
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
    while True:
        for views in loader:
            yield patchify(views, NOISE.patch_px).to(HALF)


def ours(store, law):
    assert keep_freed_memory()  # for the contenders too, which come after
    order, position, per_epoch = Order(store.manifest.row_set("train"), seed=0), 0, IMAGES // BATCH
    while True:
        epoch, turn = divmod(position, per_epoch)
        (batch,) = draw(store, order.take(epoch, turn * BATCH, (turn + 1) * BATCH), law, epoch)
        yield masked_patch_gather(batch.views, batch.fill, dtype=HALF)
        position += 1


def with_cpu(timed, stream, **said):
    """Time the stream's next batch; adds the images that one CPU second makes."""
    next(stream)
    used, calls = time.process_time(), [0]

    def call():
        calls[0] += 1
        return next(stream)

    timed(call, images=BATCH, **said)
    timed.row["images_per_cpu_s"] = calls[0] * BATCH / (time.process_time() - used)


# --- input and read -------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["input", "input, GMML's law"])
def test_input(timed, store, group):
    law = NOISE if group == "input" else GMML
    (batch,) = draw(store, np.arange(4), law, 0)
    made = masked_patch_gather(batch.views, batch.fill, dtype=HALF)
    wanted = masked_patch_gather(batch.views, batch.fill, dtype=HALF, backend="reference")
    torch.testing.assert_close(made.float(), wanted.float(), rtol=2**-7, atol=0.02)
    with_cpu(timed, ours(store, law), what="spcxr", group=group)
    timed.target("images_per_cpu_s", at_least=5000)
    timed.target("median_us_an_image", at_most=200)
    if law is NOISE:
        timed.target("speed", at_least=10, of="DataLoader, memory-mapped")


@pytest.mark.parametrize("source", ["memory-mapped", "PNG"])
def test_input_otherwise(timed, store, pngs, source):
    def decoded(row):
        return np.array(Image.open(pngs[row]))

    def mapped(row):
        return store.images([row])[0]

    np.testing.assert_array_equal(decoded(7), mapped(7))
    read, count = (mapped, IMAGES) if source == "memory-mapped" else (decoded, len(pngs))
    eager = Eager(read, count, store)
    assert abs(np.mean([eager.mask().mean() for _ in range(40)]) - 0.63) < 0.03
    with_cpu(timed, batches(eager), what=f"DataLoader, {source}", group="input", rounds=3)


@pytest.mark.parametrize("source", ["spcxr", "PNG"])
def test_read(timed, store, pngs, source):
    order = Order(np.arange(len(pngs)), seed=0)

    def stream():
        for epoch in range(10**9):
            rows = order.take(epoch, 0, BATCH)
            if source == "spcxr":
                yield store.images(rows)
            else:
                yield np.stack([np.asarray(Image.open(pngs[row])) for row in rows])

    np.testing.assert_array_equal(next(stream()), store.images(order.take(0, 0, BATCH)))
    with_cpu(timed, stream(), what=source, group="read")
    if source == "spcxr":
        timed.target("median_us_an_image", at_most=50)


# --- memory and start -----------------------------------------------------------------------

APART = """
import json, re, sys, time
import numpy as np, torch
from spcxr.data.store import Store
from spcxr.ops.masked_patch_gather import masked_patch_gather
from spcxr.recipes.images import phantoms_among
from spcxr.recipes.views import draw
from spcxr.train.heap import keep_freed_memory
from spcxr.train.order import Order
from bench_loader import BATCH, GMML, HALF

def mib(what):
    return int(re.search(what + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
assert keep_freed_memory()
said = {"mib_before": mib("RssAnon")}
began = time.perf_counter()
store = Store.open(sys.argv[1])
rows = store.manifest.row_set("train")
assert not phantoms_among(store, rows)
order = Order(rows, seed=0)
first = store.images(order.take(0, 0, BATCH))
said |= {"start_s": time.perf_counter() - began, "mib_started": mib("RssAnon"),
         "peak_mib": mib("VmHWM"), "rows": len(order)}
for epoch in range(int(sys.argv[2])):
    for start in range(0, min(len(order), int(sys.argv[3])) - BATCH + 1, BATCH):
        (batch,) = draw(store, order.take(epoch, start, start + BATCH), GMML, epoch)
        masked_patch_gather(batch.views, batch.fill, dtype=HALF)
    said[f"mib_epoch_{epoch + 1}"] = mib("RssAnon")
print(json.dumps(said))
"""


def apart(folder, images):
    """Start, and go through the first images of five epochs, in a process of its own."""
    words = [sys.executable, "-c", APART, str(folder), "5", str(images)]
    run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=HERE)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def sparse_store(small, folder):
    """A store of `MANY` black images that take no room, and a manifest that does."""
    shards = []
    for begin in range(0, MANY, SHARD):
        rows, name = min(SHARD, MANY - begin), f"images-{len(shards):05d}.npy"
        with open(folder / name, "wb") as file:
            fields = {"descr": "|u1", "fortran_order": False, "shape": (rows, SIDE, SIDE)}
            np.lib.format.write_array_header_1_0(file, fields)
            size = file.tell() + rows * SIDE * SIDE
            file.truncate(size)
        shards.append({"rows": rows, "images": {"file": name, "bytes": size, "sha256": ""}})
    file, metadata = folder / "manifest.parquet", {b"spcxr": b'{"labels": []}'}
    writer = None
    for begin in range(0, MANY, 2**18):
        table = many_rows(np.arange(begin, min(begin + 2**18, MANY)))
        writer = writer or pq.ParquetWriter(file, table.schema.with_metadata(metadata))
        writer.write_table(table.replace_schema_metadata(metadata), ROWS_IN_A_GROUP)
    writer.close()
    facts = {"shards": shards, "manifest": {"bytes": file.stat().st_size, "sha256": ""}}
    (folder / "store.json").write_text(json.dumps({**small.facts, **facts}))
    return folder


def many_rows(numbers):
    """Rows of a manifest with the columns that a store's has."""

    def joined(before, which, after=""):
        texts = pa.array(which).cast(pa.string())
        return pa.compute.binary_join_element_wise(before, texts, after, "")

    def one_of(words, which):
        return pa.array(words).take(pa.array(which % len(words)))

    blank = one_of([""], numbers)
    return pa.table(
        {
            "path": joined("images/", numbers, ".png"),
            "patient_id": joined("p", numbers // 2),
            "split": one_of(["train"] * 9 + ["val"], numbers // 2),
            "view": one_of(["PA", "AP", ""], numbers),
            "site": one_of(["a", "b", "c", "d"], numbers * 4 // MANY),
            "sex": one_of(["F", "M"], numbers // 2),
            "mask_path": blank,
            "age": pa.array((numbers % 90).astype(np.float32)),
            "source_root": one_of(["/nowhere"], numbers),
        }
    )


def test_memory(timed, store):
    said = timed(lambda: apart(store.path, 8192), what="spcxr", group="memory", rounds=1)
    timed.row |= said | {"growth": said["mib_epoch_5"] / said["mib_epoch_1"]}
    timed.target("growth", at_most=1.05)


def test_start(timed, store, tmp_path):
    many = sparse_store(store, tmp_path)
    said = timed(lambda: apart(many, 2048), what="spcxr", group="start", rounds=1)
    assert said["rows"] == MANY * 9 // 10
    timed.row |= said | {"growth": said["mib_epoch_5"] / said["mib_epoch_1"]}
    timed.target("start_s", at_most=10)
    timed.target("peak_mib", at_most=1024)
    timed.target("growth", at_most=1.1)  # few images: the heap has not settled
