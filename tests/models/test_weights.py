"""Model folders: what is written, what is read back, and what is refused."""

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import spcxr
from spcxr.errors import SpcxrError
from spcxr.models.heads import ClassificationHead
from spcxr.models.positions import resize_positions
from spcxr.models.vit import VisionTransformer, build_vit
from spcxr.models.weights import (
    convert_channels,
    load_encoder_weights,
    load_model_folder,
    save_model_folder,
)

PREPROCESS = {"preset": "minmax", "version": 1, "size_px": 32, "fit": "pad"}


def tiny(image_px=(32, 48), channels=1, seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"patch_px": 16, "width": 24, "depth": 2, "heads": 3} | changes
    return VisionTransformer(image_px=image_px, channels=channels, **settings).eval()


def save(folder, encoder, **changes):
    settings = {
        "preprocess": PREPROCESS,
        "mean": 0.5,
        "std": 0.25,
        "task": None,
        "head": None,
        "provenance": {"objective": "gmml", "epochs": 3},
    }
    return save_model_folder(folder, encoder, **(settings | changes))


def test_round_trip_through_a_run_folder(tmp_path):
    encoder, head = tiny(), ClassificationHead(width=24, classes=3)
    task = {"kind": "multiclass", "labels": ["a", "b", "c"]}
    assert save(tmp_path / "run" / "model", encoder, head=head, task=task) == tmp_path / "run/model"
    for path in (tmp_path / "run", tmp_path / "run" / "model", str(tmp_path / "run")):
        loaded = load_model_folder(path)
        images = torch.randn(2, 1, 32, 48)
        assert not loaded.encoder.training
        assert torch.equal(loaded.encoder(images), encoder(images))
        assert loaded.config["preprocess"] == PREPROCESS
        assert loaded.config["task"] == task
        assert loaded.config["provenance"]["epochs"] == 3
        assert loaded.config["spcxr_version"] == spcxr.__version__
        ClassificationHead(width=24, classes=3).load_state_dict(loaded.head_state)
        assert torch.equal(loaded.head_state["fc.weight"], head.fc.weight)
    assert sorted(os.listdir(tmp_path / "run")) == ["model"]


def test_config_says_what_timm_needs(tmp_path):
    with torch.device("meta"):
        meta = build_vit("vit_small", image_px=(224, 256), patch_px=8, channels=3)
    encoder = meta.to_empty(device="cpu")
    config = json.loads((save(tmp_path / "m", encoder) / "config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_224"
    assert (config["num_classes"], config["num_features"], config["global_pool"]) == (
        0,
        384,
        "token",
    )
    arguments = config["model_args"]
    assert arguments["img_size"] == [224, 256]
    assert (arguments["patch_size"], arguments["in_chans"], arguments["depth"]) == (8, 3, 12)
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 256]
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    keys = set(load_file(tmp_path / "m" / "model.safetensors"))
    assert not [k for k in keys if "mask_token" in k or "decoder" in k or "head" in k]


def test_replaces_its_own_kind_only(tmp_path):
    save(tmp_path / "m", tiny(seed=1))
    save(tmp_path / "m", tiny(seed=2))
    assert torch.equal(load_model_folder(tmp_path / "m").encoder.norm.weight, torch.ones(24))
    assert torch.equal(load_model_folder(tmp_path / "m").encoder.cls_token, tiny(seed=2).cls_token)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("years of work")
    with pytest.raises(SpcxrError, match="no model folder; choose another place"):
        save(thesis, tiny())
    assert (thesis / "chapter1.tex").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["m", "thesis"]


def test_a_failed_write_leaves_nothing(tmp_path):
    save(tmp_path / "m", tiny(seed=1))
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "m", tiny(seed=2), provenance={"model": object()})
    with pytest.raises(SpcxrError, match="a head and its task go together"):
        save(tmp_path / "m", tiny(seed=2), head=ClassificationHead(width=24, classes=2))
    assert os.listdir(tmp_path) == ["m"]
    assert torch.equal(load_model_folder(tmp_path / "m").encoder.cls_token, tiny(seed=1).cls_token)


def test_loading_into_an_encoder_reports(tmp_path):
    source, target = tiny(seed=1), tiny(seed=2)
    report = load_encoder_weights(target, save(tmp_path / "m", source))
    assert torch.equal(target.pos_embed, source.pos_embed)
    assert set(report.matched) == set(source.state_dict())
    assert (report.missing, report.unexpected, report.converted) == ((), (), ())


