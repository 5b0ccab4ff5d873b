import pytest
import torch
from torch import nn

from spcxr.models.vit import VisionTransformer
from spcxr.train.optim import build_adamw, set_rates, take_step


class Model(nn.Module):
    """An encoder and a head, as the recipes have them; the decoder has blocks of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = VisionTransformer(image_px=16, patch_px=8, width=8, depth=3, heads=2)
        self.head = nn.Linear(8, 2)
        self.decoder = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)] * 7)})

    def forward(self, x):
        return self.head(self.encoder(x))


def by_name(optimizer):
    return {name: group for group in optimizer.param_groups for name in group["names"]}


def test_what_decays():
    groups = by_name(build_adamw(Model()))
    still = {name for name, group in groups.items() if not group["decayed"]}
    assert {"encoder.cls_token", "encoder.pos_embed", "encoder.norm.weight"} <= still
    assert "encoder.blocks.0.attn.qkv.bias" in still
    moved = set(groups) - still
    assert {"encoder.patch_embed.proj.weight", "encoder.blocks.2.mlp.fc2.weight"} <= moved
    assert "head.weight" in moved
    assert all(name.endswith("weight") for name in moved)


def test_each_parameter_is_in_one_group():
    model = Model()
    optimizer = build_adamw(model, layer_decay=0.5)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_layer_decay_is_beits():
    groups = by_name(build_adamw(Model(), layer_decay=0.5))
    scale = {name: group["rate_scale"] for name, group in groups.items()}
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.pos_embed"] == 0.5**4
    assert [scale[f"encoder.blocks.{i}.attn.proj.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    # The head, the last norm, and a decoder whose parts are called blocks too.
    assert {scale[n] for n in ("head.weight", "encoder.norm.bias", "decoder.blocks.0.weight")} == {
        1.0
    }


def test_frozen_parameters_are_left_out():
    model = Model()
    model.encoder.requires_grad_(False)
    names = by_name(build_adamw(model))
    assert not [name for name in names if name.startswith("encoder.")]


def test_rates_follow_scale_and_decay():
    optimizer = build_adamw(Model(), layer_decay=0.5)
    set_rates(optimizer, lr=0.1, weight_decay=0.4)
    groups = by_name(optimizer)
    assert groups["encoder.blocks.0.mlp.fc1.weight"]["lr"] == pytest.approx(0.0125)
    assert groups["encoder.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.4
    assert groups["encoder.cls_token"]["weight_decay"] == 0.0


def test_one_step_equals_adamw_by_hand():
    """The first AdamW update is lr * sign(gradient), beside the decay."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    model = nn.Module()
    model.weight = weight
    optimizer = build_adamw(model)
    set_rates(optimizer, lr=0.1, weight_decay=0.5)
    loss = (weight * torch.tensor([[3.0, -4.0]])).sum()
    loss.backward()
    outcome = take_step(optimizer, loss, clip=0.0)
    assert outcome.grad_norm == pytest.approx(5.0)
    assert outcome.taken
    wanted = torch.tensor([[1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]])
    torch.testing.assert_close(weight.detach(), wanted)
    assert weight.grad is None


def test_clipping_bounds_the_gradient():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = (weight * torch.tensor([30.0, -40.0])).sum()
    loss.backward()
    assert take_step(optimizer, loss, clip=3.0).grad_norm == pytest.approx(50.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-1.8, 2.4]))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(poison):
    model = Model()
    optimizer = build_adamw(model)
    set_rates(optimizer, lr=0.1, weight_decay=0.1)
    images = torch.randn(2, 1, 16, 16)
    loss = model(images).sum()
    loss.backward()
    take_step(optimizer, loss, clip=1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moments = optimizer.state[model.head.weight]["exp_avg"].clone()
    loss = model(images).sum() * (float("nan") if poison == "loss" else 1.0)
    loss.backward()
    model.head.weight.grad[0, 0] = float("inf")
    outcome = take_step(optimizer, loss, clip=1.0)
    assert not outcome.taken
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(moments, optimizer.state[model.head.weight]["exp_avg"])
    assert model.head.weight.grad is None
