"""Results -> the tables and plots of docs/EVIDENCE.md.

Only what stands between ``<!-- row NAME -->`` and ``<!-- end NAME -->`` is written; the findings
around it are a person's, and kept. A row that has no place yet is added at the end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "EVIDENCE.md"
COLOURS = ("#0a84c6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000",
           "#8c564b", "#bcbd22", "#9467bd", "#17becf", "#d62728")  # fmt: skip
FEW = 10  # patients: fewer than these bear no interval and no p
TITLES = {
    "macro_auroc": "mean AUROC",
    "balanced_accuracy": "balanced accuracy",
    "balanced_accuracy_settled": "the same, threshold of validation rows",
    "accuracy": "accuracy",
    "macro_average_precision": "mean average precision",
    "dice": "Dice",
    "iou": "IoU",
    "hd95_px": "HD95, pixels of 128 x 128",
    "fall": "fall of mean AUROC, corrupted",
}
CHECKS = "checks"
Facts = Mapping[str, Any]


def write_document(results: Path, document: Path) -> Path:
    """Write the block of every ``RESULTS/ROW.json``, by the rows' order, and their pictures."""
    rows = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    checks = rows.pop(CHECKS, None)
    text = document.read_text() if document.is_file() else "# Evidence on real chest X-rays\n"
    if checks:
        text = put_block(text, CHECKS, "\n".join(check_lines(checks)))
    for row in sorted(rows.values(), key=lambda facts: facts["order"]):
        picture = document.parent / "images" / f"evidence-{row['name']}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(row, picture)
        text = put_block(text, row["name"], "\n".join(row_lines(row, picture.name)))
    document.write_text(text)
    return document


def put_block(text: str, name: str, block: str) -> str:
    r"""Replace what stands between the marks of a name, or add it at the end.

    >>> put_block("a\n<!-- row x -->\nold\n<!-- end x -->\nb\n", "x", "new")
    'a\n<!-- row x -->\nnew\n<!-- end x -->\nb\n'
    """
    first, last = f"<!-- row {name} -->", f"<!-- end {name} -->"
    whole = f"{first}\n{block}\n{last}"
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: whole, text)
    return f"{text.rstrip()}\n\n{whole}\n"


def check_lines(checks: Facts) -> Iterator[str]:
    """What the checks of the manifests found, and how many images and patients there are."""
    pairs = checks["near_duplicates"]
    yield f"Near-duplicates of held images among training images: {len(pairs)} pairs. The patients"
    yield "of these training images are left out of every training set:"
    yield ""
    for pair in pairs:
        yield f"- `{pair['held']}` and `{pair['train']}` (correlation {pair['correlation']:.2f})"
    yield ""
    yield "| store | training | val | test, drift | left out |"
    yield "|---|---|---|---|---|"
    for name, found in checks["stores"].items():
        train = "; ".join(f"{split} {said}" for split, said in found.items()
                          if split not in ("val", "test", "drift", "left_out"))  # fmt: skip
        held = "; ".join(found[split] for split in ("test", "drift") if split in found)
        yield f"| {name} | {train} | {found.get('val', '')} | {held} | {found['left_out']} |"


def row_lines(row: Facts, picture: str) -> Iterator[str]:
    """The heading, the circumstances, a table a metric, the plot."""
    yield f"## {row['title']}"
    yield ""
    yield from circumstances(row)
    if "curves" in row:
        yield from _ends_of_curves(row["curves"])
    if row.get("levels"):
        yield ""
        yield from table(row)
    yield ""
    yield f"![{row['title']}](images/{picture})"


def circumstances(row: Facts) -> Iterator[str]:
    """Command, commit, device, seconds, rates."""
    runs = list(row["runs"].values())
    said = {name: Counter(run[name] for run in runs) for name in ("command", "commit", "device")}
    seconds = sum(run["seconds"] for run in runs)
    yield (
        "; ".join(
            f"{name} {' and '.join(f'`{value}`' for value in values)}"
            for name, values in said.items()
        )
        + f"; {len(runs)} commands, {seconds / 60:.0f} minutes; settings "
        f"`benchmarks/evidence/rows/{row['name']}.yaml`."
    )
    rates = row.get("rates", {})
    if rates.get("tried"):
        each = [
            f"{arm} {rates['chosen'][arm]:g} (of "
            + ", ".join(f"{rate}: {value:.3f}" for rate, value in tried.items())
            + ")"
            for arm, tried in rates["tried"].items()
        ]
        yield "Peak rates, chosen by the validation rows of a seed that is not reported: "
        yield f"{'; '.join(each)}."
    if row.get("small"):
        yield "Written by `make evidence-small`: fewer levels and seeds."


def _ends_of_curves(curves: Facts) -> Iterator[str]:
    for arm, points in curves.items():
        yield f"Training loss of {arm}: {points[0][1]:.3f} in the first epoch, " \
            f"{points[-1][1]:.3f} in the last of {len(points)}."  # fmt: skip


