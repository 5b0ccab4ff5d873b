"""Model folders: an encoder as timm would store it, with its preprocessing, and strict loading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from spcxr import __version__
from spcxr.errors import SpcxrError
from spcxr.models.foreign import Weights, is_foreign, read_foreign
from spcxr.models.positions import assumed_grid, lack_cls_position, resize_positions
from spcxr.models.vit import VIT_SIZES, VisionTransformer
from spcxr.models.weight_files import read_tensors

PATCH_WEIGHT, POSITIONS = "patch_embed.proj.weight", "pos_embed"


@dataclass(frozen=True)
class LoadedModel:
    """What ``folder`` holds: the encoder (eval mode), its ``config.json``, the head's state."""

    encoder: VisionTransformer
    config: dict[str, Any]
    head_state: dict[str, Tensor] | None
    folder: Path


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor: names in the encoder, and what was converted how."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    converted: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"matched {len(self.matched)}, missing {_listed(self.missing)}, "
            f"unexpected {_listed(self.unexpected)}, converted {_listed(self.converted)}"
        )


def _listed(names: tuple[str, ...], most: int = 8) -> str:
    shown = ", ".join(names[:most]) + (f", and {len(names) - most} more" if names[most:] else "")
    return f"{len(names)} ({shown})" if names else "none"


# --- writing --------------------------------------------------------------------------------


