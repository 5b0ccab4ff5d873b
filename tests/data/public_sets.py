"""Public sets in tiny: their own headers and layouts, images empty until `draw` fills them."""

import gzip
import io

import numpy as np
from PIL import Image

from spcxr.data.sources.chexpert import FINDINGS


def touch(root, *names, text=""):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


NIH_2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NIH_ROWS = [
    "00000001_000.png,Cardiomegaly|Emphysema,0,1,{57},M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,1,1,{58},M,AP,2894,2729,0.143,0.143",
    "00000002_000.png,Hernia,0,2,{81},F,PA,2500,2048,0.168,0.168",
    "00000003_000.png,Mass,0,3,{75},F,PA,2048,2500,0.168,0.168",
]


def nih(root, year=2020):
    """2020: plain ages. 2017: ages as 057Y, and a comma after the last column's name and cell."""
    end = "" if year == 2020 else ","
    rows = [r.replace("{", "").replace("}", "") for r in NIH_ROWS]
    if year == 2017:
        rows = [r.replace("{", "0").replace("}", "Y") for r in NIH_ROWS]
    name = "Data_Entry_2017_v2020.csv" if year == 2020 else "Data_Entry_2017.csv"
    touch(root, name, text="\n".join(line + end for line in [NIH_2020, *rows]) + "\n")
    names = [row.split(",")[0] for row in NIH_ROWS]
    touch(root, f"images_001/images/{names[0]}", f"images_001/images/{names[1]}")
    touch(root, f"images_002/images/{names[2]}")  # the fourth archive was never downloaded
    return root


def covid(root):
    header = (
        "patientid,offset,sex,age,finding,RT_PCR_positive,survival,view,modality,date,location,"
        "folder,filename,doi"
    )
    rows = [
        "2,0,M,65,Pneumonia/Viral/COVID-19,Y,Y,PA,X-ray,2020,x,images,a.jpg,",
        "2,3,M,65,Pneumonia/Viral/COVID-19,Y,Y,L,X-ray,2020,x,images,a-lateral.jpg,",
        '4,0,F,,No Finding,,,AP Supine,X-ray,2020,"Wuhan, China",images,b.png,',
        "5,0,F,40,todo,,,AP,X-ray,2020,x,images,c.jpeg,",
        "6,0,F,40,Pneumonia,,,Axial,CT,2020,x,volumes,d.nii.gz,",
        "7,0,F,40,Tuberculosis,,,PA,X-ray,2020,x,images,never-downloaded.jpg,",
    ]
    touch(root, "metadata.csv", text="\n".join([header, *rows]) + "\n")
    touch(root, *(f"images/{n}" for n in ("a.jpg", "a-lateral.jpg", "b.png", "c.jpeg")))
    return root


def montgomery(root):
    for stem in ("MCUCXR_0001_0", "MCUCXR_0104_1"):
        touch(root, f"CXR_png/{stem}.png")
        touch(root, f"ManualMask/leftMask/{stem}.png", f"ManualMask/rightMask/{stem}.png")
    touch(root, "CXR_png/Thumbs.db", "NLM-MontgomeryCXRSet-ReadMe.pdf")
    reading = "Patient's Sex: F\nPatient's Age: 027Y\nnormal\n"
    touch(root, "ClinicalReadings/MCUCXR_0001_0.txt", text=reading)
    return root


def shenzhen(root):
    touch(root, "CXR_png/CHNCXR_0001_0.png", "CXR_png/CHNCXR_0327_1.png")
    touch(root, "mask/CHNCXR_0327_1_mask.png")
    touch(root, "ClinicalReadings/CHNCXR_0001_0.txt", text="male 45yrs\nnormal")
    touch(root, "ClinicalReadings/CHNCXR_0327_1.txt", text="Female, 30 yrs\nPTB in the right")
    return root


CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(FINDINGS)
CHEXPERT_TRAIN = [
    "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,"
    "1.0,,,,,,,,,0.0,,,,1.0",
    "CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg,Male,87,Frontal,PA,"
    ",,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,",
    "CheXpert-v1.0-small/train/patient00002/study2/view2_lateral.jpg,Male,87,Lateral,,"
    ",,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,",
    "CheXpert-v1.0-small/train/patient00003/study1/view1_frontal.jpg,Unknown,0,Frontal,AP,"
    ",,,,,1.0,,,,,,,,",
]
CHEXPERT_VALID = [
    "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,"
    "0.0,1.0,1.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
]


