"""What docs/export.md says to users without spcxr is what spcxr does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import classifier

from spcxr.data.phantom import draw
from spcxr.data.phantom_dicom import save, to_dataset
from spcxr.data.presets import Preprocess
from spcxr.infer.export import Wanted, export
from spcxr.infer.inputs import Input
from spcxr.infer.normalise import Normalisation, network_input
from spcxr.infer.predict import load_trained
from spcxr.infer.reading import Ready, read_prepared

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
SIZE = (32, 48)


@pytest.fixture(scope="module")
def theirs():
    """The page's functions, by name."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    return names


@pytest.fixture(params=["MONOCHROME2", "MONOCHROME1", "rescaled"])
def radiograph(request, tmp_path):
    """A DICOM file, higher than wide, whose levels run the one way or the other."""
    data = to_dataset(draw(3, size_px=150), "a")
    tall = np.ascontiguousarray(data.pixel_array[:, :101])
    data.PixelData, data.Columns = tall.tobytes(), tall.shape[1]
    if request.param == "rescaled":
        data.RescaleSlope, data.RescaleIntercept = "2.5", "-300"
    else:
        data.PhotometricInterpretation = request.param
        shape = "INVERSE" if request.param == "MONOCHROME1" else "IDENTITY"
        data.PresentationLUTShape = shape
    save(data, tmp_path / "a.dcm")
    return tmp_path / "a.dcm"


def ours(file, preprocess):
    ready = read_prepared(Input(file, "a"), preprocess)
    assert isinstance(ready, Ready)
    return network_input(ready.prepared.pixels[None], SIZE, Normalisation(0.0, 1.0))


def test_grey_levels_are_those_that_the_model_reads(radiograph, theirs):
    preprocess = Preprocess(size_px=64)
    made = theirs["grey_levels"](radiograph, preprocess.to_dict(), SIZE)
    apart = np.abs(ours(radiograph, preprocess)[0, 0].numpy() - made)
    # Half a level may be rounded the other way, and is then spread by the second resize.
    assert apart.max() < 1.01 / 255
    assert np.mean(apart > 1e-5) < 0.01


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, and a file made of it."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    run = classifier(folder / "run")
    export(run, folder / "out", Wanted("onnx", channels=3))
    return run, folder / "out" / "classify.onnx"


@pytest.mark.slow
def test_answers_are_those_of_the_model(radiograph, theirs, exported):
    run, file = exported
    made, trained = theirs["answers"](file, radiograph), load_trained(run)
    grey = ours(radiograph, Preprocess.from_dict(trained.config["preprocess"]))
    with torch.inference_mode():
        logits = trained.model((grey - 0.25) / 0.125)
    assert np.abs(made["logits"] - logits.numpy()).max() < 2e-3 * float(logits.abs().max())
    assert np.allclose(made["probabilities"], logits.sigmoid().numpy(), atol=1e-2)
