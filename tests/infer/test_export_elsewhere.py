"""Exported files in the programs they are for: ONNX Runtime, timm, and C++ without Python."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import classifier, encoder, save, segmenter
from PIL import Image

import spcxr
from spcxr.infer.export import Wanted, export
from spcxr.models.decoder import DECODERS
from spcxr.ops import dispatch

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).resolve().parents[2] / "csrc" / "example"


def lacks(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


# --- ONNX -----------------------------------------------------------------------------------------


def session_of(file):
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(file, providers=["CPUExecutionProvider"])


@lacks("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize(("opset", "batch"), [(None, None), (23, 3)])
def test_onnx_takes_grey_and_knows_its_preprocessing(tmp_path, opset, batch):
    run = classifier(tmp_path / "run")
    wanted = Wanted("onnx", channels=3, opset=opset, batch=batch)
    checks = export(run, tmp_path / "out", wanted)
    assert [check.file for check in checks] == ["encoder.onnx", "classify.onnx"]
    assert all(max(check.differences.values()) < 1e-4 for check in checks)
    session = session_of(tmp_path / "out" / "encoder.onnx")
    content = (tmp_path / "out" / "encoder.onnx").read_bytes()
    for place in (torch.__file__, spcxr.__file__):  # nobody's business where they lie
        assert str(Path(place).parent).encode() not in content
    size = batch or "batch"
    assert [one.shape for one in session.get_inputs()] == [[size, 3, 32, 48]]
    assert [one.shape for one in session.get_outputs()] == [[size, 24], [size, 4, 6, 24]]
    grey = torch.rand(3, 1, 32, 48)
    made = session.run(["cls"], {"images": grey.expand(-1, 3, -1, -1).numpy()})[0]
    mine = encoder()((grey - 0.25) / 0.125)
    assert np.abs(made - mine.numpy()).max() < 1e-4 * float(mine.abs().max())
    session = session_of(tmp_path / "out" / "classify.onnx")
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["spcxr.labels"]) == ["covid", "pneumonia"]
    assert json.loads(said["spcxr.preprocess"])["preset"] == "minmax"
    assert (said["spcxr.mean"], said["spcxr.std"]) == ("0.25", "0.125")


@lacks("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("decoder", DECODERS)
def test_onnx_of_a_segmenter(decoder, tmp_path):
    run = segmenter(tmp_path / "run", decoder)
    checks = export(run, tmp_path / "out", Wanted("onnx"))
    assert [check.file for check in checks] == ["encoder.onnx", "segment.onnx"]
    session = session_of(tmp_path / "out" / "segment.onnx")
    made = session.run(None, {"images": np.zeros((1, 1, 32, 32), np.float32)})
    assert [one.shape for one in made] == [(1, 2, 32, 32)] * 2


# --- timm -----------------------------------------------------------------------------------------

# timm imports torchvision, whose operators do not load beside a CPU-only torch; a ViT uses none.
THEIRS = """
import importlib.abc, importlib.machinery, json, sys, types

class Hollow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        def given(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {mode: mode for mode in
                ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")})
        module.__getattr__ = given
        return module
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Hollow())
import timm, torch
from spcxr.infer.export import Wanted, export
(check,) = export(sys.argv[1], sys.argv[2], Wanted("timm", channels=3))
model = timm.create_model("local-dir:" + sys.argv[1] + "/model", pretrained=True).eval()
with torch.inference_mode():
    features = model(torch.load(sys.argv[3]))
torch.save(features, sys.argv[3] + ".made")
print(json.dumps([check.by, check.differences]))
"""


@lacks("timm")
def test_timm_loads_runs_and_exports_with_equal_features(tmp_path):
    run, images = save(tmp_path / "run", encoder()), tmp_path / "images.pt"
    torch.save(torch.randn(2, 1, 32, 48), images)
    arguments = [str(run), str(tmp_path / "out"), str(images)]
    command = [sys.executable, "-W", "ignore", "-c", THEIRS, *arguments]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    by, differences = json.loads(said.splitlines()[-1])
    assert by.startswith("timm ")
    assert max(differences.values()) < 1e-4
    made, mine = torch.load(f"{images}.made"), encoder()(torch.load(images))
    assert float((made - mine).abs().max()) < 1e-4 * float(mine.abs().max())


# --- C++ without Python ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example, built as docs/export.md says."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("no cmake or no g++ on PATH")
    build = tmp_path_factory.mktemp("example")
    where = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", str(EXAMPLE), "-B", str(build), where], ["--build", str(build)]):
        made = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    return build / "encode"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with an encoder of 16 px patches, compiled with and without our operators."""
    if (reason := dispatch.native().reason) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("packages")
    run = save(folder / "run", encoder(depth=1, patch_px=16))
    checks = export(run, folder / "out", Wanted("aoti", channels=3))
    assert all(max(check.differences.values()) < 1e-4 for check in checks)
    return folder / "out"


def features_of(program, *arguments):
    made = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, check=True, env={}
    )
    return torch.tensor([float(line) for line in made.stdout.split()])


@pytest.mark.parametrize("white", [255, 4095])
@pytest.mark.parametrize("package", ["encoder", "encoder-spcxr"])
def test_the_example_prints_the_feature_that_python_computes(
    tmp_path, program, packages, package, white
):
    levels = np.random.default_rng(3).integers(0, white + 1, (32, 48))
    file, kind = tmp_path / "a.pgm", ">u2" if white > 255 else "u1"
    head = f"P5\n# a comment\n48 32\n{white}\n".encode()
    file.write_bytes(head + levels.astype(kind).tobytes())
    with Image.open(file) as picture:  # what others read in it
        assert (
            np.abs(np.asarray(picture) / (65535 if white > 255 else 255) - levels / white).max()
            < 1e-3
        )
    library = [dispatch.LIBRARY] if package == "encoder-spcxr" else []
    made = features_of(program, packages / f"{package}.aoti.pt2", file, *library)
    grey = torch.from_numpy(levels / white).float()[None, None]
    mine = encoder(depth=1, patch_px=16)((grey - 0.25) / 0.125)[0]
    assert float((made - mine).abs().max()) < 1e-4 * float(mine.abs().max())


def test_the_example_says_what_is_wrong(tmp_path, program, packages):
    (tmp_path / "a.pgm").write_bytes(b"P5\n48 32\n255\n\0")
    (tmp_path / "b.pgm").write_bytes(b"P2\n1 1\n255\n0\n")
    (tmp_path / "c.pgm").write_bytes(b"P5\n2 1\n255\n\0\0")
    package = packages / "encoder.aoti.pt2"
    for arguments, reason in (
        ((package, tmp_path / "a.pgm"), "cut short"),
        ((package, tmp_path / "b.pgm"), "no binary PGM"),
        ((package, tmp_path / "c.pgm"), "[height, width] is [1, 2], the model's [32, 48]; resize"),
        ((package, tmp_path / "none.pgm"), "none.pgm: cannot be opened; check the name"),
        ((tmp_path / "none.pt2", tmp_path / "a.pgm"), "error: "),
    ):
        run = [str(program), *map(str, arguments)]
        made = subprocess.run(run, capture_output=True, text=True)
        assert made.returncode == 1
        assert reason in made.stderr
        assert made.stderr.count("\n") == 1
