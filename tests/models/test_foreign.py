"""Weights of other libraries: equal features under our names, and what is refused."""

import argparse
import json

import pytest
import torch
from foreign_states import (
    FAMILIES,
    HEADS,
    SIDE,
    WIDTH,
    hf_forward,
    hf_state,
    same_features,
    timm_forward,
    timm_state,
    tiny,
)
from safetensors.torch import save_file

from spcxr.errors import SpcxrError
from spcxr.models.vit import build_vit
from spcxr.models.weights import load_encoder_weights

# --- equal features ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("patch_px", [8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_weights_give_the_same_features(tmp_path, family, patch_px, suffix):
    state, images = hf_state(family, patch_px=patch_px), torch.randn(2, 3, SIDE, SIDE)
    file = tmp_path / f"w.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    encoder = tiny(patch_px=patch_px)
    report = load_encoder_weights(encoder, file)
    assert same_features(encoder, images, hf_forward(family, state, images))
    assert set(report.matched) == set(encoder.state_dict())
    assert "attn.qkv: joined from q, k, v (2 blocks)" in report.converted
    folded = "attn.proj: times ls1.gamma (2 blocks)" in report.converted
    assert folded == family.startswith("Dinov2")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_channel_answers_grey_images_as_three_did(tmp_path, family):
    state, grey = hf_state(family), torch.randn(2, 1, SIDE, SIDE)
    torch.save(state, tmp_path / "w.bin")
    encoder = tiny(channels=1)
    report = load_encoder_weights(encoder, tmp_path / "w.bin")
    wanted = hf_forward(family, state, grey.expand(-1, 3, -1, -1))
    assert same_features(encoder, grey, wanted)
    assert "patch_embed.proj.weight: 3 -> 1 channels" in report.converted


