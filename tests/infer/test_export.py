"""Exported models: they answer as the model does, anywhere; what cannot be exported is refused."""

import errno
import importlib
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from exported_models import classifier, encoder, neighbours, save, segmenter
from PIL import Image
from safetensors.torch import load_file

from spcxr.cli.use_export import export as command
from spcxr.errors import SpcxrError
from spcxr.evaluate.report import PHANTOMS
from spcxr.infer import export_files, export_timm
from spcxr.infer.export import Wanted, export
from spcxr.infer.export_check import check_images, compare
from spcxr.models.weights import load_model_folder
from spcxr.ops import dispatch

export_module = importlib.import_module("spcxr.infer.export")
native = pytest.mark.skipif(
    dispatch.native().reason is not None, reason=str(dispatch.native().reason)
)


def grey(size=(32, 48), count=2):
    torch.manual_seed(7)
    return torch.rand(count, 1, *size)


def near(one, other):
    return float((one - other).abs().max()) <= 1e-4 * float(one.abs().max())


# --- torch.export ---------------------------------------------------------------------------------


@pytest.mark.slow
@native
def test_programs_answer_as_the_encoder_and_one_needs_nothing_of_ours(tmp_path):
    run = save(tmp_path / "run", encoder(depth=2))
    checks = export(run, tmp_path / "out", Wanted("pt2", channels=3))
    assert [check.file for check in checks] == ["encoder.pt2", "encoder-spcxr.pt2"]
    assert all(max(check.differences.values()) < 1e-4 for check in checks)
    images, file = grey(count=5), tmp_path / "images.pt"
    torch.save(images.expand(-1, 3, -1, -1).contiguous(), file)
    code = (
        "import sys, torch\n"
        "if sys.argv[3]: torch.ops.load_library(sys.argv[3])\n"
        "made = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2]))\n"
        "torch.save(made, sys.argv[2] + '.made')\n"
        "assert 'spcxr' not in sys.modules"
    )
    tokens = encoder(depth=2).forward_features((images - 0.25) / 0.125)
    for name, library in (("encoder.pt2", ""), ("encoder-spcxr.pt2", str(dispatch.LIBRARY))):
        arguments = [str(tmp_path / "out" / name), str(file), library]
        run = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        subprocess.run(run, check=True, capture_output=True, cwd=tmp_path)
        cls, patches = torch.load(f"{file}.made")
        assert near(tokens[:, 0], cls)
        assert near(tokens[:, 1:].unflatten(1, (4, 6)), patches)


def paths_in(content):
    """Which folders of this machine's Python files are named in what is given away."""
    return [
        p
        for p in (torch.__file__, export_files.__file__)
        if str(Path(p).parent).encode() in content
    ]


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_pure_aten_means_it(tmp_path):
    run = classifier(tmp_path / "run")
    export(run, tmp_path / "out", Wanted("pt2", pure_aten=True))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "classify.pt2", "encoder.pt2", "export.json"}
    said = {"spcxr.json": ""}
    with export_files.quietly():
        program = torch.export.load(tmp_path / "out" / "classify.pt2", extra_files=said)
    assert not [name for name in operators(program) if "spcxr" in name]
    facts = json.loads(said["spcxr.json"])
    assert facts["labels"] == ["covid", "pneumonia"]
    with zipfile.ZipFile(tmp_path / "out" / "classify.pt2") as parts:
        found = b"".join(map(parts.read, parts.namelist()))
    assert not paths_in(found)
    assert (facts["mean"], facts["std"], facts["preprocess"]["size_px"]) == (0.25, 0.125, 64)
    logits, probabilities = program.module()(grey(count=1))
    assert torch.equal(logits.sigmoid(), probabilities)


