"""Files of weights: what is read, and that no pickle is ever run."""

import argparse
import os
import pathlib
import pickle

import pytest
import torch
from foreign_states import timm_state, tiny
from safetensors.torch import save_file

from spcxr.errors import SpcxrError
from spcxr.models.weight_files import read_checkpoint, read_tensors
from spcxr.models.weights import load_encoder_weights


class Code:
    """An object whose unpickling writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"echo run > {self.file}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path, legacy):
    state = {"model": timm_state(), "extra": Code(tmp_path / "ran")}
    for suffix in ("pth", "pt", "bin", "tar", "ckpt"):
        file = tmp_path / f"w.{suffix}"
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(SpcxrError, match=r"holds posix.system beside tensors.*safetensors"):
            load_encoder_weights(tiny(), file)
    assert not (tmp_path / "ran").exists()
    # it would have run where pickles are trusted
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_only_a_namespace_is_let_in(tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"model": timm_state(), "args": argparse.Namespace(out=pathlib.Path("x"))}, file)
    with pytest.raises(SpcxrError, match=r"holds pathlib.\w+ beside tensors"):
        read_checkpoint(file)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_named_safetensors_is_refused(tmp_path, legacy):
    file = tmp_path / "w.safetensors"
    torch.save(timm_state(), file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SpcxrError, match=r"a pickle, not safetensors; rename it to w.pth"):
        load_encoder_weights(tiny(), file)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_so_is_a_bare_pickle_of_any_protocol(tmp_path, protocol):
    file = tmp_path / "w.safetensors"
    file.write_bytes(pickle.dumps(Code(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(SpcxrError, match=r"a pickle, not safetensors; rename it to w.pth"):
        read_tensors(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_safetensors_that_begins_like_a_pickle_is_read(tmp_path, protocol):
    """It begins with its header's length: 640 bytes look like protocol 2."""
    file, length = tmp_path / "w.safetensors", 128 + 256 * protocol
    kept = {"a": torch.arange(3.0)}
    save_file(kept, file, metadata={"note": ""})
    bare = int.from_bytes(file.read_bytes()[:8], "little")
    save_file(kept, file, metadata={"note": "x" * (length - bare)})
    assert file.read_bytes()[:2] == bytes([128, protocol])
    torch.testing.assert_close(read_tensors(file), kept)


@pytest.mark.parametrize("legacy", [False, True])
def test_torn_and_absent_files_are_one_line(tmp_path, legacy):
    file = tmp_path / "w.pth"
    torch.save(timm_state(), file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    for length in (0, 3, 10, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:length])
        with pytest.raises(SpcxrError, match=r"w.pth: not a whole file of weights \(\w+\); copy"):
            load_encoder_weights(tiny(), file)
    file.write_bytes(b"not weights at all")
    with pytest.raises(SpcxrError, match="not a whole file of weights"):
        load_encoder_weights(tiny(), file)
    with pytest.raises(SpcxrError, match="not there; give a run, a model folder or a"):
        load_encoder_weights(tiny(), tmp_path / "absent.bin")
    with pytest.raises(SpcxrError, match="unknown kind of weights"):
        read_checkpoint(tmp_path / "weights.npz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SpcxrError, match=r"no model.safetensors or pytorch_model.bin"):
        load_encoder_weights(tiny(), tmp_path / "empty")