def table(row: Facts) -> Iterator[str]:
    """A line for each arm of a level and each difference, a column for each metric."""
    metrics = [metric for metric in row["metrics"] if of_metric(row, metric)]
    yield f"| labels | arm | {' | '.join(TITLES[metric] for metric in metrics)} |"
    yield "|---" * (len(metrics) + 2) + "|"
    for level in ordered(row["levels"]):
        found = row["levels"][level]
        names = list(dict.fromkeys(name for metric in metrics for name in found.get(metric, ())))
        shown = level
        for name in [*(n for n in names if not is_gap(n)), *(n for n in names if is_gap(n))]:
            cells = [_cell(found.get(metric, {}), name) for metric in metrics]
            label = f"**{name}**" if is_gap(name) else name
            yield f"| {shown} | {label} | {' | '.join(cells)} |"
            shown = ""
    yield ""
    some = any(few(of) for found in row["levels"].values() for of in found.values())
    short = f" Under {FEW} patients: no interval." if some else ""
    whose = "; ".join(counts(row))
    yield f"*Seeds averaged (95 % interval over patients) [seeds]. {whose}.{short}*"


def is_gap(name: str) -> bool:
    """Whether it is a difference of two arms."""
    return " - " in name


def counts(row: Facts) -> list[str]:
    """Whose images the levels were measured on: each said once."""
    firsts = [next(iter(next(iter(found.values())).values())) for found in row["levels"].values()]
    held = "validation " if row.get("split") == "val" else ""
    return list(
        dict.fromkeys(f"{f['n_images']} {held}images, {f['n_patients']} patients" for f in firsts)
    )


def of_metric(row: Facts, metric: str) -> dict[str, Facts]:
    """The levels where a metric was measured."""
    return {level: found[metric] for level, found in row["levels"].items() if metric in found}


def ordered(levels: Mapping[str, Any]) -> list[str]:
    """By their number; ``all`` last.

    >>> ordered({"25 %": 0, "all": 0, "5": 0})
    ['5', '25 %', 'all']
    """
    return sorted(levels, key=_number)


def _number(level: str) -> float:
    found = re.match(r"[\d.]+", level)
    return float(found.group()) if found else float("inf")


def few(arms: Facts) -> bool:
    """Whether the arms of a level were measured on too few patients for an interval.

    >>> few({"a": {"n_patients": 4}, "a - b": {"value": 0.1}})
    True
    """
    return any(facts.get("n_patients", FEW) < FEW for facts in arms.values())


def _cell(arms: Facts, name: str) -> str:
    if name not in arms:
        return ""
    facts, bare = arms[name], few(arms)
    text = f"{facts['value']:z.3f}"
    if not bare:
        text += f" ({facts['low']:z.3f} to {facts['high']:z.3f})"
    if is_gap(name):
        return f"**{text}**" if bare else f"**{text}**, p {facts['p']:.3f}"
    seeds = facts["seeds"]
    return text if len(seeds) == 1 else f"{text} [{min(seeds):.3f} to {max(seeds):.3f}]"


def draw(row: Facts, file: Path) -> None:
    """Arms over levels with their intervals and seeds; of pretraining the loss over epochs."""
    metrics = row["metrics"][:2] or ["loss"]
    figure = Figure(figsize=(4.6 * len(metrics), 3.4), layout="constrained", dpi=90)
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        if "curves" in row:
            _draw_curves(axes, row["curves"])
        else:
            _draw_levels(axes, of_metric(row, metric))
            axes.set_ylabel(TITLES[metric])
        axes.grid(alpha=0.2)
    shown = {}
    for axes in figure.axes:
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, fontsize=8,
                  frameon=False)  # fmt: skip
    figure.savefig(file, metadata={"Software": None})


def _draw_curves(axes: Any, curves: Facts) -> None:
    for k, (arm, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), label=arm, color=COLOURS[k])
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")


def _draw_levels(axes: Any, levels: Facts) -> None:
    names = ordered(levels)
    arms = list(dict.fromkeys(a for name in names for a in levels[name] if not is_gap(a)))
    for k, arm in enumerate(arms):
        colour = COLOURS[k]
        places = [i for i, name in enumerate(names) if arm in levels[name]]
        found = [levels[names[i]][arm] for i in places]
        x = [i + 0.08 * (k - (len(arms) - 1) / 2) for i in places]
        y = [facts["value"] for facts in found]
        bare = few({arm: found[0]})
        ends = None if bare else [
            [max(facts["value"] - facts["low"], 0) for facts in found],
            [max(facts["high"] - facts["value"], 0) for facts in found],
        ]  # fmt: skip
        axes.errorbar(x, y, ends, fmt="o-", color=colour, label=arm, capsize=2, markersize=4)
        for place, facts in zip(x, found, strict=True):
            axes.plot([place] * len(facts["seeds"]), facts["seeds"], "_", color=colour, alpha=0.5)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("labels")
