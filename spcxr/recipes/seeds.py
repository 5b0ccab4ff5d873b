"""One training several times over, with other seeds: how much of a figure is luck."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spcxr.config import to_dict
from spcxr.errors import Interrupted
from spcxr.evaluate.report import write_json
from spcxr.recipes.finetune import SCRATCH, FinetuneConfig
from spcxr.train.distributed import World
from spcxr.train.run_folder import open_run_together

PARTS = ("validation", "test")
OF_LABEL = "auroc of "
Spread = dict[str, float]
Settings = TypeVar("Settings", bound=FinetuneConfig)


def run_seeds(
    world: World,
    config: Settings,
    run_once: Callable[[World, Settings, Path], Path],
    recipe: str,
) -> Path:
    """Run ``seed``, ``seed + 1``, ... into ``RUN/seed-K/``, each an ordinary run folder.

    Seeds that are finished are kept as they are, so that a run that was stopped goes on with the
    one it stopped in. Images are prepared once, in ``RUN/store``. ``RUN/summary.json`` holds the
    mean, standard deviation and range of every overall metric and of each label's AUROC, or of
    every metric of each structure; the table of all but the AUROCs is printed.

    Raises
    ------
    Interrupted
        in one of the runs; its message says how to go on with all of them.
    """
    opened = open_run_together(
        world, config.out, to_dict(config), recipe=recipe, resume=config.resume
    )
    with opened as folder:
        made = []
        for seed in range(config.seed, config.seed + config.seeds):
            out = str(folder / f"seed-{seed}")
            # Whether the whole may be gone on with was asked above.
            single = replace(config, seeds=1, seed=seed, out=out, resume="auto")
            try:
                made.append(run_once(world, single, folder / "store"))
            except Interrupted as error:
                # Of one seed it says how that one goes on; asked for were all.
                what, _, how = str(error).rpartition("; go on with: ")
                how = how.replace(f"{out}/config.yaml", str(folder / "config.yaml"))
                raise Interrupted(f"{what}; go on with: {how}") from error
        if world.first:
            found = [json.loads((run / "metrics.json").read_text()) for run in made]
            summary = summarise(found)
            facts = {"seeds": config.seeds, "first_seed": config.seed, "same_init": same(config)}
            write_json(folder / "summary.json", facts | summary)
            print(table(summary, config.seeds), file=sys.stderr)
    return folder


def same(config: FinetuneConfig) -> bool:
    """Whether all runs begin with the same encoder: their spread leaves out its own training."""
    return config.init != SCRATCH


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Spread]]:
    """``metrics.json`` of several runs -> part -> metric -> its `spread` over them.

    >>> run = {"test": {"overall": {"accuracy": {"value": 0.5}}, "by_class": {}}}
    >>> summarise([run, run])["test"]["accuracy"]["mean"]
    0.5
    >>> found = {"test": {"lung": {"dice": {"value": 0.9}}}}  # and none to measure in the other
    >>> summarise([{"test": {}}, found])["test"]["dice of lung"]["n"]
    1
    """
    made: dict[str, dict[str, Spread]] = {}
    for part in [p for p in PARTS if p in runs[0]]:
        values = [_values(run[part]) for run in runs]
        names = dict.fromkeys(name for found in values for name in found)
        made[part] = {name: spread([v.get(name) for v in values]) for name in names}
    return made


def _values(part: Mapping[str, Any]) -> dict[str, float | None]:
    if "overall" not in part:  # masks: structure -> metric -> its interval
        return {
            f"{metric} of {structure}": found["value"]
            for structure, metrics in part.items()
            for metric, found in metrics.items()
            if isinstance(found, Mapping) and "value" in found
        }
    overall = {name: found["value"] for name, found in part["overall"].items()}
    labels = {f"{OF_LABEL}{n}": found["auroc"]["value"] for n, found in part["by_class"].items()}
    return overall | labels


def spread(values: Sequence[float | None]) -> Spread:
    """Mean, standard deviation (of a sample: over n - 1), range, and over how many values.

    What is not defined in a run is left out, and ``n`` says so.

    >>> spread([0.25, 0.75, None])["n"], spread([0.25, 0.75, None])["mean"]
    (2, 0.5)
    """
    known = np.array([v for v in values if v is not None and np.isfinite(v)])
    if not len(known):
        return {"mean": np.nan, "sd": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    return {
        "mean": float(known.mean()),
        "sd": float(known.std(ddof=1)) if len(known) > 1 else np.nan,
        "low": float(known.min()),
        "high": float(known.max()),
        "n": len(known),
    }


def table(summary: Mapping[str, Mapping[str, Spread]], seeds: int) -> str:
    """The overall metrics in lines of text.

    >>> print(table({"test": {"accuracy": spread([0.25, 0.75])}}, 2))
    over 2 seeds    mean     sd  range
    test accuracy  0.500  0.354  0.250 to 0.750
    """
    rows = {
        f"{part} {name}": found
        for part, metrics in summary.items()
        for name, found in metrics.items()
        if not name.startswith(OF_LABEL)
    }
    heading = f"over {seeds} seeds"
    wide = max(map(len, (*rows, heading)))
    lines = [f"{heading:<{wide}}  {'mean':>5}  {'sd':>5}  range"]
    for name, found in rows.items():
        n = f" (n = {found['n']})" if found["n"] != seeds else ""
        span = f"{found['low']:.3f} to {found['high']:.3f}{n}"
        lines.append(f"{name:<{wide}}  {found['mean']:>5.3f}  {found['sd']:>5.3f}  {span}")
    return "\n".join(lines)
