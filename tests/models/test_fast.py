"""The encoder for use: every method answers as the plain one's, in bfloat16 as near as it can."""

import copy
import csv
import pickle

import pytest
import torch
import torch.nn.functional as F

from spcxr.data.phantom_draw import draw
from spcxr.models import fast
from spcxr.models.attention_maps import cls_attention
from spcxr.models.fast import for_inference
from spcxr.models.vit import VisionTransformer, build_vit
from spcxr.ops import dispatch

WHY = dispatch.unavailable("norm_linear", "native", "cpu")
needs_products = pytest.mark.skipif(WHY is not None, reason=str(WHY))
BFLOAT16 = torch.bfloat16


def lively(encoder: VisionTransformer) -> VisionTransformer:
    """Drawn weights of a trained encoder's size: at torch's first ones every block is nearly the
    identity, and nothing could be told by its outputs."""
    torch.manual_seed(0)
    for name, weight in encoder.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        elif "norm" in name and "weight" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return encoder.eval()


def tiny(width=64, depth=3, **settings):
    settings = {"image_px": (32, 48), "patch_px": 16, "heads": 2, **settings}
    return lively(VisionTransformer(width=width, depth=depth, **settings))


def answers(encoder: VisionTransformer, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every method says."""
    torch.manual_seed(1)
    hidden = torch.rand(len(images), 2, 3) < 0.4
    sizes = [images[0], images[1, :, :16], images[2, :, :, :32]]
    made = {
        "cls": encoder(images),
        "cls, hidden": encoder(images, key_mask=hidden),
        "cls, visible": encoder(images, ~hidden),
        "cls, sizes": encoder(sizes),
        "all": encoder.forward_features(images),
        "all, hidden": encoder.forward_features(images, hidden),
        "packed": encoder.encode_visible(images, ~hidden).tokens,
        "packed, sizes": encoder.encode_visible(sizes).tokens,
        "maps": cls_attention(encoder, images),
    }
    layers = encoder.get_intermediate_layers(images, 2, return_class_token=True)
    made |= {f"layer {i}, {j}": t for i, two in enumerate(layers) for j, t in enumerate(two)}
    made["outputs"] = torch.stack(encoder.outputs_of(encoder.embed(images), [1, 0]))
    return made


@pytest.mark.parametrize("width", [64, 24])
@pytest.mark.parametrize("depth", [1, 3])
def test_every_method_answers_as_the_plain_encoders(width, depth):
    encoder = tiny(width, max(depth, 2))
    images = torch.randn(4, 1, 32, 48)
    with torch.no_grad():
        wanted = answers(encoder, images)
        exact = answers(for_inference(encoder, torch.float32), images)
        near = answers(for_inference(encoder, BFLOAT16), images.bfloat16())
    for name, value in wanted.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert near[name].shape == value.shape
        assert (near[name].float() - value).norm() / value.norm() < 2e-2, name


@needs_products
def test_fused_blocks_err_no_more_than_torchs():
    encoder = tiny(depth=6)
    images = torch.randn(4, 1, 32, 48)
    with torch.no_grad():
        truth = encoder.forward_features(images)
        made = for_inference(encoder, BFLOAT16).forward_features(images.bfloat16())
        plain = copy.deepcopy(encoder).to(BFLOAT16).forward_features(images.bfloat16())
    assert (made - truth).norm() <= 1.1 * (plain - truth).norm()


def test_the_encoder_given_is_left_as_it_is():
    encoder = tiny().train()
    before = copy.deepcopy(encoder.state_dict())
    made = for_inference(encoder, BFLOAT16)
    assert encoder.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in encoder.parameters())
    assert all(torch.equal(a, before[k]) for k, a in encoder.state_dict().items())
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())
    assert list(made.state_dict()) == list(before)


@needs_products
def test_the_fused_layers_serve(monkeypatch):
    made, served = for_inference(tiny(), BFLOAT16), []
    for verb in ("norm_linear", "residual_mlp"):
        real = getattr(fast, verb)
        monkeypatch.setattr(fast, verb, lambda *words, f=real: served.append(f) or f(*words))
    made(torch.zeros(1, 1, 32, 48).bfloat16())
    assert len(served) == 6
    for width, dtype in ((24, BFLOAT16), (64, torch.float32)):
        for_inference(tiny(width), dtype)(torch.zeros(1, 1, 32, 48, dtype=dtype))
    assert len(served) == 6


def test_gradients_of_activations_are_torchs():
    """No weight has one; what explains an output may ask for those of the tokens."""
    encoder = tiny()
    made = for_inference(encoder, BFLOAT16)
    tokens = torch.randn(2, 7, 64)
    leaves = tokens.clone().requires_grad_(), tokens.bfloat16().requires_grad_()
    found = []
    for model, leaf in zip((encoder, made), leaves, strict=True):
        (out,) = model.outputs_of(leaf, [2])
        found.append(torch.autograd.grad(out[:, 0].square().sum(), leaf)[0].float())
    assert (found[1] - found[0]).norm() / found[0].norm() < 3e-2


def test_it_survives_copies():
    made = for_inference(tiny(), BFLOAT16)
    images = torch.randn(2, 1, 32, 48).bfloat16()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(images), made(images))
    assert made.to(torch.float32)(images.float()).dtype == torch.float32


def test_compiles_and_exports():
    torch._dynamo.reset()
    made, images = for_inference(tiny(), BFLOAT16), torch.randn(3, 1, 32, 48).to(BFLOAT16)
    with torch.no_grad():
        wanted = made(images)
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), wanted)
        batch = ({0: torch.export.Dim("B", min=2)},)
        program = torch.export.export(made, (images,), dynamic_shapes=batch)
        torch.testing.assert_close(program.module()(images[:2]), made(images[:2]))


# --- accuracy ---------------------------------------------------------------------------------


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def check_accuracy(images: torch.Tensor) -> None:
    """Of the cls tokens of a drawn ViT-S (a trained one is not at hand) against float32."""
    encoder = lively(build_vit("vit_small", image_px=224))
    with torch.inference_mode():
        wanted = encoder(images)
        made = for_inference(encoder, BFLOAT16)(images.bfloat16()).float()
    assert F.cosine_similarity(made, wanted).min() >= 0.9995
    pairs = torch.stack([ranks(torch.nn.functional.pdist(t)) for t in (made, wanted)])
    assert torch.corrcoef(pairs)[0, 1] >= 0.999


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - pixels.mean()) / pixels.std()


def test_accuracy_on_phantoms():
    # 276 pairs: among 28 of eight images two that change places tell of chance alone.
    drawn = [draw(i, label=label, size_px=224) for i in range(12) for label in ("normal", "covid")]
    images = [torch.from_numpy(one.pixels[:224].astype("float32")) for one in drawn]
    check_accuracy(torch.stack([normalised(image)[None] for image in images]))


@pytest.mark.slow
@pytest.mark.shared
def test_accuracy_on_real_radiographs(shared_data):
    np = pytest.importorskip("numpy")
    pil = pytest.importorskip("PIL.Image")
    with (shared_data / "cls_manifest.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    images = []
    for row in rows[:: max(len(rows) // 24, 1)][:24]:
        with pil.open(shared_data / row["path"]) as image:
            pixels = np.asarray(image.convert("L").resize((224, 224)), dtype="float32")
        images.append(normalised(torch.from_numpy(pixels))[None])
    check_accuracy(torch.stack(images))
