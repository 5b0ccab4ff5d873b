"""``--attend lungs --equalise``: every path to the encoder is given equalised greys."""

import json

import numpy as np
import pytest
import torch
from lung_runs import CPU, config, side_of_square
from PIL import Image

from spcxr.config import ConfigError
from spcxr.infer import explain_files
from spcxr.infer.predict import forward_batches, load_trained
from spcxr.infer.predict_files import predict_files
from spcxr.models import heads
from spcxr.models.regions import equalised
from spcxr.recipes import cases, evaluate
from spcxr.recipes.classify import run


@pytest.fixture
def store(make_store):
    return make_store(side_of_square, masked=True)


class Watch:
    """Looks at whatever an encoder is given: equalised once more it must be as it is."""

    def __init__(self, monkeypatch):
        self.seen = {}
        self._over(monkeypatch, heads, "tokens_read", "model")
        for module in (cases, explain_files):
            self._over(monkeypatch, module, "rollout", module.__name__)
        self._over(monkeypatch, explain_files, "grad_cam", "grad-cam")

    def _over(self, monkeypatch, module, name, where):
        original = getattr(module, name)

        def watched(model, images, *rest):
            self.look(where, images.detach(), rest[-1])
            return original(model, images, *rest)

        monkeypatch.setattr(module, name, watched)

    def look(self, where, images, visible):
        assert visible is not None, where
        patch_px = images.shape[-1] // visible.shape[-1]
        read = visible.repeat_interleave(patch_px, 1).repeat_interleave(patch_px, 2)[:, None]
        again = equalised(images, visible, patch_px)
        assert float((again - images).abs()[read].mean()) < 0.05, where
        where = f"{where}, training" if torch.is_grad_enabled() and where == "model" else where
        self.seen[where] = self.seen.get(where, 0) + len(images)


@pytest.mark.parametrize("by", ["masks", "a segmenter"])
@pytest.mark.parametrize("settings", [{}, {"method": "knn"}, {"head_init": "linear", "ema": 0.9}])
def test_whatever_the_encoder_is_given_is_equalised(
    by, settings, store, segmenter, tiny_init, tmp_path, monkeypatch
):
    watch = Watch(monkeypatch)
    source = {"lungs_from": str(segmenter)} if by == "a segmenter" else {}
    folder = run(config(store, tiny_init, tmp_path / "run", equalise=True, **source, **settings))
    assert watch.seen["model"] >= 32
    assert ("model, training" in watch.seen) == ("method" not in settings)
    watch.seen.clear()
    judged = evaluate.EvaluateConfig(
        run=str(folder),
        data=(str(store.path),),
        out=str(tmp_path / "evaluated"),
        n_bootstrap=100,
        corruptions=("gamma",),
        device="cpu",
        precision="fp32",
    )
    evaluate.run(judged)
    assert set(watch.seen) == {"model", "spcxr.recipes.cases"}
    page = (tmp_path / "evaluated" / "report.html").read_text()
    assert "the patches of the lungs alone, their greys equalised" in page
    if source and not settings:
        watch.seen.clear()
        Image.fromarray(store.images(np.array([3]))[0]).save(tmp_path / "a.png")
        explain_files.explain_files(folder, [str(tmp_path / "a.png")], tmp_path / "maps", CPU)
        predict_files(folder, [str(tmp_path / "a.png")], tmp_path / "table.csv", CPU)
        assert {"model", "grad-cam", "spcxr.infer.explain_files"} <= set(watch.seen)


def test_a_model_of_before_is_given_greys_as_they_are(store, tiny_init, tmp_path):
    folder = run(config(store, tiny_init, tmp_path / "run"))
    about = folder / "model" / "config.json"
    facts = json.loads(about.read_text())
    assert facts["task"].pop("equalise") is False
    about.write_text(json.dumps(facts))
    assert load_trained(folder).model.lungs.equalise is False


def test_equalised_greys_are_the_same_after_any_rising_curve(store, segmenter, tiny_init, tmp_path):
    """Where the segmenter finds the same patches, a gamma changes no answer of a model that
    equalises, and every answer of one that does not."""
    settings = {"lungs_from": str(segmenter)}
    even = run(config(store, tiny_init, tmp_path / "even", equalise=True, **settings))
    plain = run(config(store, tiny_init, tmp_path / "plain", **settings))
    assert "their greys equalised" in json.loads((even / "metrics.json").read_text())["task"]
    rows = store.manifest.rows(("train", "val", "test"))

    def moved(folder):
        """How far a gamma moves the answers, where it moves no patch: in their own deviations."""
        trained, seen, logits = load_trained(folder), [], []
        assert trained.model.lungs.equalise == (folder == even)
        for change in (None, lambda grey, _: grey**1.2):
            parts = forward_batches(
                trained.model,
                store,
                rows,
                trained.normalisation,
                CPU,
                change,
                told=lambda _, visible: seen.append(visible),
            )
            logits.append(torch.cat([found for _, found in parts]))
        before, after = torch.cat(seen).chunk(2)
        same = (before == after).all((1, 2))
        assert same.sum() > 10
        return float(((logits[0] - logits[1]).abs().amax(1) / logits[0].std())[same].median())

    assert moved(even) < 0.05 < 0.2 < moved(plain)


def test_equalise_without_attend_is_refused(store, tiny_init, tmp_path):
    with pytest.raises(ConfigError, match="add it, or leave it out"):
        config(store, tiny_init, tmp_path / "run", attend="image", equalise=True)
