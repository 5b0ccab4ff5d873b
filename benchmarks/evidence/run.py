"""Evidence on real chest X-rays: run every row of ``rows/``, measure it, write the document.

    python benchmarks/evidence/run.py ../shared/data/open runs/evidence [--small] [--rows lungs,...]

DATA holds ``*_manifest.csv`` (its README names the columns); nothing of it is copied into the
project. What is finished is not done again, so a stopped study goes on where it was. Results are
``OUT/results/ROW.json``, and from them the tables and plots of ``OUT/EVIDENCE.md``. The project's
own stand in benchmarks/results/evidence (``--results``) and docs/EVIDENCE.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import record  # noqa: E402  (after the path of its folder)

from evidence import measure, plan, stores, write  # noqa: E402
from spcxr.data.shards import hash_file  # noqa: E402
from spcxr.data.store import Store  # noqa: E402
from spcxr.errors import SpcxrError  # noqa: E402
from spcxr.evaluate.report import write_json  # noqa: E402
from spcxr.models.vit import build_vit  # noqa: E402
from spcxr.models.weights import save_model_folder  # noqa: E402
from spcxr.recipes.classify import ClassifyConfig  # noqa: E402
from spcxr.recipes.cohort import choose_cohort, macro_auroc  # noqa: E402

SIZE_PX = 128  # of the stores: 96 px of input and a margin
DONE = "done.json"
RESULTS = record.RESULTS / "evidence"
START = "from spcxr.cli import train; train()"


def main() -> None:
    """Read the command line, run, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="a subset, under half an hour")
    parser.add_argument("--rows", default="", help="only these, comma-separated")
    parser.add_argument("--arms", default="", help="run only these, and measure later")
    parser.add_argument("--levels", default="", help="with --arms: only these")
    parser.add_argument("--partial", action="store_true", help="measure what is finished, no more")
    parser.add_argument("--results", type=Path, help="OUT/results if not given")
    parser.add_argument("--write-only", action="store_true", help="only the document, from results")
    given = parser.parse_args()
    results = (given.results or given.out / "results").resolve()
    document = write.DOCUMENT if results == RESULTS else results.parent / "EVIDENCE.md"
    if given.levels and not given.arms:
        parser.error("--levels goes with --arms")
    if not given.write_only:
        lists = (given.rows, given.arms, given.levels)
        rows, arms, levels = ([n for n in names.split(",") if n] for names in lists)
        part = Part(given.small, rows, arms, levels, given.partial)
        study(given.data.resolve(), given.out.resolve(), results, part)
    if given.write_only or not given.arms:
        print(write.write_document(results, document))


class Part(NamedTuple):
    """What of the study is done: all of it, if nothing is said."""

    small: bool = False
    rows: Sequence[str] = ()
    arms: Sequence[str] = ()
    levels: Sequence[str] = ()
    finished: bool = False


def study(data: Path, out: Path, results: Path, part: Part) -> None:
    """Run and measure the rows in their order; of some ``part.arms`` only run them."""
    specs = yaml.safe_load((HERE / "stores.yaml").read_text())

    def prepare(manifest: Path, store: Path) -> None:
        words = ["prepare", str(manifest), "--root", str(data), "--out", str(store)]
        spcxr_train([*words, "--size-px", str(SIZE_PX)])

    checks = stores.make_stores(data, out, specs, prepare)
    draw_encoder(out / plan.RANDOM, Store.open(out / "stores" / next(iter(specs))))
    for row in chosen_rows(part):
        if part.arms:
            run_arms(row, out, part)
        elif not (found := run_row(row, out, part))["runs"]:
            print(f"{row.name}: nothing is finished; its results stay as they are", file=sys.stderr)
        else:
            facts = {"small": part.small, "checks": checks["stores"].get(row.store)} | found
            write_result(results / f"{row.name}.json", row, facts)
    write_result(results / "checks.json", None, checks)


def chosen_rows(part: Part) -> list[plan.Row]:
    """The rows of this part of the study, in their order.

    Raises
    ------
    SpcxrError
        a row, arm or level that there is not.
    """
    rows = plan.read_rows(HERE / "rows", small=part.small)
    refuse_strange("row", part.rows, [row.name for row in rows])
    rows = [row for row in rows if not part.rows or row.name in part.rows]
    refuse_strange("arm", part.arms, [arm for row in rows for arm in row.arms])
    refuse_strange("level", part.levels, [level for row in rows for level in row.levels])
    return rows


