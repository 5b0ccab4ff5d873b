#!/usr/bin/env bash
# Adults to children: pretrained and fine-tuned on adults alone, measured on children none of whom was seen.
#   benchmarks/zero_shot.sh ../shared/data/open runs/zero-shot
# DATA holds *_manifest.csv (see its README); nothing of it is copied into the project. docs/classification.md reports it.
set -euo pipefail
data=$1 out=$2
bin=$(dirname "$0")/../.venv/bin/spcxr-train
small="--image-px 96"
mkdir -p "$out/manifests"

# Adult: an age of 18 or more in the manifest. A row without an age is nobody's adult, and left out.
"$(dirname "$bin")/python" - "$data" "$out/manifests" <<'PY'
import csv, sys
data, out = sys.argv[1:]
def rows(name):
    with open(f"{data}/{name}_manifest.csv") as file:
        return list(csv.DictReader(file))
def adult(row):
    return bool(row["age"]) and float(row["age"]) >= 18
def write(name, chosen):
    columns = ["path", "patient_id", "split", "label", "source", "view", "age", "sex"]
    with open(f"{out}/{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader(); writer.writerows(chosen)
unique = {row["path"]: row for row in rows("multilabel") + rows("cls") if adult(row)}
write("adults-pretrain", [row | {"label": ""} for row in unique.values() if row["split"] == "train"])
write("adults", [row for row in rows("cls") if adult(row) and row["label"] in ("normal", "pneumonia")])
# The model sees no child, so every child is a test row, whatever the manifest's split.
write("children", [row | {"split": "test"} for row in rows("ped")])
PY

for name in adults-pretrain adults children; do
  [ -e "$out/$name/store.json" ] || "$bin" prepare "$out/manifests/$name.csv" --root "$data" --out "$out/$name" --size-px 110
done

"$bin" pretrain --data "$out/adults-pretrain" --out "$out/pretrain" --model vit_tiny $small \
  --epochs "${EPOCHS:-30}" --batch-size 32 --base-lr 8e-3

adults="--data $out/adults $small"
"$bin" classify $adults --init "$out/pretrain" --out "$out/pretrained" --epochs 15 --batch-size 16 --base-lr 5e-4 --layer-decay 0.8
"$bin" classify $adults --init scratch --model vit_tiny --out "$out/scratch" --epochs 15 --batch-size 16 --base-lr 5e-4
"$bin" classify $adults --init "$out/pretrain" --out "$out/linear" --method linear

# Adults are the reference, children the drift; the same two sets for the run from scratch, compared image by image.
"$bin" evaluate "$out/pretrained" --data "$out/adults,$out/children" --against "$out/scratch" --corruptions all --out "$out/report"
"$bin" evaluate "$out/linear" --data "$out/adults,$out/children" --against "$out/scratch" --out "$out/report-linear"
