"""``model_card.md``: what a model is, what it was made from, what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PURPOSE = (
    "Research on chest X-rays: comparing methods, pretraining, and measuring on images of your own."
)
NOT_FOR = "Research software, not a medical device: not for diagnosis or treatment."
LIMITS = (
    "It was trained on the images above and on no others; on images of another hospital, device, "
    "age or projection it may fail without a sign."
)
LICENCES = (
    "The code is under Apache-2.0. The images keep their own licences, and the weights can hold "
    "traces of them; before giving the weights away, ask whoever gave the images."
)
# What every card says, by heading: `model_card.md` and the report's card alike.
STATEMENTS = {
    "Intended use": PURPOSE,
    "Not for": NOT_FOR,
    "Limits": LIMITS,
    "Licences": LICENCES,
}


def write_model_card(
    folder: Path, title: str, facts: Mapping[str, object], *, banner: str = ""
) -> Path:
    """Write the card: a table of ``facts`` (which must name no patients), then `STATEMENTS`.

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
    said = "".join(f"\n## {heading}\n\n{text}\n" for heading, text in STATEMENTS.items())
    draft.write_text(f"# {title}\n\n{warning}| | |\n|---|---|\n{rows}{said}")
    draft.replace(file)
    return file
