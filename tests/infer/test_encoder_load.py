"""`load_encoder`: from every kind of path, with the numbers of its images; what it refuses."""

import json
import warnings

import numpy as np
import pytest
import torch
from encoder_cases import grey, made, normalised, phantom, vit_of
from foreign_states import (
    FAMILIES,
    HEADS,
    SIDE,
    WIDTH,
    hf_forward,
    hf_state,
    random_state,
    timm_forward,
    timm_state,
)
from safetensors.torch import save_file

import spcxr
from spcxr.data.presets import Preprocess
from spcxr.data.study import Study, read_study
from spcxr.errors import SpcxrError
from spcxr.models.weights import save_model_folder

CPU = {"device": "cpu", "dtype": "fp32"}


@pytest.fixture
def run(tmp_path):
    """A run folder whose encoder has three channels and is shown crops of 96 px."""
    save_model_folder(
        tmp_path / "run" / "model",
        vit_of(channels=3),
        preprocess=Preprocess(preset="chexpert-jpg", size_px=96, fit="crop").to_dict(),
        mean=0.4,
        std=0.2,
        task=None,
        head=None,
        provenance={},
    )
    return tmp_path / "run"


def test_a_run_its_model_folder_and_its_file_are_one(run, tmp_path):
    file, vit = phantom(tmp_path / "x.dcm"), vit_of(channels=3)
    for path in (run, str(run), run / "model", run / "model" / "model.safetensors"):
        encoder = spcxr.load_encoder(path, **CPU)
        assert encoder.preprocess == Preprocess(preset="chexpert-jpg", size_px=96, fit="crop")
        assert encoder.mean.flatten().tolist() == pytest.approx([0.4] * 3)
        assert encoder.std.flatten().tolist() == pytest.approx([0.2] * 3)
        assert encoder.notes == ()
        assert not encoder.training
        assert not any(w.requires_grad for w in encoder.parameters())
        square = encoder.preprocess(read_study(file)).pixels
        wanted = vit(normalised(encoder, square[None]))
        torch.testing.assert_close(encoder(file).cls, wanted, rtol=1e-4, atol=1e-5)


def test_device_and_dtype(run):
    assert spcxr.load_encoder(run, "cpu", torch.bfloat16).dtype == torch.bfloat16
    assert spcxr.load_encoder(run, torch.device("cpu"), "bf16").dtype == torch.bfloat16
    assert spcxr.load_encoder(run, dtype="fp32").dtype == torch.float32
    assert spcxr.load_encoder(run, "cpu").dtype in (torch.float32, torch.bfloat16)
    with pytest.raises(SpcxrError, match=r"dtype is torch\.float64; choose one of"):
        spcxr.load_encoder(run, dtype=torch.float64)
    with pytest.raises(SpcxrError, match="precision is 'int8'; choose one of"):
        spcxr.load_encoder(run, dtype="int8")
    with pytest.raises(SpcxrError, match="device is 'tpu'; choose one of"):
        spcxr.load_encoder(run, "tpu")
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:0"):
            with pytest.raises(SpcxrError, match="--device cuda"):
                spcxr.load_encoder(run, name)


@pytest.mark.gpu
def test_on_a_gpu_it_answers_as_on_the_cpu(run):
    arrays = np.stack([grey(seed=n) for n in range(3)])
    wanted = spcxr.load_encoder(run, **CPU)(arrays)
    for encoder in (
        spcxr.load_encoder(run, "cuda", "fp32"),
        spcxr.load_encoder(run, **CPU).to("cuda"),
    ):
        found = encoder(arrays)
        assert found.cls.is_cuda
        torch.testing.assert_close(found.cls.cpu(), wanted.cls, rtol=1e-3, atol=1e-3)
        seen = torch.rand(3, *wanted.patches.shape[1:3]) < 0.5
        assert (encoder(arrays, visible=seen).patches.cpu()[~seen] == 0).all()
        assert encoder(list(arrays), keep_aspect=True).cls.is_cuda


def test_loaded_in_inference_mode_it_can_still_learn(run):
    with torch.inference_mode():
        encoder = spcxr.load_encoder(run, **CPU).requires_grad_()
    encoder(torch.zeros(1, 3, 64, 64)).cls.sum().backward()


# -- weights of others ------------------------------------------------------------------------

