"""MLflow and W&B: what they are told, the run that goes on, and what is refused."""

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from spcxr.errors import SpcxrError
from spcxr.train.journal import Journal
from spcxr.train.trackers import open_trackers

SETTINGS = {"data": "cohort.csv", "crop": (0.1, 1.0), "lr": None, "notes": "n" * 900}


class MlflowError(Exception):
    """``mlflow.exceptions.MlflowException``."""


class FakeMlflow(ModuleType):
    """The part of MLflow 2.9's client that is used, with its server's memory in ``runs``."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.experiments, self.places, self.down = {}, {}, [], False
        self.entities = SimpleNamespace(Metric=lambda *given: given)
        self.exceptions = SimpleNamespace(MlflowException=MlflowError)

    def MlflowClient(self, tracking_uri):
        self.places.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name):
        self.experiments[name] = []
        return name

    def create_run(self, experiment, run_name):
        made = f"run{len(self.runs)}"
        self.runs[made] = {"name": run_name, "params": {}, "metrics": [], "status": []}
        self.experiments[experiment].append(made)
        return SimpleNamespace(info=SimpleNamespace(run_id=made))

    def log_param(self, run, key, value):
        assert key not in self.runs[run]["params"], "MLflow refuses a second value"
        self.runs[run]["params"][key] = value

    def update_run(self, run, status):
        if run not in self.runs:
            raise MlflowError(f"Run {run!r} not found\nstack of the server")
        self.runs[run]["status"].append(status)

    def log_batch(self, run, metrics):
        if self.down:
            raise MlflowError("API request failed\nstack of the client")
        self.runs[run]["metrics"] += [(key, value, step) for key, value, _, step in metrics]

    def set_terminated(self, run):
        self.runs[run]["status"].append("FINISHED")


class FakeWandb(ModuleType):
    """The part of W&B that is used; ``runs`` holds what each id was told."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.begun, self.closed, self.refuses = {}, [], 0, ""

    def Settings(self, **given):
        return given

    def init(self, **given):
        if self.refuses:
            raise self.Error(self.refuses)
        self.begun.append(given)
        made = given["id"] or f"w{len(self.runs)}"
        self.runs.setdefault(made, [])
        return SimpleNamespace(
            id=made,
            log=self.runs[made].append,
            finish=self._finish,
            define_metric=lambda name, step_metric=None: None,
        )

    def _finish(self):
        self.closed += 1


@pytest.fixture
def mlflow(monkeypatch):
    """A fake MLflow; the real one's variables are unset."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", FakeMlflow())
    return sys.modules["mlflow"]


@pytest.fixture
def wandb(monkeypatch):
    """A fake W&B."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    return sys.modules["wandb"]


def train(folder, names, steps, start=0):
    folder.mkdir(exist_ok=True)
    trackers = open_trackers(names, folder, SETTINGS)
    with Journal(
        folder, step=start, images_done=0, images_total=9, quiet=True, trackers=trackers
    ) as journal:
        for step in steps:
            journal.record("train", step, {"loss": 1 / step, "lr": 0.1})
        journal.record("val", step, {"loss": 0.5})


def test_a_run_that_goes_on_is_one_tracked_run(tmp_path, mlflow, wandb):
    folder = tmp_path / "run"
    train(folder, ("mlflow", "wandb"), [1, 2])
    train(folder, ("wandb", "mlflow"), [2, 3], start=1)
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": "run0", "wandb": "w0"}

    assert mlflow.experiments == {"spcxr": ["run0"]}
    assert mlflow.places == [(folder / "mlruns").as_uri()] * 2
    told = mlflow.runs["run0"]
    assert told["name"] == "run"
    assert told["status"] == ["RUNNING", "FINISHED"] * 2
    assert told["params"] | {"notes": ""} == {
        "data": "cohort.csv",
        "crop": "(0.1, 1.0)",
        "lr": "None",
        "notes": "",
    }
    assert len(told["params"]["notes"]) == 500
    losses = [(v, s) for k, v, s in told["metrics"] if k == "train/loss"]
    assert losses == [(1.0, 1), (0.5, 2), (0.5, 2), (1 / 3, 3)]
    assert ("val/loss", 0.5, 3) in told["metrics"]

    assert list(wandb.runs) == ["w0"]
    assert wandb.runs["w0"][0] == {"train/loss": 1.0, "train/lr": 0.1, "step": 1}
    assert [told["step"] for told in wandb.runs["w0"]] == [1, 2, 2, 2, 3, 3]
    assert [(b["id"], b["project"], b["resume"]) for b in wandb.begun] == [
        (None, "spcxr", "allow"),
        ("w0", "spcxr", "allow"),
    ]
    assert wandb.begun[0]["settings"]["console"] == "off"  # log lines stay here
    assert wandb.closed == 2


