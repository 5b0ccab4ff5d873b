"""Checkpoints: folders of safetensors and readable JSON, whole or refused; nothing is pickled.

    checkpoints/step-00001200/   model.safetensors  optimizer.safetensors  [ema.safetensors]
                                 checkpoint.json    position, and size and hash of each file
    checkpoints/last, best, bad  symbolic links to such folders

A folder is written under a temporary name and renamed when it is on disk; links are swapped in one
call. Whenever the process or the machine dies, ``last`` is a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spcxr.errors import SpcxrError
from spcxr.train.parallel import as_in, whole

FORMAT, VERSION = "spcxr-checkpoint", 1
DRAFT = ".writing-"


@dataclass(frozen=True)
class Position:
    """Where a run stands. Epoch, batch, order and random draws follow from ``step`` and the seed.

    ``step``: steps behind us; ``best``: the best validation figure so far and ``best_step`` when;
    ``bad_in_a_row``: steps just left out because they were not finite; ``data``: the content hash
    of the store, so that a run does not go on with other images.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    bad_in_a_row: int = 0
    data: str = ""


# --- writing --------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    position: Position,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None = None,
) -> Path:
    """Write one checkpoint folder. ``folder`` appears when everything in it is on disk.

    An older folder of that name is replaced (the run came back to this step after a resume).

    Raises
    ------
    SpcxrError
        it cannot be written (a full disk, say); nothing half-written is left.
    """
    _publish(folder, position, gathered(model, optimizer, ema))
    return folder


def gathered(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
) -> dict[str, dict[str, Tensor]]:
    """All state by file name; weights that are shared out are brought together, by every rank."""
    states = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    if ema is not None:
        states["ema"] = ema.state_dict()
    return {name: {k: whole(v.detach()) for k, v in s.items()} for name, s in states.items()}


def _publish(folder: Path, position: Position, states: dict[str, dict[str, Tensor]]) -> None:
    draft = folder.with_name(f"{DRAFT}{folder.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    with _written(folder, draft):
        _write(draft, position, states)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
        sync(folder.parent)


@contextmanager
def _written(folder: Path, draft: Path) -> Iterator[None]:
    """Around all writing: what fails is one line, and the draft goes, for it takes up space."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise SpcxrError(
            f"{folder}: the checkpoint cannot be written ({error}); free some space or check the "
            "folder, then give the same command: it goes on from the last checkpoint"
        ) from error


def _write(draft: Path, position: Position, states: dict[str, dict[str, Tensor]]) -> None:
    draft.mkdir(parents=True)
    files = {}
    for name, state in states.items():
        file = draft / f"{name}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _hash(file)}
    block = {
        "format": FORMAT,
        "version": VERSION,
        "position": asdict(position),
        "torch": torch.__version__,
        "files": files,
    }
    (draft / "checkpoint.json").write_text(json.dumps(block, indent=1) + "\n")
    for path in (*draft.iterdir(), draft):
        sync(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as ``exp_avg/<parameter>``, ``exp_avg_sq/<parameter>``, ``step/<parameter>``.

    The optimiser must come from `optim.build_adamw`, whose groups know their parameters' names.
    """
    return {
        f"{kind}/{name}": value
        for name, parameter in _named(optimizer)
        for kind, value in optimizer.state[parameter].items()
    }


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"],
                                                                 strict=True)
    ]  # fmt: skip


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------


def load_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ema: nn.Module | None = None,
) -> Position:
    """Fill model, optimiser and EMA from a checkpoint, all or nothing, and say where it stands.

    Raises
    ------
    SpcxrError
        no checkpoint, a newer format, a file that is torn or changed, or tensors that are not
        those of the model (missing, unexpected and misshapen ones are listed).
    """
    folder = Path(folder)
    block = _read_block(folder)
    modules = {"model": model} | ({"ema": ema} if ema is not None else {})
    states = {name: _read_state(folder, block, name) for name in modules}
    moments = _read_state(folder, block, "optimizer") if optimizer is not None else {}
    for name, module in modules.items():
        own = {key: value.shape for key, value in module.state_dict().items()}
        _refuse_misfits(folder, name, states[name], own, own)
    if optimizer is not None:
        own = {
            f"{kind}/{key}": p.shape if kind != "step" else torch.Size()
            for key, p in _named(optimizer)
            for kind in ("exp_avg", "exp_avg_sq", "step")
        }
        # A parameter that never had a gradient has no moments, so none of them is required.
        _refuse_misfits(folder, "optimizer", moments, own, ())
    for name, module in modules.items():
        mine = module.state_dict()
        module.load_state_dict({k: as_in(mine[k], v) for k, v in states[name].items()})
    if optimizer is not None:
        _fill_optimizer(optimizer, moments)
    try:
        return Position(**block["position"])
    except (KeyError, TypeError) as error:
        raise _torn(folder / "checkpoint.json", f"no position ({error})") from error


def _read_block(folder: Path) -> dict[str, Any]:
    file = folder / "checkpoint.json"
    if not folder.is_dir() or not file.is_file():
        raise SpcxrError(f"{folder}: no checkpoint (no checkpoint.json); check the path")
    try:
        block = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _torn(file, f"not readable ({error})") from error
    if not isinstance(block, dict) or block.get("format") != FORMAT:
        raise _torn(file, "not a checkpoint of spcxr's")
    if block["version"] > VERSION:
        raise SpcxrError(
            f"{file}: format {block['version']}, this spcxr reads up to {VERSION}; update spcxr"
        )
    return block