@pytest.mark.slow
@native
@pytest.mark.parametrize("decoder", ["unet", "unetr", "linear"])
def test_segmenters_as_programs(tmp_path, decoder):
    run = segmenter(tmp_path / "run", decoder)
    checks = export(run, tmp_path / "out", Wanted("pt2", channels=3, batch=2))
    assert [check.file for check in checks][2:] == ["segment.pt2", "segment-spcxr.pt2"]
    with export_files.quietly():
        program = torch.export.load(tmp_path / "out" / "segment.pt2").module()
    logits, probabilities = program(grey((32, 32)).expand(-1, 3, -1, -1).contiguous())
    assert logits.shape == (2, 2, 32, 32)
    assert torch.allclose(probabilities.sum(1), torch.ones(2, 32, 32), atol=1e-5)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["labels"] == ["background", "lung"]
    assert facts["input"]["shape"] == [2, 3, 32, 32]


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "wanted"), [(1, None), (1, 3), (3, 1)])
def test_a_timm_folder_is_a_model_folder_of_the_channels_asked_for(tmp_path, own, wanted):
    run = save(tmp_path / "run", encoder(channels=own))
    (check,) = export(run, tmp_path / "out", Wanted("timm", channels=wanted))
    assert max(check.differences.values()) < 1e-5
    given = wanted or own
    filters = load_file(tmp_path / "out" / "model.safetensors")["patch_embed.proj.weight"]
    mine = encoder(channels=own).patch_embed.proj.weight
    if own > given:
        assert torch.equal(filters, mine.sum(1, keepdim=True))
    else:
        assert torch.equal(filters, mine.expand(-1, given, -1, -1) / (given / own))
    loaded = load_model_folder(tmp_path / "out")
    assert loaded.config["pretrained_cfg"]["input_size"] == [given, 32, 48]
    assert loaded.config["provenance"]["init"] == "a"  # not where it lay


def test_weights_that_are_read_back_otherwise_are_not_written(tmp_path, monkeypatch):
    run = save(tmp_path / "run", encoder(channels=1))

    def twice(filters, channels):
        return filters.expand(-1, channels, -1, -1) / 1.5

    monkeypatch.setattr(export_timm, "convert_channels", twice)
    with pytest.raises(SpcxrError, match=r"model.safetensors: cls is .* away .* not written"):
        export(run, tmp_path / "out", Wanted("timm", channels=3))
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


# --- the check, the card --------------------------------------------------------------------------


def test_other_shapes_and_numbers_that_are_none_are_refused():
    one = torch.ones(2, 3)
    with pytest.raises(SpcxrError, match=r"cls is \[3\], the model's \[2, 3\]"):
        compare("a", ["cls"], [one], [one[0]], "b")
    with pytest.raises(SpcxrError, match="cls is nan of its largest value away"):
        compare("a", ["cls"], [one], [one * float("nan")], "b")
    with pytest.raises(SpcxrError, match=r"cls is 1.0e-03 of"):
        compare("a", ["cls"], [one], [one * 1.001], "b")


def test_the_check_can_be_on_ones_own_radiographs(tmp_path):
    file = tmp_path / "a.png"
    Image.effect_noise((80, 90), 60).save(file)
    config = load_model_folder(save(tmp_path / "run", encoder(depth=1))).config
    images = check_images([file], config, (32, 48))
    assert images.shape == (1, 1, 32, 48)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert not torch.equal(images, check_images([], config, (32, 48))[:1])
    file.write_bytes(b"no image")
    with pytest.raises(SpcxrError, match=r"a\.png: .*; give another --images"):
        check_images([file], config, (32, 48))


def test_card_and_facts_stand_beside_the_weights(tmp_path):
    export(classifier(tmp_path / "run"), tmp_path / "out", Wanted("timm"))
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("not a medical device", "minmax", "| training rows | 12 |", "local-dir"):
        assert said in card
    assert "largest difference cls" in card
    assert PHANTOMS in card
    assert "somebody" not in card
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["task"] is None  # timm has no such head
    assert set(facts["files"]["model.safetensors"]["differences"]) == {"cls", "patches"}


# --- refusals -------------------------------------------------------------------------------------


