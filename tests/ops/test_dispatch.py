"""The dispatcher: a reason for everything, no silent fallback."""

import logging
import shutil

import pytest
import torch

from spcxr.ops import dispatch
from spcxr.ops.checks import constant_when_traced
from spcxr.ops.group_mask import group_mask

IDS = torch.arange(3)


@pytest.fixture
def fresh():
    """The dispatcher before its first choice; what it had loaded comes back afterwards."""
    caches = (dispatch.native, dispatch._first_that_can)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_by_name_it_serves_or_raises():
    reason = dispatch.unavailable("group_mask", "triton", "cpu")
    if reason is None:
        pytest.skip("TRITON_INTERPRET=1: Triton serves on the CPU")
    with pytest.raises(dispatch.BackendUnavailable, match="'triton' cannot serve"):
        group_mask(IDS, seed=0, epoch=0, grid=(4, 4), backend="triton")


def test_without_the_library_the_reference_serves_and_says_so_once(
    monkeypatch, tmp_path, caplog, fresh
):
    monkeypatch.setattr(dispatch, "LIBRARY", tmp_path / "_native_ops.so")
    with caplog.at_level(logging.INFO, logger="spcxr.ops.dispatch"):
        for _ in range(2):
            group_mask(IDS, seed=0, epoch=0, grid=(4, 4))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "reference serves" in record.message
    assert "was not built" in record.message
    with pytest.raises(dispatch.BackendUnavailable, match="was not built"):
        group_mask(IDS, seed=0, epoch=0, grid=(4, 4), backend="native")
    rows = {row["backend"]: row for row in dispatch.report()}
    assert not rows["native"]["available"]
    assert rows["reference"]["used"]
    assert "was not built" in dispatch.build_info()["library"]


@pytest.mark.parametrize("content", [b"", b"\x7fELF torn"])
def test_a_torn_library_is_a_reason(monkeypatch, tmp_path, fresh, content):
    torn = tmp_path / "_native_ops.so"
    torn.write_bytes(content)
    monkeypatch.setattr(dispatch, "LIBRARY", torn)
    reason = dispatch.unavailable("group_mask", "native", "cpu")
    assert str(torn) in reason
    assert "does not load" in reason
    assert "\n" not in reason


def test_every_row_has_a_reason():
    rows = dispatch.report()
    assert len(rows) == len(dispatch.VERBS) * len(dispatch.BACKENDS)
    assert all(row["reason"] for row in rows)
    assert all(sum(r["used"] for r in rows if r["verb"] == v) == 1 for v in dispatch.VERBS)


def test_devices_nobody_has_kernels_for():
    assert "'xpu'" in (dispatch.unavailable("group_mask", "native", "xpu") or "'xpu' not built")
    assert dispatch.unavailable("group_mask", "triton", "xpu")
    assert dispatch.unavailable("group_mask", "reference", "xpu") is None


@pytest.mark.skipif(dispatch.native().reason is not None, reason=str(dispatch.native().reason))
def test_build_info_tells_what_was_built():
    info = dispatch.build_info()
    assert info["library"] == str(dispatch.LIBRARY)
    assert set(info) == {"library", "cuda", "nvcc", "torch", "compiler", "cpu_features"}
    assert info["torch"][0].isdigit()
    if shutil.which("nvcc") is None and info["nvcc"] == "none":
        assert "nvcc" in info["cuda"] or "OFF" in info["cuda"]


def test_the_mark_for_dynamo_is_the_one_that_torch_sets():
    """Ours is set by hand, since torch's decorator imports Dynamo."""

    def ours():
        return 1

    def torchs():
        return 1

    assert vars(constant_when_traced(ours)) == vars(torch.compiler.assume_constant_result(torchs))
