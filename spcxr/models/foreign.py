"""Weights of other libraries under our (timm's) names: timm, DINO, DINOv2, MAE, Hugging Face.

What can be rewritten exactly is rewritten and said: q, k and v become one projection, LayerScale is
multiplied into the layer before it. What this encoder cannot compute is refused by name.

Names were taken from the state dicts of timm, transformers (``ViTModel``, ``ViTMAEModel``,
``Dinov2Model``; RAD-DINO is one) and the checkpoints of facebookresearch's dino, dinov2 and mae
(medical_mae writes the same); no code of theirs is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.models.weight_files import SUFFIXES, read_checkpoint

# --- tables ---------------------------------------------------------------------------------

# The dictionary of weights inside a checkpoint, best first: an average of the weights (DINO's
# teacher, an EMA) is what its makers evaluate.
CONTAINERS = (
    "teacher",
    "model_ema",
    "state_dict_ema",
    "ema",
    "model",
    "state_dict",
    "model_state_dict",
    "encoder",
    "backbone",
    "student",
)
# The one tensor that every encoder has: what stands before it is the encoder's prefix
# (``module.``, ``backbone.``, ``vit.``, ...).
TIMM_PATCHES = "patch_embed.proj.weight"
HF_PATCHES = "embeddings.patch_embeddings.projection.weight"

# DINOv2 trains in chunks of blocks: the second number is the block's.
TIMM = {r"blocks\.\d+\.(\d+)\.": r"blocks.\1."}
# Files say ``encoder.layer.0.attention.attention.query``; the state dicts of transformers 5 say
# ``layers.0.attention.q_proj``.
BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
HF = {
    r"embeddings\.(cls_token|mask_token)$": r"\1",
    r"embeddings\.position_embeddings$": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"layernorm\.": "norm.",
    BLOCK + r"attention\.(?:attention\.query|q_proj)\.": r"blocks.\1.attn.q.",
    BLOCK + r"attention\.(?:attention\.key|k_proj)\.": r"blocks.\1.attn.k.",
    BLOCK + r"attention\.(?:attention\.value|v_proj)\.": r"blocks.\1.attn.v.",
    BLOCK + r"attention\.(?:output\.dense|o_proj)\.": r"blocks.\1.attn.proj.",
    BLOCK + r"(?:norm1|layernorm_before)\.": r"blocks.\1.norm1.",
    BLOCK + r"(?:norm2|layernorm_after)\.": r"blocks.\1.norm2.",
    BLOCK + r"(?:mlp\.fc1|intermediate\.dense)\.": r"blocks.\1.mlp.fc1.",
    BLOCK + r"(?:mlp\.fc2|output\.dense)\.": r"blocks.\1.mlp.fc2.",
    BLOCK + r"layer_scale([12])\.lambda1$": r"blocks.\1.ls\2.gamma",
}
# Parts of other encoders, by the names they go by, that ours has nothing to put in place of.
UNLIKE = {
    r"(reg_token|register_tokens|storage_tokens)$": "register tokens",
    r"\.mlp\.(w12|w1|w2|w3|weights_in|weights_out|gate_proj|fc1_g)\.": "a gated MLP (SwiGLU)",
    r"\.(q_norm|k_norm|query_norm|key_norm)\.": "normalised queries and keys",
    r"relative_position|rel_pos": "relative position biases",
    r"(^|\.)rope": "rotary positions",
    r"(dist_token|distillation_token)$": "a second token (DeiT's distillation)",
    r"(^|\.)(norm_pre|pre_layrnorm)\.": "a norm before the blocks",
    r"\.lora_|\.base_layer\.": "LoRA adapters, which are to be merged first",
}
# What a file may hold beside the encoder without changing the encoder's output.
BESIDE_ENCODER = (
    "head.",
    "head_dist.",
    "fc_norm.",
    "pre_logits.",
    "decoder",
    "mask_token",
    "pooler.",
    "classifier.",
    "dino_head.",
    "ibot_head.",
)
NORM_EPS = 1e-6


# --- from a path to our names ---------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Tensors by our names; names of those set aside; what was rewritten how.

    ``heads`` and ``grid`` (rows, columns of the positions) are None where the file does not say.
    """

    state: dict[str, Tensor]
    aside: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    heads: int | None = None
    grid: tuple[int, int] | None = None


def is_foreign(path: str | Path) -> bool:
    """Whether ``path`` is a file of weights, or a folder of timm's or Hugging Face's making.

    >>> is_foreign("mae_pretrain_vit_base.pth"), is_foreign("runs/a")
    (True, False)
    """
    path = Path(path)
    if not path.is_dir():
        return path.suffix in SUFFIXES
    config = settings_beside(path)
    return bool(config.keys() & {"model_type", "architecture"}) and "spcxr_version" not in config


def read_foreign(path: Path) -> Weights:
    """The encoder of a weights file, or of a folder that holds one, under our names.

    Raises
    ------
    SpcxrError
        a file that cannot be read (`read_checkpoint`), that holds no encoder or several, or one
        that computes something else than ours.
    """
    if path.is_dir():
        path = _weights_in(path)
    tensors, said = _unwrap(read_checkpoint(path), path)
    prefix, note = _prefix(tensors, path)
    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    aside = [k for k in tensors if not k.startswith(prefix)]
    table = HF if HF_PATCHES in inside else TIMM
    config = settings_beside(path.parent) if table is HF else {}
    _refuse_unlike(inside, config, path)
    state = {_renamed(name, table): tensor for name, tensor in inside.items()}
    if len(state) != len(inside):
        raise SpcxrError(f"{path}: several tensors would bear one name; save one encoder alone")
    aside += [k for k in state if k.startswith(BESIDE_ENCODER)]
    state = {k: v for k, v in state.items() if not k.startswith(BESIDE_ENCODER)}
    converted = [*said, *note, *_join_qkv(state, path), *_fold_layer_scale(state, path)]
    eps = config.get("layer_norm_eps", NORM_EPS)
    if eps != NORM_EPS:
        converted.append(f"LayerNorm eps: {eps:g} -> {NORM_EPS:g}")
    return Weights(state, tuple(aside), tuple(converted), config.get("num_attention_heads"))


