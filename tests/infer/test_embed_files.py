"""`spcxr embed`: the same vectors in every format, in order; parts, and memory."""

import csv
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from foreign_states import HEADS, timm_state
from safetensors import safe_open

import spcxr
from spcxr.cli import use
from spcxr.data.presets import FITS, PRESETS, Preprocess
from spcxr.data.study import Study, read_study
from spcxr.errors import NothingDone, SpcxrError
from spcxr.infer import embed_files as module
from spcxr.infer import result_parts
from spcxr.infer.embed_files import Embedder, embed_files
from spcxr.infer.predict import Normalisation, network_input
from spcxr.infer.reading import Ready, Refused
from spcxr.models.weights import load_model_folder

GRID, WIDTH = (4, 4), 24


@pytest.fixture
def files(png, lungs):
    """Five radiographs, with one that is none in their middle."""
    made = [png(f"{name}.png", np.roll(lungs(), 9 * k, 1)) for k, name in enumerate("badce")]
    made[2].write_bytes(b"no image")
    return made


def read_vectors(out, name="cls"):
    """``(vectors (n, ...), rows (n,), paths)`` of any format."""
    if out.suffix == ".npz":
        with np.load(out) as held:
            found, row = held[name], held["row"]
    elif out.suffix == ".safetensors":
        with safe_open(out, "numpy") as held:
            found, row = held.get_tensor(name), held.get_tensor("row")
    else:
        return from_table(out, name)
    with out.with_name(f"{out.name}.rows.csv").open() as opened:
        table = list(csv.DictReader(opened))
    assert [int(line["row"]) for line in table] == list(range(len(table)))
    assert row.tolist() == [k for k, line in enumerate(table) if line["status"] == "done"]
    return found, row, [line["path"] for line in table]


def from_table(out, name):
    if out.suffix == ".parquet":
        table = pq.read_table(out)
        assert str(table.schema.field(name).type).startswith("fixed_size_list<")
        listed = table.to_pylist()
    elif out.suffix == ".json":
        listed = json.loads(out.read_text())["rows"]
    else:
        with out.open() as opened:
            listed = list(csv.DictReader(opened))
        for line in listed:
            cells = [line[f"{name}_{k}"] for k in range(WIDTH)]
            line[name] = [float(v) for v in cells] if cells[0] else None
    row = [k for k, line in enumerate(listed) if line.get(name) is not None]
    vectors = np.array([listed[k][name] for k in row], np.float32)
    return vectors, np.array(row), [line["path"] for line in listed]


@pytest.mark.parametrize("suffix", module.FORMATS)
def test_vectors_are_the_encoders_own_in_the_order_given(
    suffix, untrained, files, compute, tmp_path
):
    out = tmp_path / f"o{suffix}"
    counts = embed_files(untrained(), files, out, compute)
    assert (counts.done, counts.rejected) == (4, 1)
    found, row, paths = read_vectors(out)
    assert paths == [str(file) for file in files]
    assert row.tolist() == [0, 1, 3, 4]
    loaded = load_model_folder(untrained())
    squares = np.stack([Preprocess(size_px=32)(read_study(files[k])).pixels for k in row])
    images = network_input(squares, (32, 32), Normalisation(0.25, 0.25))
    with torch.no_grad():
        wanted = loaded.encoder(images).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".safetensors"])
@pytest.mark.parametrize("tokens", ["patch", "both"])
def test_patches_are_a_grid(suffix, tokens, untrained, files, compute, tmp_path):
    out = tmp_path / f"o{suffix}"
    embed_files(untrained(), files, out, compute, tokens=tokens)
    found, row, _ = read_vectors(out, "patches")
    found = found.reshape(len(row), *GRID, WIDTH)
    loaded = load_model_folder(untrained())
    squares = np.stack([Preprocess(size_px=32)(read_study(files[k])).pixels for k in row])
    images = network_input(squares, (32, 32), Normalisation(0.25, 0.25))
    with torch.no_grad():
        wanted = loaded.encoder.forward_features(images)[:, 1:].numpy()
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-5)
    there = pq.read_schema(out).names if suffix == ".parquet" else ()
    assert ("cls" in there) == (suffix == ".parquet" and tokens == "both")


def test_what_is_embedded_travels_with_the_vectors(untrained, files, compute, tmp_path):
    for suffix in (".parquet", ".safetensors"):
        embed_files(untrained(), files, tmp_path / f"o{suffix}", compute)
    in_parquet = pq.read_schema(tmp_path / "o.parquet").metadata[b"spcxr"]
    with safe_open(tmp_path / "o.safetensors", "numpy") as held:
        in_safetensors = held.metadata()["spcxr"]
    said = json.loads(in_parquet)
    assert said == json.loads(in_safetensors)
    assert said["preprocess"] == Preprocess(size_px=32).to_dict()
    assert said["shapes"] == {"cls": [WIDTH]}
    assert (said["mean"], said["std"]) == ([0.25], [0.25])
    assert (said["heads"], said["precision"]) == (3, "fp32")


