"""Crops, masks and fills: their law, what they depend on, and what they change."""

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.objectives.corruption import (
    ALIEN,
    FILLS,
    Corruption,
    Plan,
    corrupt,
    sample_crops,
    sample_partners,
    sample_plan,
    shuffle_source,
)

SHAPE = (1, 32, 48)


def plan_for(ids, law, seed=0, epoch=0, view=0, shape=SHAPE):
    ids = torch.as_tensor(ids)
    return sample_plan(ids, law, seed=seed, epoch=epoch, view=view, shape=shape, patch_px=16)


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
    ids = torch.arange(batch) * 3 + 1
    for seed in range(20):
        partner, alone = sample_partners(ids, seed=seed, epoch=seed)
        assert sorted(partner.tolist()) == list(range(batch))
        assert not (partner == torch.arange(batch)).any()
        assert not alone.any()


def test_partners_change_with_the_epoch():
    found = {tuple(sample_partners(torch.arange(8), seed=0, epoch=e)[0].tolist()) for e in range(9)}
    assert len(found) > 5


def test_a_repeated_image_is_not_its_own_partner():
    ids = torch.tensor([4, 4, 4, 1, 2, 3])
    for epoch in range(20):
        partner, alone = sample_partners(ids, seed=0, epoch=epoch)
        assert not alone.any()
        assert not (ids[partner] == ids).any()
    assert sample_partners(torch.tensor([4, 4]), seed=0, epoch=0)[1].all()


@pytest.mark.parametrize(
    ("fills", "shares"),
    [
        (("noise",), {0: 1 / 2, ALIEN: 1 / 2}),
        (("zeros", "other"), {1: 1 / 3, 2: 1 / 3, ALIEN: 1 / 3}),
    ],
)
def test_either_or_shares(fills, shares):
    kind = plan_for(range(1500), Corruption(fills=fills), shape=(1, 16, 16)).kind
    for number, share in shares.items():
        assert (kind == number).float().mean().item() == pytest.approx(share, abs=0.04)
    assert set(kind.tolist()) == set(shares)


def test_alien_ratio_zero_switches_pasting_off():
    kind = plan_for(range(100), Corruption(alien_ratio=0.0), shape=(1, 16, 16)).kind
    assert set(kind.tolist()) == {FILLS.index("noise")}


def test_ratios_belong_to_their_kind():
    plan = plan_for(range(300), Corruption(mask_ratio=0.75, alien_ratio=0.3), shape=(1, 64, 64))
    cover = plan.mask.float().mean((1, 2))
    pasted = plan.kind == ALIEN
    assert cover[pasted].mean().item() == pytest.approx(0.31, abs=0.02)
    assert cover[~pasted].mean().item() == pytest.approx(0.635, abs=0.02)


# --- plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("align_patches", [False, True])
def test_a_plan_depends_on_the_image_not_on_its_batch(fill, align_patches):
    law = Corruption(fills=(fill,), align_patches=align_patches)
    many, few = plan_for([5, 9, 2, 7, 8], law), plan_for([7, 9], law)
    for name in ("mask", "kind", "noise") + (("source",) if fill == "shuffle" else ()):
        inside, alone = getattr(many, name)[[3, 1]], getattr(few, name)
        assert torch.equal(inside, alone) or name == "source"
    if fill == "shuffle":
        for a, b, m in zip(many.source[[3, 1]], few.source, few.mask, strict=True):
            assert torch.equal(a[m], b[m])


