"""Processes that meet before the runtime starts: who is missing is named to all who came."""

import socket
import threading
import time

import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import rendezvous
from mmrstraj_jax.training.rendezvous import gather, join


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*calls) -> list[str | None]:
    """Each call in a thread of its own: its error, or None."""
    said: list[str | None] = [None] * len(calls)

    def one(at, function, *args):
        try:
            function("127.0.0.1", *args)
        except UserError as error:
            said[at] = str(error)

    threads = [threading.Thread(target=one, args=(at, *call)) for at, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return said


def test_all_that_came_hear_who_is_missing(port):
    said = run((gather, port, 4, 2), (join, port, 1, 4, 2), (join, port, 3, 4, 2))
    assert [text.split(":")[0] for text in said] == [f"process {number} of 4" for number in (0, 1, 3)]
    assert all(f"process 2 did not come to 127.0.0.1:{port} within 2 s" in text for text in said)


@pytest.mark.parametrize("first, second", [((1, 3), (1, 3)), ((1, 3), (2, 4)), ((3, 4), (1, 3))])
def test_a_number_twice_and_other_counts_are_refused(port, first, second):
    said = run((gather, port, 3, 30), (join, port, *first, 5), (join, port, *second, 5))
    assert "a process came that is number" in said[0] and "correct --process-id or --num-processes" in said[0]
    assert all(said)


def test_strangers_and_those_who_leave_again_do_not_count(port):
    def stranger(host, *_):
        with _connect(host, port) as link:
            link.sendall(b"GET / HTTP/1.1\r\n\r\n")
            link.recv(1)

    def leaves(host, *_):
        with _connect(host, port) as link:
            link.sendall(b"mmrstraj 1 3\n")

    said = run((gather, port, 3, 3), (stranger,), (leaves,))
    assert "process 1, 2 did not come" in said[0]


def _connect(host, port) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            continue


def zero(host, port, *args):
    """Process 0; a second listener stands for the runtime."""
    gather(host, port, *args)
    with socket.create_server(("", port)) as runtime:
        runtime.settimeout(30)
        runtime.accept()[0].close()


def test_when_all_came_the_port_is_free_for_the_runtime(port):
    assert run((zero, port, 2, 30), (join, port, 1, 2, 30)) == [None, None]


def test_nobody_there(port):
    assert f"nothing answers at 127.0.0.1:{port}" in run((join, port, 1, 2, 1))[0]
    with socket.create_server(("", port)):
        assert f"port {port} of" in run((gather, port, 2, 1))[0]


def test_a_name_that_comes_late_is_waited_for(port, monkeypatch):
    """As that of a Kubernetes service before pod 0 has an address."""
    connect, asked = socket.create_connection, []

    def late(address, **how):
        asked.append(address)
        if len(asked) < 4:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return connect(address, **how)

    monkeypatch.setattr(rendezvous.socket, "create_connection", late)
    assert run((zero, port, 2, 30), (join, port, 1, 2, 30)) == [None, None]


@pytest.mark.parametrize("timeout, longest", [(0.5, 60.0), (300, 0.5)])
def test_a_name_that_never_comes_is_an_error_in_time(port, monkeypatch, timeout, longest):
    def never(address, **_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(rendezvous.socket, "create_connection", never)
    monkeypatch.setattr(rendezvous, "RESOLVE", longest)
    begin = time.monotonic()
    (said,) = run((join, port, 1, 2, timeout))
    assert 0.5 <= time.monotonic() - begin < 10
    assert said.startswith(
        "process 1 of 2: coordinator host '127.0.0.1' is unknown (Name or service not known)"
    )
