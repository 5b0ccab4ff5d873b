"""Where two processes of one pretraining spend their steps: how much of the exchange is hidden.

    torchrun --standalone --nproc-per-node 2 benchmarks/profile_ranks.py [--out trace.json]

The recipe's own step (`recipes.pretrain.learn_step`) with DDP, ViT-S/16 at 224 px, 8 images a step,
on a store of noise. Rank 0 prints, a step: its time, the time that all-reduces were under way, and
the share of that in which the backward pass computed too; and what the exchange waited for alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.profiler import ProfilerActivity, profile

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store, StoreWriter
from spcxr.recipes.pretrain import Loop, learn_step, part_of
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.pretrain_start import build
from spcxr.train.checkpoint import Checkpoints
from spcxr.train.distributed import World, join_world
from spcxr.train.interrupt import Signals
from spcxr.train.journal import Silent

STEPS, WARM = 4, 2


def noise_store(folder: Path) -> str:
    names = [f"{i}.png" for i in range(64)]
    draw = np.random.default_rng(0)
    with StoreWriter(folder / "store", Preprocess(size_px=256)) as writer:
        for _ in names:
            writer.add(draw.integers(0, 256, (256, 256), np.uint8))
        columns = {"path": names, "patient_id": names, "split": ["train"] * len(names)}
        return str(writer.finish(Manifest.from_columns(columns, root=".")).path)


def spans(events, wanted) -> list[tuple[float, float]]:
    """Disjoint intervals in microseconds in which an event of such a name was under way."""
    found = sorted((e.time_range.start, e.time_range.end) for e in events if wanted(e.name))
    merged: list[list[float]] = []
    for start, end in found:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [(start, end) for start, end in merged]


def shared(first, second) -> float:
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in first for c, d in second)


def steps(world: World, folder: Path, trace: Path | None) -> None:
    store = Store.open(world.once(lambda: noise_store(folder)))
    config = PretrainConfig(data=str(store.path), out="unused", batch_size=8, device="auto")
    training = build(config, folder / "run", store, world)
    checkpoints = Checkpoints(folder / "run", writes=False)
    loop = Loop(training, "fp32", checkpoints, Silent(), Signals())
    training.stepped.train()

    def once(step: int) -> float:
        parts = [part_of(training, rows, 0) for rows in training.rows_of(step)[1]]
        began = time.perf_counter()
        learn_step(loop, parts, step)
        return 1e3 * (time.perf_counter() - began)

    for step in range(WARM):
        once(step)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        times = [once(WARM + step) for step in range(STEPS)]
    if not world.first:
        return
    exchange = spans(seen.events(), lambda name: "all_reduce" in name or "allreduce" in name)
    backward = spans(seen.events(), lambda name: name.startswith("autograd::engine::evaluate"))
    under_way = sum(end - start for start, end in exchange) / 1e3 / STEPS
    hidden = shared(exchange, backward) / 1e3 / STEPS
    print(f"step {statistics.median(times):.0f} ms on {world.size} processes")
    print(f"all-reduce under way {under_way:.1f} ms a step, {hidden / under_way:.0%} of it while")
    print(f"the backward pass computed; {under_way - hidden:.1f} ms beside it")
    if trace:
        seen.export_chrome_trace(str(trace))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write a Chrome trace of rank 0")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, join_world("auto") as world:
        steps(world, Path(place), words.out)
