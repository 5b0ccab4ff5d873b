"""Shared fixtures: where the real chest X-rays are, and what CI must not skip."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "open"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real chest X-rays beside the checkout; the test is skipped, with the reason, without."""
    if not SHARED.is_dir():
        if os.environ.get("SPCXR_REQUIRE_SHARED") == "1":
            pytest.fail(f"SPCXR_REQUIRE_SHARED=1, but {SHARED} is not there")
        pytest.skip("the real chest X-rays (../shared/data/open) are not beside this checkout")
    return SHARED
