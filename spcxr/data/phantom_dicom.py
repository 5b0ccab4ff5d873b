"""Phantoms as DICOM files: DX and CR images that say in every place a reader looks that they are
drawings (PatientName, PatientID, SeriesDescription, ImageComments, StudyDescription)."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from spcxr.data.phantom_detector import BITS, SITES, WHITE
from spcxr.data.phantom_draw import Phantom

NOTICE = "spcxr phantom: drawn, not a patient"
SYNTAXES = {
    "none": ExplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg2000": JPEG2000Lossless,
}


def uid_of(text: str) -> UID:
    """A UID made from a text: the same text, the same UID (2.25. and a name-based UUID, PS3.5 B.2).

    >>> uid_of("a") == uid_of("a"), uid_of("a") == uid_of("b"), uid_of("a").is_valid
    (True, False, True)
    """
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'spcxr phantom {text}').int}")


def to_dataset(phantom: Phantom, name: str) -> Dataset:
    """The DX (PS3.3 A.26) or CR (A.2) image of a phantom; ``name`` tells it from others.

    Site-b stores MONOCHROME1, ``4095 - pixels``. Sixteen bits are allocated and twelve stored.

    >>> from spcxr.data.phantom_draw import draw
    >>> data = to_dataset(draw(0, size_px=64), "0")
    >>> data.Modality, data.PhotometricInterpretation, str(data.PatientName)
    ('DX', 'MONOCHROME2', 'PHANTOM^00000')
    """
    site = SITES[phantom.site]
    data = Dataset()
    _describe_patient(data, phantom, name)
    if site.modality == "DX":
        data.SOPClassUID = DigitalXRayImageStorageForPresentation
        _describe_dx(data, phantom)
    else:
        data.SOPClassUID = ComputedRadiographyImageStorage
        data.CassetteOrientation = "PORTRAIT"
        data.ImagerPixelSpacing = [f"{mm:.6f}" for mm in phantom.spacing_mm]
    _describe_pixels(data, phantom)
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return data


def save(data: Dataset, path: Path, compression: str = "none") -> None:
    """Write a dataset as a DICOM file; ``compression`` is a key of `SYNTAXES`, all lossless.

    >>> sorted(SYNTAXES)
    ['deflated', 'jpeg2000', 'none', 'rle']
    """
    syntax = SYNTAXES[compression]
    if compression in ("rle", "jpeg2000"):
        # The instance UID stays: the pixels are the same, bit for bit.
        data.compress(syntax, generate_instance_uid=False)
    else:
        data.file_meta.TransferSyntaxUID = syntax
    dcmwrite(path, data, enforce_file_format=True)


def _describe_patient(data: Dataset, phantom: Phantom, name: str) -> None:
    """Patient, study, series, equipment: drawn, and dated nowhere."""
    data.PatientName = f"PHANTOM^{phantom.patient_id.rsplit('-', 1)[-1]}"
    data.PatientID = phantom.patient_id
    data.PatientBirthDate = ""
    data.PatientSex = phantom.sex
    data.PatientAge = f"{phantom.age:03.0f}Y"
    data.PatientComments = NOTICE
    # The pixels count: the same image drawn larger is another image and needs another UID.
    key = f"{phantom.patient_id}/{name}/{hashlib.sha256(phantom.pixels.tobytes()).hexdigest()}"
    data.StudyInstanceUID = uid_of(f"study {key}")
    data.SeriesInstanceUID = uid_of(f"series {key}")
    data.SOPInstanceUID = uid_of(f"image {key}")
    data.StudyDate = data.StudyTime = data.AccessionNumber = data.StudyID = ""
    data.ReferringPhysicianName = ""
    data.StudyDescription = data.SeriesDescription = data.ImageComments = NOTICE
    data.Modality = SITES[phantom.site].modality
    data.SeriesNumber = data.InstanceNumber = 1
    data.Manufacturer = "spcxr"
    data.ManufacturerModelName = "phantom"
    data.InstitutionName = phantom.site
    data.BodyPartExamined = "CHEST"
    data.ViewPosition = phantom.view
    data.PatientOrientation = ["L", "F"]
    data.ImageType = ["DERIVED", "PRIMARY"]
    data.DerivationDescription = NOTICE
    data.BurnedInAnnotation = "NO"  # a side marker names nobody


def _describe_dx(data: Dataset, phantom: Phantom) -> None:
    """What the DX modules ask for beyond CR."""
    data.PresentationIntentType = "FOR PRESENTATION"
    data.ImageLaterality = "U"
    data.AnatomicRegionSequence = Sequence([_code("816094009", "SCT", "Chest")])
    view = {
        "PA": _code("272479007", "SCT", "postero-anterior"),
        "AP": _code("399348003", "SCT", "antero-posterior"),
    }
    data.ViewCodeSequence = Sequence([view[phantom.view]])
    data.ViewCodeSequence[0].ViewModifierCodeSequence = Sequence([])
    data.AcquisitionContextSequence = Sequence([])
    data.DetectorType = "SCINTILLATOR"
    data.ImagerPixelSpacing = [f"{mm:.6f}" for mm in phantom.spacing_mm]
    data.PixelIntensityRelationship = "LOG"
    data.PixelIntensityRelationshipSign = 1
    data.LossyImageCompression = "00"
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = "0", "1", "US"
    data.PresentationLUTShape = "IDENTITY"


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _describe_pixels(data: Dataset, phantom: Phantom) -> None:
    """Image pixel module (PS3.3 C.7.6.3) and the window that shows the whole range."""
    inverted = SITES[phantom.site].inverted
    stored = WHITE - phantom.pixels if inverted else phantom.pixels
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, BITS, BITS - 1
    data.PixelRepresentation = 0
    data.PixelSpacing = [f"{mm:.6f}" for mm in phantom.spacing_mm]
    low, high = np.percentile(stored, (0.5, 99.5))
    data.WindowCenter = f"{(low + high) / 2:.0f}"
    data.WindowWidth = f"{max(high - low, 2):.0f}"
    data.PixelData = stored.astype("<u2").tobytes()
    data["PixelData"].VR = "OW"