def refuse_strange(kind: str, asked: Sequence[str], there: Sequence[str]) -> None:
    """Refuse a name that there is not.

    >>> refuse_strange("arm", ["scrach"], ["scratch", "pretrained"])
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: no arm 'scrach'; there are scratch, pretrained
    """
    if strange := [name for name in asked if name not in there]:
        known = ", ".join(dict.fromkeys(there))
        raise SpcxrError(f"no {kind} {strange[0]!r}; there are {known}")


def draw_encoder(folder: Path, store: Store) -> None:
    """An encoder that has learned nothing: what a probe finds on it is not pretraining's.

    Pixels are normalised as for the pretrained ones, by the first store of ``stores.yaml``.
    """
    if folder.exists():
        return
    torch.manual_seed(0)
    save_model_folder(
        folder,
        build_vit("vit_tiny", image_px=96, patch_px=16),
        preprocess=store.preprocess.to_dict(),
        mean=store.mean,
        std=store.std,
        task=None,
        head=None,
        provenance={"recipe": "none: drawn weights", "seed": 0, "phantoms": False},
    )


def spcxr_train(words: Sequence[str]) -> None:
    """One ``spcxr-train`` command; its own lines go to this terminal."""
    print("spcxr-train", shlex.join(words), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-c", START, *words], check=True)


def wanted(job: plan.Job, part: Part) -> bool:
    """Whether it is done, or may be run."""
    return not part.finished or (job.folder / DONE).is_file()


def run_job(job: plan.Job) -> dict[str, Any]:
    """Run a command unless it is done; what it was, by which commit, and how long it took.

    Raises
    ------
    SpcxrError
        it was done with other settings, or from other weights than are there now.
    """
    marker = job.folder / DONE
    settings = {k: v for k, v in job.settings.items() if k not in ("data", "out")}
    begun = {name: weights_digest(settings[name]) for name in ("init", "lungs_from")
             if settings.get(name, plan.SCRATCH) != plan.SCRATCH}  # fmt: skip
    if marker.is_file():
        facts = dict(json.loads(marker.read_text()))
        if facts["settings"] != settings or facts.get("begun_from") != begun:
            other = "settings" if facts["settings"] != settings else "weights to begin from"
            raise SpcxrError(f"{job.folder}: was run with other {other}; remove it to run it anew")
        return facts
    config = job.folder.with_name(f"{job.folder.name}.yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(job.settings, sort_keys=False))
    began = time.monotonic()
    spcxr_train([job.command, "--config", str(config)])
    for made in job.seeds:  # half of what a finished run holds; its model stays
        shutil.rmtree(made / "checkpoints", ignore_errors=True)
    facts = {
        "command": f"spcxr-train {job.command}",
        "settings": settings,
        "begun_from": begun,
        "commit": record.commit(),
        "device": record.device_name(),
        "threads": os.environ.get("OMP_NUM_THREADS", str(record.CORES)),
        "seconds": round(time.monotonic() - began),
    }
    write_json(marker, facts)
    return facts


def portable(facts: dict[str, Any], out: Path) -> dict[str, Any]:
    """What is known of a run, its settings' folders by their place in OUT.

    >>> portable({"settings": {"init": "/a/out/pretrain", "seeds": 3}}, Path("/a/out"))
    {'settings': {'init': 'pretrain', 'seeds': 3}}
    """
    root = f"{out}/"
    settings = {name: value.removeprefix(root) if isinstance(value, str) else value
                for name, value in facts["settings"].items()}  # fmt: skip
    return facts | {"settings": settings}


def weights_digest(folder: str) -> str:
    """Of the encoder of a run, or of a model folder.

    Raises
    ------
    SpcxrError
        it is not there: its row has not been run.
    """
    for inside in ("model/model.safetensors", "model.safetensors"):
        if (file := Path(folder) / inside).is_file():
            return hash_file(file)
    raise SpcxrError(f"{folder}: no encoder there; run the row that makes it first")


def run_arms(row: plan.Row, out: Path, part: Part) -> None:
    """The rates and jobs of these arms alone: a share of a row for each of several machines, or
    scratch while pretraining goes on."""
    chosen = {arm: settings for arm, settings in row.arms.items() if arm in part.arms}
    row = dataclasses.replace(row, arms=chosen)
    store = Store.open(out / "stores" / row.store)
    for job in plan.jobs(row, out, choose_rates(row, out, store, part)[0]):
        if not part.levels or job.level in part.levels:
            run_job(job)


def run_row(row: plan.Row, out: Path, part: Part) -> dict[str, Any]:
    """Choose rates, run the jobs, measure them; or measure what is finished, and run nothing."""
    store = Store.open(out / "stores" / row.store)
    if row.command == "pretrain":
        made = {job.arm: portable(run_job(job), out)
                for job in plan.jobs(row, out) if wanted(job, part)}  # fmt: skip
        return {"runs": made, "curves": {arm: _curve(out / row.name / "all" / arm) for arm in made}}
    rates, tried = choose_rates(row, out, store, part)
    runs: dict[str, Any] = {}
    # level -> arm -> its seeds
    found: dict[str, dict[str, list[measure.Measured]]] = {}
    for job in plan.jobs(row, out, rates):
        if not wanted(job, part):
            continue
        runs[f"{job.level}/{job.arm}"] = portable(run_job(job), out)
        for level, seeds in measured(row, job, out, store).items():
            found.setdefault(level, {})[job.arm] = seeds
    pairs = list(row.differences)
    if row.baseline:
        pairs.append([plan.PRETRAINED, measure.BASELINE])
        for level in [level for level in row.levels if level in found]:
            found[level][measure.BASELINE] = _baselines(row, level, store)
    levels = {
        level: measure.compare_arms(arms, pairs, row.metrics) for level, arms in found.items()
    }
    return {"runs": runs, "levels": levels, "rates": {"chosen": rates, "tried": tried}}


def measured(
    row: plan.Row, job: plan.Job, out: Path, store: Store
) -> dict[str, list[measure.Measured]]:
    """Level -> the job's seeds on the rows of the row's split; and on test rows of other stores, if
    the row says so, as levels of their own."""
    if row.corruptions:
        made = {
            job.level: [
                measure.measure_elsewhere(seed, store, row.corruptions) for seed in job.seeds
            ]
        }
    else:
        made = {job.level: [measure.measure_run(seed, store, row.split) for seed in job.seeds]}
    if job.level in row.doubtful.get("levels", ()):
        without = row.doubtful["without"]
        made[f"{job.level}, without {' and '.join(without.values())} labels"] = [
            measure.measure_run(seed, store, row.split, without) for seed in job.seeds
        ]
    for name in row.elsewhere:
        other = Store.open(out / "stores" / name)
        made[f"{job.level}, on {name}"] = [
            measure.measure_elsewhere(seed, other) for seed in job.seeds
        ]
    return made


def choose_rates(
    row: plan.Row, out: Path, store: Store, part: Part
) -> tuple[dict[str, float], Any]:
    """The base rate of each arm that does best on validation rows, and all that was tried."""
    tried: dict[str, dict[float, float]] = {}
    for rate, job in plan.trials(row, out):
        if not wanted(job, part):
            continue
        run_job(job)
        (folder,) = job.seeds
        found = measure.measure_run(folder, store, "val")
        value = found.statistics[row.metrics[0]](1.0 + 0.0 * found.patients.astype(bool))
        tried.setdefault(job.arm, {})[rate] = float(value)
    chosen = {arm: max(rates, key=lambda r: rates[r]) for arm, rates in tried.items()}
    return chosen, tried


def _baselines(row: plan.Row, level: str, store: Store) -> list[measure.Measured]:
    """Thumbnails, on the rows of each seed of the level."""
    asked = row.settings | row.levels[level]
    chosen = {name: asked[name] for name in ("task", *plan.DRAWN) if name in asked}
    made = []
    for seed in range(asked.get("seeds", 1) if set(plan.DRAWN) & set(chosen) else 1):
        config = ClassifyConfig(data="-", init="-", out="-", seed=seed, **chosen)
        cohort = choose_cohort(config, store)
        made.append(measure.thumbnail_baseline(store, cohort, macro_auroc))
    return made


def _curve(folder: Path) -> list[list[float]]:
    """(epoch, mean training loss) of a pretraining run."""
    losses: dict[int, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        facts = json.loads(line)
        if facts.get("kind") == "train":
            losses.setdefault(facts["epoch"], []).append(facts["loss"])
    return [[epoch, sum(some) / len(some)] for epoch, some in sorted(losses.items())]


def write_result(file: Path, row: plan.Row | None, facts: dict[str, Any]) -> None:
    """One JSON file: the row as it stands in its file, and what was found; figures to 5 digits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {} if row is None else {"title": row.title, "order": row.order, "name": row.name,
                                   "command": row.command, "differences": row.differences,
                                   "metrics": row.metrics, "split": row.split}  # fmt: skip
    kept = json.loads(
        json.dumps(said | facts), parse_float=lambda text: float(f"{float(text):.5g}")
    )
    file.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (SpcxrError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
