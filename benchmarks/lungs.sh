#!/usr/bin/env bash
# Lungs on real chest X-rays: pretrained against scratch, few labels, two stages for small chests, DICOM SEG. docs/RESULTS.md reports it.
#   benchmarks/lungs.sh ../shared/data/open runs/lungs [PRETRAINED_RUN]
# DATA holds *_manifest.csv (see its README); nothing of it is copied into the project. About half an hour on two CPU cores after the pretraining.
set -euo pipefail
data=$1 out=$2 pretrained=${3:-}
bin=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin
px=${PX:-96}
mkdir -p "$out/manifests"

# Sources define lungs differently, so one at a time: children (v7labs), adults as radiologists drew them (general_blockchain).
"$bin/python" - "$data" "$out/manifests" <<'PY'
import csv, sys
data, out = sys.argv[1:]
def subset(source, name, keep):
    with open(f"{data}/{source}_manifest.csv") as file:
        rows = [row for row in csv.DictReader(file) if keep(row)]
    with open(f"{out}/{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0]); writer.writeheader(); writer.writerows(rows)
subset("seg", "children", lambda r: "Kermany" in r["source"])
subset("seg", "adults", lambda r: r["mask_source"] == "general_blockchain")
PY

prepare() { [ -e "$out/$1/store.json" ] || "$bin/spcxr-train" prepare "$2" --root "$data" --out "$out/$1" --size-px $((px * 8 / 7)); }
prepare children "$out/manifests/children.csv"
prepare adults "$out/manifests/adults.csv"
if [ -z "$pretrained" ]; then
  prepare unlabeled "$data/unlabeled_manifest.csv"
  pretrained=$out/pretrain
  "$bin/spcxr-train" pretrain --data "$out/unlabeled" --out "$pretrained" --model vit_tiny --image-px "$px" --epochs "${EPOCHS:-30}" --batch-size 32
fi

segment() { "$bin/spcxr-train" segment --image-px "$px" --batch-size 16 --decoder unetr --base-channels 8 "$@"; }
evaluate() { [ -e "$out/$1/report.html" ] || "$bin/spcxr-train" evaluate "${@:2}" --out "$out/$1"; }
scratch="--init scratch --model vit_tiny"
for who in children adults; do
  segment --data "$out/$who" --init "$pretrained" --out "$out/$who-pretrained" --epochs 20
  segment --data "$out/$who" $scratch --out "$out/$who-scratch" --epochs 20
  evaluate "report-$who" "$out/$who-pretrained" --data "$out/$who" --against "$out/$who-scratch"
done

# Tiny Lungs' two stages: the lungs are found first, and segmented in their box alone.
segment --data "$out/children" --init "$pretrained" --crop-from "$out/children-pretrained" --out "$out/children-two-stages" --epochs 20
evaluate report-two-stages "$out/children-two-stages" --data "$out/children" --against "$out/children-pretrained"

# Use: real DICOM files, and drawn ones; each SEG is opened by dciodvfy where it is installed, and by pydicom.
[ -e "$out/phantoms/manifest.csv" ] || "$bin/python" -c "
import sys
from spcxr.data import phantom
phantom.write(sys.argv[1], phantom.Series(count=12), workers=2)" "$out/phantoms"
"$bin/spcxr" segment "$out/adults-pretrained" "$data/dicom" --out "$out/masks-dicom" --dicom-seg --uncertainty
"$bin/spcxr" segment "$out/children-pretrained" "$out/phantoms/dicom" --out "$out/masks-phantoms" --dicom-seg
for seg in "$out"/masks-*/dicom_seg/*.dcm "$out"/masks-*/dicom_seg/*/*.dcm; do
  [ -e "$seg" ] || continue
  "$bin/python" -c "
import sys, pydicom
found = pydicom.dcmread(sys.argv[1]); lungs = found.pixel_array
print(sys.argv[1], lungs.shape, f'{lungs.mean():.3f} of the pixels')" "$seg"
  if command -v dciodvfy > /dev/null; then ! dciodvfy "$seg" 2>&1 | grep ^Error; fi
done

# Few labels: three draws of 10 and of 25 children, the same number of steps for both starts, beside all labels.
curve=() flat=()
for labels in 10 25; do
  few="--data $out/children --labels $labels --seeds 3 --epochs $((1000 / labels))"
  segment $few --init "$pretrained" --out "$out/children-pretrained-$labels"
  segment $few $scratch --out "$out/children-scratch-$labels"
  curve+=("$out/children-pretrained-$labels") flat+=("$out/children-scratch-$labels")
done
join() { local IFS=,; echo "$*"; }
"$bin/python" "$(dirname "$0")/label_curve.py" "$out/curve.html" \
  "pretrained=$(join "${curve[@]}" "$out/children-pretrained")" "from scratch=$(join "${flat[@]}" "$out/children-scratch")"