def test_a_bare_file_may_carry_a_head(tmp_path):
    source, target = tiny(seed=1), tiny(seed=2)
    state = source.state_dict() | {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    save_file(state, tmp_path / "w.safetensors")
    report = load_encoder_weights(target, tmp_path / "w.safetensors")
    assert sorted(report.unexpected) == ["head.bias", "head.weight"]
    assert "unexpected 2 (head" in str(report)
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_three_channels_to_one_answers_grey_images_alike(tmp_path):
    rgb, grey = tiny(channels=3, seed=1), tiny(channels=1, seed=2)
    report = load_encoder_weights(grey, save(tmp_path / "m", rgb))
    assert report.converted == ("patch_embed.proj.weight: 3 -> 1 channels",)
    images = torch.randn(2, 1, 32, 48)
    assert torch.allclose(grey(images), rgb(images.expand(-1, 3, -1, -1)), atol=1e-5)


def test_one_channel_to_three_answers_grey_images_alike(tmp_path):
    grey, rgb = tiny(channels=1, seed=1), tiny(channels=3, seed=2)
    report = load_encoder_weights(rgb, save(tmp_path / "m", grey))
    assert report.converted == ("patch_embed.proj.weight: 1 -> 3 channels",)
    images = torch.randn(2, 1, 32, 48)
    assert torch.allclose(rgb(images.expand(-1, 3, -1, -1)), grey(images), atol=1e-5)
    back = convert_channels(convert_channels(grey.patch_embed.proj.weight, 3), 1)
    assert torch.allclose(back, grey.patch_embed.proj.weight)


def test_positions_are_resampled_from_the_grid_in_the_config(tmp_path):
    source, target = tiny((32, 128), seed=1), tiny((64, 64), seed=2)  # 16 patches both
    report = load_encoder_weights(target, save(tmp_path / "m", source))
    assert report.converted == ("pos_embed: 2x8 -> 4x4 patches",)
    assert torch.equal(target.pos_embed, resize_positions(source.pos_embed, (2, 8), (4, 4)))


def test_positions_of_a_bare_square_file_are_resampled(tmp_path):
    source, target = tiny((64, 64), seed=1), tiny((32, 48), seed=2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    report = load_encoder_weights(target, tmp_path / "w.safetensors")
    assert report.converted == ("pos_embed: 4x4 -> 2x3 patches",)
    save_file(tiny((32, 48)).state_dict(), tmp_path / "oblong.safetensors")
    with pytest.raises(SpcxrError, match="6 positions are no square grid"):
        load_encoder_weights(tiny((64, 64)), tmp_path / "oblong.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (tiny(depth=3), r"unexpected 12 \(blocks.2.*matched 30 of 30"),
        (tiny(depth=1), r"missing 12 \(blocks.1.norm1.weight"),
        (tiny(width=48), r"other shape 30 \(cls_token \[1, 1, 48\] for \[1, 1, 24\]"),
        (tiny((16, 24), patch_px=8), "check the model's size and patch_px"),
    ],
)
def test_refuses_another_build_and_changes_nothing(tmp_path, source, message):
    target = tiny(seed=2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(SpcxrError, match=message):
        load_encoder_weights(target, save(tmp_path / "m", source))
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_refuses_values_that_are_not_finite(tmp_path):
    source = tiny()
    source.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(SpcxrError, match=r"not finite in 1 \(blocks.0.mlp.fc1.weight\)"):
        load_encoder_weights(tiny(), tmp_path / "w.safetensors")


def test_refuses_torn_and_absent_files(tmp_path):
    folder = save(tmp_path / "m", tiny())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SpcxrError, match=r"model.safetensors: not a whole safetensors file"):
        load_model_folder(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpcxrError, match="not a whole safetensors file"):
        load_model_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpcxrError, match=r"model.safetensors: not there"):
        load_model_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(SpcxrError, match=r"config.json: not readable as JSON"):
        load_model_folder(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(SpcxrError, match=r"model_args is missing"):
        load_model_folder(folder)
    with pytest.raises(SpcxrError, match=r"no config.json"):
        load_model_folder(tmp_path)
    with pytest.raises(SpcxrError, match=r"no config.json"):
        load_model_folder(tmp_path / "absent")
    with pytest.raises(SpcxrError, match=r"give a run, a model folder or a \.safetensors file"):
        load_encoder_weights(tiny(), tmp_path / "weights.pt")


def test_refuses_a_task_without_its_head(tmp_path):
    folder = save(
        tmp_path / "m", tiny(), head=ClassificationHead(width=24, classes=2), task={"kind": "x"}
    )
    (folder / "head.safetensors").unlink()
    with pytest.raises(SpcxrError, match=r"task and head.safetensors go together"):
        load_model_folder(folder)


def test_refuses_weights_that_are_not_the_configs(tmp_path):
    folder = save(tmp_path / "m", tiny())
    save_file(tiny(channels=3).state_dict(), folder / "model.safetensors")
    with pytest.raises(SpcxrError, match=r"weights are not those of config.json.*3 -> 1"):
        load_model_folder(folder)


def test_a_full_disk_is_one_line_and_the_earlier_model_stays(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", tiny())

    def full(state, file, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("spcxr.models.weights.save_file", full)
    with pytest.raises(SpcxrError, match=r"model: .*No space left.*free some space"):
        save(folder, tiny(seed=1))
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert load_model_folder(folder).config["provenance"]["epochs"] == 3
