"""MC-SSL: its loss is the plain formula; temperatures, centres and prototypes keep their times."""

import pytest
import torch
import torch.nn.functional as F

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.corruption import Corruption, sample_fill
from spcxr.objectives.mcssl import build_mcssl
from spcxr.objectives.objective import Progress, whole_view
from spcxr.ops.masked_patch_gather import masked_patch_gather

BATCH, SHARES, LOCAL, PROTOTYPES = 3, (0.8, 1.3), 2, 20


def tiny(**settings):
    """Student, teacher and centres differ, as they do after some steps."""
    torch.manual_seed(0)
    encoder = VisionTransformer(image_px=(32, 48), patch_px=16, width=24, depth=3, heads=3)
    objective = build_mcssl(encoder, prototypes=PROTOTYPES, hidden=16, **settings)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *objective.projection.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
        objective.centres.copy_(0.1 * torch.randn(2, PROTOTYPES))
    return objective.train()


def a_batch(local=LOCAL):
    torch.manual_seed(1)
    images = [torch.randn(BATCH, 1, 32, 48) for _ in SHARES]
    small, found = [torch.randn(BATCH, 1, 32, 48) for _ in range(local)], []
    law = Corruption(fills=("noise", "zeros"))
    for number, share in enumerate(SHARES):
        keys = {"seed": 0, "epoch": 0, "view": number, "size": (32, 48), "patch_px": 16}
        view = whole_view(
            images[number], sample_fill(torch.arange(BATCH), law, **keys), patch_px=16
        )
        found.append(view._replace(share=torch.tensor(share)))
    return images, small, found + [whole_view(s, None, patch_px=16) for s in small]


def cut(images):
    return images.unfold(2, 16, 16).unfold(3, 16, 16).reshape(len(images), 6, 256)


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


def logits(head, tokens):
    for layer in (0, 2, 4):
        tokens = tokens @ head.mlp[layer].weight.T + head.mlp[layer].bias
        tokens = F.gelu(tokens) if layer < 4 else tokens
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    return unit @ (head.prototypes / head.prototypes.norm(dim=1, keepdim=True)).T


def entropy_across(aim, said):
    """Cross-entropy of one token: -sum_k p_k log q_k."""
    return -(aim * (said.exp() / said.exp().sum()).log()).sum()


def by_hand(objective, images, small, views, temperature=0.04):
    """mse, cls and patch, view by view and image by image."""
    encoder, teacher = objective.encoder, objective.teacher
    mse, said, patches_said, aims, patch_aims = 0.0, [], [], [], []
    for image, view, share in zip(images, views, SHARES, strict=False):
        outputs = tokens_after_each_block(encoder, masked_patch_gather(view.views, view.fill))
        rebuilt = norm(encoder, (outputs[1] + outputs[2]) / 2)[:, 1:]
        for layer in objective.head.mlp:
            rebuilt = layer(rebuilt)
        hidden = cut(view.fill.mask[:, None])
        error = objective.head.to_pixels(rebuilt) - cut(image)
        mse = mse + share * error[hidden].square().mean() / 2
        student = logits(objective.projection, norm(encoder, outputs[-1])) / 0.1
        taught = norm(teacher.encoder, tokens_after_each_block(teacher.encoder, cut(image))[-1])
        taught = logits(teacher.head, taught).detach()
        said.append(student[:, 0])
        patches_said.append(student[:, 1:])
        aims.append(((taught[:, 0] - objective.centres[0]) / temperature).softmax(-1))
        patch_aims.append(((taught[:, 1:] - objective.centres[1]) / temperature).softmax(-1))
    for image in small:
        cls = norm(encoder, tokens_after_each_block(encoder, cut(image))[-1])[:, 0]
        said.append(logits(objective.projection, cls) / 0.1)
    cls_losses, patch_losses = [], []
    for b in range(BATCH):
        for t in (0, 1):
            for v in range(len(said)):
                if v != t:
                    cls_losses.append(entropy_across(aims[t][b], said[v][b]))
            for n in range(6):
                patch_losses.append(entropy_across(patch_aims[t][b, n], patches_said[t][b, n]))
    return mse, sum(cls_losses) / len(cls_losses), sum(patch_losses) / len(patch_losses)


@pytest.mark.parametrize("local", [0, LOCAL])
def test_the_loss_equals_the_plain_formula(local):
    objective, (images, small, views) = tiny(reconstruction_weight=2.0), a_batch(local)
    mse, cls, patch = by_hand(objective, images, small, views)
    losses = objective(views)
    for name, wanted in (("mse", mse), ("cls", cls), ("patch", patch)):
        torch.testing.assert_close(losses[name], wanted.detach())
    plain = 2.0 * mse + cls + patch
    torch.testing.assert_close(losses["loss"], plain)
    student = [p for p in objective.parameters() if p.requires_grad]
    mine = torch.autograd.grad(losses["loss"], student)
    theirs = torch.autograd.grad(plain, student)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("local", [0, LOCAL])
