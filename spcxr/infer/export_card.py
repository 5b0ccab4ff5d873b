"""``README.md`` of an exported model: what it is, what it takes, how it was checked."""

from __future__ import annotations

import json
from pathlib import Path

from spcxr.evaluate.report import PHANTOMS
from spcxr.infer.export_check import Check
from spcxr.infer.export_files import Job
from spcxr.infer.export_graphs import Exported
from spcxr.train.model_card import write_model_card

CARD = "README.md"
USE = {
    "timm": """import timm
model = timm.create_model("local-dir:DIR", pretrained=True)
features = model((grey - mean) / std)  # cls; mean and std are in config.json""",
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("DIR/encoder.onnx")
cls, patches = session.run(["cls", "patches"], {"images": grey})""",
    "pt2": """import torch
encoder = torch.export.load("DIR/encoder.pt2").module()  # aten operators alone
cls, patches = encoder(grey)
# encoder-spcxr.pt2 needs spcxr's operators first: import spcxr.ops.masked_attention""",
    "aoti": """import torch
encoder = torch._inductor.aoti_load_package("DIR/encoder.aoti.pt2")
cls, patches = encoder(grey)
# in C++, without Python: csrc/example of spcxr's sources""",
}


def write_card(exported: Exported, job: Job, checks: list[Check]) -> Path:
    """Write the card from the facts that travel with the files (`export.facts_of`)."""
    facts, encoder = job.facts, exported.encoder
    rows: dict[str, object] = {
        "format": facts["format"],
        "task": facts["task"] or "none: features of an encoder",
        "labels": ", ".join(facts["labels"]) or "none",
        "encoder": f"vision transformer of {encoder.depth} blocks, width {encoder.width}, "
        f"{encoder.heads} heads, patches of {encoder.patch_px} px",
        "input": f"{facts['input']['shape']} float32: {facts['input']['values']}",
        "preprocessing": json.dumps(facts["preprocess"]),
        "mean, std": f"{facts['mean']:.6g}, {facts['std']:.6g} of the grey levels in [0, 1]",
        "made with": f"spcxr {facts['spcxr_version']}, torch {facts['torch_version']}",
    }
    rows |= {name.replace("_", " "): value for name, value in facts["provenance"].items()}
    rows |= {f"check of {check.file}": str(check).partition(": ")[2] for check in checks}
    banner = PHANTOMS if facts["provenance"].get("phantoms") else ""
    title = "A chest X-ray model exported by spcxr"
    card = write_model_card(job.folder, title, rows, banner=banner)
    made = card.rename(job.folder / CARD)
    use = f"\n## Use\n\n```python\n{USE[facts['format']]}\n```\n"
    made.write_text(made.read_text() + use)
    return made