def _read_state(folder: Path, block: dict[str, Any], name: str) -> dict[str, Tensor]:
    file = folder / f"{name}.safetensors"
    entry = block["files"].get(file.name)
    if entry is None:
        raise SpcxrError(f"{folder}: holds no {name} state; choose a checkpoint that does")
    if not file.is_file():
        raise _torn(file, "missing")
    if file.stat().st_size != entry["bytes"]:
        raise _torn(file, f"{file.stat().st_size} bytes instead of {entry['bytes']}")
    if _hash(file) != entry["sha256"]:
        raise _torn(file, "its content has changed")
    return load_file(file)


def _torn(file: Path, said: str) -> SpcxrError:
    return SpcxrError(
        f"{file}: {said}; the checkpoint is torn: restore it, or point the link 'last' beside it "
        "to an older step, or start anew with another --out"
    )


def _refuse_misfits(
    folder: Path,
    name: str,
    state: dict[str, Tensor],
    own: dict[str, torch.Size],
    required: Iterable[str],
) -> None:
    missing = [key for key in required if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {list(value.shape)} for {list(own[key])}"
        for key, value in state.items()
        if key in own and value.shape != own[key]
    ]
    faults = {"missing": missing, "unexpected": unexpected, "other shape": misshapen}
    if said := "; ".join(f"{k} {_listed(v)}" for k, v in faults.items() if v):
        raise SpcxrError(
            f"{folder}: {name} state does not fit: {said}; continue with the settings of the run "
            "that wrote it"
        )


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} ({shown})"


def _fill_optimizer(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Hand the moments over by torch's own loader, which puts each where its parameter is."""
    state: dict[int, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(_named(optimizer)):
        kinds = ("exp_avg", "exp_avg_sq", "step")
        found = {
            k: moments[f"{k}/{name}"] if k == "step" else as_in(parameter, moments[f"{k}/{name}"])
            for k in kinds
            if f"{k}/{name}" in moments
        }
        if found:
            state[number] = found
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- which ones are kept --------------------------------------------------------------------


class Checkpoints:
    """The ``checkpoints`` folder of a run: which are kept.

    Parameters
    ----------
    last
        how many of the newest; ``last`` links to the newest, ``best`` to the best, ``bad`` to the
        first that a step was not finite after: these are always kept.
    every
        those of each so many steps too; 0 for none.
    writes
        whether this process writes: rank 0. The others only help to bring weights together.
    """

    def __init__(
        self, run_folder: Path, *, last: int = 1, every: int = 0, writes: bool = True
    ) -> None:
        self.folder = run_folder / "checkpoints"
        self.last, self.best = self.folder / "last", self.folder / "best"
        self.bad = self.folder / "bad"
        self._newest, self._every, self._writes = last, every, writes
        self._saved_at = time.monotonic()

    @property
    def begun(self) -> bool:
        """Whether anything was saved yet."""
        return self.last.is_symlink() or self.last.exists()

    @property
    def age_s(self) -> float:
        """Seconds since the last save (or the start)."""
        return time.monotonic() - self._saved_at

    def save(
        self,
        position: Position,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: nn.Module | None = None,
    ) -> Path:
        """Save; point ``last`` there, ``best`` if this step's figure is the best, ``bad`` if this
        step is the first that was left out; tidy."""
        folder = self.folder / f"step-{position.step:08d}"
        states = gathered(model, optimizer, ema)
        if not self._writes:
            return folder
        if self.last.exists() and self.last.resolve() == folder.resolve():
            # Replacing the folder that `last` points to would leave a moment without any.
            folder = folder.with_name(folder.name + "-again")
        _publish(folder, position, states)
        if position.best is not None and position.best_step == position.step:
            self._point(self.best, folder.name)
        if position.bad_in_a_row and not self.bad.is_symlink():
            self._point(self.bad, folder.name)
        self._point(self.last, folder.name)  # the others first: a kill between leaves none behind
        self._tidy()
        self._saved_at = time.monotonic()
        return folder

    def load(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        ema: nn.Module | None = None,
    ) -> Position | None:
        """Fill everything from ``last``; None where nothing was saved yet."""
        if not self.begun:
            return None
        return load_checkpoint(self.last, model=model, optimizer=optimizer, ema=ema)

    def _point(self, link: Path, target: str) -> None:
        draft = link.with_name(f"{DRAFT}{link.name}-{os.getpid()}")
        with _written(link, draft):
            draft.unlink(missing_ok=True)
            draft.symlink_to(target, target_is_directory=True)
            draft.replace(link)
            sync(self.folder)

    def _tidy(self) -> None:
        """Remove checkpoints that are not to be kept, and drafts of processes that died."""
        links = (self.last, self.best, self.bad)
        linked = {link.resolve() for link in links if link.exists()}
        found: dict[int, list[Path]] = {}  # a step saved again has two folders for a moment
        for folder in self.folder.glob("step-*"):
            found.setdefault(int(folder.name.split("-")[1]), []).append(folder)
        newest = sorted(found)[-self._newest :]
        for step, folders in found.items():
            kept = linked.intersection(folder.resolve() for folder in folders)
            if not kept and (step in newest or (self._every and step % self._every == 0)):
                continue
            for folder in folders:
                if folder.resolve() not in kept:
                    shutil.rmtree(folder)
        for draft in self.folder.glob(f"{DRAFT}*"):
            if draft.is_symlink():
                draft.unlink()
            else:
                shutil.rmtree(draft)