def test_gradients_reach_every_parameter_of_the_student_and_none_of_the_teachers(local):
    objective, (*_, views) = tiny(), a_batch(local)
    losses = objective(views)
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward()
    named = dict(objective.named_parameters())
    with_gradient = {n for n, p in named.items() if p.grad is not None and p.grad.any()}
    assert with_gradient == {n for n in named if not n.startswith("teacher.")}


def test_local_views_may_be_small():
    objective, (images, _, views) = tiny(), a_batch(0)
    small = [whole_view(i[..., :16, :32].contiguous(), None, patch_px=16) for i in images]
    losses = objective(views + small)
    assert losses["patch"] == objective(views)["patch"]
    assert losses["cls"] != objective(views)["cls"]


@pytest.mark.parametrize(
    ("epoch", "last", "temperature"),
    [(0, 0.07, 0.04), (15, 0.07, 0.055), (30, 0.07, 0.07), (99, 0.07, 0.07), (0, 0.02, 0.02)],
)
def test_the_teacher_softens_over_thirty_epochs(epoch, last, temperature):
    objective, (images, small, views) = tiny(teacher_temperature=last), a_batch()
    objective.begin_step(Progress(7 * epoch, 7, 700))
    assert objective.temperature == pytest.approx(temperature)
    _, cls, patch = by_hand(objective, images, small, views, temperature)
    losses = objective(views)
    torch.testing.assert_close(losses["cls"], cls.detach())
    torch.testing.assert_close(losses["patch"], patch.detach())


def test_prototypes_are_frozen_in_the_first_epoch():
    objective, (*_, views) = tiny(), a_batch()
    prototypes = objective.projection.prototypes
    for step, frozen in ((0, True), (6, True), (7, False)):
        objective.begin_step(Progress(step, 7, 700))
        objective(views)["loss"].backward()
        assert prototypes.grad.any()
        objective.end_backward()
        assert (prototypes.grad is None) == frozen
        assert objective.projection.mlp[4].weight.grad.any()


def test_centres_move_once_a_step_to_the_mean_of_its_batches():
    objective, (images, _, views) = tiny(), a_batch()
    teacher, before = objective.teacher, objective.centres.clone()
    means = []
    for image in images:
        tokens = tokens_after_each_block(teacher.encoder, cut(image))[-1]
        said = logits(teacher.head, norm(teacher.encoder, tokens))
        means.append((said[:, 0].mean(0), said[:, 1:].mean((0, 1))))
    objective.begin_step(Progress(0, 7, 700))
    objective(views)
    objective(views[1::-1])  # a second batch of the same step
    assert torch.equal(objective.centres, before)
    objective.end_step()
    for number in (0, 1):
        mean = (means[0][number] + means[1][number]) / 2
        torch.testing.assert_close(objective.centres[number], 0.9 * before[number] + 0.1 * mean)


def test_steps_that_were_refused_and_held_out_images_leave_centres_alone():
    objective, (images, _, views) = tiny(), a_batch()
    twin = tiny()
    objective.begin_step(Progress(0, 7, 700))
    objective(
        [v._replace(views=v.views._replace(pixels=v.views.pixels * torch.nan)) for v in views]
    )
    objective.begin_step(Progress(1, 7, 700))
    objective.eval()([whole_view(i + 1, v.fill, patch_px=16) for i, v in zip(images, views)])  # noqa: B905
    objective.train()(views)
    objective.end_step()
    twin.begin_step(Progress(1, 7, 700))
    twin(views)
    twin.end_step()
    assert torch.equal(objective.centres, twin.centres)


def test_the_teacher_follows_at_the_end_of_a_step():
    objective, (*_, views) = tiny(teacher_momentum=0.9), a_batch()
    mine, theirs = objective.teacher.head.prototypes, objective.projection.prototypes
    before = mine.clone()
    objective.begin_step(Progress(50, 10, 100))
    objective(views)
    objective.end_step()
    torch.testing.assert_close(mine, 0.95 * before + 0.05 * theirs.detach())


def test_heads_and_losses_are_float32_under_autocast():
    objective, (*_, views) = tiny(), a_batch()
    seen = []
    for head in (objective.projection, objective.teacher.head):
        head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = objective(views, dtype=torch.bfloat16)
    assert seen == [torch.float32] * 3
    whole = objective(views)
    for name in ("mse", "cls", "patch"):
        assert low[name].dtype == torch.float32
        assert low[name].item() == pytest.approx(whole[name].item(), rel=0.05)


def test_it_learns():
    objective, (*_, views) = tiny(), a_batch()
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for step in range(30):
        objective.begin_step(Progress(step, 100, 100))
        losses = objective(views)
        optimiser.zero_grad()
        losses["loss"].backward()
        objective.end_backward()
        optimiser.step()
        found.append({name: value.item() for name, value in losses.items()})
    assert found[-1]["mse"] < 0.97 * found[0]["mse"]  # noise: there is little to learn
    assert found[-1]["cls"] < 0.8 * found[0]["cls"]
    assert found[-1]["patch"] < 0.5 * found[0]["patch"]
