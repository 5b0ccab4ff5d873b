"""The run folder: one run's, whole, and nobody else's."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from spcxr.errors import SpcxrError
from spcxr.train.distributed import World

# Settings that may differ when a run goes on: where it and its images are (`Position.data` tells
# whether these are the same), where it computes, what it shows and keeps.
FREE = ("out", "data", "resume", "device", "accumulate", "compile", "recompute", "parallel",
        "keep_last", "keep_every_epochs", "save_every_s", "save_every_epochs", "sample_every",
        "probe", "probe_every", "track")  # fmt: skip


@contextmanager
def open_run(
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    recipe: str,
    resume: str = "auto",
    free: Sequence[str] = FREE,
) -> Iterator[Path]:
    """Make or re-open the folder of a run, and keep other processes out of it meanwhile.

    A new folder gets ``config.yaml``: the settings, valid as ``--config``, below a line that names
    the recipe. An existing run is gone on with when ``resume`` is ``auto`` and the settings are
    the same (those of ``free`` aside); whether there is a checkpoint is `Checkpoints.load`'s to
    say. A run refused before it did anything leaves no folder behind; one that has only prepared
    its images (``store``) keeps them, and its settings may still be changed.

    Parameters
    ----------
    settings
        plain values by name (``config.to_dict``).
    recipe
        the command, as in ``pretrain``.

    Raises
    ------
    SpcxrError
        ``out`` is a file, holds something else, another recipe's run or a run of other settings
        (which are listed), is in use by another process, or holds a run and ``resume`` is
        ``never``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with open_run(f"{place}/a", {"epochs": 2}, recipe="pretrain") as folder:
    ...         _ = (folder / "metrics.jsonl").write_text("")
    ...     with open_run(f"{place}/a", {"epochs": 3}, recipe="pretrain"):
    ...         pass
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: .../a: holds a run of other settings (epochs 2, now 3); ...
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SpcxrError(f"{folder}: is a file; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(folder)
    with (folder / "run.lock").open("a") as lock:
        _lock(lock, folder)
        config = folder / "config.yaml"
        if config.is_file() and not _only_begun(folder):
            _refuse_recipe(config, recipe, resume)
            _refuse_others(config, settings, free)
        else:
            _write_whole(config, f"{_HEADING}{recipe}\n" + _yaml(settings))
        try:
            yield folder
        finally:
            if not _made(folder):
                # Refused before anything was done: the corrected command may use the same place.
                shutil.rmtree(folder)


@contextmanager
def open_run_together(
    world: World,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    recipe: str,
    resume: str = "auto",
    free: Sequence[str] = FREE,
) -> Iterator[Path]:
    """`open_run`, done and locked by rank 0 alone; its refusal is everybody's."""

    def opened() -> str:
        opening = open_run(out, settings, recipe=recipe, resume=resume, free=free)
        return str(stack.enter_context(opening))

    with ExitStack() as stack:
        yield Path(world.once(opened))


# What a run writes before it does anything, and the stores it prepares its images into.
_BEGINNING = {"config.yaml", "run.lock", ".config.yaml.writing"}
_STORE = re.compile(r"store(-\d+)?(\.partial)?")
_HEADING = "# spcxr-train "


def _made(folder: Path) -> set[str]:
    """What is there beside the beginning; a strange ``config.yaml`` counts."""
    made = {path.name for path in folder.iterdir()} - _BEGINNING
    config = folder / "config.yaml"
    if config.is_file() and not config.read_text().startswith(_HEADING):
        made.add(config.name)
    return made


def _only_begun(folder: Path) -> bool:
    """No more than images were prepared: settings may still be put right, the images stay."""
    return all(_STORE.fullmatch(name) for name in _made(folder))


def _refuse_strangers(folder: Path) -> None:
    """Only an empty folder, or one that a run began to fill, may become a run."""
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in _BEGINNING)
    if strangers and not (folder / "config.yaml").is_file():
        raise SpcxrError(f"{folder}: holds {strangers[0]!r} and no run; choose another --out")


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SpcxrError(
            f"{folder}: another process is at work on this run; wait, or choose another --out"
        ) from error


def _refuse_recipe(config: Path, recipe: str, resume: str) -> None:
    folder, text = config.parent, config.read_text()
    if resume == "never":
        raise SpcxrError(f"{folder}: holds a run; choose another --out, or --resume auto")
    written = text.partition("\n")[0].removeprefix(_HEADING).strip()
    if written != recipe:
        said = f"a {written!r} run" if written.isalpha() else "a config.yaml that is no run's"
        raise SpcxrError(f"{folder}: holds {said}, not a {recipe!r} run; choose another --out")


def _refuse_others(config: Path, settings: Mapping[str, Any], free: Sequence[str]) -> None:
    folder = config.parent
    try:
        before = yaml.safe_load(config.read_text()) or {}
    except yaml.YAMLError as error:
        raise SpcxrError(
            f"{config}: not readable as YAML; restore it, or choose another --out"
        ) from (error)
    # Through YAML as well, so that a tuple equals the list it was written as.
    now = yaml.safe_load(_yaml(settings))
    changed = [
        f"{name} {before.get(name, 'unset')}, now {now.get(name, 'unset')}"
        for name in dict.fromkeys([*before, *now])
        if name not in free and before.get(name, _UNSET) != now.get(name, _UNSET)
    ]
    if changed:
        raise SpcxrError(
            f"{folder}: holds a run of other settings ({'; '.join(changed)}); choose another "
            "--out, or give the settings of its config.yaml"
        )


_UNSET = object()


def _yaml(settings: Mapping[str, Any]) -> str:
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def _write_whole(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}.writing")
    with draft.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
