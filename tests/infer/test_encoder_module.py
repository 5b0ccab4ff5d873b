"""The encoder within other programs: modules, threads, processes, compilers; and its start."""

import copy
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from encoder_cases import SIDE, WIDTH, grey, made, phantom
from torch import nn
from torch.utils.data import DataLoader

from spcxr.infer.encoder import Encoder
from spcxr.models.weights import save_model_folder

IMAGES = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) - 0.5


def same(one, other):
    torch.testing.assert_close(one.cls, other.cls, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.patches, other.patches, rtol=1e-5, atol=1e-6)


class Tool(nn.Module):
    """A head on the encoder, as a user would write it."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(WIDTH, 2)

    def forward(self, images):
        return self.head(self.encoder(images).cls)


def test_a_head_learns_on_the_frozen_encoder():
    tool = Tool(made())
    before = copy.deepcopy(tool.encoder.state_dict())
    tool(IMAGES).sum().backward()
    assert tool.head.weight.grad is not None
    assert [name for name, w in tool.named_parameters() if w.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    assert all(torch.equal(w, before[k]) for k, w in tool.encoder.state_dict().items())
    assert set(tool.encoder.state_dict()) == {f"vit.{k}" for k in tool.encoder.vit.state_dict()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_reaches_the_weights_and_the_fast_copy_follows(dtype):
    tool = Tool(made(dtype))
    with torch.no_grad():
        first = tool.encoder(IMAGES).cls
    tool.requires_grad_(True)
    tool(IMAGES).square().sum().backward()
    assert all(w.grad is not None for w in tool.encoder.parameters())
    with torch.no_grad():
        for weight in tool.encoder.parameters():
            weight.sub_(0.1 * weight.grad)
        after = tool.encoder(IMAGES).cls
    assert (after - first).abs().max() > 1e-3
    plain = tool.encoder.vit(IMAGES)
    assert torch.cosine_similarity(after, plain).min() > 0.99
    # in the other direction, and by assignment
    tool.requires_grad_(False)
    for assign in (False, True):
        tool.encoder.vit.load_state_dict(made(seed=int(assign)).vit.state_dict(), assign=assign)
        with torch.no_grad():
            same(tool.encoder(IMAGES), made(dtype, seed=int(assign))(IMAGES))


def test_gradients_reach_an_image_that_wants_them():
    images = IMAGES.clone().requires_grad_()
    encoder = made()
    encoder(images).cls.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert all(w.grad is None for w in encoder.parameters())


def test_other_floats_are_taken():
    wanted, doubled = made()(IMAGES), made()(IMAGES.double())
    same(doubled, wanted)
    learning = made().requires_grad_()
    torch.testing.assert_close(learning(IMAGES.double()).cls, wanted.cls, rtol=1e-4, atol=1e-5)
    assert learning(IMAGES).cls.requires_grad


def test_features_made_in_inference_mode_and_weights_read_in_it():
    encoder = made()
    wanted = encoder(IMAGES)
    with torch.inference_mode():
        same(encoder(IMAGES), wanted)
        same(copy.deepcopy(encoder)(IMAGES), wanted)
    assert not encoder(IMAGES).cls.is_inference()


def test_copies_and_pickles_are_it():
    encoder = made(torch.bfloat16)
    wanted = encoder(IMAGES)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        same(other(IMAGES), wanted)
        assert other.preprocess == encoder.preprocess
        assert other.vit.cls_token is not encoder.vit.cls_token
    assert len(pickle.dumps(encoder)) == pytest.approx(len(pickle.dumps(made())), rel=0.02)


def test_to_makes_the_fast_copy_anew():
    encoder = made()
    wanted = encoder(IMAGES)
    halved = encoder.to(torch.bfloat16).float()
    assert (halved(IMAGES).cls - wanted.cls).abs().max() > 1e-4
    assert torch.allclose(halved(IMAGES).cls, halved.vit(IMAGES), atol=1e-4)


def test_threads_get_what_one_gets(tmp_path):
    encoder = made()
    jobs = [IMAGES, np.stack([grey(seed=1)] * 3), [phantom(tmp_path / "x.dcm")]] * 4
    wanted = [made()(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(encoder, jobs), wanted, strict=True):
            same(one, other)


def test_what_threads_silenced_is_heard_again(tmp_path):
    file = phantom(tmp_path / "x.dcm")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(made(), [[file]] * 8))
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_it_compiles_whole():
    tool = Tool(made(torch.bfloat16)).eval()
    compiled = torch.compile(tool, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), tool(IMAGES), rtol=0, atol=0.05)
        tool.encoder.vit.load_state_dict(made(seed=5).vit.state_dict())
        torch.testing.assert_close(compiled(IMAGES), tool(IMAGES), rtol=0, atol=0.05)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_it_works_in_workers_of_a_data_loader(context, tmp_path):
    files = [str(phantom(tmp_path / f"{n}.dcm", n)) for n in range(3)]
    encoder = made()
    loader = DataLoader(
        files, batch_size=2, collate_fn=encoder, num_workers=1, multiprocessing_context=context
    )
    found = torch.cat([features.cls for features in loader])
    torch.testing.assert_close(found, encoder(files).cls, rtol=1e-4, atol=1e-5)


def test_the_start_loads_little(tmp_path):
    """Neither compilers nor training's libraries are loaded for an embedding."""
    encoder = made()
    preprocess = encoder.preprocess.to_dict()
    save_model_folder(
        tmp_path / "model", encoder.vit, preprocess=preprocess, mean=0.5, std=0.25, task=None,
        head=None, provenance={},
    )  # fmt: skip
    file = phantom(tmp_path / "x.dcm")
    heavy = ["torch._dynamo", "sympy", "monai", "pyarrow", "matplotlib", "tensorboard", "fsspec"]
    code = (
        "import sys, spcxr; assert 'torch' not in sys.modules;"
        f"print(spcxr.load_encoder({str(tmp_path)!r})({str(file)!r}).cls.shape);"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"torch.Size([1, {WIDTH}])", "[]"]


def by_data(weight):
    weight.data.mul_(0.9)


def by_other_data(weight):
    weight.data = weight.data * 0.9


def by_a_fused_step(weight):
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.01, fused=True).step()
    weight.grad = None
    weight.requires_grad_(False)


@pytest.mark.parametrize("change", [by_data, by_other_data, by_a_fused_step])
def test_changes_that_torch_does_not_count_are_seen(change):
    encoder = made()
    first = encoder(IMAGES).cls
    change(encoder.vit.blocks[1].mlp.fc1.weight)
    after = encoder(IMAGES).cls
    assert (after - first).abs().max() > 1e-3
    torch.testing.assert_close(after, encoder.vit(IMAGES), rtol=1e-4, atol=1e-4)


def test_weights_that_learn_by_a_fused_optimiser_are_those_that_answer():
    encoder = made()
    encoder(IMAGES)
    encoder.requires_grad_()
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=0.01, fused=True)
    for _ in range(2):
        encoder(IMAGES).cls.square().mean().backward()
        optimiser.step()
        with torch.no_grad():
            torch.testing.assert_close(encoder(IMAGES).cls, encoder.vit(IMAGES))