def _weights_in(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise SpcxrError(f"{folder}: no model.safetensors or pytorch_model.bin; give the weights file")


def settings_beside(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """``config.json`` of a timm or Hugging Face folder; nothing where there is none."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SpcxrError(f"{file}: not readable as JSON ({error}); copy it again") from error
    return found if isinstance(found, dict) else {}


def _unwrap(found: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Go down the containers to the tensors; say which was chosen where there was a choice."""
    said = []
    while inner := [k for k in CONTAINERS if isinstance(found.get(k), Mapping)]:
        if inner[1:]:
            said.append(f"took {inner[0]!r} of the file's {', '.join(sorted(inner))}")
        found = found[inner[0]]
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        names = ", ".join(str(k) for k in list(found)[:8]) or "nothing"
        raise SpcxrError(f"{path}: no weights by name in it (it holds {names}); save a state dict")
    return tensors, said


def _prefix(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, list[str]]:
    """What stands before the encoder's names; the teacher's where there are two encoders."""
    endings = (TIMM_PATCHES, HF_PATCHES)
    anchor = re.compile(rf"(|.*\.)({'|'.join(map(re.escape, endings))})$")
    found = [match.group(1) for name in tensors if (match := anchor.match(name))]
    if len(found) == 1:
        return found[0], []
    if not found:
        names = ", ".join(list(tensors)[:8])
        raise SpcxrError(
            f"{path}: no ViT encoder in it (no {endings[0]}, no {endings[1]}; it begins with "
            f"{names}); give a ViT's weights"
        )
    teachers = [p for p in found if {"teacher", "ema", "model_ema"} & set(p.split("."))]
    if len(teachers) != 1:
        raise SpcxrError(f"{path}: several encoders: {', '.join(found)}; save one of them alone")
    others = ", ".join(p for p in found if p != teachers[0])
    return teachers[0], [f"took {teachers[0]!r}, not {others!r}"]


def _refuse_unlike(names: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    """Refuse an encoder that ours cannot stand for, saying what it has and where."""
    for pattern, what in UNLIKE.items():
        if found := [name for name in names if re.search(pattern, name)]:
            raise SpcxrError(
                f"{path}: has {what} ({found[0]}), which this encoder does not compute; choose a "
                "plain ViT's weights"
            )
    for name, second in names.items():
        first = names.get(name.replace("mlp.fc2.weight", "mlp.fc1.weight"), second)
        if name.endswith("mlp.fc2.weight") and first.shape[:1] != second.shape[1:2]:
            raise SpcxrError(
                f"{path}: has a gated MLP ({name}), which this encoder does not compute; choose a "
                "plain ViT's weights"
            )
    if config.get("hidden_act", "gelu") != "gelu":
        raise SpcxrError(
            f"{path}: its config says hidden_act {config['hidden_act']!r}, this encoder has the "
            "exact gelu; choose a plain ViT's weights"
        )
    if not any(name.endswith("cls_token") for name in names):
        raise SpcxrError(f"{path}: has no cls token, which this encoder starts from; choose others")


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, ours in table.items():
        made, count = re.subn("^" + pattern, ours, name)
        if count:
            return made
    return name


# --- exact rewriting ------------------------------------------------------------------------


def _join_qkv(state: dict[str, Tensor], path: Path) -> list[str]:
    """Three projections into one, in place: rows of q, then k, then v."""
    firsts = [k for k in state if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", k)]
    for first in firsts:
        names = [first.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if missing := [n for n in names if n not in state]:
            raise SpcxrError(f"{path}: {first} without {missing[0]}; the file is not whole")
        state[first.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(n) for n in names])
    blocks = len({k.split(".")[1] for k in firsts})
    return [f"attn.qkv: joined from q, k, v ({blocks} blocks)"] if blocks else []


def _fold_layer_scale(state: dict[str, Tensor], path: Path) -> list[str]:
    """Multiply LayerScale (arXiv 2103.17239) into the projection before it, in place.

    ``gamma * (W x + b) = (gamma W) x + gamma b``: exact, but for float32's rounding.
    """
    said = []
    for scale, layer in {"ls1": "attn.proj", "ls2": "mlp.fc2"}.items():
        gammas = [k for k in state if re.fullmatch(rf"blocks\.\d+\.{scale}\.gamma", k)]
        for name in gammas:
            gamma = state.pop(name).float()
            for kind in ("weight", "bias"):
                target = name.replace(f"{scale}.gamma", f"{layer}.{kind}")
                given = state.get(target)
                if given is None or given.shape[0] != gamma.numel():
                    raise SpcxrError(f"{path}: {name} does not fit {target}; the file is not whole")
                state[target] = given.float() * gamma.view(-1, *(1,) * (given.ndim - 1))
        if gammas:
            said.append(f"{layer}: times {scale}.gamma ({len(gammas)} blocks)")
    return said
