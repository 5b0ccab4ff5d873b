"""``model_card.md``: what a model is, what it was made from, what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LIMITS = """\
## Limits

Research software, not a medical device: not for diagnosis or treatment. It was trained on the
images above and on no others; on images of another hospital, device, age or projection it may fail
without a sign. The weights can hold traces of their training images; before giving them away, ask
whoever gave the images.
"""


def write_model_card(
    folder: Path, title: str, facts: Mapping[str, object], *, banner: str = ""
) -> Path:
    """Write the card: a table of ``facts`` (which must name no patients), then the limits.

    ``banner`` stands above all, in bold: what must not be overlooked.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     card = write_model_card(Path(place), "An encoder", {"images": 12})
    ...     print(card.read_text().splitlines()[4])
    | images | 12 |
    """
    rows = "".join(f"| {name} | {str(v).replace('|', '/')} |\n" for name, v in facts.items())
    file = folder / "model_card.md"
    draft = file.with_name(".model_card.md.writing")
    warning = f"**{banner}**\n\n" if banner else ""
    draft.write_text(f"# {title}\n\n{warning}| | |\n|---|---|\n{rows}\n{LIMITS}")
    draft.replace(file)
    return file
