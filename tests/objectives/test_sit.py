"""SiT: its loss is the plain formula; the student learns, the teacher follows."""

import pytest
import torch
import torch.nn.functional as F

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.corruption import Corruption, sample_fill
from spcxr.objectives.objective import Progress, whole_view
from spcxr.objectives.sit import build_sit
from spcxr.ops.masked_patch_gather import masked_patch_gather

BATCH, SHARES = 3, (0.8, 1.3)


def tiny(**settings):
    """Student and teacher differ, as they do after some steps."""
    torch.manual_seed(0)
    encoder = VisionTransformer(image_px=(32, 48), patch_px=16, width=24, depth=3, heads=3)
    objective = build_sit(encoder, **settings)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *objective.projection.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return objective.train()


def a_batch(law=Corruption(fills=("noise", "zeros"))):  # noqa: B008
    torch.manual_seed(1)
    images, found = [torch.randn(BATCH, 1, 32, 48) for _ in SHARES], []
    for number, share in enumerate(SHARES):
        keys = {"seed": 0, "epoch": 0, "view": number, "size": (32, 48), "patch_px": 16}
        fill = sample_fill(torch.arange(BATCH), law, **keys)
        view = whole_view(images[number], fill, patch_px=16)
        found.append(view._replace(share=torch.tensor(share)))
    return images, found


def tokens_after_each_block(encoder, rows):
    tokens = F.linear(rows, encoder.patch_embed.proj.weight.flatten(1))
    tokens = tokens + encoder.patch_embed.proj.bias
    first = encoder.cls_token.expand(len(rows), 1, 24)
    tokens, found = torch.cat([first, tokens], 1) + encoder.pos_embed, []
    for block in encoder.blocks:
        tokens = block(tokens)
        found.append(tokens)
    return found


def norm(encoder, tokens):
    return F.layer_norm(tokens, (24,), encoder.norm.weight, encoder.norm.bias, 1e-6)


def project(head, cls):
    """Linear, BatchNorm, ReLU twice; linear, BatchNorm; length 1. Statistics of this batch."""
    out = cls
    for layer in (0, 3, 6):
        out = out @ head.layers[layer].weight.T
        scale, shift = head.layers[layer + 1].weight, head.layers[layer + 1].bias
        out = (out - out.mean(0)) / (out.var(0, correction=0) + 1e-5).sqrt()
        out = out if scale is None else (out * scale + shift).relu()
    return out / out.norm(dim=1, keepdim=True)


def by_hand(objective, images, views):
    """l1 and contrast, step by step."""
    encoder, teacher = objective.encoder, objective.teacher
    corrupted = torch.cat([masked_patch_gather(v.views, v.fill) for v in views])
    clean = torch.cat(
        [i.unfold(2, 16, 16).unfold(3, 16, 16).reshape(BATCH, 6, 256) for i in images]
    )
    outputs = tokens_after_each_block(encoder, corrupted)
    # Three blocks: those nearest to 6, 8, 10 and 12 of 12 are the second and the third.
    rebuilt = norm(encoder, (outputs[1] + outputs[2]) / 2)[:, 1:]
    for layer in objective.head.mlp:
        rebuilt = layer(rebuilt)
    error = (objective.head.to_pixels(rebuilt) - clean).abs()
    l1 = 0.0
    for v, (view, share) in enumerate(zip(views, SHARES, strict=True)):
        hidden = view.fill.mask[:, None].unfold(2, 16, 16).unfold(3, 16, 16).reshape(BATCH, 6, 256)
        l1 = l1 + share * error[v * BATCH : (v + 1) * BATCH][hidden].mean() / 2
    q = project(objective.projection, norm(encoder, outputs[-1])[:, 0])
    taught = norm(teacher.encoder, tokens_after_each_block(teacher.encoder, clean)[-1])[:, 0]
    k = project(teacher.head, taught).detach()
    contrast = 0.0
    for queries, keys in ((q[:BATCH], k[BATCH:]), (q[BATCH:], k[:BATCH])):
        for i in range(BATCH):
            likeness = torch.stack([(queries[i] * keys[j]).sum() / 0.2 for j in range(BATCH)])
            probability = likeness[i].exp() / likeness.exp().sum()
            contrast = contrast - 2 * 0.2 * probability.log() / BATCH
    return l1, contrast


