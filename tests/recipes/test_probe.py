"""Probes of a frozen encoder: what they score, what they leave alone, and what is refused."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from spcxr.errors import SpcxrError
from spcxr.infer.predict import Normalisation
from spcxr.models.neighbours import TEMPERATURE
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import load_model_folder
from spcxr.recipes.probe import PENALTY, Probe, knn_scores, linear_scores, probe
from spcxr.train.device import Compute

COMPUTE = Compute(16, torch.device("cpu"), "fp32")


@pytest.fixture
def encoder(tiny_init):
    return load_model_folder(tiny_init).encoder


def squares(there):
    return {"label": ["square" if t else "empty" for t in there]}


def findings(there):
    """One finding that the image shows, one that it does not; some unknown, some uncertain."""
    shown = ["1" if t else "0" for t in there]
    drawn = np.random.default_rng(3).integers(0, 2, len(shown)).astype(str).tolist()
    shown[0], shown[2], drawn[1], drawn[3] = "", "-1", "-1", ""
    return {"nodule": shown, "coin": drawn}


def cloud(rows, features=12, seed=0):
    """Features and two labels that depend on them, a tenth unknown."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)).astype(np.float32)
    labels = (x[:, :2] + rng.normal(size=(rows, 2)) > 0).astype(np.float32)
    labels[rng.random((rows, 2)) < 0.1] = np.nan
    return x, labels


# --- scores --------------------------------------------------------------------------------------


def test_an_image_that_shows_its_label_is_told(make_store, encoder):
    found = probe(encoder, make_store(squares), COMPUTE)
    assert set(found) == {"knn_auroc", "linear_auroc", "labels"}
    assert found["labels"] == 2
    assert found["linear_auroc"] > 0.95
    assert found["knn_auroc"] > 0.8


def test_an_encoder_of_three_channels_is_given_grey_thrice(make_store, encoder):
    state = encoder.state_dict()
    for name in [n for n in state if n.startswith("patch_embed.") and state[n].ndim > 1]:
        state[name] = torch.cat([state[name], *[torch.zeros_like(state[name])] * 2], 1)
    wide = VisionTransformer(image_px=32, patch_px=8, channels=3, width=24, depth=4, heads=3)
    wide.load_state_dict(state)
    store = make_store(squares)
    assert probe(wide, store, COMPUTE) == pytest.approx(probe(encoder, store, COMPUTE), abs=0.02)


def test_labels_that_mean_nothing_score_by_chance(make_store, encoder):
    store = make_store(findings, count=400)
    coin = probe(encoder, store, COMPUTE, labels=("coin",))
    assert coin["labels"] == 1
    assert abs(coin["linear_auroc"] - 0.5) < 0.15
    assert abs(coin["knn_auroc"] - 0.5) < 0.15
    both = probe(encoder, store, COMPUTE)
    nodule = probe(encoder, store, COMPUTE, labels=("nodule",))
    for name in ("knn_auroc", "linear_auroc"):
        assert nodule[name] > 0.95
        assert both[name] == pytest.approx((coin[name] + nodule[name]) / 2, abs=1e-3)


def test_the_linear_probe_is_scikit_learns():
    (train, labels), (test, _) = cloud(150), cloud(60, seed=1)
    found = linear_scores(train, labels, test)
    mean, deviation = train.mean(0), train.std(0)
    for column in range(2):
        known = ~np.isnan(labels[:, column])
        model = LogisticRegression(C=1 / (known.sum() * PENALTY), tol=1e-8, max_iter=1000)
        model.fit((train[known] - mean) / deviation, labels[known, column])
        wanted = model.decision_function((test - mean) / deviation)
        assert np.allclose(found[:, column], wanted, atol=2e-3)


def test_the_nearest_neighbours_are_scikit_learns():
    (train, labels), (test, _) = cloud(150), cloud(60, seed=1)
    found = knn_scores(train, labels, test, k=7)
    for column in range(2):
        known = ~np.isnan(labels[:, column])
        search = NearestNeighbors(n_neighbors=7, metric="cosine").fit(train[known])
        distance, place = search.kneighbors(test)
        weight = np.exp((1 - distance) / TEMPERATURE)
        votes = labels[known, column][place]
        assert np.allclose(found[:, column], (weight * votes).sum(1) / weight.sum(1), atol=1e-4)


def test_more_neighbours_than_rows_is_all_of_them():
    train, labels = cloud(5)
    labels[:] = [[1, 0], [0, 1], [1, 0], [0, np.nan], [1, 1]]
    assert ((knn_scores(train, labels, train) > 0) & (knn_scores(train, labels, train) < 1)).all()