def test_their_own_variables_are_heeded(tmp_path, mlflow, wandb, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "thorax")
    monkeypatch.setenv("WANDB_PROJECT", "thorax")
    train(tmp_path / "run", ("mlflow", "wandb"), [1])
    assert mlflow.places == ["http://tracker:5000"]
    assert list(mlflow.experiments) == ["thorax"]
    assert wandb.begun[0]["project"] == "thorax"


def test_a_server_that_fails_is_said_once_and_training_goes_on(tmp_path, mlflow, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    (tracker,) = open_trackers(("mlflow",), folder, {})
    tracker.log(1, {"loss": 1.0})
    mlflow.down = True
    with caplog.at_level(logging.WARNING, "spcxr"):
        tracker.log(2, {"loss": 0.5})
        tracker.log(3, {"loss": 0.5})
        tracker.close()
    assert [r.getMessage() for r in caplog.records] == [
        "MLflow is told no more (API request failed); metrics.jsonl has all"
    ]
    assert mlflow.runs["run0"]["metrics"] == [("loss", 1.0, 1)]


def test_a_tracked_run_that_is_gone_is_one_line(tmp_path, mlflow):
    train(tmp_path / "run", ("mlflow",), [1])
    mlflow.runs.clear()
    with pytest.raises(SpcxrError, match=r"\(Run 'run0' not found\); remove .*trackers.json"):
        open_trackers(("mlflow",), tmp_path / "run", {})
    (tmp_path / "run" / "trackers.json").write_text("{")
    with pytest.raises(SpcxrError, match=r"trackers.json: not readable .*remove it"):
        open_trackers(("mlflow",), tmp_path / "run", {})


def test_one_that_does_not_open_closes_the_others(tmp_path, mlflow, wandb):
    wandb.refuses = "No API key configured.\nmore"
    with pytest.raises(SpcxrError, match=r"W&B \(No API key configured.\); .*WANDB_MODE=offline$"):
        open_trackers(("mlflow", "wandb"), tmp_path, {})
    assert mlflow.runs["run0"]["status"] == ["RUNNING", "FINISHED"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "run0"}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # how Python marks what cannot be imported
    with pytest.raises(SpcxrError, match=rf"tracker {name}: .*pip install 'spcxr\[track\]'"):
        open_trackers((name,), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_opens_nothing(tmp_path, mlflow):
    with pytest.raises(SpcxrError, match="no tracker 'sacred'; choose from: mlflow, wandb"):
        open_trackers(("mlflow", "sacred"), tmp_path, {})
    assert mlflow.runs == {}


def test_the_real_mlflow_keeps_one_run_in_the_run_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra spcxr[track] is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run"
    train(folder, ("mlflow",), [1, 2])
    train(folder, ("mlflow",), [2, 3], start=1)
    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    run = client.get_run(json.loads((folder / "trackers.json").read_text())["mlflow"])
    assert run.info.status == "FINISHED"
    assert run.data.params["crop"] == "(0.1, 1.0)"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [
        1,
        2,
        2,
        3,
    ]


def test_the_real_wandb_stores_one_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra spcxr[track] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    train(folder, ("wandb",), [1, 2])
    made = json.loads((folder / "trackers.json").read_text())["wandb"]
    stored = list((folder / "wandb").glob(f"offline-run-*-{made}/run-{made}.wandb"))
    assert [file.stat().st_size > 0 for file in stored] == [True]