def test_the_loss_equals_the_plain_formula():
    objective, (images, views) = tiny(reconstruction_weight=5.0), a_batch()
    losses = objective(views)
    l1, contrast = by_hand(objective, images, views)
    torch.testing.assert_close(losses["l1"], l1.detach())
    torch.testing.assert_close(losses["contrast"], contrast.detach())
    torch.testing.assert_close(losses["loss"], 5.0 * l1 + contrast)
    student = [p for p in objective.parameters() if p.requires_grad]
    mine = torch.autograd.grad(losses["loss"], student)
    theirs = torch.autograd.grad(5.0 * l1 + contrast, student)
    for a, b in zip(mine, theirs, strict=True):
        # A shift of all features is lost in BatchNorm: its gradient is rounding alone.
        atol = max(1e-4 * float(b.abs().max()), 5e-7)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=atol)


def test_gradients_reach_every_parameter_of_the_student_and_none_of_the_teachers():
    objective, (_, views) = tiny(), a_batch()
    losses = objective(views)
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward()
    named = dict(objective.named_parameters())
    with_gradient = {n for n, p in named.items() if p.grad is not None and p.grad.any()}
    assert with_gradient == {n for n in named if not n.startswith("teacher.")}


def test_the_teacher_follows_at_the_end_of_a_step():
    objective = tiny(teacher_momentum=0.9)
    mine, theirs = objective.teacher.encoder.cls_token, objective.encoder.cls_token
    before = mine.clone()
    objective.begin_step(Progress(50, 10, 100))
    objective.end_step()
    torch.testing.assert_close(mine, 0.95 * before + 0.05 * theirs.detach())
    objective.begin_step(Progress(100, 10, 100))
    last = mine.clone()
    objective.end_step()
    assert torch.equal(mine, last)


def test_stochastic_depth_is_the_students_alone():
    objective, (_, views) = tiny(), a_batch()
    whole = objective(views)
    dropped = torch.ones(BATCH, 3, 2)
    dropped[1, 2] = 0.0
    losses = objective([views[0]._replace(survivors=dropped), views[1]._replace(survivors=dropped)])
    assert losses["l1"] != whole["l1"]
    every = torch.ones(BATCH, 3, 2)
    same = objective([view._replace(survivors=every) for view in views])
    torch.testing.assert_close(same["loss"], whole["loss"])


def test_pictures_show_what_is_learned():
    objective, (_, views) = tiny(), a_batch()
    rebuilt = objective.eval().reconstruct(views[0])
    outputs = tokens_after_each_block(
        objective.encoder, masked_patch_gather(views[0].views, views[0].fill)
    )
    wanted = objective.head(norm(objective.encoder, (outputs[1] + outputs[2]) / 2)[:, 1:])
    torch.testing.assert_close(rebuilt, wanted)


def test_one_image_has_no_other_to_be_taken_for():
    objective, views = tiny(), []
    for number in (0, 1):
        keys = {"seed": 0, "epoch": 0, "view": number, "size": (32, 48), "patch_px": 16}
        fill = sample_fill(torch.tensor([4]), Corruption(), **keys)
        views.append(whole_view(torch.randn(1, 1, 32, 48), fill, patch_px=16))
    losses = objective(views)
    assert losses["contrast"].item() == pytest.approx(0.0, abs=1e-6)
    assert losses["l1"].item() > 0


def test_heads_and_contrast_are_float32_under_autocast():
    objective, (_, views) = tiny(), a_batch()
    seen = []
    for head in (objective.projection, objective.teacher.head):
        head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = objective(views, dtype=torch.bfloat16)
    assert seen == [torch.float32] * 2
    assert low["contrast"].dtype == torch.float32
    assert low["l1"].item() == pytest.approx(objective(views)["l1"].item(), rel=0.02)


def test_it_learns():
    objective, (_, views) = tiny(), a_batch()
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for step in range(30):
        objective.begin_step(Progress(step, 10, 30))
        losses = objective(views)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        objective.end_step()
        found.append({name: value.item() for name, value in losses.items()})
    assert found[-1]["contrast"] < 0.3 * found[0]["contrast"]
    assert found[-1]["l1"] < 0.95 * found[0]["l1"]
