"""The numbers of one drawn patient and of one drawn exposure, in body units (see phantom_canvas).

Proportions follow what radiology textbooks give for a frontal chest radiograph: cardiothoracic
ratio 0.42 to 0.52 (adult) and up to 0.6 (infant), right dome half an interspace above the left,
nine to ten posterior ribs above the right dome at full inspiration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Anatomy:
    """One patient. Lengths are in body units (half the thorax' width), ``unit_mm`` long each."""

    age: float
    sex: str
    unit_mm: float
    child: bool
    dome_y: float  # the right dome of the diaphragm at full inspiration
    depth: float  # half the thorax' inner front-to-back size
    wall: float  # soft tissue outside the ribs
    flare: float  # how much the thorax widens downwards
    heart: float  # cardiothoracic ratio
    heart_tilt: float  # radians from the horizontal
    aorta: float  # radius of the aortic knob
    thymus: float  # 0 none
    breast: float  # 0 none
    rib_drop: float  # how far a rib falls from the spine to its front end
    rib_pitch: float  # distance of neighbouring ribs at the spine
    rib_height: float  # half a rib's height
    cortex: float  # thickness of cortical bone
    scoliosis: float  # sideways bend of the spine


@dataclass(frozen=True)
class Pose:
    """How the patient stood before the detector, for one image."""

    view: str  # PA or AP
    angle: float  # radians in the image plane
    turn: float  # radians about the long axis
    zoom: float  # width of the image in body units
    shift: tuple[float, float]
    raised: float  # how far the diaphragm stands above full inspiration
    shoulders: float  # height of the shoulders; 0 relaxed, negative raised
    chin: float  # y of the chin's lower edge


def draw_anatomy(rng: np.random.Generator, child: bool) -> Anatomy:
    """A patient from one generator: an adult of 18 to 88 years or a child of 1 to 11."""
    u = rng.uniform
    sex = "F" if u() < 0.5 else "M"
    adult = Anatomy(
        age=float(rng.integers(18, 89)),
        sex=sex,
        unit_mm=u(132, 150) - (10 if sex == "F" else 0),
        child=False,
        dome_y=u(1.48, 1.78),
        depth=u(0.56, 0.68),
        wall=float(np.clip(rng.gamma(6, 0.022), 0.06, 0.3)),
        flare=u(-0.02, 0.05),
        heart=u(0.41, 0.53),
        heart_tilt=u(0.5, 0.85),
        aorta=u(0.09, 0.125),
        thymus=0.0,
        breast=u(0.02, 0.1) if sex == "F" else u(0, 0.025),
        rib_drop=u(0.56, 0.78),
        rib_pitch=u(0.158, 0.172),
        rib_height=u(0.042, 0.05),
        cortex=u(0.0075, 0.0105),
        scoliosis=rng.normal(0, 0.015),
    )
    if not child:
        knob = adult.aorta + 0.0005 * max(adult.age - 50, 0)  # the aorta unfolds with age
        return replace(adult, aorta=knob, rib_drop=adult.rib_drop + 0.001 * (adult.age - 45))
    age = float(rng.integers(1, 12))
    return replace(
        adult,
        age=age,
        unit_mm=66 + 4.2 * age + u(-3, 3),
        child=True,
        dome_y=u(1.28, 1.42) + 0.016 * age,
        depth=u(0.68, 0.78) - 0.008 * age,
        wall=u(0.07, 0.14),
        flare=u(0.03, 0.09),
        heart=u(0.5, 0.6) - 0.005 * age,
        heart_tilt=u(0.4, 0.65),
        aorta=u(0.07, 0.09),
        thymus=u(0.0, 0.11) if age < 5 else 0.0,
        breast=0.0,
        rib_drop=u(0.36, 0.5),
        rib_pitch=u(0.142, 0.152) + 0.0012 * age,
        rib_height=u(0.04, 0.046),
        cortex=u(0.0075, 0.01),
    )


def draw_pose(rng: np.random.Generator, anatomy: Anatomy) -> Pose:
    """How one image is taken: children and the frail lie (AP), breathe in less and turn more."""
    u = rng.uniform
    frail = 0.75 if anatomy.child else 0.15 + 0.004 * max(anatomy.age - 40, 0)
    supine = bool(u() < frail)
    return Pose(
        view="AP" if supine else "PA",
        angle=rng.normal(0, 0.028 if supine else 0.014),
        turn=rng.normal(0, 0.06 if supine else 0.035),
        zoom=(u(2.42, 2.75) if not anatomy.child else u(2.5, 3.0)),
        shift=(rng.normal(0, 0.04), rng.normal(0, 0.045)),
        raised=u(0.02, 0.2) if supine else u(0, 0.1),
        shoulders=u(-0.45, -0.08) if anatomy.child else u(-0.1, 0.05),
        chin=u(-0.62, -0.38) if anatomy.child else u(-0.85, -0.5),
    )
