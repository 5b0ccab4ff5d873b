import signal
import threading
from pathlib import Path

import pytest

from spcxr.errors import Interrupted
from spcxr.train.interrupt import watch_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with watch_signals() as signals:
        assert signals.came is None
        signal.raise_signal(number)
        assert signals.came == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_the_line_says_how_to_go_on():
    with watch_signals() as signals:
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        signals.raise_interrupted(Path("runs/a"), "pretrain", "step 3 of 9")
    assert str(caught.value) == (
        "runs/a: stopped by SIGTERM at step 3 of 9, and saved; go on with: "
        "spcxr-train pretrain --config runs/a/config.yaml --resume auto"
    )
    assert caught.value.exit_code == 130


def test_a_second_ctrl_c_stops_at_once():
    with watch_signals() as signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.came == "SIGINT"


def test_other_threads_may_train_too():
    found = []

    def work():
        with watch_signals() as signals:
            found.append(signals.came)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