def test_plans_change_with_seed_epoch_and_view():
    law = Corruption(alien_ratio=0.0)
    base = plan_for(range(4), law)
    for change in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        other = plan_for(range(4), law, **change)
        assert not any(torch.equal(a, b) for a, b in zip(base.mask, other.mask, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(base.noise, other.noise, strict=True))


def test_aligned_masks_hide_whole_patches():
    def shares_hidden(law):
        mask = plan_for(range(20), law).mask
        return set(mask.reshape(20, 2, 16, 3, 16).float().mean((2, 4)).unique().tolist())

    assert shares_hidden(Corruption(align_patches=True)) == {0.0, 1.0}
    assert len(shares_hidden(Corruption())) > 10


def test_refuses_laws_and_shapes_that_cannot_be():
    with pytest.raises(SpcxrError, match="no fill 'fog'"):
        Corruption(fills=("fog",))
    with pytest.raises(SpcxrError, match="mask_ratio 0"):
        Corruption(mask_ratio=0)
    with pytest.raises(SpcxrError, match="33x48 px does not divide"):
        plan_for([1], Corruption(align_patches=True), shape=(1, 33, 48))
    with pytest.raises(SpcxrError, match="sample the plan for these images"):
        corrupt(torch.zeros(3, 1, 32, 48), plan_for([1, 2], Corruption()))


# --- corruption -----------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("channels", [1, 3])
def test_changes_what_is_masked_and_nothing_else(fill, channels):
    torch.manual_seed(0)
    clean = torch.rand(12, channels, 32, 48) + 3.0
    before = clean.clone()
    plan = plan_for(range(12), Corruption(fills=(fill,)), shape=(channels, 32, 48))
    corrupted, mask = corrupt(clean, plan)
    hidden = mask[:, None].expand_as(clean)
    assert torch.equal(corrupted[~hidden], clean[~hidden])
    assert bool((corrupted[hidden] != clean[hidden]).all())
    assert torch.equal(clean, before)
    assert torch.equal(corrupt(clean, plan)[0], corrupted)
    assert mask.any((1, 2)).all()


def test_each_fill_is_what_its_name_says():
    torch.manual_seed(0)
    clean = torch.rand(64, 1, 32, 48) + 3.0
    plan = plan_for(range(64), Corruption(fills=FILLS))
    corrupted, mask = corrupt(clean, plan)
    assert set(plan.kind.tolist()) == {0, 1, 2, 3, ALIEN}
    noise = []
    for i, (kind, m) in enumerate(zip(plan.kind.tolist(), mask, strict=True)):
        got, partner = corrupted[i, 0][m], clean[plan.partner[i], 0]
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


def test_shuffle_equals_the_plain_loop():
    torch.manual_seed(0)
    blocks = torch.tensor(
        [[[2, 3, 5, 6], [4, 5, 8, 4], [0, 0, 0, 0]], [[0, 0, 1, 1], [15, 19, 1, 1], [3, 3, 3, 3]]]
    )
    places = torch.rand(2, 3, 2)
    source = shuffle_source(blocks, places, (16, 20))
    clean = torch.rand(2, 16, 20)
    wanted, covered = clean.clone(), torch.zeros(2, 16, 20, dtype=torch.bool)
    for b in range(2):
        for (top, left, h, w), (u, v) in zip(blocks[b].tolist(), places[b].tolist(), strict=True):
            if h == 0:
                continue
            corners = [r for r in range(16 - h + 1) if r != top]
            corners = corners[top:] + corners[:top]  # counted from the rectangle's own row
            row, column = corners[int(u * len(corners))], int(v * (20 - w + 1))
            wanted[b, top : top + h, left : left + w] = clean[b, row : row + h, column : column + w]
            covered[b, top : top + h, left : left + w] = True
    made = clean.flatten(1).gather(1, source.flatten(1)).view_as(clean)
    assert torch.equal(made, wanted)
    own_row = source // 20 == torch.arange(16)[:, None]
    assert not own_row[covered].any()
    assert own_row[~covered].all()


def test_a_batch_of_one_falls_to_noise():
    for fill in ("other", "zeros"):
        for image_id in range(12):
            plan = plan_for([image_id], Corruption(fills=(fill,)))
            assert plan.kind.item() in (FILLS.index("noise"), FILLS.index("zeros"))
            corrupted, mask = corrupt(torch.full((1, *SHAPE), 7.0), plan)
            assert bool((corrupted[:, 0][mask] != 7.0).all())


def test_an_empty_batch():
    plan = plan_for(torch.zeros(0, dtype=torch.int64), Corruption(fills=FILLS))
    corrupted, mask = corrupt(torch.zeros(0, *SHAPE), plan)
    assert corrupted.shape == (0, *SHAPE)
    assert mask.shape == (0, 32, 48)


def test_keeps_the_images_dtype():
    clean = torch.ones(3, *SHAPE, dtype=torch.bfloat16)
    assert corrupt(clean, plan_for(range(3), Corruption()))[0].dtype == torch.bfloat16


def test_a_plan_moves_as_a_whole():
    plan = plan_for(range(2), Corruption(fills=("shuffle",))).to("meta")
    assert isinstance(plan, Plan)
    assert {t.device.type for t in vars(plan).values()} == {"meta"}
