import math

import pytest

from spcxr.train.schedule import cosine


def test_warm_up_is_linear_and_wastes_no_step():
    found = [cosine(s, 100, start=1.0, end=0.1, warmup=4, warmup_start=0.5) for s in range(5)]
    assert found == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])


def test_cosine_hits_its_ends_and_its_middle():
    assert cosine(0, 10, start=0.04, end=0.4) == pytest.approx(0.04)
    assert cosine(5, 10, start=0.04, end=0.4) == pytest.approx(0.22)
    assert cosine(10, 10, start=0.04, end=0.4) == pytest.approx(0.4)
    assert cosine(1000, 10, start=0.04, end=0.4) == pytest.approx(0.4)


def test_cosine_after_warm_up_equals_the_formula():
    for step in range(3, 20):
        wanted = 1e-6 + (5e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 3) / 17))
        assert cosine(step, 20, start=5e-4, end=1e-6, warmup=3) == pytest.approx(wanted)


def test_warm_up_longer_than_the_run_stays_below_its_top():
    found = [cosine(s, 3, start=1.0, end=0.0, warmup=9) for s in range(3)]
    assert found == sorted(found)
    assert found[-1] < 1.0