def refused(*arguments):
    """The one line that the command ends with."""
    result = CliRunner().invoke(command, [str(one) for one in arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_what_no_graph_does_is_refused(tmp_path):
    out = ("--out", tmp_path / "out")
    knn = neighbours(tmp_path / "knn")
    assert "its k-NN head holds features of the training" in refused(knn, "--format", "pt2", *out)
    lungs = classifier(tmp_path / "lungs", attend="lungs")
    assert "it finds the lungs first" in refused(lungs, "--format", "pt2", *out)
    windows = segmenter(tmp_path / "windows", window_px=32, image_px=64)
    line = refused(windows, "--format", "onnx", *out)
    assert "needs onnx" in line or "part by part (Windows)" in line
    line = refused(windows, "--format", "pt2", *out)
    assert "part by part (Windows), which no exported graph does; export its encoder" in line
    assert not (tmp_path / "out").exists()


def test_a_place_that_holds_something_else_is_left_alone(tmp_path):
    run = save(tmp_path / "run", encoder(depth=1))
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years of work")
    line = refused(run, "--format", "timm", "--out", thesis)
    assert line.endswith("exists and is no earlier export; choose another --out")
    for _ in range(2):  # an earlier export, and an empty folder, are written over
        (tmp_path / "new").mkdir(exist_ok=True)
        export(run, tmp_path / "new", Wanted("timm"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "run", "thesis"]
    (tmp_path / "new" / "notes.txt").write_text("whom we gave it to")
    line = refused(run, "--format", "timm", "--out", tmp_path / "new")
    assert "new: holds notes.txt, which no export wrote; move it, or" in line
    (tmp_path / "new" / "export.json").write_text("{}")  # somebody else's
    assert "no earlier export" in refused(run, "--format", "timm", "--out", tmp_path / "new")


def test_a_model_is_not_replaced_by_what_is_made_of_it(tmp_path):
    made = tmp_path / "made"
    export(save(tmp_path / "run", encoder(depth=1)), made, Wanted("timm"))
    weights = (made / "model.safetensors").read_bytes()
    line = refused(made, "--format", "pt2", "--pure-aten", "--out", made)
    assert line.endswith("made: is the model that is read; choose another --out")
    assert (made / "model.safetensors").read_bytes() == weights


def test_the_place_may_be_a_link_but_not_the_folder_one_is_in(tmp_path, monkeypatch):
    run = save(tmp_path / "run", encoder(depth=1))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    export(run, tmp_path / "link", Wanted("timm"))
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "run", "there"]
    modes = {file.stat().st_mode for file in (tmp_path / "there").iterdir()}
    assert len(modes) == 1  # whoever may read the card may read the weights
    monkeypatch.chdir(tmp_path / "there")
    assert refused(run, "--format", "timm", "--out", ".").endswith("give --out a name within it")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    run = save(tmp_path / "run", encoder(depth=1))

    def full(file, data):
        file.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused(run, "--format", "pt2", "--pure-aten", "--out", tmp_path / "out")
    assert "out: cannot be written (No space left on device); free some space" in line
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    (tmp_path / "file").touch()
    line = refused(run, "--format", "timm", "--out", tmp_path / "file" / "out")
    assert "out: cannot be written (Not a directory)" in line


def test_sigterm_leaves_nothing_half(tmp_path, monkeypatch):
    run = save(tmp_path / "run", encoder(depth=1))
    monkeypatch.setattr(
        export_module, "write_card", lambda *made: signal.raise_signal(signal.SIGTERM)
    )
    arguments = [str(run), "--format", "timm", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(command, arguments).exit_code == 130
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--format", "timm", "--opset", "18"), "--opset is for onnx"),
        (("--format", "onnx", "--opset", "17"), "opset 17; choose 18 to 23"),
        (("--format", "onnx", "--pure-aten"), "--pure-aten is for pt2 and aoti"),
        (("--format", "timm", "--batch-size", "2"), "not for timm"),
        (("--format", "timm"), "neither a run with an exported model/"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, flags, reason):
    assert reason in refused(tmp_path / "none", *flags, "--out", tmp_path / "out")


def test_missing_parts_are_named_with_the_remedy(tmp_path, monkeypatch):
    run = save(tmp_path / "run", encoder(depth=1))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(export_files, "ONNX_PARTS", ("onnxscript",))
    line = refused(run, "--format", "onnx", "--out", tmp_path / "out")
    assert "needs onnxscript" in line
    assert "pip install 'spcxr[export]'" in line
    monkeypatch.setattr(export_files.shutil, "which", lambda name: None)
    line = refused(run, "--format", "aoti", "--out", tmp_path / "out")
    assert line.endswith("there is no C++ compiler; install g++")
    reason = dispatch.Native({}, "not built")
    monkeypatch.setattr(export_files.dispatch, "native", lambda: reason)
    line = refused(run, "--format", "pt2", "--out", tmp_path / "out")
    assert "not built; or ask for --pure-aten" in line
