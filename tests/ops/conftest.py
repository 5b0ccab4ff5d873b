"""Every op test runs on every backend; CI names those that must not skip."""

import os

import pytest

from spcxr.ops import dispatch


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request) -> str:
    """Each backend that serves here on the CPU; SPCXR_REQUIRE_BACKENDS=a,b forbids the skip."""
    reason = dispatch.unavailable("group_mask", request.param, "cpu")
    if reason is not None:
        required = os.environ.get("SPCXR_REQUIRE_BACKENDS", "").split(",")
        if request.param in required:
            pytest.fail(f"SPCXR_REQUIRE_BACKENDS names {request.param}: {reason}")
        pytest.skip(f"{request.param}: {reason}")
    return request.param