# --- parts ----------------------------------------------------------------------------------


def fake(monkeypatch, *, width=WIDTH, bad=()):
    """An embedder whose vector of a file is its number, and a reader that reads nothing."""

    def encode(squares):
        numbers = squares[:, 0, 0] + np.float32(256) * squares[:, 0, 1]
        return np.repeat(numbers[:, None], width, 1), np.zeros((len(squares), 1, 1, width))

    embedder = Embedder(
        encode, Preprocess(size_px=4), Normalisation(0.5, 0.25), (1, 1), width, "fake"
    )

    def read(given, preprocess):
        number = int(given.path.stem)
        if number in bad:
            return Refused(given, "it is bad")
        pixels = np.zeros((4, 4), np.uint8)
        pixels[0, :2] = number % 256, number // 256
        study = Study(pixels, bits=8)
        return Ready(given, study, SimpleNamespace(pixels=pixels, box=(0, 0, 4, 4)), None)

    monkeypatch.setattr(module, "open_embedder", lambda model, compute, told: embedder)
    monkeypatch.setattr(module, "read_prepared", read)


def touched(folder, count):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:05d}").touch()
    return folder


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".safetensors", ".csv"])
def test_parts_are_joined_in_order(suffix, monkeypatch, compute, tmp_path):
    fake(monkeypatch, bad={0, 7, 8, 9, 40})
    monkeypatch.setattr(result_parts, "ROWS", 8)
    folder, out = touched(tmp_path / "in", 41), tmp_path / f"o{suffix}"
    counts = embed_files("fake", [folder], out, compute)
    assert (counts.done, counts.rejected) == (36, 5)
    found, row, paths = read_vectors(out)
    assert len(paths) == 41
    assert row.tolist() == [k for k in range(41) if k not in {0, 7, 8, 9, 40}]
    np.testing.assert_array_equal(found[:, 0], row)
    np.testing.assert_array_equal(found[:, -1], row)


def test_a_killed_command_goes_on_behind_its_last_part(monkeypatch, compute, tmp_path):
    fake(monkeypatch, bad={3})
    monkeypatch.setattr(result_parts, "ROWS", 8)
    folder, out = touched(tmp_path / "in", 30), tmp_path / "o.npz"

    with monkeypatch.context() as patch:
        patch.setattr(result_parts.Parts, "flush", dies_after(2))
        with pytest.raises(MemoryError):
            embed_files("fake", [folder], out, compute)
    parts = out.with_name("o.npz.parts")
    assert sorted(file.name for file in parts.glob("*.parquet")) == [
        "000000000.parquet",
        "000000008.parquet",
    ]
    (parts / ".writing").write_bytes(b"torn")
    read, real = [], module.read_prepared
    monkeypatch.setattr(
        module, "read_prepared", lambda given, p: read.append(given.path.stem) or real(given, p)
    )
    counts = embed_files("fake", [folder], out, compute)
    assert (counts.done, counts.rejected) == (29, 1)
    assert sorted(read) == [f"{k:05d}" for k in range(16, 30)]
    found, row, _ = read_vectors(out)
    np.testing.assert_array_equal(found[:, 0], row)


def test_a_name_that_is_no_text_is_written_and_gone_on_with(monkeypatch, compute, tmp_path):
    fake(monkeypatch)
    monkeypatch.setattr(result_parts, "ROWS", 1)
    folder = touched(tmp_path / "in", 3)
    (folder / "00001").rename(folder / "00001.\udcff")
    with monkeypatch.context() as patch:
        patch.setattr(result_parts.Parts, "flush", dies_after(2))
        with pytest.raises(MemoryError):
            embed_files("fake", [folder], tmp_path / "o.parquet", compute)
    embed_files("fake", [folder], tmp_path / "o.parquet", compute)
    _, row, paths = read_vectors(tmp_path / "o.parquet")
    assert row.tolist() == [0, 1, 2]
    assert paths[1].endswith("00001.\\udcff")


def dies_after(count):
    """`Parts.flush` that works so many times, as if the process were killed then."""
    real, calls = result_parts.Parts.flush, []

    def flush(self):
        calls.append(1)
        if len(calls) > count:
            raise MemoryError
        real(self)

    return flush


def test_a_torn_part_is_said(monkeypatch, compute, tmp_path):
    fake(monkeypatch)
    out = tmp_path / "o.npz"
    parts = out.with_name("o.npz.parts")
    with monkeypatch.context() as patch:
        patch.setattr(result_parts, "ROWS", 4)
        patch.setattr(result_parts.Parts, "flush", dies_after(1))
        with pytest.raises(MemoryError):
            embed_files("fake", [touched(tmp_path / "in", 20)], out, compute)
    (parts / "000000000.parquet").write_bytes(b"torn")
    with pytest.raises(SpcxrError, match=r"000000000.parquet: is damaged .*; delete .*o.npz.parts"):
        embed_files("fake", [tmp_path / "in"], out, compute)


