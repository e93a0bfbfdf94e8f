"""Signals: what the first and the second one do."""

import os
import signal

import pytest

from mmrstraj_jax.training.resilience import Stopped, StopSignal


def test_signals_before_the_first_step_and_a_second_one(monkeypatch):
    with StopSignal(), pytest.raises(Stopped, match="SIGINT before the first step"):
        os.kill(os.getpid(), signal.SIGINT)
    sent = []
    with StopSignal() as stop:
        stop.arm()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        real = os.kill
        monkeypatch.setattr(os, "kill", lambda *args: sent.append((*args, signal.getsignal(args[1]))))
        real(os.getpid(), signal.SIGTERM)
    assert sent == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]
