"""When a run stops. A list plays the preemption service of several processes."""

import os
import signal
import time

import jax
import numpy as np
import pytest

from simvlg_jax.training import stopping
from simvlg_jax.training.stopping import Stop


def test_signal_waits_until_it_is_asked_for_and_a_second_one_acts():
    before = signal.getsignal(signal.SIGINT)
    with Stop(0) as stop:
        assert not stop.reached(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reached(1) and stop.reason() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_repeated_sigterm_waits_like_the_first():
    """A machine that goes down sends SIGTERM to every process, and the restart loop passes on its own."""
    with Stop(0) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(0) and stop.reason() == signal.SIGTERM


def test_time_runs_from_the_first_step_on_and_evaluating_does_not_count(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = Stop(1.0)
    now[0] += 500
    assert not stop.reached(0)
    now[0] += 59
    assert not stop.reached(1)
    stop.grant(30)
    now[0] += 30
    assert not stop.reached(2)
    now[0] += 2
    assert stop.reached(3) and stop.reason() is None


@pytest.fixture
def several(monkeypatch):
    """Plays two processes; this one has the number `index[0]`. A service hears SIGTERM and stops all at step 7."""
    index, heard = [0], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index[0])
    monkeypatch.setattr(stopping.os, "kill", lambda pid, number: heard.append((pid, number)))
    monkeypatch.setattr(
        stopping.multihost_utils, "reached_preemption_sync_point", lambda step: bool(heard) and step == 7
    )
    monkeypatch.setattr(stopping.collectives, "numbers_of_all", lambda known: np.array([[known]]))
    return index, heard


def test_sigint_and_time_limit_become_the_services_business(several, monkeypatch):
    index, heard = several
    with Stop(0) as stop:
        signal.raise_signal(signal.SIGINT)
        assert heard == [(os.getpid(), signal.SIGTERM)]
        assert not stop.reached(6) and stop.reached(7) and stop.reason() == signal.SIGINT
    heard.clear()
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    for index[0], asks in ((1, False), (0, True)):  # process 0 alone looks at the clock
        stop = Stop(1.0)
        assert not stop.reached(5)
        now[0] += 61
        assert not stop.reached(6) and bool(heard) == asks
    assert stop.reached(7) and stop.reason() is None


def test_service_may_stop_a_process_that_knows_nothing(several):
    several[1].append("a maintenance notice")
    stop = Stop(0)
    assert stop.reached(7) and stop.reason() == signal.SIGTERM
