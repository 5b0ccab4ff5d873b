import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.train import device
from spcxr.train.device import Compute, autocast, pick_device, pick_precision, why_not_bf16

CPU = torch.device("cpu")


def test_cuda_is_not_replaced_in_silence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(SpcxrError, match=r"--device cuda: .*; choose --device cpu"):
        pick_device("cuda")


def test_unknown_names_are_refused():
    with pytest.raises(SpcxrError, match="choose one of: auto, cpu, cuda"):
        pick_device("tpu")
    with pytest.raises(SpcxrError, match="choose one of: auto, bf16, fp32"):
        pick_precision("fp16", CPU)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("fpu avx2", "fp32"),
        ("avx512f avx512_vnni amx_tile", "fp32"),
        ("avx2 avx512_bf16", "bf16"),
        ("avx2 amx_bf16 amx_tile", "bf16"),
        (None, "fp32"),
    ],
)
def test_auto_means_bf16_only_where_the_cpu_has_it(monkeypatch, tmp_path, flags, wanted):
    """Read from the system: torch 2.11 may lack `torch.cpu.get_capabilities`."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(device, "CPU_INFO", file)
    assert pick_precision("auto", CPU) == wanted
    assert ("AMX" in why_not_bf16("auto", CPU)) is (wanted == "fp32")
    assert why_not_bf16("fp32", CPU) == why_not_bf16("bf16", CPU) == ""


def test_what_is_asked_for_is_kept(monkeypatch):
    monkeypatch.setattr(device, "cpu_flags", frozenset)
    assert pick_precision("bf16", CPU) == "bf16"


def test_autocast():
    a = torch.ones(2, 2)
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32
    for context in (autocast(CPU, "bf16"), Compute(1, CPU, "bf16").autocast()):
        with context:
            assert (a @ a).dtype == torch.bfloat16