IMAGES = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
ASSUMED = r"does not say how its images were made; assumed .*\. Give preset, fit"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("cls_position", [False, True])
def test_timm_files(tmp_path, scaled, cls_position):
    state = timm_state(scaled=scaled, cls_position=cls_position)
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=ASSUMED):
        encoder = spcxr.load_encoder(tmp_path / "w.pth", **CPU, heads=HEADS)
    wanted = timm_forward(state, IMAGES)
    torch.testing.assert_close(encoder(IMAGES).cls, wanted[:, 0], rtol=1e-4, atol=1e-4)
    assert encoder.preprocess == Preprocess(size_px=SIDE)
    assert encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert "assumed preprocess: minmax, pad, 32 px" in encoder.notes
    assert "assumed mean and std: ImageNet's" in encoder.notes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patch_px", [16, 8])
def test_hugging_face_folders(tmp_path, family, patch_px):
    state = hf_state(family, patch_px=patch_px)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "dinov2", "num_attention_heads": HEADS, "layer_norm_eps": 1e-6})
    )
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.53] * 3, "image_std": [0.26] * 3})
    )
    settings = Preprocess(preset="rad-dino", size_px=48, fit="crop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is assumed
        encoder = spcxr.load_encoder(tmp_path, **CPU, preprocess=settings)
    wanted = hf_forward(family, state, IMAGES)[:, 0]
    torch.testing.assert_close(encoder(IMAGES).cls, wanted, rtol=1e-4, atol=1e-4)
    square = torch.from_numpy(settings(Study(grey(), 8)).pixels)[None, None]
    unit = torch.nn.functional.interpolate(
        square.float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True
    )
    shown = ((unit - 0.53) / 0.26).expand(-1, 3, -1, -1)
    torch.testing.assert_close(encoder(grey()).cls, encoder(shown).cls, rtol=1e-3, atol=1e-3)


def test_a_timm_folder_says_mean_std_and_heads(tmp_path):
    save_file(timm_state(channels=1), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_small_patch16_224",
        "model_args": {"num_heads": HEADS},
        "pretrained_cfg": {"mean": [0.3], "std": [0.2]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(
        UserWarning,
        match=r"assumed preprocess: minmax, pad, 32 px\. Give",
    ):
        encoder = spcxr.load_encoder(tmp_path, **CPU)
    assert (encoder.vit.heads, encoder.vit.channels) == (HEADS, 1)
    assert (encoder.mean.item(), encoder.std.item()) == pytest.approx((0.3, 0.2))


def test_what_is_said_by_hand_is_believed(tmp_path):
    torch.save(timm_state(channels=1), tmp_path / "w.pt")
    by_hand = {"heads": HEADS, "preprocess": Preprocess(size_px=64)}
    with pytest.raises(SpcxrError, match="give mean and std"):
        spcxr.load_encoder(tmp_path / "w.pt", **CPU, **by_hand)
    encoder = spcxr.load_encoder(tmp_path / "w.pt", **CPU, **by_hand, mean=0.5, std=[0.25])
    assert (encoder.mean.item(), encoder.std.item()) == (0.5, 0.25)
    with pytest.raises(SpcxrError, match="another number of channels than its 1"):
        spcxr.load_encoder(tmp_path / "w.pt", **CPU, **by_hand, mean=[0.5] * 3, std=0.25)
    with pytest.raises(SpcxrError, match=f"width {WIDTH} and depth 2.*; give heads"):
        spcxr.load_encoder(tmp_path / "w.pt", **CPU, mean=0.5, std=0.25)


def test_some_of_the_preprocessing_may_be_said(tmp_path):
    torch.save(timm_state(channels=1), tmp_path / "w.pt")
    others = {"heads": HEADS, "mean": np.float32(0.5), "std": np.array([0.25])}
    told = {"preset": "rad-dino", "fit": "crop"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is assumed
        encoder = spcxr.load_encoder(tmp_path / "w.pt", **CPU, **others, preprocess=told)
    assert encoder.preprocess == Preprocess(**told, size_px=SIDE)
    told = {"fit": "crop", "size_px": 40}
    with pytest.warns(UserWarning, match=r"assumed preprocess: minmax, crop, 40 px\."):
        spcxr.load_encoder(tmp_path / "w.pt", **CPU, **others, preprocess=told)


# -- refusals ---------------------------------------------------------------------------------


def test_our_weights_say_their_preprocessing_themselves(run):
    for given in ({"mean": 0.5}, {"preprocess": Preprocess()}, {"heads": 3}):
        with pytest.raises(SpcxrError, match="come with these weights; leave them out"):
            spcxr.load_encoder(run, **CPU, **given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mean": (123.6, 116.3, 103.5), "std": 58.4}, r"mean 123.6, .* not of pixels in \[0, 1\]"),
        ({"mean": 0.5, "std": 0}, "not of pixels"),
        ({"mean": 0.5, "std": -0.25}, "not of pixels"),
        ({"mean": float("nan"), "std": 0.25}, "not of pixels"),
        ({"mean": "0.5;0.5", "std": 0.25}, "mean is '0.5;0.5'; give a number, or one a channel"),
        ({"heads": 0}, "heads is 0; give 1 or more"),
        ({"heads": -HEADS}, "heads is -3; give 1 or more"),
        ({"preprocess": "minmax"}, "preprocess is 'minmax'; give a Preprocess, or some of preset"),
        ({"preprocess": {"preset": "minmax", "size": 3}}, "give a Preprocess, or some of preset"),
        ({"preprocess": {"preset": "maxmin"}}, "preprocess preset is 'maxmin'; choose: minmax"),
    ],
)
def test_settings_that_cannot_be(tmp_path, given, reason):
    torch.save(timm_state(), tmp_path / "w.pt")
    with pytest.raises(SpcxrError, match=reason):
        spcxr.load_encoder(tmp_path / "w.pt", **CPU, **{"heads": HEADS, **given})


def test_a_file_that_is_no_weights_is_named(tmp_path, run):
    (tmp_path / "notes.txt").write_text("a radiograph")
    for file in (tmp_path / "notes.txt", run / "model" / "config.json"):
        with pytest.raises(SpcxrError, match=rf"{file.name}: is no weights file by its name; give"):
            spcxr.load_encoder(file, **CPU)


class Code:
    """Runs where pickles are trusted."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_code_is_never_run(tmp_path):
    torch.save({"model": timm_state(), "x": Code(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(SpcxrError, match=r"holds .*open beside tensors, which could run code"):
        spcxr.load_encoder(tmp_path / "w.pth", **CPU)
    assert not (tmp_path / "ran").exists()


def pickle_for_safetensors(folder):
    torch.save(timm_state(), folder / "model" / "model.safetensors")


def torn(folder):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def another(folder):
    save_file(
        {k: v[:-1].clone() for k, v in timm_state().items() if v.ndim}, folder / "w.safetensors"
    )
    (folder / "w.safetensors").replace(folder / "model" / "model.safetensors")


def wild(folder):
    state = {k: v.detach().clone() for k, v in vit_of(channels=3).state_dict().items()}
    state["norm.bias"][0] = torch.nan
    save_file(state, folder / "model" / "model.safetensors")


def newer(folder):
    file = folder / "model" / "config.json"
    config = json.loads(file.read_text())
    config["preprocess"]["version"] = 99
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (pickle_for_safetensors, "a pickle, not safetensors"),
        (torn, "not a whole safetensors file"),
        (another, "not the weights of this encoder"),
        (wild, "values that are not finite in 1 .norm.bias"),
        (newer, "has version 99, this spcxr makes version 1"),
    ],
)
def test_damaged_runs(run, change, reason):
    change(run)
    with pytest.raises(SpcxrError, match=reason) as refused:
        spcxr.load_encoder(run, **CPU)
    assert "\n" not in str(refused.value)


OTHERS = {
    "resnet": ({"conv1.weight": (64, 3, 7, 7), "fc.weight": (10, 64)}, "no ViT encoder in it"),
    "registers": (
        {"patch_embed.proj.weight": (24, 3, 16, 16), "cls_token": (1, 1, 24),
         "register_tokens": (1, 4, 24)},
        "has register tokens",
    ),
    "no blocks": (
        {"patch_embed.proj.weight": (24, 3, 16, 16), "cls_token": (1, 1, 24)},
        "not a whole ViT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path, name):
    shapes, reason = OTHERS[name]
    save_file(random_state(shapes), tmp_path / "w.safetensors")
    with pytest.raises(SpcxrError, match=reason):
        spcxr.load_encoder(tmp_path / "w.safetensors", **CPU)


def test_nothing_there(tmp_path):
    with pytest.raises(SpcxrError, match="neither a run with an exported model"):
        spcxr.load_encoder(tmp_path, **CPU)
    with pytest.raises(SpcxrError, match="not there; give a run"):
        spcxr.load_encoder(tmp_path / "w.safetensors", **CPU)


def test_the_package_names_what_it_has():
    assert set(spcxr.__all__) == {
        "Encoder", "Features", "RaggedFeatures", "__version__", "load_encoder",
    }  # fmt: skip
    assert isinstance(made(), spcxr.Encoder)
    assert isinstance(made()(grey()), spcxr.Features)
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        _ = spcxr.encode
