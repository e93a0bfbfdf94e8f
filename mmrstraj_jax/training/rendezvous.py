"""All processes of a run meet before JAX's runtime starts, so that who is missing is named.

The runtime itself aborts with a C++ stack when somebody does not come. So process 0 first listens at the
coordinator's port by itself; each of the others says its number and holds the connection until process 0 has
heard them all, or gives up and says why. Then the port is the runtime's.
"""

import contextlib
import selectors
import socket
import time

from mmrstraj_jax.errors import UserError

GO = "go\n"
# Seconds until the coordinator's name is known: a Kubernetes service has none before pod 0 has an address
RESOLVE = 60.0


def gather(host: str, port: int, count: int, timeout: float) -> None:
    """Process 0: returns when processes 1 .. count - 1 have come, and lets them go on.

    Raises UserError, on all that came: the port is in use; within `timeout` seconds somebody did not come, or
    two have the same number, or another idea of how many they are.
    """
    came: dict[socket.socket, int] = {}
    with contextlib.ExitStack() as stack:
        ready = stack.enter_context(selectors.DefaultSelector())
        server = stack.enter_context(_listen(host, port))
        ready.register(server, selectors.EVENT_READ)
        deadline, problem = time.monotonic() + timeout, None
        while len(came) < count - 1 and problem is None:
            events = ready.select(deadline - time.monotonic())
            if not events:
                absent = sorted(set(range(1, count)) - set(came.values()))
                problem = (
                    f"process {', '.join(map(str, absent))} did not come to {host}:{port} within {timeout:g} "
                    "s; see its log, and whether all got the same coordinator and number of processes, each "
                    "an id of its own"
                )
            for key, _ in events:
                if key.fileobj is server:
                    peer = stack.enter_context(server.accept()[0])
                    ready.register(peer, selectors.EVENT_READ)
                    continue
                peer = key.fileobj
                hello = _hello(peer)
                if hello is None or peer in came:  # it has gone again, or is none of ours
                    came.pop(peer, None)
                    ready.unregister(peer)
                    peer.close()
                    continue
                index, theirs = hello
                if theirs != count or not 0 < index < count or index in came.values():
                    problem = (
                        f"a process came that is number {index} of {theirs}, and this run has {count}, each "
                        "number once; correct --process-id or --num-processes"
                    )
                came[peer] = index
        server.close()  # before anybody goes on: the runtime takes the port now
        for peer in came:
            with contextlib.suppress(OSError):  # it has gone; the watchdog will name it
                peer.sendall(GO.encode() if problem is None else f"{problem}\n".encode())
        if problem is not None:
            raise UserError(f"process 0 of {count}: {problem}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise UserError(
            f"process 0: port {port} of {host}:{port} cannot be opened ({error.strerror}): another run, or "
            "one that hangs, holds it; choose another port for all processes"
        ) from error


def _hello(peer: socket.socket) -> tuple[int, int] | None:
    """(number, count) of the process that came; None: not one of ours, or nothing more comes."""
    try:
        name, index, count = peer.recv(100).decode().split()
        return (int(index), int(count)) if name == "mmrstraj" else None
    except (OSError, ValueError):
        return None


def join(host: str, port: int, index: int, count: int, timeout: float) -> None:
    """Process 1 and up: returns when process 0 has heard of all, and the runtime can be reached.

    Raises UserError: what process 0 says; within `timeout` seconds nobody answers, or, RESOLVE at most, the
    host stays unknown.
    """
    who, begin = f"process {index} of {count}", time.monotonic()
    deadline = begin + timeout
    verdict, reason = "", "no answer"
    while verdict != GO:
        try:
            with socket.create_connection((host, port), timeout=5) as link:
                link.sendall(f"mmrstraj {index} {count}\n".encode())
                # Process 0 gives up first when it began at the same time, and says why
                link.settimeout(max(1.0, deadline - time.monotonic() + 5))
                verdict = link.makefile(encoding="utf-8").readline()
        except socket.gaierror as error:
            if time.monotonic() > begin + min(timeout, RESOLVE):
                raise UserError(
                    f"{who}: coordinator host {host!r} is unknown ({error.strerror}); "
                    "give the host name or address of process 0"
                ) from error
            reason = error.strerror
        except OSError as error:
            reason = error.strerror or str(error)
        if verdict.endswith("\n") and verdict != GO:
            raise UserError(f"{who}: {verdict.strip()}")
        if verdict != GO and time.monotonic() > deadline:
            raise UserError(
                f"{who}: nothing answers at {host}:{port} ({reason}); process 0 must run there: check host, "
                "port, firewall, and the log of process 0"
            )
        if verdict != GO:
            time.sleep(0.2)
    while True:  # the runtime's client would wait a second after a first try that came too early
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=5).close()
            return
        if time.monotonic() > deadline + 60:
            raise UserError(f"{who}: process 0 at {host}:{port} has gone again; see its log")
        time.sleep(0.05)
