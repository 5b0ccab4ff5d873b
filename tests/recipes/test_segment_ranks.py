"""`segment` on two processes: the Dice of a step is that of all its images."""

import json
import sys

import pytest
import torch
from ranks import end, launch, same_weights

from spcxr.evaluate.mask_summary import FIGURES
from spcxr.recipes.mask_losses import LOSSES, over_scales, whole_step
from spcxr.recipes.masks import figures
from spcxr.train.augment import IGNORE
from spcxr.train.journal import read_records

CODE = "from spcxr.cli import train; train()"


class OneOfTwo:
    """A rank whose neighbour has told its sums already."""

    size = 2

    def __init__(self, others):
        self.others = others

    def add_up(self, values):
        return values + self.others


def sums_of(loss, logits, masks):
    """What a rank with these images would send."""
    told = []

    def listening(sums):
        told.append(sums.detach().clone())
        return sums

    loss(logits, masks, listening)
    (made,) = told
    return made


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("others_count", [True, False])
def test_the_loss_of_two_parts_is_that_of_the_whole(name, others_count):
    torch.manual_seed(0)
    loss, masks = LOSSES[name], torch.randint(0, 3, (6, 8, 8), dtype=torch.uint8)
    masks[1, :4] = IGNORE
    logits = torch.randn(6, 3, 8, 8)
    mine, theirs = slice(0, 4), slice(4, 6)
    whole = logits.clone().requires_grad_()
    together = loss(whole, masks) if others_count else loss(whole[mine], masks[mine])
    together.backward()
    own = logits[mine].clone().requires_grad_()
    others = sums_of(loss, logits[theirs], masks[theirs]) * float(others_count)
    found = loss(own, masks[mine], whole_step(OneOfTwo(others)))
    found.backward()
    assert float(found.detach()) == pytest.approx(float(together.detach()), rel=1e-6)
    assert torch.allclose(own.grad / 2, whole.grad[mine], rtol=1e-5, atol=1e-8)


def test_a_rank_without_images_tells_nothing_and_pulls_nothing():
    torch.manual_seed(0)
    loss, masks = LOSSES["dice-ce"], torch.randint(0, 2, (4, 8, 8), dtype=torch.uint8)
    logits = torch.randn(4, 2, 8, 8)
    idle = logits[:1].clone().requires_grad_()
    total = whole_step(OneOfTwo(sums_of(loss, logits, masks)), counts=False)
    found = loss(idle, masks[:1], total)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(loss(logits, masks)), rel=1e-6)
    assert not idle.grad.any()


def test_coarser_masks_are_added_up_as_well():
    torch.manual_seed(0)
    loss, masks = LOSSES["dice-ce"], torch.randint(0, 2, (4, 8, 8), dtype=torch.uint8)
    scales = [torch.randn(4, 2, 8, 8), torch.randn(4, 2, 4, 4)]
    asked = []

    def counted(sums):
        asked.append(len(sums))
        return sums

    over_scales(loss, scales, masks, counted)
    assert asked == [4, 4]


def test_a_rank_without_rows_to_judge_finds_nothing(make_store):
    store = make_store(masked=True, count=8)
    assert figures(store, iter(()), ("lung",)).shape == (0, 1, len(FIGURES))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"deep-supervision": None, "ema": 0.5}])
def test_two_processes_give_the_weights_of_one(flags, make_store, tiny_init, tmp_path):
    """17 rows to learn from in batches of 8: the last step has one, and none for the second."""
    splits = (["train"] + ["val", "test"] * 3 + ["train"]) * 8 + ["train"]
    store, folders = make_store(masked=True, count=65, splits=splits), []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        given = {"data": store.path, "init": tiny_init, "out": out, "epochs": 2, "batch-size": 8}
        given |= {"base-channels": 4, "drop-path": 0.0, "device": "cpu", "precision": "fp32"}
        words = [f"--{k}" if v is None else f"--{k}={v}" for k, v in (given | flags).items()]
        end(launch([sys.executable, "-c", CODE, "segment", *words], ranks=ranks))
        folders.append(out)
    same_weights(*folders)
    losses = [[r["loss"] for r in read_records(f) if r["kind"] == "train"] for f in folders]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    facts = [json.loads((f / "metrics.json").read_text()) for f in folders]
    dice = [fact["test"]["lung"]["dice"]["value"] for fact in facts]
    assert dice[1] == pytest.approx(dice[0], abs=1e-3)
    assert {p.name for p in folders[0].iterdir()} == {p.name for p in folders[1].iterdir()}
