"""Processes that train together: who they are, what they tell each other, how they end.

Started by torchrun, or by SLURM's ``srun``; without either a process is alone. NCCL on GPUs, gloo
on CPUs. Each rank watches the next one: when one dies, the others end with its name within
`SILENT_S`, instead of waiting in a collective for ever.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spcxr.errors import Interrupted, SpcxrError
from spcxr.train.device import pick_device

SILENT_S = 30.0  # a rank that says nothing for so long is dead
PULSE_S = 1.0
GRACE_S = 5.0  # for a rank to end by itself, with its own words, once another one has failed
COLLECTIVE = datetime.timedelta(minutes=30)  # rank 0 may be saving; who is dead is known before


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job, and where they meet."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def find_ranks(env: Mapping[str, str]) -> Ranks | None:
    """What torchrun or SLURM says of this process; None where it is alone.

    A SLURM step of several tasks counts (``srun``), an allocation by itself does not. Its tasks
    meet on the first node of the job, on a port made from the job's number.

    Raises
    ------
    SpcxrError
        variables that contradict each other or are half there.

    >>> find_ranks({}) is None
    True
    >>> find_ranks({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
    ...             "SLURM_JOB_NODELIST": "gpu[07-08],n1", "SLURM_JOB_ID": "123"})
    Ranks(rank=3, size=4, local_rank=1, address='gpu07', port=20123)
    """
    if "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in env]:
            raise SpcxrError(f"WORLD_SIZE is set, {missing[0]} is not; start with torchrun")
        rank, size, local, port = (_number(env, n) for n in (*names[:3], names[4]))
        found = Ranks(rank, size, local, env["MASTER_ADDR"], port)
    elif _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_JOB_NODELIST", "")
        found = Ranks(
            _number(env, "SLURM_PROCID"),
            _number(env, "SLURM_STEP_NUM_TASKS"),
            _number(env, "SLURM_LOCALID", 0),
            env.get("MASTER_ADDR") or first_node(nodes),
            _number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000),
        )
    else:
        return None
    if not 0 <= found.rank < found.size:
        raise SpcxrError(
            f"rank {found.rank} of {found.size} processes; start with torchrun or srun"
        )
    return found if found.size > 1 else None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise SpcxrError(f"{name} is {text!r}; it must be a number: start with torchrun or srun")
    return int(text)


def first_node(nodes: str) -> str:
    """The first host of a SLURM list.

    >>> first_node("gpu[07-08,11],n1"), first_node("n1,n2"), first_node("a[3]-ib")
    ('gpu07', 'n1', 'a3-ib')
    """
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if not found:
        raise SpcxrError(f"SLURM_JOB_NODELIST is {nodes!r}; set MASTER_ADDR to the first node")
    return "".join(part or "" for part in found.groups())


class World:
    """The processes of a run as one of them sees them. Alone, every method is a plain one."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size
        self._store: dist.Store | None = None
        self._told = 0

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place; no device is waited for."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def once(self, work: Callable[[], str]) -> str:
        """Let rank 0 do something, however long it takes; every rank gets what it returned.

        Raises
        ------
        SpcxrError
            on every rank what rank 0 met.
        """
        if self._store is None:
            return work()
        self._told += 1
        key = f"once/{self._told}"
        if self.first:
            try:
                answer = {"made": work()}
            except SpcxrError as error:
                self._store.set(key, json.dumps({"error": str(error)}))
                raise
            self._store.set(key, json.dumps(answer))
            return answer["made"]
        while not self._store.check([key]):
            time.sleep(0.1)
        answer = json.loads(self._store.get(key))
        if "error" in answer:
            raise SpcxrError(answer["error"])
        return str(answer["made"])


