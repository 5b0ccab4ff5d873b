"""docs/embedding.md is run as it stands; a small program of a user passes mypy --strict."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder_cases import grey, phantom, vit_of
from PIL import Image

from spcxr.data.presets import Preprocess
from spcxr.models.vit import build_vit
from spcxr.models.weights import save_model_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "embedding.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model_folder(
        tmp_path / "runs" / "a" / "model",
        vit_of(),
        preprocess=Preprocess(size_px=64).to_dict(),
        mean=0.5,
        std=0.25,
        task=None,
        head=None,
        provenance={},
    )
    torch.save({"teacher": build_vit("vit_tiny", image_px=32, channels=3).state_dict()}, "dino.pth")
    phantom(tmp_path / "a.dcm")
    Image.fromarray(grey()).save(tmp_path / "b.png")
    Path("text.dcm").write_text("no radiograph")
    # Traced as the page says, but not turned into C++, which takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found, names = blocks(), {}
    assert len(found) >= 12
    for number, block in enumerate(found):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "text.dcm it is no DICOM" in said
    assert "heads: 3, as every vit_tiny has" in said
    assert names["heat"].shape == names["study"].pixels.shape
    assert np.isfinite(names["heat"]).all()


PROGRAM = """
from pathlib import Path

import spcxr
import torch
from spcxr import Encoder, Features, RaggedFeatures, load_encoder


class Tool(torch.nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(images).cls


def main(paths: list[str | Path]) -> None:
    encoder: Encoder = load_encoder("runs/a", device="cpu")
    features: Features = encoder(paths, batch_size=4)
    ragged: RaggedFeatures = encoder(paths, keep_aspect=True)
    reveal_type(features.cls)
    reveal_type(encoder(paths).patches)
    reveal_type(ragged.patches)
    reveal_type(encoder.attention("a.dcm"))
    reveal_type(spcxr.load_encoder)
"""


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir",
         str(tmp_path / "cache"), "program.py"],
        cwd=tmp_path, capture_output=True, text=True,
        # Mypy does not follow the import hook of an editable install.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Success" in run.stdout, run.stdout
    revealed = re.findall(r'Revealed type is "(.*)"', run.stdout)
    assert [one.replace("builtins.", "") for one in revealed[:4]] == [
        "torch._tensor.Tensor",
        "torch._tensor.Tensor",
        "list[torch._tensor.Tensor]",
        "torch._tensor.Tensor",
    ]
    assert "preprocess: spcxr.data.presets.Preprocess | typing.Mapping" in revealed[4]