def chexpert(root):
    """As unpacked: the tables and the folders train and valid; one image never came down."""
    touch(root, "train.csv", text="\n".join([CHEXPERT, *CHEXPERT_TRAIN]) + "\n")
    touch(root, "valid.csv", text="\n".join([CHEXPERT, *CHEXPERT_VALID]) + "\n")
    for row in [*CHEXPERT_TRAIN[:3], *CHEXPERT_VALID]:
        touch(root, row.split(",")[0].partition("/")[2])
    return root


MIMIC = [  # dicom, subject, study, view, split
    ("02aa804e-bde0afdd", "10000032", "50414267", "PA", "train"),
    ("174413ec-4ec4c1f7", "10000032", "50414267", "LATERAL", "train"),
    ("2a2277a9-b0ded155", "10000764", "57375967", "AP", "validate"),
    ("e084de3b-be89b11e", "10001217", "58913004", "LL", "test"),
    ("ffffffff-00000000", "10002000", "50000000", "PA", "train"),  # not on disk
]


def mimic(root):
    names = "No Finding", "Pneumonia", "Edema"
    order = sorted(FINDINGS)
    studies = {"50414267": {"No Finding": "1.0"}, "57375967": {"Pneumonia": "-1.0", "Edema": "0.0"}}
    assert set(names) <= set(order)
    labels = ["subject_id,study_id," + ",".join(order)] + [
        f"1{study[1:]},{study}," + ",".join(said.get(name, "") for name in order)
        for study, said in studies.items()
    ]
    views = [
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
        "StudyDate,StudyTime"
    ] + [f'{d},{p},{s},"CHEST (PA, LAT)",{v},3056,2544,21800506,2.1' for d, p, s, v, _ in MIMIC]
    splits = ["dicom_id,study_id,subject_id,split"]
    splits += [f"{d},{s},{p},{split}" for d, p, s, _, split in MIMIC]
    for name, lines in {"chexpert": labels, "metadata": views, "split": splits}.items():
        packed = gzip.compress("\n".join([*lines, ""]).encode())
        root.mkdir(exist_ok=True)
        (root / f"mimic-cxr-2.0.0-{name}.csv.gz").write_bytes(packed)
    for image, subject, study, _, _ in MIMIC[:4]:
        touch(root, f"files/p{subject[:2]}/p{subject}/s{study}/{image}.jpg")
    return root


RSNA = ["0004cfab", "00436515", "000db696", "not-here"]


def rsna(root, classes=True):
    boxes = ["0004cfab,,,,,0", "00436515,264.0,152.0,213.0,379.0,1"]
    boxes += ["00436515,562.0,152.0,256.0,453.0,1", "000db696,,,,,0", "not-here,,,,,0"]
    text = "\n".join(["patientId,x,y,width,height,Target", *boxes, ""])
    touch(root, "stage_2_train_labels.csv", text=text)
    said = ["No Lung Opacity / Not Normal", "Lung Opacity", "Normal", "Normal"]
    rows = [f"{image},{name}" for image, name in zip(RSNA, said, strict=True)]
    if classes:
        text = "\n".join(["patientId,class", rows[1], *rows, ""])  # one line a box, as the set has
        touch(root, "stage_2_detailed_class_info.csv", text=text)
    touch(root, *(f"stage_2_train_images/{image}.dcm" for image in RSNA[:3]))
    return root


SIIM = ["1.2.276.1", "1.2.276.2", "1.2.276.3"]


def siim(root):
    """Two masks of the first image, none of the second; the third is not on disk."""
    rows = [f"{SIIM[0]}, 1025 3 1021 2", f"{SIIM[0]}, 0 1", f"{SIIM[1]}, -1", f"{SIIM[2]}, 5 5"]
    touch(root, "train-rle.csv", text="\n".join(["ImageId, EncodedPixels", *rows, ""]))
    for image in SIIM[:2]:
        touch(root, f"dicom-images-train/{image}/{image}.9/{image}.dcm")
    return root


