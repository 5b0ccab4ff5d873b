"""Distances between the borders of masks: MONAI's numbers, and what is said of empty masks."""

import time
import warnings

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from spcxr.errors import SpcxrError
from spcxr.evaluate.surface import borders, surface_distances


def blobs(count, side, seed):
    """Two ellipses each, some of them cut by the image's border."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    made = np.zeros((count, side, side), bool)
    for mask in made:
        for middle in (0.3, 0.7):
            at, tall, wide = rng.normal(0.5, 0.05), rng.uniform(0.25, 0.55), rng.uniform(0.1, 0.2)
            mask |= ((x - rng.normal(middle, 0.03)) / wide) ** 2 + ((y - at) / tall) ** 2 < 1
    return made


def by_monai(predicted, truth, spacing):
    given = [torch.tensor(m[:, None]).float() for m in (predicted, truth)]
    rest = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own of its next version
        found = [
            compute_hausdorff_distance(*given, percentile=95, **rest),
            compute_hausdorff_distance(*given, **rest),
            compute_average_surface_distance(*given, symmetric=True, **rest),
        ]
    return torch.stack(found, -1)[:, 0].numpy()


def test_distances_equal_monai_in_px_and_mm():
    predicted, truth = blobs(12, 64, 0), blobs(12, 64, 1)
    predicted[3] = np.random.default_rng(2).random((64, 64)) < 0.1
    size = np.random.default_rng(3).uniform(0.1, 3.0, (12, 2))
    size[:4, 1] = size[:4, 0]
    px, mm = surface_distances(predicted, truth, pixel_mm=size)
    np.testing.assert_allclose(px, by_monai(predicted, truth, None), rtol=1e-4)
    np.testing.assert_allclose(mm, by_monai(predicted, truth, size.tolist()), rtol=1e-4)
    assert (px[:, 0] <= px[:, 1]).all()


def test_distances_by_hand():
    one, other = np.zeros((2, 1, 30, 30), bool)
    one[0, 10, 5:25] = True
    other[0, 13, 5:25] = True
    other[0, 20, 5] = True  # one pixel of 21: above the 95th percentile
    px, mm = surface_distances(one, other, pixel_mm=np.array([[0.5, 2.0]]))
    assert px[0, 1] == 10
    assert px[0, 0] == 3
    assert px[0, 2] == pytest.approx((40 * 3 + 10) / 41)
    np.testing.assert_allclose(mm, px / 2)  # all of it is along the columns


def test_an_empty_mask_has_no_distance():
    empty, full = np.zeros((1, 8, 8), bool), np.ones((1, 8, 8), bool)
    for pair in ((empty, empty), (full, empty), (empty, full)):
        px, mm = surface_distances(*pair, pixel_mm=np.ones((1, 2)))
        assert np.isnan([px, mm]).all()
    assert (surface_distances(full, full)[0] == 0).all()


def test_without_spacing_there_are_no_millimetres():
    masks = blobs(3, 32, 0)
    size = np.array([[1.0, 1.0], [np.nan, 1.0], [np.nan, np.nan]])
    px, mm = surface_distances(masks, masks[::-1], pixel_mm=size)
    assert np.isfinite(px).all()
    assert np.isnan(mm).all(1).tolist() == [False, True, True]
    assert np.isnan(surface_distances(masks, masks)[1]).all()


def test_where_the_known_ends_there_is_no_border():
    one, other = np.zeros((2, 1, 20, 20), bool)
    one[0, 4:16, 4:16], other[0, 4:16, 2:16] = True, True
    known = np.ones((1, 20, 20), bool)
    known[0, :, 10:] = False
    kept = borders(one, known)
    assert not kept[0, :, 10:].any()
    assert not kept[0, 6:14, 9].any()  # beside what is unknown
    px, _ = surface_distances(one, other, known)
    assert px[0, 1] == 2
    hidden = other | ~known  # whatever stands where nothing is known
    np.testing.assert_array_equal(px, surface_distances(one, hidden, known)[0])
    assert np.isnan(surface_distances(one, other, np.zeros_like(known))[0]).all()


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(SpcxrError, match="one size"):
        surface_distances(np.zeros((1, 2, 2)), np.zeros((1, 3, 2)))


@pytest.mark.slow
def test_a_thousand_masks_take_seconds():
    predicted, truth = blobs(1000, 256, 0), blobs(1000, 256, 1)
    start = time.process_time()
    surface_distances(predicted, truth, pixel_mm=np.full((1000, 2), [0.7, 0.8]))
    assert time.process_time() - start < 15
