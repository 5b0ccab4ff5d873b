"""AdamW as vision transformers are trained with it: what decays, how fast layers move, a step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spcxr.train.parallel import whole

# Positions and the cls token are learned from nothing: pulling them to zero says nothing (DeiT).
UNDECAYED = ("pos_embed", "cls_token")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases, 1-D tensors, positions and the cls token.

    >>> decays("blocks.0.mlp.fc1.weight", torch.zeros(2, 2)), decays("cls_token", torch.zeros(1, 1))
    (True, False)
    """
    return parameter.ndim > 1 and name.split(".")[-1] not in (*UNDECAYED, "bias")


def layer_of(name: str, depth: int) -> int:
    """The layer of an encoder's parameter: 0 embedding, 1 .. depth the blocks, depth + 1 the rest.

    >>> [layer_of(n, 12) for n in ("pos_embed", "patch_embed.proj.bias", "blocks.0.x", "norm.bias")]
    [0, 0, 1, 13]
    """
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name.startswith((*UNDECAYED, "patch_embed.")) else depth + 1


def build_adamw(
    model: nn.Module,
    *,
    layer_decay: float = 1.0,
    encoder_prefix: str = "encoder.",
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient; `set_rates` gives rate and decay a step.

    Parameters
    ----------
    layer_decay
        the rate of a block over that of the next one (BEiT, arXiv 2106.08254): of a parameter of
        layer ``i`` it is ``layer_decay ** (depth + 1 - i)`` times that of the head.
    encoder_prefix
        of the names of the vision transformer's parameters; all others move at the full rate.

    >>> model = nn.ModuleDict({"encoder": nn.LayerNorm(2), "head": nn.Linear(2, 1)})
    >>> [(g["names"], g["decayed"]) for g in build_adamw(model).param_groups]
    [(['encoder.weight', 'encoder.bias', 'head.bias'], False), (['head.weight'], True)]
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = {n: n.removeprefix(encoder_prefix) for n, _ in named if n.startswith(encoder_prefix)}
    numbers = [int(m[1]) for n in inside.values() if (m := re.match(r"blocks\.(\d+)\.", n))]
    depth = max(numbers, default=-1) + 1
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        layer = layer_of(inside[name], depth) if name in inside else depth + 1
        key = (layer_decay ** (depth + 1 - layer), decays(name, parameter))
        group = groups.setdefault(
            key, {"params": [], "names": [], "rate_scale": key[0], "decayed": key[1]}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    # fused: one pass over all parameters instead of a dozen, on the CPU too.
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the learning rate and the weight decay of the coming step, group by group.

    >>> optimizer = build_adamw(nn.Linear(2, 1)); set_rates(optimizer, lr=0.1, weight_decay=0.4)
    >>> [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    [(0.1, 0.4), (0.1, 0.0)]
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate_scale"]
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


@dataclass(frozen=True)
class Step:
    """An update: loss, gradient norm before clipping, whether it was made; figures ``beside``."""

    loss: float
    grad_norm: float
    taken: bool
    beside: tuple[float, ...] = ()


def take_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, *, clip: float, beside: Tensor | None = None
) -> Step:
    """Clip the gradients to norm ``clip`` (0 = do not), update, clear them.

    Where the loss or the norm is not finite the update is left out: weights and moments stay as
    they were.

    Parameters
    ----------
    loss
        scalar, already back-propagated.
    beside
        ``[n]`` other figures to bring from the device in the same transfer.

    >>> weight = nn.Parameter(torch.ones(1)); optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> loss = (3 * weight).sum(); loss.backward()
    >>> take_step(optimizer, loss, clip=1.0), round(weight.item(), 5)
    (Step(loss=3.0, grad_norm=3.0, taken=True, beside=()), 0.0)
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf))
    # One transfer from the device for all.
    told = torch.stack([loss.detach().float(), norm.float()])
    loss_value, norm_value, *rest = torch.cat(
        [told, told[:0] if beside is None else beside]
    ).tolist()
    taken = math.isfinite(loss_value) and math.isfinite(norm_value)
    if taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(loss_value, norm_value, taken, tuple(rest))
