"""A small digital radiograph as a DICOM dataset, to be changed tag by tag."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from spcxr.data.study import read_study

CLASS_DX = "1.2.840.10008.5.1.4.1.1.1.1"


def dataset(pixels: np.ndarray, tags: dict[str, object]) -> FileDataset:
    """A 12-bit digital radiograph of the chest; ``tags`` change it, None removes one."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CLASS_DX, "1.2.3"
    made = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = CLASS_DX, "1.2.3", "DX"
    made.BodyPartExamined, made.PhotometricInterpretation = "CHEST", "MONOCHROME2"
    made.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        made.PlanarConfiguration = 0
    made.Rows, made.Columns = pixels.shape[:2]
    made.BitsAllocated = 8 * pixels.dtype.itemsize
    made.BitsStored = min(12, made.BitsAllocated)
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tags are wrong on purpose
        for name, value in tags.items():
            if value is None:
                delattr(made, name)
            else:
                setattr(made, name, value)
    return made


class Radiographs:
    """Makes, saves and reads them in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ramp = np.add.outer(np.arange(80) * 25, np.arange(70) * 16)
        self.gradient = ramp.astype(np.uint16)  # 0 .. 3079

    def make(self, pixels: np.ndarray | None = None, **tags: object) -> FileDataset:
        return dataset(self.gradient if pixels is None else pixels, tags)

    def save(self, made: FileDataset, name: str = "x.dcm") -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.save_as(self.folder / name, enforce_file_format=False)
        return self.folder / name

    def read(self, pixels: np.ndarray | None = None, **tags: object):
        return read_study(self.save(self.make(pixels, **tags)))


@pytest.fixture
def radiographs(tmp_path) -> Radiographs:
    return Radiographs(tmp_path)
