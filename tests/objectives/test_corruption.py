"""Crops, masks and fills: their law, what they depend on, and what they change."""

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.objectives.corruption import (
    Corruption,
    pair_up,
    sample_crops,
    sample_fill,
    sample_survivors,
    shuffle_sources,
)
from spcxr.ops.masked_patch_gather import masked_patch_gather
from spcxr.ops.patches import unpatchify
from spcxr.ops.views import FILLS, Fill, pixel_mask, whole_views

SIZE = (32, 48)
OTHER = FILLS.index("other")


def fill_for(ids, law, seed=0, epoch=0, view=0, size=SIZE):
    ids = torch.as_tensor(ids)
    return sample_fill(ids, law, seed=seed, epoch=epoch, view=view, size=size, patch_px=16)


def corrupt(clean, fill):
    """Corrupted images and the mask of pixels, by the op."""
    views = whole_views(clean, patch_px=16)
    rows = masked_patch_gather(views, fill)
    return unpatchify(rows, views.grid, 16), pixel_mask(views, fill.mask)


# --- crops ----------------------------------------------------------------------------------


def test_crops_follow_the_law():
    ids = torch.arange(4000)
    crops = sample_crops(ids, seed=1, epoch=0, source_px=256, scale=(0.5, 1.0))
    top, left, height, width = crops.boxes.unbind(1)
    area, aspect = height * width / 256**2, width / height
    assert bool((top >= 0).all() and (left >= 0).all())
    assert bool((top + height <= 256).all() and (left + width <= 256).all())
    assert 0.5 - 1e-4 < area.min() < 0.51
    assert 0.99 < area.max() <= 1.0
    assert 3 / 4 - 1e-3 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 4 / 3 + 1e-3
    assert aspect.log().mean().abs() < 0.01  # wide and tall alike
    room = (256 - height) > 1
    assert (top / (256 - height))[room].mean().item() == pytest.approx(0.5, abs=0.02)
    assert crops.flip.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_crops_depend_on_id_epoch_seed_and_view_alone():
    def boxes(ids, seed=0, epoch=0, view=0):
        return sample_crops(
            torch.tensor(ids), seed=seed, epoch=epoch, view=view, source_px=(200, 300)
        ).boxes

    many = boxes([5, 9, 2, 7])
    assert torch.equal(boxes([7, 5]), many[[3, 0]])
    for change in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        assert not torch.isclose(boxes([5, 9, 2, 7], **change), many).all(1).any()


def test_a_crop_that_cannot_fit_is_the_largest_central_one():
    crops = sample_crops(torch.arange(5), seed=0, epoch=0, source_px=(40, 400), scale=(0.99, 1.0))
    wanted = torch.tensor([0.0, (400 - 160 / 3) / 2, 40.0, 160 / 3])
    assert torch.allclose(crops.boxes, wanted.expand(5, 4), atol=1e-3)


def test_whole_image_and_no_flip():
    crops = sample_crops(
        torch.arange(9), seed=0, epoch=0, source_px=64, scale=(1, 1), ratio=(1, 1), flip_p=0
    )
    assert torch.equal(crops.boxes, torch.tensor([[0.0, 0, 64, 64]]).expand(9, 4))
    assert not crops.flip.any()


@pytest.mark.parametrize(
    "bad", [{"scale": (0.0, 1)}, {"scale": (0.5, 1.5)}, {"ratio": (2.0, 1.0)}, {"flip_p": 2.0}]
)
def test_refuses_crops_that_cannot_be(bad):
    with pytest.raises(SpcxrError, match="give 0 < low <= high"):
        sample_crops(torch.arange(2), seed=0, epoch=0, source_px=64, **bad)


# --- partners and kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3, 4, 7, 64])
def test_partners_are_a_permutation_without_fixed_point(batch):
    partner, alone = pair_up(torch.arange(batch) * 3 + 1)
    assert sorted(partner.tolist()) == list(range(batch))
    assert not (partner == torch.arange(batch)).any()
    assert not alone.any()


@pytest.mark.parametrize("part", [2, 4, 6, 12])
def test_partners_do_not_depend_on_how_a_step_is_divided(part):
    ids = torch.arange(100, 112)
    whole = ids[pair_up(ids)[0]]
    parts = [p[pair_up(p)[0]] for p in ids.split(part)]
    assert torch.equal(torch.cat(parts), whole)


def test_an_image_that_would_be_its_own_partner_is_alone():
    assert pair_up(torch.tensor([4]))[1].tolist() == [True]
    assert pair_up(torch.tensor([4, 4, 1, 2]))[1].tolist() == [True, True, False, False]
    assert pair_up(torch.tensor([], dtype=torch.int64))[0].tolist() == []


# --- stochastic depth -----------------------------------------------------------------------


