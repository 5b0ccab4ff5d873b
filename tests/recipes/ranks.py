"""Several processes of one command, as torchrun or srun would start them."""

import os
import socket
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command, *, ranks=1, slurm=False):
    """The processes, each with one thread."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    port, made = str(free_port()), []
    for rank in range(ranks):
        if ranks == 1:
            env = {}
        elif slurm:
            env = {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NUM_TASKS": str(ranks),
                "SLURM_JOB_NODELIST": "localhost",
                "SLURM_JOB_ID": "7",
                "MASTER_PORT": port,
            }
        else:
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        made.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**clean, "OMP_NUM_THREADS": "1", **env},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    return made


def end(processes, code=0, limit_s=240):
    """What they said, once all have ended with this code."""
    said = [process.communicate(timeout=limit_s)[1] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def same_weights(folder, other):
    """Fails unless two runs have learned the same encoder and head, but for what has no gradient.

    The bias of keys adds one number to all logits of a query, which softmax does not feel; the
    bias of a convolution adds one to a whole plane, which the instance norm behind it takes off.
    Their gradients are rounding alone, and AdamW makes whole steps of it.
    """
    for name in ("model", "head"):
        one, two = (load_file(f / "model" / f"{name}.safetensors") for f in (folder, other))
        for key, value in one.items():
            felt = torch.ones_like(value)
            if key.endswith("qkv.bias"):
                felt.chunk(3)[1].zero_()
            if key.endswith(".conv.bias"):  # of MONAI's blocks, each with its norm
                felt.zero_()
            assert torch.allclose(value * felt, two[key] * felt, rtol=1e-3, atol=2e-5), key
