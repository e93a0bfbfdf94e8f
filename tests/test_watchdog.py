"""Who is dead, frozen or stuck: two watchdogs over one key-value store, in one process."""

import threading
import time

import pytest

from mmrstraj_jax.training.watchdog import Watchdog


class Store:
    """What the watchdog uses of the coordination service."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.copy().items() if key.startswith(prefix)]

    def key_value_try_get(self, key):
        if key not in self.values:
            raise RuntimeError("NOT_FOUND")
        return self.values[key]


@pytest.fixture
def pair(monkeypatch):
    """pair(heartbeat, step_timeout) -> watchdogs, lines that would have ended them; nothing exits."""
    lines: dict[int, tuple[str, int]] = {}

    def end(self, line, code=69):
        if self in dogs:  # not a thread of the test before
            lines.setdefault(self._index, (line, code))
        self.stop()

    monkeypatch.setattr(Watchdog, "_end", end)
    monkeypatch.setattr(Watchdog, "_announce_aborts", lambda self: None)
    store = Store()

    def made(heartbeat, step_timeout):
        dogs.extend(Watchdog(store, index, 2, heartbeat, step_timeout) for index in range(2))
        return dogs, lines

    dogs: list[Watchdog] = []
    yield made
    for dog in dogs:
        dog.stop()


def wait_for(lines, count=2):
    end = time.monotonic() + 60
    while len(lines) < count and time.monotonic() < end:
        time.sleep(0.05)
    return lines


def test_nothing_happens_while_both_go_on(pair):
    dogs, lines = pair(heartbeat=60, step_timeout=60)
    for dog in dogs:
        dog.start()
        dog.arm()
    for number in range(3):
        for dog in dogs:
            dog.beat(f"step {number}")
        time.sleep(0.7)
    assert not lines


def test_a_silent_process_is_named(pair):
    dogs, lines = pair(heartbeat=5, step_timeout=60)
    for dog in dogs:
        dog.start()
        dog.beat("running step 7")
    time.sleep(2.5)
    dogs[1].stop()  # its threads with it, as under SIGSTOP
    line, code = wait_for(lines, 1)[0]
    assert code == 69 and line.startswith("dead or frozen: process 1 (")
    assert "last seen in: running step 7" in line


def test_the_one_that_is_behind_is_named_to_all(pair, capfd):
    dogs, lines = pair(heartbeat=60, step_timeout=2)
    for dog in dogs:
        dog.start()
        dog.arm()
        dog.beat("preparing step 3")
    dogs[0].beat("running step 3")  # and there it waits for the other one
    found = wait_for(lines)
    assert found[0] == found[1]
    assert found[0][0].startswith("stuck: process 1 (")
    assert "in: preparing step 3; the others wait for it" in found[0][0]
    assert "no progress for" in capfd.readouterr().err


def test_an_error_of_one_ends_the_others_with_its_line(pair):
    dogs, lines = pair(heartbeat=60, step_timeout=60)
    for dog in dogs:
        dog.start()
    threading.Thread(target=dogs[1].tell, args=("process 1: x.json: no such file", 2)).start()
    assert wait_for(lines)[0] == ("process 1: x.json: no such file", 2)
