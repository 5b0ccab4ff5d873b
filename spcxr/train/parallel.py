"""One model on several processes: a copy on each (DDP), or its weights shared out (FSDP2); and rows
that are shared out between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from spcxr.train.distributed import World

Rows = NDArray[np.int64]
F = TypeVar("F", np.float32, np.float64)


def spread(module: nn.Module, world: World, *, shard: bool, methods: tuple[str, ...]) -> nn.Module:
    """What to call in a step instead of ``module``, so that gradients are means over all ranks.

    Alone it is the module. Buffers are not exchanged: what changes them must do so alike on all
    ranks.

    Parameters
    ----------
    shard
        share the weights out in place, block by block (FSDP2: ``blocks`` of any submodule), so that
        build the optimiser afterwards; else DDP.
    methods
        names of methods beside ``forward`` that use the weights.
    """
    if world.size == 1:
        return module
    if not shard:
        copies = DistributedDataParallel(module, gradient_as_bucket_view=True)
        copies.broadcast_buffers = False  # as an argument it has another name since torch 2.13
        return copies
    mesh = torch.distributed.init_device_mesh(world.device.type, (world.size,))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in methods:
        register_fsdp_forward_method(module, name)
    return module


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of all transformers inside a module: encoder, decoder, teacher."""
    return [block for part in module.modules() for block in getattr(part, "blocks", ())]


@contextmanager
def syncing(module: nn.Module, on: bool) -> Iterator[None]:
    """Exchange gradients in the backward pass of this block, or leave it to a later one."""
    if isinstance(module, DistributedDataParallel) and not on:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)
    yield


def whole(value: Tensor) -> Tensor:
    """A tensor that may be shared out, whole; every rank must ask for it.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def as_in(own: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, shared out as ``own`` is.

    >>> as_in(torch.zeros(2), torch.ones(2))
    tensor([1., 1.])
    """
    if not isinstance(own, DTensor):
        return value
    here = value.to(own.device_mesh.device_type)
    return distribute_tensor(here, own.device_mesh, own.placements, src_data_rank=None)


def predict_together(world: World, predict: Callable[[Rows], NDArray[F]], rows: Rows) -> NDArray[F]:
    """``predict(rows) (n, K)``, each rank its share of the rows; every rank gets it all."""
    if world.size == 1:
        return predict(rows)
    places = np.array_split(np.arange(len(rows)), world.size)[world.rank]
    found = predict(rows[places])
    widths = torch.zeros(world.size, device=world.device)
    widths[world.rank] = found.shape[1]
    width = int(world.add_up(widths).max())
    made = torch.zeros(len(rows), width, device=world.device, dtype=torch.from_numpy(found).dtype)
    if len(places):
        made[torch.from_numpy(places)] = torch.from_numpy(found).to(world.device)
    together: NDArray[F] = world.add_up(made).cpu().numpy()
    return together