def own_gpu(local_rank: int, seen: int) -> int:
    """The number of this process's GPU among those it sees; the one, where it sees no other.

    >>> own_gpu(3, 8), own_gpu(3, 1)  # the latter: srun --gpus-per-task=1
    (3, 0)
    """
    if seen == 1:
        return 0
    if local_rank >= seen:
        raise SpcxrError(f"local rank {local_rank} has no GPU of {seen}; start one process a GPU")
    return local_rank


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the other processes of this job, if there are any, for as long as the block lasts.

    Parameters
    ----------
    device
        ``auto``, ``cpu`` or ``cuda``; on GPUs each local rank has its own.

    >>> with join_world("cpu") as world:
    ...     world.size, world.once(lambda: "made")
    (1, 'made')
    """
    found = find_ranks(os.environ)
    here = pick_device(device)
    if found is None:
        yield World(here)
        return
    if here.type == "cuda":
        here = torch.device("cuda", own_gpu(found.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(here)
    os.environ |= {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.size),
        "MASTER_ADDR": found.address,
        "MASTER_PORT": str(found.port),
    }
    store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE))
    dist.init_process_group(
        "nccl" if here.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=found.rank,
        world_size=found.size,
        timeout=COLLECTIVE,
    )
    world = World(here, found.rank, found.size)
    world._store = dist.PrefixStore("spcxr", store)
    watch = Watch(store.clone(), found.rank, found.size)
    watch.start()
    try:
        with _naming_the_dead(watch):
            yield world
            dist.barrier()
            watch.stop("done")
            dist.barrier()  # rank 0 keeps the store that the others' watches read
    finally:
        watch.stop("done")
        dist.destroy_process_group()


@contextmanager
def _naming_the_dead(watch: Watch) -> Iterator[None]:
    """Tell the others of an error of ours; where a collective broke, wait for the dead's name."""
    try:
        yield
    except Interrupted:
        raise  # all ranks stop at the same step
    except SpcxrError as error:
        watch.stop(f"failed: {error}")
        raise
    except RuntimeError as error:
        # gloo's errors have no type of their own.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            # A collective broke off because somebody is gone: the watch ends this process by name.
            watch.broken.set()
            watch.join(SILENT_S + 5 * PULSE_S)
        watch.stop(f"failed: {str(error).splitlines()[0]}")
        raise
    except BaseException as error:
        watch.stop(f"failed: {type(error).__name__}")
        raise


class Watch(threading.Thread):
    """Says each second that this rank lives, and ends the process when another one died."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.store = dist.PrefixStore("pulse", store)
        self.rank, self.other = rank, (rank + 1) % size
        self.broken = threading.Event()  # a collective: nothing more can be done here
        self._size, self._end = size, threading.Event()
        self._heard, self._at = "", time.monotonic()

    def run(self) -> None:
        """Until `stop`, or until somebody died."""
        me = f"{socket.gethostname()} {os.getpid()}"
        count = 0
        while not self._end.wait(PULSE_S if count else 0.0):
            count += 1
            try:
                self.store.set(str(self.rank), f"{me} {count}")
                dead = self._dead()
                if dead and not self.store.check(["dead"]):
                    self.store.set("dead", dead)
                said = self.store.get("dead").decode() if self.store.check(["dead"]) else ""
            except RuntimeError:
                # Rank 0 (or torchrun) keeps the store that is not there any more.
                said = "rank 0 does not answer"
            if said and not self._ends_by_itself():
                leave(said)

    def _ends_by_itself(self) -> bool:
        """Give this rank the time to meet the error itself, unless a collective of its broke."""
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and not self.broken.is_set():
            if self._end.wait(0.05):
                return True
        return self._end.is_set()

    def stop(self, last: str) -> None:
        """Stop watching; ``last`` is ``done``, or what the others shall say of this rank."""
        if self._end.is_set():
            return
        self._end.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(2 * PULSE_S)
        try:
            self.store.set(str(self.rank), last)
            if last != "done" and not self.store.check(["dead"]):
                self.store.set("dead", f"rank {self.rank} {last}")
            if last != "done" and self.rank == 0:
                self._linger()
        except RuntimeError:
            return  # the keeper of the store is gone: there is nobody to tell

    def _linger(self) -> None:
        """Keep the store until the others have read why they end, or are taking too long."""
        until = time.monotonic() + GRACE_S + 2 * PULSE_S
        for other in map(str, range(1, self._size)):
            while time.monotonic() < until:
                if self.store.check([other]) and self.store.get(other).startswith(b"failed"):
                    break
                time.sleep(0.05)

    def _dead(self) -> str:
        """What became of the next rank; nothing where it lives or is done."""
        if not self.store.check([str(self.other)]):
            said = ""
        else:
            said = self.store.get(str(self.other)).decode()
        if said == "done" or said.startswith("failed"):
            return ""  # the latter has told everybody
        if said != self._heard:
            self._heard, self._at = said, time.monotonic()
        host, _, rest = said.partition(" ")
        gone = host == socket.gethostname() and not _runs(rest.partition(" ")[0])
        if not gone and time.monotonic() - self._at < SILENT_S:
            return ""
        where = f" (process {rest.partition(' ')[0]} on {host})" if said else ""
        return f"rank {self.other}{where} died"


def _runs(process: str) -> bool:
    """Whether a process of this machine runs: it is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def leave(said: str) -> None:
    """End this process, whose main thread may wait in a collective for ever."""
    print(
        f"error: {said}; its output says why; the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