VINDR = [
    "50a418190bc3fb1ef1633bf9678929b3,No finding,14,R11,,,,",
    "50a418190bc3fb1ef1633bf9678929b3,No finding,14,R7,,,,",
    "50a418190bc3fb1ef1633bf9678929b3,No finding,14,R10,,,,",
    "9a5094b2563a1ef3ff50dc5c7ff71345,Cardiomegaly,3,R10,691,1375,1653,1831",
    "9a5094b2563a1ef3ff50dc5c7ff71345,Aortic enlargement,0,R10,1052,715,1299,966",
    "9a5094b2563a1ef3ff50dc5c7ff71345,Cardiomegaly,3,R8,700,1370,1650,1830",
    "9a5094b2563a1ef3ff50dc5c7ff71345,Cardiomegaly,3,R8,710,1370,1650,1830",
    "9a5094b2563a1ef3ff50dc5c7ff71345,No finding,14,R9,,,,",
    "never-unpacked,No finding,14,R1,,,,",
]


def vindr(root):
    """Kaggle's: one table of boxes, each by a radiologist."""
    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
    touch(root, "train.csv", text="\n".join([header, *VINDR, ""]))
    touch(root, *(f"train/{row.split(',')[0]}.dicom" for row in VINDR[:4]))
    return root


COVIDX = [
    "3 SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.jpeg pneumonia cohen",
    "COVID-00001 COVID-00001.jpg COVID-19 fig1",
    "003d8fa0-6bf1-40ed-b54c-ac657f8495c5 003d8fa0-6bf1-40ed-b54c-ac657f8495c5.png normal rsna",
]
UUID = "47c78742-4998-4878-aec4-37b11b1354ac"
COVIDX_TEST = ["419639-003251 MIDRC-RICORD-1C-419639-003251-46647-0.png COVID-19 ricord"]


def covidx(root):
    touch(root, "labels/train_COVIDx9A.txt", text="\n".join(COVIDX) + "\n")
    touch(root, "labels/test_COVIDx9A.txt", text="\n".join(COVIDX_TEST) + "\n")
    for folder, rows in (("train", COVIDX[:2]), ("test", COVIDX_TEST)):
        touch(root, *(f"{folder}/{row.split()[1]}" for row in rows))
    return root


def film(value=0):
    """A raw JSRT film: white (0) above, black (4095) below; its first pixel is ``value``."""
    made = np.repeat(np.linspace(0, 4095, 2048).astype(">u2"), 2048)
    made[0] = value
    return made.tobytes()


def jsrt(root):
    for name in ("JPCLN001", "JPCLN002", "JPCNN001"):
        touch(root, f"All247images/{name}.IMG")
        (root / f"All247images/{name}.IMG").write_bytes(film())
    cells = ["JPCLN001.IMG", "5", "15", "53", "male", "1634", "692", "malignant", "l.upper lobe"]
    other = ["JPCLN002.IMG", "5", "30", "?", "female", "1614", "1090", "benign", "l.upper lobe"]
    text = "\t".join(cells) + "\r" + "\t".join(other) + "\r"  # as the set has it: CR alone
    touch(root, "Clinical_Information/CLNDAT_EN.txt", text=text)
    touch(root, "Clinical_Information/CNNDAT_EN.TXT", text="JPCNN001.IMG  55  female  non-nodule\r")
    for side, left in (("left", 600), ("right", 200)):
        mask = np.zeros((1024, 1024), np.uint8)
        mask[300:700, left : left + 200] = 255
        touch(root, f"scratch/fold1/masks/{side} lung/JPCNN001.gif")
        Image.fromarray(mask).save(root / f"scratch/fold1/masks/{side} lung/JPCNN001.gif")
    return root


MAKERS = {
    "nih": nih,
    "chexpert": chexpert,
    "mimic": mimic,
    "rsna": rsna,
    "siim": siim,
    "vindr": vindr,
    "covidx": covidx,
    "covid-chestxray": covid,
    "montgomery": montgomery,
    "shenzhen": shenzhen,
    "jsrt": jsrt,
}


def draw(root, dicom, side=64):
    """Fill every empty image below ``root``: a ramp, as DICOM (``dicom(pixels, file)``) or PNG."""
    ramp = np.add.outer(np.arange(side), np.arange(side)).astype(np.uint16) * 4000 // (2 * side)
    for file in sorted(root.rglob("*")):
        if not file.is_file() or file.stat().st_size:
            continue
        if file.suffix in (".dcm", ".dicom"):
            dicom(ramp, file)
        elif file.suffix in (".png", ".jpg", ".jpeg"):
            buffer = io.BytesIO()
            kind = "PNG" if file.suffix == ".png" else "JPEG"
            Image.fromarray((ramp // 16).astype(np.uint8)).save(buffer, kind)
            file.write_bytes(buffer.getvalue())
