#!/usr/bin/env bash
# The main job on real chest X-rays: what docs/RESULTS.md reports. About a quarter of an hour on two CPU cores.
#   benchmarks/real_run.sh ../shared/data/open runs/real
# DATA holds *_manifest.csv (see its README); nothing of it is copied into the project.
set -euo pipefail
data=$1 out=$2
bin=$(dirname "$0")/../.venv/bin/spcxr-train
size="--size-px 110"   # 96 px of input, and a margin for crops
small="--image-px 96"
mkdir -p "$out/manifests"

# Mask sources define lungs differently (with and without the heart), so one source at a time;
# and covid against pneumonia within one hospital collection, since sources confound the pooled task.
"$(dirname "$bin")/python" - "$data" "$out/manifests" <<'PY'
import csv, sys
data, out = sys.argv[1:]
def subset(source, name, keep):
    with open(f"{data}/{source}_manifest.csv") as file:
        rows = [row for row in csv.DictReader(file) if keep(row)]
    with open(f"{out}/{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0]); writer.writeheader(); writer.writerows(rows)
subset("seg", "seg-children", lambda r: "Kermany" in r["source"])
subset("cls", "one-source", lambda r: "ieee8023" in r["source"] and r["label"] != "normal")
PY

prepare() { [ -e "$out/$1/store.json" ] || "$bin" prepare "$2" --root "$data" --out "$out/$1" $size; }
prepare unlabeled "$data/unlabeled_manifest.csv"
prepare cls "$data/cls_manifest.csv"
prepare drift "$data/drift_manifest.csv"
prepare one-source "$out/manifests/one-source.csv"
prepare seg-children "$out/manifests/seg-children.csv"

"$bin" pretrain --data "$out/unlabeled" --out "$out/pretrain" --model vit_tiny $small \
  --epochs "${EPOCHS:-8}" --batch-size 32 --base-lr 8e-3 --sample-every 4

for start in pretrained scratch; do
  if [ $start = pretrained ]; then init="--init $out/pretrain --layer-decay 0.8"; else init="--init scratch --model vit_tiny"; fi
  "$bin" classify --data "$out/cls" $init --out "$out/classify-$start" $small --epochs 6 --batch-size 16 --base-lr 5e-4
  "$bin" segment --data "$out/seg-children" $init --out "$out/segment-$start" $small --epochs 15 --batch-size 16 \
    --label-fraction 0.25 --decoder unetr --base-channels 8
  evaluate() { [ -e "$3/report.html" ] || "$bin" evaluate "$1" --data "$2" --out "$3" "${@:4}"; }
  evaluate "$out/classify-$start" "$out/cls,$out/one-source" "$out/evaluate-$start"
  evaluate "$out/classify-$start" "$out/drift" "$out/drift-$start" --splits drift
  evaluate "$out/segment-$start" "$out/seg-children" "$out/evaluate-lungs-$start"
done
