"""The teacher: a slow copy, without gradients, that never drops a branch."""

import pytest
import torch

from spcxr.models.over_ranks import BatchNormOverRanks
from spcxr.models.projection import ProjectionHead
from spcxr.models.vit import VisionTransformer
from spcxr.objectives.objective import Progress
from spcxr.objectives.teacher import Teacher, momentum_at


def pair(drop_path=0.0):
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_px=(32, 48), patch_px=16, width=24, depth=3, heads=3, drop_path=drop_path
    )
    head = ProjectionHead(width=24, outputs=8)
    return encoder, head, Teacher(encoder, head)


def test_it_begins_as_the_student_and_shares_nothing_with_it():
    encoder, head, teacher = pair()
    for mine, student in ((teacher.encoder, encoder), (teacher.head, head)):
        theirs = student.state_dict()
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs[name])
            assert value.data_ptr() != theirs[name].data_ptr()
    assert not any(p.requires_grad for p in teacher.parameters())


def test_it_reads_clean_patches_as_the_encoder_reads_images():
    encoder, _, teacher = pair(drop_path=0.5)
    images = torch.randn(2, 1, 32, 48)
    rows = images.unfold(2, 16, 16).unfold(3, 16, 16).reshape(2, 6, 256)
    tokens = teacher.train()(rows, (2, 3))
    torch.testing.assert_close(tokens, encoder.eval().forward_features(images))
    assert not tokens.requires_grad


def test_it_follows_by_its_momentum_and_copies_buffers():
    encoder, head, teacher = pair()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.no_grad():
        for module in (encoder, head):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(1)
    teacher.follow(encoder, head, 0.75)
    buffers = {f"head.{name}" for name, _ in head.named_buffers()}
    assert any(name.endswith("running_var") for name in buffers)
    for name, value in teacher.state_dict().items():
        moved = 1 if name in buffers else 0.25
        torch.testing.assert_close(value, before[name] + moved)


def test_training_reaches_batch_norm_alone():
    _, _, teacher = pair()
    norms = [m for m in teacher.modules() if isinstance(m, BatchNormOverRanks)]
    assert len(norms) == 3
    teacher.train()
    assert [m for m in teacher.modules() if m.training] == norms
    teacher.eval()
    assert not any(m.training for m in teacher.modules())


@pytest.mark.parametrize(("step", "value"), [(0, 0.9), (25, 0.9146447), (50, 0.95), (100, 1.0)])
def test_momentum_rises_to_one(step, value):
    assert momentum_at(Progress(step, 10, 100), 0.9) == pytest.approx(value)
