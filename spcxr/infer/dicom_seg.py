"""A mask as DICOM SEG (PS3.3 A.51): BINARY, of one 2-D radiograph, without a frame of reference.

What is said of patient and study is copied from the source image, blank where it is blank there.
The pixel grid is the source's own (``Spatial Locations Preserved``), so its spacing is too: no
Pixel Measures are written, which would ask for a slice thickness that a projection has not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from spcxr import __version__
from spcxr.data.dicom import starts_like_dicom
from spcxr.data.study import Rejected, decoding
from spcxr.errors import SpcxrError

Code = tuple[str, str]
# SNOMED CT, as PS3.16 lists them: types in CID 7151, sides, which are modifiers, in CID 244.
LUNG, HEART = ("39607008", "Lung"), ("80891009", "Heart")
LEFT, RIGHT = ("7771000", "Left"), ("24028007", "Right")
CODES: dict[str, tuple[Code, Code | None]] = {
    "lung": (LUNG, None),
    "lungs": (LUNG, None),
    "left lung": (LUNG, LEFT),
    "right lung": (LUNG, RIGHT),
    "heart": (HEART, None),
}
CATEGORY = ("91723000", "Anatomical Structure")  # CID 7150
ALGORITHM, MAKER = "spcxr segment", "spcxr"
BLANK_IF_UNKNOWN = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate",
                    "StudyTime", "StudyID", "AccessionNumber", "PatientOrientation")  # fmt: skip
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
UTF8 = "ISO_IR 192"
DATES = ("PatientBirthDate", "StudyDate")
# PS3.3 C.7.1.1, C.7.6.1.1.1, C.7.6.1.1.5; PS3.5 6.2, TM and AS.
ALLOWED = {
    "PatientSex": re.compile("[MFO]"),
    "PatientAge": re.compile(r"\d{3}[DWMY]"),
    "PatientOrientation": re.compile(r"[LRAPHF]{1,3}\\[LRAPHF]{1,3}"),
    "StudyTime": re.compile(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?"),
    "LossyImageCompression": re.compile("00|01"),
}
SERIES_NUMBER = 7000  # ours: far above a study's own
INSTALL = "--dicom-seg needs highdicom; pip install 'spcxr[dicom-out]'"


def refuse_uncoded(structures: Iterable[str]) -> None:
    """Refuse structures that have no code here, and say where highdicom is not installed.

    Raises
    ------
    SpcxrError
        with the remedy.

    >>> refuse_uncoded(["left lung", "square"])
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: --dicom-seg: no code is known for 'square' (known: lung, ...); ...
    """
    for name in structures:
        if name.lower() not in CODES:
            raise SpcxrError(
                f"--dicom-seg: no code is known for {name!r} (known: {', '.join(CODES)}); "
                "leave out --dicom-seg"
            )
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise SpcxrError(INSTALL) from error


def read_source(path: str | Path) -> pydicom.Dataset:
    """The header of a DICOM file that a SEG can refer to.

    Raises
    ------
    Rejected
        no DICOM file, or one without the UIDs that a reference is made of.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(132)
    if not starts_like_dicom(head):
        raise Rejected(path, "it is no DICOM file, so a DICOM SEG has nothing to refer to")
    with decoding(path, "pydicom", "its DICOM header is damaged"):
        source = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        lacking = [name for name in NEEDED if not source.get(name)]
    if lacking:
        raise Rejected(path, f"it has no {lacking[0]}, so a DICOM SEG cannot refer to it")
    return source


def to_seg(
    path: str | Path,
    source: pydicom.Dataset,
    mask: NDArray[np.uint8],
    structures: tuple[str, ...],
    version: str,
) -> pydicom.Dataset:
    """The SEG of a mask, with a series and an instance UID of its own.

    A structure that is nowhere in the mask has a description and no frame.

    Parameters
    ----------
    path
        of the source, for messages.
    source
        its header (`read_source`); blank elements are added to it where it lacks them.
    mask
        ``(Rows, Columns)`` uint8 class numbers, 0 = background; not all of it.
    structures
        names of the classes from 1.
    version
        which model made it, for Algorithm Version.

    Raises
    ------
    Rejected
        a mask of another size, or a header that highdicom refuses.
    """
    from highdicom.seg import Segmentation, SegmentationTypeValues

    if mask.shape != (source.get("Rows"), source.get("Columns")):
        raise Rejected(path, "its mask is not of the size that its header says")
    with decoding(path, "highdicom", "its header does not do for a DICOM SEG"):
        _fill(source)
        seg = Segmentation(
            source_images=[source],
            pixel_array=mask[None],
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=_descriptions(structures, version),
            series_instance_uid=generate_uid(prefix=None),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(prefix=None),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=ALGORITHM,
            software_versions=__version__,
            device_serial_number="none",
            content_label="CXR_SEG",
            series_description=ALGORITHM,
        )
        for groups in seg.SharedFunctionalGroupsSequence:
            if "PixelMeasuresSequence" in groups:
                del groups.PixelMeasuresSequence
        seg.PatientOrientation = source.PatientOrientation
    return seg


def _fill(source: pydicom.Dataset) -> None:
    """Blank elements where the source has none: highdicom asks for them, and blank is unknown.

    Values that are none of DICOM's (old dates with dots, a sex of another letter) would make the
    SEG invalid, too, or highdicom refuse the file: they are not copied. Names become UTF-8.
    """
    if source.get("SpecificCharacterSet"):
        source.decode()  # highdicom takes not all of DICOM's repertoires
        source.SpecificCharacterSet = UTF8
    for name in BLANK_IF_UNKNOWN:
        if name not in source:
            setattr(source, name, "")
    odd = [name for name in DATES if not _is_date(_plain(source.get(name)))]
    odd += [name for name, kind in ALLOWED.items() if not kind.fullmatch(_plain(source.get(name)))]
    for name in odd:
        if name in BLANK_IF_UNKNOWN:
            setattr(source, name, "")
        elif name in source:
            delattr(source, name)


def _plain(value: Any) -> str:
    """A value as a file holds it, several joined by backslashes.

    >>> _plain(pydicom.multival.MultiValue(str, ["L", "F"])), _plain(None)
    ('L\\\\F', '')
    """
    several = value if isinstance(value, pydicom.multival.MultiValue) else [value]
    return "\\".join("" if one is None else str(one).strip() for one in several)


def _is_date(value: str) -> bool:
    """Whether it is a day as PS3.5 6.2 writes it (DA).

    >>> _is_date("20240229"), _is_date("2024.02.29"), _is_date("00000000"), _is_date("")
    (True, False, False, False)
    """
    try:
        return bool(re.fullmatch(r"\d{8}", value) and datetime.strptime(value, "%Y%m%d"))
    except ValueError:
        return False


def _descriptions(structures: tuple[str, ...], version: str) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept

    def coded(code: Code, scheme: str = "SCT") -> CodedConcept:
        return CodedConcept(code[0], scheme, code[1])

    algorithm = AlgorithmIdentificationSequence(
        name=ALGORITHM, family=coded(("123110", "Artificial Intelligence"), "DCM"), version=version
    )
    made = []
    for number, name in enumerate(structures, start=1):
        kind, side = CODES[name.lower()]
        one = SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=coded(CATEGORY),
            segmented_property_type=coded(kind),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        if side is not None:
            one.SegmentedPropertyTypeModifierCodeSequence = [coded(side)]
        made.append(one)
    return made
