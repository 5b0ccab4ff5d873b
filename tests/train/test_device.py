import logging

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.train.device import autocast, pick_device, pick_precision

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
    ("found", "wanted"),
    [
        ({"avx2": True}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_tile": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_auto_means_bf16_only_where_the_cpu_has_it(monkeypatch, caplog, found, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    with caplog.at_level(logging.INFO, logger="spcxr"):
        assert pick_precision("auto", CPU) == wanted
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == (wanted == "fp32")
    assert all("AMX" in line for line in lines)


def test_what_is_asked_for_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert pick_precision("bf16", CPU) == "bf16"


def test_autocast():
    a = torch.ones(2, 2)
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
