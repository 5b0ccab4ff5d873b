"""Identifiers out of a DICOM header, for tables whose user asked for them, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pydicom

from spcxr.data.dicom import starts_like_dicom
from spcxr.data.study import decoding
from spcxr.infer.result_table import Row

IDS = ("PatientID", "StudyInstanceUID", "SOPInstanceUID")


def header_ids(path: str | Path) -> Row:
    """`IDS` of a DICOM file (PS3.3 C.7.1.1, C.7.2.1, C.12.1); nothing of another file.

    Raises
    ------
    Rejected
        a header that cannot be read.

    >>> from pydicom.data import get_testdata_file
    >>> header_ids(get_testdata_file("CT_small.dcm"))["PatientID"]
    '1CT1'
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(132)
    if not starts_like_dicom(head):
        return {}
    with decoding(path, "pydicom", "its DICOM header is damaged"):
        source = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(IDS))
        return {name: str(source.get(name) or "") for name in IDS}
