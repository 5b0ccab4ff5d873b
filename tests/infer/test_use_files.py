"""What `spcxr predict`, `embed` and `explain` promise alike: refusals and silence."""

import json
import pickle
import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from use_calls import COMMANDS, DID, OUT, call, rows

from spcxr.data.phantom_dicom import save, to_dataset
from spcxr.data.phantom_draw import draw

# --- bad input ------------------------------------------------------------------------------


def phantom(**settings):
    data = to_dataset(draw(1, size_px=64), "x")
    for name, value in settings.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    return data


def bomb(side):
    """A PNG that says it is ``side`` pixels wide and high, and holds one line."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    lines = chunk(b"IDAT", zlib.compress(bytes(side + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + lines + chunk(b"IEND", b"")


BAD = {
    "ct.dcm": "Modality is CT",
    "frames.dcm": "has 3 frames",
    "no_photometric.dcm": "PhotometricInterpretation is missing",
    "lateral.dcm": "lateral view",
    "truncated.dcm": "cut short",
    "zero.dcm": "it is empty",
    "constant.png": "every pixel has the same value",
    "one_by_one.png": "every pixel has the same value",
    "mask.png": "only two grey levels",
    "bomb.png": "larger than Pillow decodes",
    "torn.png": "damaged or cut short",
    "pickle.dcm": "no DICOM, PNG, JPEG, TIFF or WebP",
    "nan.tif": "floating point, without a range",
}


@pytest.fixture
def bad_folder(png, tmp_path):
    """One file that is good, and one of every kind that is not."""
    good = png("good.png")
    folder = good.parent
    save(phantom(Modality="CT"), folder / "ct.dcm")
    frames = phantom(NumberOfFrames=3)
    frames.PixelData = frames.PixelData * 3
    save(frames, folder / "frames.dcm")
    save(phantom(PhotometricInterpretation=None), folder / "no_photometric.dcm")
    save(phantom(ViewPosition="LL"), folder / "lateral.dcm")
    save(phantom(), folder / "truncated.dcm")
    whole = (folder / "truncated.dcm").read_bytes()
    (folder / "truncated.dcm").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.dcm").touch()
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(folder / "constant.png")
    Image.fromarray(np.full((1, 1), 7, np.uint8)).save(folder / "one_by_one.png")
    Image.fromarray(np.eye(40, dtype=np.uint8)).save(folder / "mask.png")
    (folder / "bomb.png").write_bytes(bomb(20_000))
    (folder / "torn.png").write_bytes(good.read_bytes()[:300])
    (folder / "pickle.dcm").write_bytes(pickle.dumps({"a": 1}))
    levels = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
    levels[3, 3] = np.nan
    Image.fromarray(levels).save(folder / "nan.tif")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_bad_file_has_a_row_and_the_rest_goes_on(command, untrained, bad_folder, tmp_path):
    out = tmp_path / OUT[command]
    run = call(command, untrained(), [bad_folder], out)
    assert run.exit_code == 0, run.output
    assert f"(1 {DID[command]}, {len(BAD)} rejected)" in run.output
    found = {row["path"].rpartition("/")[2]: row for row in rows(out)}
    assert set(found) == {*BAD, "good.png"}
    assert found.pop("good.png")["status"] == "done"
    for name, row in found.items():
        assert row["status"] == "rejected", name
        assert BAD[name] in row["reason"], (name, row["reason"])
        assert row["reason"], name
        assert "\n" not in row["reason"]
    assert run.stdout.count("\n") == 1


@pytest.mark.shared
@pytest.mark.parametrize("command", COMMANDS)
def test_real_files_are_read_or_refused_for_what_they_are(
    command, untrained, shared_data, tmp_path
):
    out = tmp_path / OUT[command]
    run = call(command, untrained(), [shared_data / "dicom"], out)
    assert run.exit_code == 0, run.output
    refused = {
        row["path"].rpartition("/")[2]: row["reason"]
        for row in rows(out)
        if row["status"] == "rejected"
    }
    assert refused == {
        "udacity_test4.dcm": "its BodyPartExamined is RIBCAGE, not the chest",
        "udacity_test5.dcm": "its Modality is CT, not one of CR, DX, DR, RG",
        "udacity_test6.dcm": "its PatientPosition is XX, none of a chest X-ray",
        "wg04_RG2_hip_JPLY.dcm": "its BodyPartExamined is HIP, not the chest",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_colour_photo_is_read_by_its_luminance_and_said(command, untrained, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    out = tmp_path / OUT[command]
    assert call(command, untrained(), [tmp_path / "photo.png"], out).exit_code == 0
    assert "a colour picture, read by its luminance" in rows(out)[0]["notes"]


@pytest.mark.parametrize("out", ["out.npz", "out.json", "out.parquet"])
def test_results_beside_the_images_are_no_inputs(out, untrained, png, tmp_path):
    """A file of results in the folder of the images; the command is stopped, and goes on."""
    folder = png("sub/a.png").parent.parent
    png("b.png")
    (folder / f"{out}.parts").mkdir()
    (folder / f"{out}.parts" / "000000009.old").touch()
    (folder / f"{out}.rows.csv").touch()
    command = "embed" if out != "out.json" else "predict"
    run = call(command, untrained(), [folder], folder / out)
    assert f"(2 {DID[command]}, 0 rejected)" in run.output


def test_settings_of_a_csv_beside_the_images_are_no_input(untrained, png):
    folder = png("a.png").parent
    for _ in range(2):
        run = call("predict", untrained(), [folder], folder / "out.csv")
        assert "(1 predicted, 0 rejected)" in run.output
    assert (folder / "out.settings.json").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_done_is_exit_code_1_and_the_reasons_are_kept(command, untrained, tmp_path):
    (tmp_path / "empty.png").touch()
    out = tmp_path / OUT[command]
    run = call(command, untrained(), [tmp_path / "empty.png"], out)
    assert run.exit_code == 1
    assert "empty.png: it is empty (all 1 rejected: see " in run.stderr
    assert [row["reason"] for row in rows(out)] == ["it is empty"]


@pytest.mark.parametrize(
    ("command", "structures", "out", "flags", "said"),
    [
        ("predict", ("lung",), "o.csv", [], "has no labels; give a run of spcxr-train classify"),
        ("explain", ("lung",), "o", [], "has no labels; give a run of spcxr-train classify"),
        ("predict", (), "o.txt", [], "--out must end in .csv, .json or .parquet"),
        ("embed", (), "o", [], "--out must end in .parquet, .npz, .safetensors, .csv or .json"),
        ("embed", (), "o.csv", ["--tokens", "both"], ".csv holds cls alone"),
        ("explain", (), "o", ["--label", "rib"], "knows no label 'rib'; choose of covid"),
        ("explain", (), "in/a.png", [], "is a file; choose another --out"),
        ("predict", (), "folder.csv", [], "is a folder; choose another --out"),
        ("embed", (), "there.npz", [], "is there already; delete it, or choose another --out"),
        ("predict", (), "there.csv", [], "is not of this command; choose another --out"),
    ],
)
def test_requests_that_cannot_be(
    untrained, png, tmp_path, monkeypatch, command, structures, out, flags, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "there.npz").write_text("mine")
    (tmp_path / "there.csv").write_text("mine\n")
    run = call(command, untrained(*structures), [png("a.png")], out, *flags)
    assert run.exit_code == 2
    assert run.output.count("\n") == 1
    assert said in run.output
    assert (tmp_path / "there.csv").read_text() == "mine\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_models_that_are_none(command, png, tmp_path):
    torn = tmp_path / "torn" / "model"
    torn.mkdir(parents=True)
    (torn / "config.json").write_text("{")
    for model, said in ((tmp_path / "no", "neither a run"), (torn, "not readable as JSON")):
        run = call(command, model, [png("a.png")], tmp_path / OUT[command])
        assert (run.exit_code, run.output.count("\n")) == (2, 1), run.output
        assert said in run.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pickle_in_place_of_safetensors_is_refused_unread(command, untrained, png, tmp_path):
    run = untrained()

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (run / "model" / "model.safetensors").write_bytes(pickle.dumps(Evil(), protocol=2))
    said = call(command, run, [png("a.png")], tmp_path / OUT[command])
    assert (said.exit_code, said.output.count("\n")) == (2, 1)
    assert "a pickle, not safetensors" in said.output
    assert not (tmp_path / "ran").exists()


# --- silence --------------------------------------------------------------------------------


def everything_below(folder):
    """All bytes that were written, and the names of the files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    written = b"".join(path.read_bytes() for path in files)
    tables = [path for path in files if path.suffix == ".parquet"]  # compressed
    return written + repr([pq.read_table(path).to_pylist() for path in tables]).encode(), files


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_of_the_header_comes_out(command, untrained, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "results"
    folder.mkdir()
    out.mkdir()
    data = phantom(PatientID="SECRET-7", PatientName="Secret^Name", StudyDate="19700102")
    data.AccessionNumber = "A-SECRET"
    save(data, folder / "a.dcm")
    torn = phantom(PatientID="SECRET-7", PatientName="Secret^Name", Modality="CT")
    save(torn, folder / "b.dcm")
    run = call(command, untrained(), [folder], out / OUT[command])
    assert run.exit_code == 0, run.output
    written, files = everything_below(out)
    for word in ("SECRET", "Secret", "19700102", str(data.StudyInstanceUID), "A-SECRET"):
        assert word.encode() not in written
        assert word not in run.output
        assert not any(word in str(file) for file in files)


@pytest.mark.parametrize("out", ["o.csv", "o.json", "o.parquet"])
@pytest.mark.parametrize("command", ["predict", "embed"])
def test_identifiers_are_there_if_they_are_asked_for(command, out, untrained, png, tmp_path):
    data = phantom(PatientID="SECRET-7", PatientName="Secret^Name")
    save(data, tmp_path / "a.dcm")
    files = [tmp_path / "a.dcm", png("b.png")]
    run = call(command, untrained(), files, tmp_path / out, "--with-ids")
    assert run.exit_code == 0, run.output
    if out == "o.json":
        found = json.loads((tmp_path / out).read_text())["rows"]
    else:
        found = rows(tmp_path / out)
    first, second = found
    assert first["PatientID"] == "SECRET-7"
    assert first["StudyInstanceUID"] == data.StudyInstanceUID
    assert first["SOPInstanceUID"] == data.SOPInstanceUID
    assert not second.get("PatientID")
    assert b"Secret^Name" not in everything_below(tmp_path)[0].replace(
        (tmp_path / "a.dcm").read_bytes(), b""
    )