def timm_config(encoder: VisionTransformer, mean: float, std: float) -> dict[str, Any]:
    """The part of ``config.json`` that timm reads (``timm.create_model("local-dir:...")``).

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=192, depth=12, heads=3)
    >>> timm_config(encoder, 0.5, 0.25)["architecture"]
    'vit_tiny_patch16_224'
    """
    shape = (encoder.width, encoder.depth, encoder.heads)
    names = [name for name, size in VIT_SIZES.items() if size == shape]
    # Any registered name serves for other shapes: model_args say everything that differs.
    architecture = (names[0] if names else "vit_small") + "_patch16_224"
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "token",
        "model_args": {
            "img_size": list(encoder.image_px),
            "patch_size": encoder.patch_px,
            "in_chans": encoder.channels,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": encoder.mlp_ratio,
        },
        "pretrained_cfg": {
            "input_size": [encoder.channels, *encoder.image_px],
            "mean": [mean] * encoder.channels,
            "std": [std] * encoder.channels,
            "interpolation": "bilinear",
            "crop_pct": 1.0,  # the whole image, not timm's usual central 87.5 %
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def save_model_folder(
    folder: str | Path,
    encoder: VisionTransformer,
    *,
    preprocess: dict[str, Any],
    mean: float,
    std: float,
    task: dict[str, Any] | None,
    head: nn.Module | None,
    provenance: dict[str, Any],
) -> Path:
    """Write ``model.safetensors``, ``config.json`` and, with a head, ``head.safetensors``.

    The folder is written under a temporary name and renamed; an earlier model folder of that
    name is replaced, anything else there is refused.

    Parameters
    ----------
    preprocess
        the store's preprocessing (``Preprocess.to_dict()``), so that it travels with the weights.
    mean, std
        of the pixels in [0, 1], as used for normalising.
    task
        what the head answers (kind, label names, head settings), or None for an encoder.
    provenance
        how the weights came to be (objective, data hash, epochs, seed); kept word for word.

    Returns
    -------
    the folder.

    Raises
    ------
    SpcxrError
        the folder exists and is no model folder, a head was given without a task, or nothing can
        be written there (a full disk, say).
    """
    folder = Path(folder)
    if (head is None) != (task is None):
        raise SpcxrError(f"{folder}: a head and its task go together; give both or neither")
    if folder.exists() and not _is_model_folder(folder):
        raise SpcxrError(f"{folder}: exists and is no model folder; choose another place")
    config = timm_config(encoder, mean, std) | {
        "preprocess": preprocess,
        "task": task,
        "provenance": provenance,
        "spcxr_version": __version__,
    }
    draft = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        _save(encoder, draft / "model.safetensors")
        if head is not None:
            _save(head, draft / "head.safetensors")
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        replace_folder(draft, folder)
    except (SafetensorError, OSError) as error:
        raise SpcxrError(
            f"{folder}: the model cannot be written ({error}); free some space or check the folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _save(module: nn.Module, file: Path) -> None:
    """The state dict, for whoever may read the folder; safetensors writes for the owner alone."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    save_file(state, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)


def _is_model_folder(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "spcxr_version" in _read_json(config)


def replace_folder(draft: Path, folder: Path) -> None:
    """Put ``draft`` in the place of ``folder``; a folder cannot be swapped in one call."""
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# --- reading --------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpcxrError(f"{path}: not readable as JSON ({error}); export the model again") from (
            error
        )
    if not isinstance(found, dict):
        raise SpcxrError(f"{path}: holds no settings; export the model again")
    return found


def _model_folder(path: Path) -> Path:
    """The model folder that ``path`` (a run or the folder itself) means."""
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise SpcxrError(
        f"{path}: neither a run with an exported model/ nor a model folder (no config.json); "
        "give the folder of a finished run"
    )


def _encoder_from(config: Mapping[str, Any], path: Path) -> VisionTransformer:
    try:
        arguments = config["model_args"]
        height, width = arguments["img_size"]
        with torch.device("meta"):  # nothing is drawn: the weights are in the file
            return VisionTransformer(
                image_px=(height, width),
                patch_px=arguments["patch_size"],
                channels=arguments["in_chans"],
                width=arguments["embed_dim"],
                depth=arguments["depth"],
                heads=arguments["num_heads"],
                mlp_ratio=arguments["mlp_ratio"],
            )
    except (KeyError, TypeError, ValueError) as error:
        raise SpcxrError(
            f"{path}: model_args do not describe an encoder ({error!r}); export the model again"
        ) from error


def load_model_folder(path: str | Path) -> LoadedModel:
    """Build and fill the encoder of a run folder or its ``model/`` folder, exactly as saved.

    Returns
    -------
    `LoadedModel`; ``config`` holds ``preprocess``, ``task`` and ``pretrained_cfg`` (mean, std).

    Raises
    ------
    SpcxrError
        not a run or model folder, a torn file, or weights that are not those of the config.
    """
    folder = _model_folder(Path(path))
    config = _read_json(folder / "config.json")
    for key in ("model_args", "pretrained_cfg", "preprocess", "spcxr_version"):
        if key not in config:
            raise SpcxrError(f"{folder / 'config.json'}: {key} is missing; export the model again")
    encoder = _encoder_from(config, folder / "config.json")
    report = load_encoder_weights(encoder, folder)
    if report.unexpected or report.converted:
        raise SpcxrError(f"{folder}: weights are not those of config.json: {report}")
    head = folder / "head.safetensors"
    if (config.get("task") is not None) != head.is_file():
        raise SpcxrError(f"{folder}: task and head.safetensors go together; export it again")
    state = read_tensors(head) if head.is_file() else None
    return LoadedModel(encoder.eval(), config, state, folder)


def load_encoder_weights(encoder: VisionTransformer, path: str | Path) -> LoadReport:
    """Fill ``encoder`` from a run, a model folder, or weights of another library's making.

    Those are files (`weight_files.SUFFIXES`) and folders of timm, DINO, DINOv2, MAE, medical_mae,
    or Hugging Face's ViT and Dinov2 (RAD-DINO); their names become ours as `models.foreign` says.
    The channels of the first layer are converted (3 -> 1 by the sum of the filters, 1 -> 3 by a
    third of the filter: the same answer to a grey image given thrice) and the positions resampled
    to the encoder's grid. Everything else must match: a part of the encoder without weights, or
    weights of an encoder of another build, are refused with nothing changed.

    Returns
    -------
    `LoadReport`; ``missing`` is empty, ``unexpected`` names heads and decoders left aside.

    Raises
    ------
    SpcxrError
        a file that cannot be read or holds code, names or shapes that do not match, an encoder
        that computes something else, values that are not finite.
    """
    return fill_encoder(encoder, _weights_at(Path(path)), Path(path))


def fill_encoder(encoder: VisionTransformer, found: Weights, path: Path) -> LoadReport:
    """`load_encoder_weights` of tensors; an encoder on the meta device is brought to the CPU."""
    wanted = encoder.state_dict()
    if found.heads not in (None, encoder.heads):
        raise SpcxrError(
            f"{path}: attends with {found.heads} heads, this encoder with {encoder.heads}; choose "
            "the --model that it was trained as"
        )
    state = found.state
    converted = (*found.converted, *_convert(state, encoder, found.grid, path))
    report = LoadReport(
        matched=tuple(k for k in wanted if k in state and state[k].shape == wanted[k].shape),
        missing=tuple(k for k in wanted if k not in state),
        unexpected=(*found.aside, *(k for k in state if k not in wanted)),
        converted=converted,
    )
    _refuse_misfits(report, state, encoder, path)
    meta = encoder.cls_token.is_meta  # then there is nothing to copy into: copies become its own
    copies = {k: state[k].to(torch.float32, copy=meta).contiguous() for k in wanted}
    encoder.load_state_dict(copies, assign=meta)
    return report


def _weights_at(path: Path) -> Weights:
    """The encoder's tensors of another library, or of one of our own folders as they are."""
    if is_foreign(path):
        return read_foreign(path)
    folder = _model_folder(path)
    source = _encoder_from(_read_json(folder / "config.json"), folder / "config.json")
    state = read_tensors(folder / "model.safetensors")
    return Weights(state, heads=source.heads, grid=source.grid)


def _convert(
    state: dict[str, Tensor],
    encoder: VisionTransformer,
    grid: tuple[int, int] | None,
    path: Path,
) -> tuple[str, ...]:
    """Adapt channels and positions in place; say what was done."""
    done = []
    filters = state.get(PATCH_WEIGHT)
    if filters is not None and filters.ndim == 4 and filters.shape[1] != encoder.channels:
        state[PATCH_WEIGHT] = convert_channels(filters, encoder.channels)
        done.append(f"{PATCH_WEIGHT}: {filters.shape[1]} -> {encoder.channels} channels")
    positions = state.get(POSITIONS)
    if positions is not None and positions.ndim == 3:
        if grid is None and lack_cls_position(positions.shape[1], encoder.grid):
            positions = state[POSITIONS] = F.pad(positions, (0, 0, 1, 0))
            done.append(f"{POSITIONS}: a zero for the cls token, which had no position")
        source = grid or assumed_grid(positions.shape[1] - 1, encoder.grid, path)
        if source != encoder.grid:
            state[POSITIONS] = resize_positions(positions, source, encoder.grid)
            done.append(f"{POSITIONS}: {source[0]}x{source[1]} -> %dx%d patches" % encoder.grid)
    return tuple(done)


def convert_channels(filters: Tensor, channels: int) -> Tensor:
    """Patch filters ``[D, C, P, P]`` for another channel count: 3 -> 1 sum, 1 -> 3 a third each.

    Raises
    ------
    SpcxrError
        any other pair of counts.

    >>> convert_channels(torch.ones(8, 3, 16, 16), 1).shape
    torch.Size([8, 1, 16, 16])
    """
    pair = (filters.shape[1], channels)
    if pair == (3, 1):
        return filters.sum(1, keepdim=True)
    if pair == (1, 3):
        return filters.expand(-1, 3, -1, -1) / 3.0
    raise SpcxrError(f"weights of {pair[0]} channels for an encoder of {pair[1]}; only 1 and 3 mix")


def _refuse_misfits(
    report: LoadReport, state: dict[str, Tensor], encoder: VisionTransformer, path: Path
) -> None:
    """Raise unless each tensor of the encoder is there, fits and is finite, and none is left."""
    wanted = encoder.state_dict()
    misfits = [
        f"{k} {list(state[k].shape)} for {list(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    foreign = tuple(k for k in state if k not in wanted)
    if report.missing or misfits or foreign:
        raise SpcxrError(
            f"{path}: not the weights of this encoder: missing {_listed(report.missing)}; "
            f"unexpected {_listed(foreign)}; other shape {_listed(tuple(misfits))}; matched "
            f"{len(report.matched)} of {len(wanted)}; {_remedy(report, state, encoder)}"
        )
    broken = tuple(k for k in wanted if not all(v.isfinite() for v in state[k].aminmax()))
    if broken:
        raise SpcxrError(f"{path}: values that are not finite in {_listed(broken)}; retrain it")


def _remedy(report: LoadReport, state: dict[str, Tensor], encoder: VisionTransformer) -> str:
    """Which of our sizes the tensors are, if any, and the flags that choose it."""
    filters = state.get(PATCH_WEIGHT, torch.empty(0))
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    named = [
        n for n, s in VIT_SIZES.items() if filters.ndim == 4 and s[:2] == (len(filters), depth)
    ]
    if any(k.startswith("norm.") for k in report.missing) and any(
        k.startswith("fc_norm.") for k in report.unexpected
    ):
        return (
            "it was fine-tuned on pooled patches and lost its final norm: give the pretrained one"
        )
    if not named:
        return "check the model's size and patch_px"
    patch_px = filters.shape[2]
    if (len(filters), depth, patch_px) == (encoder.width, encoder.depth, encoder.patch_px):
        return "its size is the right one, its build another: choose a plain ViT's weights"
    return f"this file is a {named[0]}/{patch_px}: choose --model {named[0]} --patch-px {patch_px}"
