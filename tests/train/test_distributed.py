"""Who is who among processes: torchrun's and SLURM's variables; what is plain for one alone."""

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.train.distributed import World, find_ranks, first_node, join_world, own_gpu

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[3-4]",
    "SLURM_JOB_ID": "41234567",
}


def test_torchrun_wins_over_slurm():
    """torchrun inside an srun step of its own: its processes are the ranks."""
    found = find_ranks({**SLURM, **TORCHRUN})
    assert (found.rank, found.size, found.local_rank) == (1, 4, 1)
    assert (found.address, found.port) == ("n1", 29500)


def test_slurm_step():
    found = find_ranks(SLURM)
    assert (found.rank, found.size, found.local_rank, found.address) == (2, 4, 0, "gpu3")
    assert 20000 <= found.port < 40000
    told = find_ranks({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (told.address, told.port) == ("a", 1)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
        {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        # A shell of salloc: many tasks are allocated, none is a step's.
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]"},
    ],
)
def test_alone(env):
    assert find_ranks(env) is None


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set, RANK is not; start with torchrun"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4 processes"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'; it must be a number"),
        ({**SLURM, "SLURM_JOB_NODELIST": ""}, "set MASTER_ADDR to the first node"),
    ],
)
def test_variables_that_cannot_be(env, said):
    with pytest.raises(SpcxrError, match=said):
        find_ranks(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[10-12,20]", "n10"), ("a-[1]-x,b", "a-1-x"), ("n01,n[2-3]", "n01")],
)
def test_first_node(nodes, first):
    assert first_node(nodes) == first


def test_a_gpu_of_ones_own():
    assert [own_gpu(n, 4) for n in range(4)] == [0, 1, 2, 3]
    with pytest.raises(SpcxrError, match="local rank 4 has no GPU of 4"):
        own_gpu(4, 4)


def test_alone_every_method_is_plain(monkeypatch):
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    with join_world("cpu") as world:
        assert (world.first, world.size) == (True, 1)
        assert world.add_up(torch.ones(2)).tolist() == [1.0, 1.0]
        assert world.once(lambda: "made") == "made"
    assert not World(torch.device("cpu"), 1, 2).first