def test_nothing_is_left_of_a_command_that_made_nothing(monkeypatch, compute, tmp_path):
    """A path with a slip in it: the next try may well be with other settings."""
    fake(monkeypatch)
    with pytest.raises(SpcxrError, match="no such file or folder"):
        embed_files("fake", [tmp_path / "nowhere"], tmp_path / "o.npz", compute)
    assert list(tmp_path.iterdir()) == []
    folder = touched(tmp_path / "in", 1)
    embed_files("fake", [folder], tmp_path / "o.npz", compute, tokens="both")


def test_all_rejected(monkeypatch, compute, tmp_path):
    fake(monkeypatch, bad=set(range(3)))
    with pytest.raises(NothingDone, match=r"00000: it is bad \(all 3 rejected: see .*o.npz"):
        embed_files("fake", [touched(tmp_path / "in", 3)], tmp_path / "o.npz", compute)
    found, row, paths = read_vectors(tmp_path / "o.npz")
    assert (found.shape, row.shape, len(paths)) == ((0, WIDTH), (0,), 3)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".safetensors", ".json"])
def test_memory_does_not_grow_with_the_number_of_files(suffix, monkeypatch, compute, tmp_path):
    """4,000 vectors of 384 more are 6.1 MB more; in memory their files' names alone are."""
    fake(monkeypatch, width=384)
    monkeypatch.setattr(result_parts, "ROWS", 256)
    pool, peaks = pa.default_memory_pool(), {}
    for count in (1000, 5000):
        folder = touched(tmp_path / str(count), count)
        tracemalloc.start()
        embed_files("fake", [folder], tmp_path / f"{count}{suffix}", compute)
        peaks[count] = np.array([tracemalloc.get_traced_memory()[1], pool.max_memory()])
        tracemalloc.stop()
    python, arrow = peaks[5000] - peaks[1000]
    assert python < 4000 * 1000, peaks
    assert arrow < 2**21, peaks


# --- weights of another library -------------------------------------------------------------


def test_flags_say_how_the_images_of_other_weights_were_made(png, tmp_path):
    """What they leave out is assumed and said in words that are neither flags nor keywords."""
    file, weights = png("a.png"), tmp_path / "w.pth"
    torch.save({"model": timm_state()}, weights)
    flags = ("--preset", "rad-dino", "--fit", "crop", "--size-px", "40", "--heads", str(HEADS))
    run = embed(weights, file, tmp_path / "a.npz", *flags, "--mean", "0.4,0.5,0.6", "--std", "0.2")
    assert (run.exit_code, "assumed" in run.stderr) == (0, False), run.output
    settings = {"preset": "rad-dino", "fit": "crop", "size_px": 40}
    numbers = {"mean": (0.4, 0.5, 0.6), "std": 0.2, "heads": HEADS}
    encoder = spcxr.load_encoder(weights, "cpu", "fp32", preprocess=settings, **numbers)
    found, _, _ = read_vectors(tmp_path / "a.npz")
    np.testing.assert_allclose(found, encoder(file).cls.numpy(), rtol=1e-4, atol=1e-5)
    run = embed(weights, file, tmp_path / "b.npz", "--heads", str(HEADS))
    assert "assumed preprocess: minmax, pad, 32 px; mean and std: ImageNet's." in run.stderr
    assert "Give preset, fit, mean and std if they are others" in run.stderr
    other, _, _ = read_vectors(tmp_path / "b.npz")
    assert np.abs(other - found).max() > 1e-2


def test_flags_for_other_weights_are_refused_where_they_cannot_be(untrained, png, tmp_path):
    file, out = png("a.png"), tmp_path / "o.npz"
    run = embed(untrained() / "model", file, out, "--preset", "voi")
    assert (run.exit_code, "come with these weights; leave them out" in run.output) == (2, True)
    run = embed(untrained() / "model", file, out, "--mean", "a half")
    assert (run.exit_code, "'a half': give a number, or one a channel" in run.output) == (2, True)


def test_presets_and_fits_on_offer_are_those_that_are_known():
    kinds = {parameter.name: parameter.type for parameter in use.commands["embed"].params}
    assert tuple(kinds["preset"].choices) == tuple(PRESETS)
    assert tuple(kinds["fit"].choices) == FITS


def embed(model, file, out, *flags):
    usual = ("--out", str(out), "--device", "cpu", "--precision", "fp32")
    return CliRunner().invoke(use, ["embed", str(model), str(file), *usual, *flags])