@pytest.mark.parametrize("cls_position", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_timm_weights_give_the_same_features(tmp_path, scaled, cls_position):
    state = timm_state(scaled=scaled, cls_position=cls_position)
    save_file(state, tmp_path / "w.safetensors")
    encoder, images = tiny(), torch.randn(2, 3, SIDE, SIDE)
    report = load_encoder_weights(encoder, tmp_path / "w.safetensors")
    assert same_features(encoder, images, timm_forward(state, images))
    said = "; ".join(report.converted)
    assert ("times ls2.gamma" in said, "a zero for the cls token" in said) == (
        scaled,
        not cls_position,
    )


def test_one_channel_weights_serve_three(tmp_path):
    state, grey = timm_state(channels=1), torch.randn(2, 1, SIDE, SIDE)
    torch.save({"model": state}, tmp_path / "w.pth")
    encoder = tiny(channels=3)
    load_encoder_weights(encoder, tmp_path / "w.pth")
    assert same_features(encoder, grey.expand(-1, 3, -1, -1), timm_forward(state, grey))


def test_fourteen_px_patches_are_resampled_to_another_side(tmp_path):
    with torch.device("meta"):
        meta = build_vit("vit_tiny", image_px=(518, 518), patch_px=14, channels=3)
    state = {k: torch.zeros(v.shape) for k, v in meta.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    encoder = build_vit("vit_tiny", image_px=(224, 280), patch_px=14)
    report = load_encoder_weights(encoder, tmp_path / "w.pth")
    assert report.converted[1] == "pos_embed: 37x37 -> 16x20 patches"


# --- containers and prefixes ---------------------------------------------------------------------


def dino_checkpoint():
    """DINO's ``checkpoint.pth``: student under DDP, teacher, heads, and settings in a Namespace."""
    head = {"head.mlp.0.weight": torch.zeros(8, WIDTH), "head.last_layer.weight_g": torch.ones(8)}

    def wrapped(state, prefix):
        return {f"{prefix}backbone.{k}": v for k, v in state.items()} | {
            prefix + k: v for k, v in head.items()
        }

    student = {k: v + 1 for k, v in timm_state().items()}
    return {
        "student": wrapped(student, "module."),
        "teacher": wrapped(timm_state(), ""),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def mae_checkpoint():
    """MAE's and medical_mae's pretraining checkpoint, with its decoder."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 5, 8),
        "decoder_embed.weight": torch.zeros(8, WIDTH),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8),
        "decoder_pred.bias": torch.zeros(768),
    }
    return {
        "model": timm_state() | decoder,
        "optimizer": {},
        "epoch": 800,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75),
    }


def chunked():
    """DINOv2's teacher: blocks in chunks, beside two heads."""
    state = {
        k.replace("blocks.", "blocks.0.", 1): v for k, v in timm_state(scaled=True).items()
    } | {"mask_token": torch.zeros(1, WIDTH)}
    heads = {f"{h}.mlp.0.weight": torch.zeros(8, WIDTH) for h in ("dino_head", "ibot_head")}
    return {"teacher": {f"backbone.{k}": v for k, v in state.items()} | heads}


def under(prefix):
    return {prefix + k: v for k, v in timm_state().items()}


CHECKPOINTS = {
    "DINO": (dino_checkpoint, 2, "took 'teacher' of the file's student, teacher"),
    "MAE": (mae_checkpoint, 5, None),
    "DINOv2": (chunked, 3, "mlp.fc2: times ls2.gamma (2 blocks)"),
    "DDP": (lambda: {"state_dict": under("module.")}, 0, None),
    "lightning": (lambda: {"state_dict": under("model.encoder.")}, 0, None),
    "a file of EMA weights": (
        lambda: {"state_dict": {}, "state_dict_ema": timm_state()},
        0,
        "took 'state_dict_ema' of the file's state_dict, state_dict_ema",
    ),
    "both in one dictionary": (
        lambda: under("teacher.backbone.") | under("student.backbone."),
        len(timm_state()),
        "took 'teacher.backbone.', not 'student.backbone.'",
    ),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_as_their_makers_write_them(tmp_path, name, legacy):
    make, aside, said = CHECKPOINTS[name]
    file = tmp_path / "checkpoint.pth.tar"
    torch.save(make(), file, _use_new_zipfile_serialization=not legacy)
    encoder, images = tiny(), torch.randn(2, 3, SIDE, SIDE)
    report = load_encoder_weights(encoder, file)
    state = timm_state(scaled=name == "DINOv2")
    assert same_features(encoder, images, timm_forward(state, images))
    assert len(report.unexpected) == aside
    assert said is None or said in report.converted


def hf_folder(folder, state, **config):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"} | config))
    return folder


def test_a_hugging_face_folder_tells_eps_and_heads(tmp_path):
    state = {f"vit.{k}": v for k, v in hf_state("ViTModel").items()}
    state |= {
        "vit.pooler.dense.weight": torch.zeros(WIDTH, WIDTH),
        "classifier.bias": torch.ones(2),
    }
    config = {"layer_norm_eps": 1e-12, "num_attention_heads": HEADS, "hidden_act": "gelu"}
    folder = hf_folder(tmp_path / "a", state, **config)
    for path in (folder, folder / "model.safetensors"):
        report = load_encoder_weights(tiny(), path)
        assert report.converted[-1] == "LayerNorm eps: 1e-12 -> 1e-06"
        assert sorted(report.unexpected) == ["classifier.bias", "pooler.dense.weight"]
    other = hf_folder(tmp_path / "b", state, num_attention_heads=6)
    with pytest.raises(SpcxrError, match=r"attends with 6 heads, this encoder with 3"):
        load_encoder_weights(tiny(), other)
    quick = hf_folder(tmp_path / "c", state, hidden_act="quick_gelu")
    with pytest.raises(SpcxrError, match=r"hidden_act 'quick_gelu', this encoder has the exact"):
        load_encoder_weights(tiny(), quick)


# --- refusals ------------------------------------------------------------------------------------


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


UNLIKE = [
    ({"reg_token": torch.zeros(1, 4, WIDTH)}, "register tokens (reg_token)"),
    ({"blocks.0.mlp.w12.weight": torch.zeros(8, WIDTH)}, "a gated MLP (SwiGLU)"),
    ({"blocks.0.mlp.fc1.weight": torch.zeros(8 * WIDTH, WIDTH)}, "a gated MLP (blocks.0.mlp.fc2"),
    ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, "normalised queries and keys"),
    ({"blocks.0.attn.relative_position_bias_table": torch.ones(8)}, "relative position biases"),
    ({"rope_embed.periods": torch.ones(4)}, "rotary positions"),
    ({"dist_token": torch.zeros(1, 1, WIDTH)}, "a second token"),
    ({"norm_pre.weight": torch.ones(WIDTH)}, "a norm before the blocks"),
    ({"blocks.0.attn.qkv.lora_A.weight": torch.ones(2, WIDTH)}, "LoRA adapters"),
]


def refused(tmp_path, state, encoder=None):
    """The message, after making sure that it is one line and that nothing was changed."""
    encoder = encoder or tiny()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(SpcxrError) as caught:
        load_encoder_weights(encoder, tmp_path / "w.pth")
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'w.pth'}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("extra", "reason"), UNLIKE)
def test_what_this_encoder_cannot_compute_is_named(tmp_path, extra, reason):
    message = refused(tmp_path, timm_state() | extra)
    assert f"has {reason}" in message
    assert "does not compute" in message


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (without(timm_state(), "cls_token"), "has no cls token"),
        (without(timm_state(), "norm.weight", "norm.bias"), "missing 2 (norm.weight, norm.bias)"),
        (
            without(timm_state(), "norm.weight", "norm.bias")
            | {"fc_norm.weight": torch.ones(WIDTH), "fc_norm.bias": torch.zeros(WIDTH)},
            "lost its final norm: give the pretrained one",
        ),
        (timm_state() | {"blocks.0.gate": torch.ones(1)}, "unexpected 1 (blocks.0.gate)"),
        (timm_state() | {"blocks.0.ls1.gamma": torch.ones(7)}, "does not fit blocks.0.attn.proj"),
        (
            without(hf_state("ViTModel"), "encoder.layer.1.attention.attention.key.bias"),
            "blocks.1.attn.q.bias without blocks.1.attn.k.bias",
        ),
        (
            {k: v for k, v in timm_state().items() if not k.startswith("blocks.1")},
            "missing 12 (blocks.1.norm1.weight",
        ),
        ({"conv1.weight": torch.zeros(3), "fc.bias": torch.ones(1)}, "no ViT encoder in it"),
        (under("a.") | under("b."), "several encoders: a., b.; save one of them alone"),
        ({"epoch": 3}, "no weights by name in it (it holds epoch)"),
        ({"model": {}}, "no weights by name in it (it holds nothing)"),
        (
            timm_state() | {"blocks.0.0.norm1.weight": torch.ones(WIDTH)},
            "several tensors would bear one name",
        ),
        ([torch.ones(1)], "holds a list, no weights by name"),
    ],
)
def test_a_file_that_does_not_match_is_refused(tmp_path, state, reason):
    assert reason in refused(tmp_path, state)


@pytest.mark.parametrize(("size", "patch_px"), [("vit_small", 14), ("vit_tiny", 14)])
def test_the_size_of_the_file_is_named(tmp_path, size, patch_px):
    with torch.device("meta"):
        theirs = build_vit("vit_tiny", image_px=32, channels=3)
    state = {k: torch.zeros(v.shape) for k, v in theirs.state_dict().items()}
    message = refused(tmp_path, state, build_vit(size, image_px=28, patch_px=patch_px))
    assert message.endswith("this file is a vit_tiny/16: choose --model vit_tiny --patch-px 16")