def test_the_macro_auroc_is_scikit_learns(make_store, encoder):
    store = make_store(findings)
    made = Probe(store)
    found = made(encoder, Normalisation(0.25, 0.25), COMPUTE)
    pixels = store.images(np.arange(len(store)))[:, None] / 255.0
    with torch.no_grad():
        tokens = encoder.forward_features(torch.from_numpy((pixels - 0.25) / 0.25).float())
    features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1).numpy()
    truth = made.values[made.test]
    scores = linear_scores(features[made.train], made.values[made.train], features[made.test])
    known = ~np.isnan(truth)
    wanted = [roc_auc_score(truth[known[:, k], k], scores[known[:, k], k]) for k in range(2)]
    assert found["linear_auroc"] == pytest.approx(np.mean(wanted), abs=0.02)


# --- rows ----------------------------------------------------------------------------------------


def test_validation_rows_answer_and_test_rows_where_there_are_none(make_store):
    store = make_store(squares)
    made = Probe(store)
    assert made.train.tolist() == store.manifest.rows("train").tolist()
    assert made.test.tolist() == store.manifest.rows("val").tolist()
    splits = ["train" if i % 2 else "test_b" for i in range(64)]
    other = make_store(squares, name="other", splits=splits)
    assert Probe(other).test.tolist() == list(range(0, 64, 2))


def test_rows_are_capped_evenly_over_those_with_a_label(make_store):
    def half(there):
        return {"nodule": ["" if i < 32 else str(int(t)) for i, t in enumerate(there)]}

    made = Probe(make_store(half), most=5, most_tested=3)
    assert (len(made.train), len(made.test)) == (5, 3)
    assert made.train.min() >= 32
    assert made.train.max() - made.train.min() > 20


def test_a_label_of_one_value_is_left_out(make_store):
    def one(there):
        return {"nodule": [str(int(t)) for t in there], "never": ["0"] * len(there)}

    assert Probe(make_store(one)).labels == ("nodule",)


def test_a_label_of_one_value_in_training_is_left_out(make_store):
    def both(there):
        held_out = [str(int(t)) if i % 4 > 1 else "0" for i, t in enumerate(there)]
        return {"nodule": [str(int(t)) for t in there], "new": held_out}

    assert Probe(make_store(both)).labels == ("nodule",)


def test_uncertain_and_unasked_rows_are_unknown(make_store):
    made = Probe(make_store(findings))
    assert np.isnan(made.values[[0, 2, 1, 3], [0, 0, 1, 1]]).all()
    assert np.isnan(made.values).sum() == 4
    three = {"label": ["abc"[i // 4 % 3] for i in range(64)]}
    chosen = Probe(make_store(three, name="three"), labels=("a", "b"))
    assert not np.isin(chosen.train // 4 % 3, 2).any()  # no row of class c, which is neither


# --- what is left alone --------------------------------------------------------------------------


def test_modes_weights_and_random_numbers_are_left_alone(make_store, encoder):
    made, normalisation = Probe(make_store(squares)), Normalisation(0.25, 0.25)
    encoder.train()
    encoder.blocks[1].eval()
    modes = [m.training for m in encoder.modules()]
    weights = {k: v.clone() for k, v in encoder.state_dict().items()}
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = made(encoder, normalisation, COMPUTE)
    assert [m.training for m in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert all(torch.equal(v, weights[k]) for k, v in encoder.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    with torch.inference_mode():
        assert made(encoder, normalisation, COMPUTE) == first
    with torch.no_grad():
        encoder.patch_embed.proj.weight.fill_(float("nan"))
    with pytest.raises(SpcxrError, match="not finite"):
        made(encoder, normalisation, COMPUTE)
    assert [m.training for m in encoder.modules()] == modes


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "settings", "splits", "message"),
    [
        (None, {}, None, r"store: no label columns to probe with; add one"),
        (
            squares,
            {"labels": ("tb",)},
            None,
            r"no label 'tb'; the manifest's labels: empty, square",
        ),
        (squares, {}, ["val"] * 64, r"no rows of train to probe with \(its splits: val\)"),
        (
            squares,
            {},
            ["train"] * 64,
            r"no rows of val or test to probe with \(its splits: train\)",
        ),
        (
            lambda there: {"never": ["0"] * len(there), "blank": ["", "1"] + [""] * 62},
            {},
            None,
            r"no label of never, blank is both 1 and 0 among 32 training and among 16 held-out",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused_at_once(make_store, columns, settings, splits, message):
    with pytest.raises(SpcxrError, match=message):
        Probe(make_store(columns, splits=splits), **settings)
