import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from spcxr.errors import SpcxrError
from spcxr.train.checkpoint import Checkpoints, Position, load_checkpoint, save_checkpoint
from spcxr.train.optim import build_adamw, set_rates, take_step


def make(width=4, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return model, build_adamw(model)


def learn(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(100 + step)
        set_rates(optimizer, lr=0.01, weight_decay=0.1)
        loss = model(torch.randn(6, 3)).square().mean()
        loss.backward()
        take_step(optimizer, loss, clip=1.0)


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.fixture
def saved(tmp_path):
    model, optimizer = make()
    learn(model, optimizer, 3)
    position = Position(step=3, best=0.5, best_step=3, data="abc")
    folder = save_checkpoint(tmp_path / "c", position, model=model, optimizer=optimizer, ema=model)
    return folder, model, optimizer


def test_going_on_equals_not_stopping(saved):
    folder, model, optimizer = saved
    other, its_optimizer = make(seed=9)
    ema, _ = make(seed=7)
    position = load_checkpoint(folder, model=other, optimizer=its_optimizer, ema=ema)
    assert position == Position(step=3, best=0.5, best_step=3, data="abc")
    assert same(ema, model)
    for pair in ((model, optimizer), (other, its_optimizer)):
        learn(*pair, 2)
    assert same(model, other)


def test_moments_matter(saved):
    """Without the optimiser's state the weights would part: the test above can fail."""
    folder, model, optimizer = saved
    other, its_optimizer = make(seed=9)
    load_checkpoint(folder, model=other)
    for pair in ((model, optimizer), (other, its_optimizer)):
        learn(*pair, 2)
    assert not same(model, other)


def test_tensors_are_named_and_nothing_is_pickled(saved):
    folder, _, _ = saved
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    block = json.loads((folder / "checkpoint.json").read_text())
    assert block["position"]["step"] == 3
    from safetensors import safe_open

    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        assert "exp_avg/0.weight" in file.keys()  # noqa: SIM118


def cut_tail(file):
    file.write_bytes(file.read_bytes()[:-40])


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_tail, flip_bit, lambda f: f.unlink()])
@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_torn_file_is_refused_and_nothing_changed(saved, damage, name):
    folder, _, _ = saved
    damage(folder / f"{name}.safetensors")
    other, its_optimizer = make(seed=9)
    before, _ = make(seed=9)
    with pytest.raises(SpcxrError, match=rf"{name}\.safetensors: .*the checkpoint is torn"):
        load_checkpoint(folder, model=other, optimizer=its_optimizer)
    assert same(other, before)
    assert not its_optimizer.state


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_a_torn_json_is_refused(saved, text):
    folder, model, _ = saved
    (folder / "checkpoint.json").write_text(text)
    with pytest.raises(SpcxrError, match=r"checkpoint\.json: .*torn"):
        load_checkpoint(folder, model=model)


def test_no_checkpoint_newer_format_and_no_ema(saved, tmp_path):
    folder, model, _ = saved
    with pytest.raises(SpcxrError, match="no checkpoint"):
        load_checkpoint(tmp_path / "nowhere", model=model)
    block = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**block, "version": 99}))
    with pytest.raises(SpcxrError, match=r"format 99.*update spcxr"):
        load_checkpoint(folder, model=model)
    plain = save_checkpoint(tmp_path / "d", Position(), model=model, optimizer=make()[1])
    with pytest.raises(SpcxrError, match="holds no ema state"):
        load_checkpoint(plain, model=model, ema=make()[0])


def test_another_models_checkpoint_is_refused_by_name(saved):
    folder, _, _ = saved
    wide, _ = make(width=5)
    with pytest.raises(SpcxrError, match=r"other shape .*0\.weight \[4, 3\] for \[5, 3\]"):
        load_checkpoint(folder, model=wide)
    with pytest.raises(SpcxrError, match=r"missing 2 \(other\.weight, other\.bias\).*unexpected"):
        load_checkpoint(folder, model=nn.ModuleDict({"other": nn.Linear(3, 4)}))


# --- the folder of checkpoints --------------------------------------------------------------


def names(checkpoints):
    return sorted(p.name for p in checkpoints.folder.iterdir())


def test_the_last_and_the_best_are_kept(tmp_path):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load(model=model) is None
    for step, best, best_step in [(2, 0.9, 2), (4, 0.9, 2), (6, 0.5, 6), (8, 0.5, 6), (9, 0.5, 6)]:
        position = Position(step=step, best=best, best_step=best_step)
        checkpoints.save(position, model=model, optimizer=optimizer)
    kept = ["best", "last"] + [f"step-{n:08d}" for n in (6, 9)]
    assert names(checkpoints) == kept
    assert checkpoints.load(model=model).step == 9
    assert load_checkpoint(checkpoints.best, model=model).step == 6


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(1, 0, [4, 9]), (3, 0, [4, 7, 8, 9]), (1, 3, [3, 4, 6, 9]), (2, 4, [4, 8, 9])],
)
def test_the_newest_and_some_are_kept(tmp_path, last, every, kept):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path, last=last, every=every)
    for step in range(1, 10):
        best = Position(step=step, best=0.1, best_step=4) if step >= 4 else Position(step=step)
        checkpoints.save(best, model=model, optimizer=optimizer)
    assert names(checkpoints) == ["best", "last", *(f"step-{step:08d}" for step in kept)]


def test_other_ranks_write_nothing(tmp_path):
    model, optimizer = make()
    Checkpoints(tmp_path, writes=False).save(Position(step=1), model=model, optimizer=optimizer)
    assert not any(tmp_path.iterdir())


def test_the_same_step_can_be_saved_again(tmp_path):
    """A run that comes back to its last step never stands without a whole checkpoint."""
    checkpoints = Checkpoints(tmp_path)
    for seed in range(3):
        model, optimizer = make(seed=seed)
        checkpoints.save(Position(step=5), model=model, optimizer=optimizer)
        loaded, _ = make(seed=99)
        assert checkpoints.load(model=loaded).step == 5
        assert same(model, loaded)
        assert len(names(checkpoints)) == 2


def test_dying_while_writing_leaves_the_last_one(tmp_path, monkeypatch):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Position(step=1), model=model, optimizer=optimizer)

    def die(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("spcxr.train.checkpoint.save_file", die)
        with pytest.raises(SpcxrError, match="No space left"):
            checkpoints.save(Position(step=2), model=model, optimizer=optimizer)
    assert checkpoints.load(model=model).step == 1
    checkpoints.save(Position(step=2), model=model, optimizer=optimizer)
    assert names(checkpoints) == ["last", "step-00000002"]


def test_a_link_to_nowhere_is_no_fresh_start(tmp_path):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    shutil.rmtree(checkpoints.save(Position(step=1), model=model, optimizer=optimizer))
    with pytest.raises(SpcxrError, match="no checkpoint"):
        checkpoints.load(model=model)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(saved, tmp_path, monkeypatch):
    _, model, optimizer = saved
    before = sorted(tmp_path.rglob("*"))

    def full(state, file):
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("spcxr.train.checkpoint.save_file", full)
    with pytest.raises(SpcxrError, match=r"step-4: .*No space left.*free some space") as caught:
        save_checkpoint(tmp_path / "step-4", Position(step=4), model=model, optimizer=optimizer)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
