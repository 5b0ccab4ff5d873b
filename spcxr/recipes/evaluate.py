"""Measure a trained model on one test set or several, with intervals, and write the report.

open the data -> refuse patients it was trained on -> predict (images as they are, made worse,
another model's) -> judge -> write. With torchrun the processes share the predictions; the first of
them judges and writes, and the figures are those of one process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.config import Config, ConfigError, setting, to_dict
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.corruptions import CORRUPTIONS
from spcxr.infer.predict import load_trained
from spcxr.recipes import evaluate_page as written
from spcxr.recipes.compare import compare, refuse_other_task
from spcxr.recipes.drift import Sample, drift, sample_features
from spcxr.recipes.evaluate_page import Found, Given, Models
from spcxr.recipes.images import open_images, refuse_other_preprocess
from spcxr.recipes.leaks import Leaks, copies_among, find_leaks, pictures, refuse_leaks
from spcxr.recipes.measure import judge, predict, rows_to_measure
from spcxr.recipes.sweep import ALL, NONE, Step, judge_corrupted, predict_corrupted
from spcxr.recipes.testset import Settings, TestSet
from spcxr.train.device import pick_precision
from spcxr.train.distributed import World, join_world
from spcxr.train.run_folder import open_run

Array = NDArray[Any]
EVERY_SPLIT = "all"


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Settings of `run`; see ``spcxr-train evaluate --help``."""

    run: str = setting(help="run or model folder of classify or segment")
    data: tuple[str, ...] = setting(
        help="stores, manifest CSVs or image folders: a,b,...; the first is the reference"
    )
    out: str = setting(help="folder to write")
    splits: tuple[str, ...] = setting(
        ("test",), "splits to measure, each by itself; 'all' for every row at once"
    )
    against: str | None = setting(None, "another run of the same labels, to compare with")
    corruptions: tuple[str, ...] = setting(
        (NONE,), f"images made worse: none, all (19 more passes), or {', '.join(CORRUPTIONS)}"
    )
    distance_images: int = setting(
        2000, "images of each set whose features are compared (0: none)", low=0
    )
    allow_leak: bool = setting(
        False, "measure patients the model was trained on all the same, and say so"
    )
    n_bootstrap: int = setting(2000, "resamples of the patients for an interval", low=100)
    threshold: float | None = setting(
        None,
        "probability from which a label is called (several findings): the model's own, else 0.5, "
        "if not given",
        low=0.0,
        high=1.0,
    )
    seed: int = setting(0, "of the resamples and corruptions", low=0)
    batch_size: int = setting(64, "images at a time", low=1)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "bf16 where it is fast, or", choices=("auto", "bf16", "fp32"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data or not self.splits:
            raise ConfigError("data and splits must name one each at least")
        if EVERY_SPLIT in self.splits and len(self.splits) > 1:
            raise ConfigError("splits names 'all' and others; give either")
        places = [str(Path(data).resolve()) for data in self.data]
        for name, given in (("data", places), ("splits", list(self.splits))):
            if twice := [one for one in given if given.count(one) > 1]:
                raise ConfigError(f"{name} names {twice[0]} twice; name each once")
        unknown = [name for name in self.corruptions if name not in {*CORRUPTIONS, NONE, ALL}]
        if unknown:
            raise ConfigError(
                f"corruptions names {unknown[0]!r}; choose none, all, or of "
                f"{', '.join(CORRUPTIONS)}"
            )
        if self.against is not None and self.against == self.run:
            raise ConfigError("against names the run itself; give another run, or leave it out")
        if len(self.corruptions) > 1 and {NONE, ALL} & set(self.corruptions):
            raise ConfigError("corruptions names 'none' or 'all' and others; give either")


def run(config: EvaluateConfig) -> Path:
    """Evaluate ``config.run`` on each data set and split; returns the report's path.

    Writes ``predictions.csv`` (paths as in the manifest, no patient), ``metrics.json`` and
    ``report.html`` into ``out``, the report last. One process of many where torchrun or SLURM says
    so.

    Raises
    ------
    SpcxrError
        no trained task, data prepared otherwise than the weights know, a split or label that the
        data do not have, a patient the model was trained on, another model of another task, or an
        ``out`` that holds something else or an evaluation of other weights, data or settings. A
        finished one of the same is left as it is.
    """
    with join_world(config.device) as world, run_folder(world, config) as folder:
        settings = settings_of(config, world)
        models = load_models(config, world)
        sets = list(choose_sets(config, models, folder, world))
        described = written.describe(models, settings, sets)
        if world.once(lambda: finished(folder, described)):
            return folder / "report.html"
        given = look_for_leaks(config, models, sets, world)
        seen = [look(config, models, test_set, settings) for test_set in sets]

        def judged() -> str:
            found = judge_all(models, given, seen, settings)
            return str(written.write_all(folder, models, found, described, settings))

        return Path(world.once(judged))


@contextmanager
def run_folder(world: World, config: EvaluateConfig) -> Iterator[Path]:
    """The folder to write, opened and locked by the first process; its refusal is everybody's."""

    def opened() -> str:
        return str(stack.enter_context(open_run(config.out, to_dict(config), recipe="evaluate")))

    with ExitStack() as stack:
        yield Path(world.once(opened))


def settings_of(config: EvaluateConfig, world: World) -> Settings:
    """How to predict and to resample."""
    return Settings(
        batch_size=config.batch_size,
        device=world.device,
        precision=pick_precision(config.precision, world.device),
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
        threshold=config.threshold,
        world=world,
    )


def load_models(config: EvaluateConfig, world: World) -> Models:
    """The model of the run, and that of ``--against`` after it, each by the folder given.

    Raises
    ------
    SpcxrError
        no trained task in one of them, or not the same one; one model under two names; a threshold
        for what has no use of one.
    """
    trained = load_trained(config.run, world.device)
    models = {config.run: trained}
    if config.threshold is not None and not trained.multilabel:
        raise SpcxrError(
            f"{config.run}: calls the likeliest class, whatever its probability; leave out "
            "--threshold, which is for several findings"
        )
    if config.against is not None:
        models[config.against] = load_trained(config.against, world.device)
        if models[config.against].folder.resolve() == trained.folder.resolve():
            raise SpcxrError(
                f"{config.against}: is the model of {config.run} itself; give --against another run"
            )
        refuse_other_task(models)
    return models


def finished(folder: Path, described: Mapping[str, object]) -> str:
    """Non-empty where ``folder`` holds this very evaluation, whole.

    Raises
    ------
    SpcxrError
        its ``metrics.json`` does not say that it is this one.
    """
    if not (folder / "report.html").exists():
        return ""
    try:
        found = json.loads((folder / "metrics.json").read_text())["provenance"]
    except (OSError, ValueError, KeyError):
        found = {}
    changed = [name for name, value in described.items() if found.get(name) != str(value)]
    if changed:
        raise SpcxrError(
            f"{folder}: holds a finished evaluation with other {', '.join(changed)}; "
            "choose another --out"
        )
    print(f"{folder}: already complete", file=sys.stderr)
    return "complete"


# --- data -----------------------------------------------------------------------------------


def choose_sets(
    config: EvaluateConfig, models: Models, folder: Path, world: World
) -> Iterator[TestSet]:
    """Every (data, split) that has rows, named so that no two are alike.

    Raises
    ------
    SpcxrError
        data without a row in any of the splits, or prepared otherwise than a model knows; a split
        that none of the data have.
    """
    stems = [Path(path).stem for path in config.data]
    absent = set(config.splits)
    for number, path in enumerate(config.data):
        store = open_for(models, path, folder / f"store-{number}", world)
        name = stems[number] if stems.count(stems[number]) == 1 else path
        if config.splits == (EVERY_SPLIT,):
            yield TestSet(name, path, store, np.arange(len(store), dtype=np.int64))
            continue
        found = [split for split in config.splits if len(store.manifest.rows(split))]
        if not found:
            raise SpcxrError(
                f"{path}: no row in split {', '.join(config.splits)}; it has "
                f"{', '.join(store.manifest.splits) or 'none'}: choose with --splits, or 'all'"
            )
        absent -= set(found)
        for split in found:
            yield TestSet(f"{name}: {split}", path, store, store.manifest.rows(split))
    if absent - {EVERY_SPLIT}:
        raise SpcxrError(
            f"no data have a row in split {', '.join(sorted(absent))}; leave it out of --splits"
        )


def open_for(models: Models, path: str, made: Path, world: World) -> Store:
    """The images as all models know them; what has to be prepared the first process prepares."""
    wanted = {name: model.config["preprocess"] for name, model in models.items()}
    run, *others = wanted
    size_px = max(preprocess["size_px"] for preprocess in wanted.values())

    def opened() -> str:
        store = open_images(path, made, size_px=size_px, wanted=wanted[run], init=run)
        for other in others:
            refuse_other_preprocess(store, wanted[other], other)
        return str(store.path)

    return Store.open(world.once(opened))


def look_for_leaks(
    config: EvaluateConfig, models: Models, sets: Sequence[TestSet], world: World
) -> list[Given]:
    """What the sets hold of the models' training, and of copies; a leak is refused unless allowed.

    Raises
    ------
    SpcxrError
        a leak that is not allowed, or a set with nothing to measure by.
    """
    trained = next(iter(models.values()))

    def looked() -> str:
        told = []
        for test_set in sets:
            rows = rows_to_measure(trained, test_set)  # refuses what has no answer
            shown = pictures(test_set.store, rows)
            leaks = {}
            for name, model in models.items():
                found = find_leaks(model.folder, test_set.store, rows, shown)
                if not config.allow_leak:
                    refuse_leaks(found, test_set.name, name)
                leaks[name] = found and dataclasses.asdict(found)
            told.append({"leaks": leaks, "copies": copies_among(shown)})
        return json.dumps(told)

    return [
        Given({name: f and Leaks(**f) for name, f in one["leaks"].items()}, one["copies"])
        for one in json.loads(world.once(looked))
    ]


# --- predict, then judge --------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What was predicted for one test set, by each model in turn, and not judged yet."""

    test_set: TestSet
    predicted: Sequence[Array]
    corrupted: Mapping[Step, Array]
    features: Sample | None


def look(config: EvaluateConfig, models: Models, test_set: TestSet, settings: Settings) -> Seen:
    """Every prediction that is asked for; all processes take part."""
    trained = next(iter(models.values()))
    names = (test_set.name, f"{test_set.name}, {config.against}")
    features = None
    if config.distance_images and len(config.data) * len(config.splits) > 1:
        features = sample_features(trained, test_set, settings, config.distance_images)
    return Seen(
        test_set,
        [
            predict(model, test_set, settings, name=name)
            for model, name in zip(models.values(), names, strict=False)
        ],
        predict_corrupted(trained, test_set, settings, config.corruptions),
        features,
    )


def judge_all(
    models: Models, given: Sequence[Given], seen: Sequence[Seen], settings: Settings
) -> list[Found]:
    """All that was found, set by set; the first set is the one the others are held against."""
    trained, *others = models.values()
    results = [judge(trained, one.test_set, one.predicted[0], settings) for one in seen]
    made: list[Found] = []
    for one, result, facts in zip(seen, results, given, strict=True):
        against = None
        for rival in others:
            rivals = judge(rival, one.test_set, one.predicted[1], settings)
            against = compare(result, rivals, settings)
        first, own = seen[0].features, one.features
        pair = (first, own) if first is not None and own is not None else None
        made.append(
            Found(
                result=result,
                given=facts,
                corrupted=judge_corrupted(trained, result, one.corrupted, settings),
                against=against,
                drift=drift(results[0], result, pair, settings) if made else None,
            )
        )
    return made
