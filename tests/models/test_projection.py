"""Heads that compare images, and BatchNorm whose batch is that of all ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from two_ranks import on_two_ranks

from spcxr.models.over_ranks import BatchNormOverRanks, rows_over_ranks, sum_over_ranks
from spcxr.models.projection import ProjectionHead, PrototypeHead


def test_the_prototype_head_is_the_plain_formula():
    torch.manual_seed(0)
    head = PrototypeHead(width=6, prototypes=5, hidden=8, bottleneck=4)
    tokens = torch.randn(2, 3, 6)
    hidden = tokens
    for layer in (0, 2, 4):
        hidden = hidden @ head.mlp[layer].weight.T + head.mlp[layer].bias
        hidden = F.gelu(hidden) if layer < 4 else hidden
    for b in range(2):
        for t in range(3):
            for k in range(5):
                a, p = hidden[b, t], head.prototypes[k]
                cosine = (a * p).sum() / (a.norm() * p.norm())
                assert head(tokens)[b, t, k].item() == pytest.approx(cosine.item(), abs=1e-6)


def test_the_length_of_a_prototype_does_not_matter():
    head = PrototypeHead(width=6, prototypes=5, hidden=8)
    tokens = torch.randn(7, 6)
    before = head(tokens)
    with torch.no_grad():
        head.prototypes *= torch.linspace(0.1, 9, 5)[:, None]
    torch.testing.assert_close(head(tokens), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_projection_is_three_layers_with_torchs_batch_norm(training):
    torch.manual_seed(0)
    head = ProjectionHead(width=6, outputs=4).train(training)
    layers = [
        nn.BatchNorm1d(m.num_features, affine=m.affine) if isinstance(m, BatchNormOverRanks) else m
        for m in head.layers
    ]
    plain, features = nn.Sequential(*layers).train(training), torch.randn(9, 6)
    projected = plain(features)
    wanted = projected / projected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head(features), wanted)


def pair(features=5):
    torch.manual_seed(0)
    ours, torchs = BatchNormOverRanks(features), nn.BatchNorm1d(features)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(features))
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def test_alone_it_is_batch_norm():
    ours, torchs = pair()
    weights = torch.randn(8, 5)
    for offset in (0.0, 3.0, 100.0):
        mine = (torch.randn(8, 5) + offset).requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        for norm, rows in ((ours, mine), (torchs, theirs)):
            (norm(rows) * weights).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(mine), torchs(theirs), rtol=1e-4, atol=1e-4)
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    rows = torch.randn(3, 5)
    torch.testing.assert_close(ours.eval()(rows), torchs.eval()(rows))


def test_a_batch_that_is_not_finite_leaves_no_trace():
    ours, _ = pair()
    rows = torch.randn(8, 5)
    ours(rows)
    before = {k: v.clone() for k, v in ours.state_dict().items() if k.startswith("running")}
    rows[3] = torch.nan
    assert ours(rows).isnan().all()
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in before.items())


def test_alone_sums_and_rows_are_ones_own():
    rows = torch.randn(3, 2, requires_grad=True)
    assert sum_over_ranks(rows) is rows
    found, first = rows_over_ranks(rows)
    assert (torch.equal(found, rows), found.requires_grad, first) == (True, False, 0)


HALVES = """
import sys, torch, torch.distributed as dist
from spcxr.models.over_ranks import BatchNormOverRanks, rows_over_ranks
dist.init_process_group("gloo")
rank = dist.get_rank()
case = torch.load(f"{sys.argv[1]}/case.pt")
norm = BatchNormOverRanks(5)
norm.load_state_dict(case["state"])
own = slice(0, 5) if rank == 0 else slice(5, 8)
rows = case["rows"][own].clone().requires_grad_()
out = norm(rows)
(out * case["weights"][own]).sum().backward()
gathered, first = rows_over_ranks(case["rows"][rank * 4 : rank * 4 + 4])
found = {"out": out.detach(), "rows": rows.grad, "weight": norm.weight.grad, "first": first,
         "bias": norm.bias.grad, "state": norm.state_dict(), "gathered": gathered}
torch.save(found, f"{sys.argv[1]}/rank-{rank}.pt")
dist.destroy_process_group()
"""


def test_on_two_ranks_it_is_batch_norm_of_both_halves(tmp_path):
    """Unequal halves, five rows and three: values, all gradients, running statistics."""
    ours, torchs = pair()
    case = {"state": ours.state_dict(), "rows": torch.randn(8, 5) + 2, "weights": torch.randn(8, 5)}
    torch.save(case, tmp_path / "case.pt")
    on_two_ranks(HALVES, tmp_path)
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    rows = case["rows"].clone().requires_grad_()
    out = torchs(rows)
    (out * case["weights"]).sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([f["out"] for f in found]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([f["rows"] for f in found]), rows.grad, **close)
    for name in ("weight", "bias"):
        total = found[0][name] + found[1][name]
        torch.testing.assert_close(total, getattr(torchs, name).grad, **close)
    for name, value in torchs.state_dict().items():
        assert torch.equal(found[0]["state"][name], found[1]["state"][name])
        torch.testing.assert_close(found[0]["state"][name], value)
    assert all(torch.equal(f["gathered"], case["rows"]) for f in found)
    assert [f["first"] for f in found] == [0, 4]