def test_survivors_count_as_often_as_the_rate_says_and_one_on_average():
    drawn = sample_survivors(torch.arange(4000), (0.0, 0.2, 0.5), seed=3, epoch=1)
    assert drawn.shape == (4000, 3, 2)
    assert drawn[:, 0].unique().tolist() == [1.0]
    assert drawn[:, 1].unique().tolist() == [0.0, 1.25]
    for block, rate in enumerate((0.0, 0.2, 0.5)):
        for branch in (0, 1):
            dropped = (drawn[:, block, branch] == 0).float().mean()
            assert dropped == pytest.approx(rate, abs=4 * (0.25 / 4000) ** 0.5)
    assert (drawn[:, 2, 0] != drawn[:, 2, 1]).float().mean() == pytest.approx(0.5, abs=0.04)


def test_an_images_survivors_are_its_own():
    ids, rates = torch.tensor([9, 4, 7]), (0.3, 0.6)
    together = sample_survivors(ids, rates, seed=0, epoch=2)
    alone = [sample_survivors(i[None], rates, seed=0, epoch=2) for i in ids]
    assert torch.equal(torch.cat(alone), together)
    many = torch.arange(64)
    drawn = [
        sample_survivors(many, rates, seed=s, epoch=e, view=v)
        for s, e, v in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize(
    ("fills", "shares"),
    [
        (("noise",), {"noise": 1 / 2, "other": 1 / 2}),
        (("zeros", "other"), {"zeros": 1 / 3, "other": 2 / 3}),
    ],
)
def test_either_or_shares(fills, shares):
    kind = fill_for(range(1500), Corruption(fills=fills), size=(16, 16)).kind
    for name, share in shares.items():
        found = (kind == FILLS.index(name)).float().mean().item()
        assert found == pytest.approx(share, abs=0.04)
    assert set(kind.tolist()) == {FILLS.index(name) for name in shares}


def test_alien_ratio_zero_switches_pasting_off():
    kind = fill_for(range(100), Corruption(alien_ratio=0.0), size=(16, 16)).kind
    assert set(kind.tolist()) == {FILLS.index("noise")}


def test_ratios_belong_to_their_kind():
    fill = fill_for(range(300), Corruption(mask_ratio=0.75, alien_ratio=0.3), size=(64, 64))
    cover = fill.mask.float().mean((1, 2))
    pasted = fill.kind == OTHER
    assert cover[pasted].mean().item() == pytest.approx(0.31, abs=0.02)
    assert cover[~pasted].mean().item() == pytest.approx(0.635, abs=0.02)


# --- fills ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("align_patches", [False, True])
def test_a_fill_depends_on_the_image_not_on_its_batch(name, align_patches):
    law = Corruption(fills=(name,), align_patches=align_patches)
    many, few = fill_for([5, 9, 2, 7, 8], law), fill_for([7, 9], law)
    for part in ("mask", "kind", "blocks", "sources"):
        assert torch.equal(getattr(many, part)[[3, 1]], getattr(few, part))
    assert (many.blocks.shape[1] > 0) == (name == "shuffle")


def test_fills_change_with_seed_epoch_and_view():
    law = Corruption(alien_ratio=0.0)
    base, clean = fill_for(range(4), law), torch.zeros(4, 1, *SIZE)
    for change in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        other = fill_for(range(4), law, **change)
        assert not any(torch.equal(a, b) for a, b in zip(base.mask, other.mask, strict=True))
        noisy, other_noisy = corrupt(clean, base)[0], corrupt(clean, other)[0]
        both = (noisy != 0) & (other_noisy != 0)
        assert both.any()
        assert not (noisy == other_noisy)[both].any()


def test_aligned_masks_hide_whole_patches():
    def shares_hidden(law):
        mask = pixel_mask(
            whole_views(torch.zeros(20, 1, *SIZE), patch_px=16), fill_for(range(20), law).mask
        )
        return set(mask.reshape(20, 2, 16, 3, 16).float().mean((2, 4)).unique().tolist())

    assert shares_hidden(Corruption(align_patches=True)) == {0.0, 1.0}
    assert len(shares_hidden(Corruption())) > 10


def test_refuses_laws_and_shapes_that_cannot_be():
    with pytest.raises(SpcxrError, match="no fill 'fog'"):
        Corruption(fills=("fog",))
    with pytest.raises(SpcxrError, match="mask_ratio 0"):
        Corruption(mask_ratio=0)
    with pytest.raises(SpcxrError, match="33x48 px does not divide"):
        fill_for([1], Corruption(align_patches=True), size=(33, 48))


# --- corruption -----------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("channels", [1, 3])
def test_changes_what_is_masked_and_nothing_else(fill, channels):
    torch.manual_seed(0)
    clean = torch.rand(12, channels, *SIZE) + 3.0
    before = clean.clone()
    drawn = fill_for(range(12), Corruption(fills=(fill,)))
    corrupted, mask = corrupt(clean, drawn)
    hidden = mask[:, None].expand_as(clean)
    assert torch.equal(corrupted[~hidden], clean[~hidden])
    assert bool((corrupted[hidden] != clean[hidden]).all())
    assert torch.equal(clean, before)
    assert torch.equal(corrupt(clean, drawn)[0], corrupted)
    assert mask.any((1, 2)).all()


def test_each_fill_is_what_its_name_says():
    torch.manual_seed(0)
    clean = torch.rand(64, 1, 32, 48) + 3.0
    fill = fill_for(range(64), Corruption(fills=FILLS))
    corrupted, mask = corrupt(clean, fill)
    assert set(fill.kind.tolist()) == {0, 1, 2, 3}
    noise = []
    for i, (kind, m) in enumerate(zip(fill.kind.tolist(), mask, strict=True)):
        got, partner = corrupted[i, 0][m], clean[fill.partner[i], 0]
        if kind == FILLS.index("noise"):
            noise.append(got)
        elif kind == FILLS.index("zeros"):
            assert not got.any()
        elif kind == FILLS.index("shuffle"):
            assert torch.isin(got, clean[i]).all()
        else:
            assert torch.equal(got, partner[m])
    field = torch.cat(noise)
    assert field.mean().abs() < 0.05
    assert field.std().item() == pytest.approx(1.0, abs=0.05)


def test_shuffle_reads_other_rows_of_the_image():
    blocks = torch.tensor([[[2, 3, 5, 6], [4, 5, 8, 4], [0, 0, 0, 0], [0, 0, 16, 2]]]).int()
    seen = set()
    for draw in range(200):
        generator = torch.Generator().manual_seed(draw)
        places = torch.rand(1, 4, 2, generator=generator, dtype=torch.float64)
        sources = shuffle_sources(blocks, places, (16, 20))
        (top, left), (below, beside), _, (whole, beyond) = sources[0].tolist()
        assert 0 <= top <= 11
        assert top != 2
        assert 0 <= left <= 14
        assert 0 <= below <= 8
        assert below != 4
        assert 0 <= beside <= 16
        assert whole == 0  # as tall as the image: only columns move
        assert beyond != 0
        seen.add(top)
    assert seen == set(range(12)) - {2}
    edge = torch.full((1, 4, 2), 1 - 2.0**-32, dtype=torch.float64)
    last = shuffle_sources(blocks, edge, (16, 20))[0] + blocks[0, :, 2:]
    assert bool((last <= torch.tensor([16, 20])).all())


@pytest.mark.parametrize(
    ("size", "patch_px"), [((16, 48), 16), ((32, 16), 16), ((16, 16), 16), ((2, 5), 1), ((1, 4), 1)]
)
def test_shuffle_changes_all_it_hides_on_the_smallest_grids(size, patch_px):
    clean = torch.arange(1.0, 1 + size[0] * size[1]).view(1, 1, *size).expand(24, 1, *size)
    law = Corruption(fills=("shuffle",), align_patches=True, alien_ratio=0.0)
    drawn = sample_fill(torch.arange(24), law, seed=0, epoch=0, size=size, patch_px=patch_px)
    rows = masked_patch_gather(whole_views(clean, patch_px=patch_px), drawn)
    views = whole_views(clean, patch_px=patch_px)
    corrupted, mask = unpatchify(rows, views.grid, patch_px), pixel_mask(views, drawn.mask)
    assert mask.any((1, 2)).all()
    assert bool((corrupted[:, 0] != clean[:, 0])[mask].all())


def test_a_batch_of_one_falls_to_noise():
    for name in ("other", "zeros"):
        for image_id in range(12):
            fill = fill_for([image_id], Corruption(fills=(name,)))
            assert fill.kind.item() in (FILLS.index("noise"), FILLS.index("zeros"))
            corrupted, mask = corrupt(torch.full((1, 1, *SIZE), 7.0), fill)
            assert bool((corrupted[:, 0][mask] != 7.0).all())


def test_an_empty_batch():
    fill = fill_for(torch.zeros(0, dtype=torch.int64), Corruption(fills=FILLS))
    corrupted, mask = corrupt(torch.zeros(0, 1, *SIZE), fill)
    assert corrupted.shape == (0, 1, *SIZE)
    assert mask.shape == (0, *SIZE)


def test_a_fill_moves_as_a_whole():
    fill = fill_for(range(2), Corruption(fills=("shuffle",))).to("meta")
    assert isinstance(fill, Fill)
    assert {t.device.type for t in fill[:6]} == {"meta"}
    assert fill[6:] == (0, 0, 0)
