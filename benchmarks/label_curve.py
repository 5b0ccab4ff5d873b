"""Draw the learning curve of finished runs: pretrained against from scratch, over labels.

    python benchmarks/label_curve.py OUT.html pretrained=RUN,RUN "from scratch=RUN,RUN"

Runs of ``--seeds`` count as one each seed. ``--metric macro_auroc`` for `classify`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spcxr.evaluate.provenance import provenance
from spcxr.evaluate.report import NOT_A_DEVICE, Report, write_report
from spcxr.recipes.learning_curve import learning_curve_section


def main() -> None:
    """Read the runs, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("series", nargs="+", help="NAME=RUN,RUN,...")
    parser.add_argument("--metric", default="dice")
    given = parser.parse_args()
    series = {
        name: runs.split(",") for name, _, runs in (one.partition("=") for one in given.series)
    }
    report = Report(
        title="Learning curve",
        summary=f"{', '.join(series)}: the same test rows, more and fewer labels.",
        sections=[learning_curve_section(series, given.metric)],
        provenance=provenance({"runs": ", ".join(given.series)}),
        limitations=[NOT_A_DEVICE],
    )
    print(write_report(given.out, report))


if __name__ == "__main__":
    main()
