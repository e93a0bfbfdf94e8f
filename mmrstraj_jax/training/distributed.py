"""The one place that knows of other processes: who they are, what they agree on, when one tells all to stop.

`find_place` reads SLURM's or Kubernetes' environment, or explicit options. `Processes` is used by one process
too: then everything here is a plain function call.
"""

import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmrstraj_jax import settings
from mmrstraj_jax.config import ClusterConfig, Config
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import rendezvous
from mmrstraj_jax.training.resilience import EXIT_STOPPED, Stopped, StopSignal
from mmrstraj_jax.training.watchdog import Watchdog

T = TypeVar("T")
OPTIONS = ("--coordinator", "--num-processes", "--process-id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclass(frozen=True)
class Place:
    """This process among those of a run."""

    coordinator: str  # "host:port" of process 0
    count: int
    index: int
    local_device_ids: tuple[int, ...] | None = None  # of the devices it sees those it drives; None: all

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator {self.coordinator}: expected HOST:PORT of process 0")
        if not 0 <= self.index < self.count:
            raise UserError(
                f"--process-id {self.index}: expected 0 to {self.count - 1} (--num-processes {self.count})"
            )

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def find_place(given: tuple[str | None, ...], env: Mapping[str, str]) -> Place | None:
    """Where this process stands; None: it is alone.

    First of: the options (all three), the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (in an indexed Kubernetes Job the last may be missing: JOB_COMPLETION_INDEX), a SLURM step
    of several tasks.

    Args:
        given: values of OPTIONS.
    Raises:
        UserError: some of them are missing, or are no numbers.
    """
    named = tuple(env.get(name) for name in VARIABLES)
    if any(given):
        return _place(given, OPTIONS)
    if any(named):
        return _place((*named[:2], named[2] or env.get("JOB_COMPLETION_INDEX")), VARIABLES)
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        host = first_host(env["SLURM_STEP_NODELIST"])
        # Jobs that share a node must not share a port
        port = 61440 + (int(env["SLURM_JOB_ID"]) * 16 + int(env["SLURM_STEP_ID"]) % 16) % 4096
        count, index = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
        return Place(f"{host}:{port}", count, index, _own_devices(env))
    return None


def _own_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """What a task of a SLURM step drives: all GPUs of its node where it is the only one there, or those that
    SLURM shows to it alone; else the GPU of its own number on the node.
    """
    count = env["SLURM_STEP_NUM_TASKS"]
    alone = int(count) == int(env.get("SLURM_STEP_NUM_NODES", count))
    shown = env.get("SLURM_GPUS_PER_TASK") or "," not in env.get("CUDA_VISIBLE_DEVICES", ",")
    if alone or shown or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    return (int(env["SLURM_LOCALID"]),)


def _place(values: tuple[str | None, ...], names: tuple[str, ...]) -> Place:
    missing = [name for name, value in zip(names, values, strict=True) if not value]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; several processes need {', '.join(names)}")
    for name, value in zip(names[1:], values[1:], strict=True):
        if not value.isdigit():
            raise UserError(f"{name} {value}: expected a whole number")
    return Place(values[0], int(values[1]), int(values[2]))


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: "gpu[003-004,7],x1" is gpu003."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST {nodes!r}: expected node names")
    return "".join(part or "" for part in match.groups())


def connect(place: Place, config: ClusterConfig) -> None:
    """Meets the other processes; before anything else touches a device.

    Raises UserError within about `start_timeout` seconds: a port in use, a host that cannot be reached,
    processes that did not come.
    """
    if place.index == 0:
        rendezvous.gather(place.host, place.port, place.count, config.start_timeout)
    else:
        rendezvous.join(place.host, place.port, place.index, place.count, config.start_timeout)
    # Python handles SIGTERM (resilience.py); the runtime's service would swallow it
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        list(place.local_device_ids) if place.local_device_ids else None,
        # Under srun JAX would take one GPU for each process, whatever it was told
        cluster_detection_method="deactivate",
        # Ours speaks first, and names the process
        heartbeat_timeout_seconds=round(2 * config.heartbeat) + 10,
        shutdown_timeout_seconds=round(config.heartbeat),
    )


class Processes:
    """All processes of a run, as a context manager around it. With place None: this one, alone.

    Leaving it with an error ends the others too, with a line that names this process and the error.

    Raises UserError: see `connect`.
    """

    def __init__(self, place: Place | None, config: ClusterConfig):
        self.index, self.count = (place.index, place.count) if place else (0, 1)
        self._config, self._questions = config, 0
        self._stopping = False  # all processes know that they stop
        self._place, self._client = place, None

    @property
    def primary(self) -> bool:
        """Whether this process writes logs, locks and folders."""
        return self.index == 0

    def __enter__(self) -> "Processes":
        if self._place is not None:
            connect(self._place, self._config)
            from jax._src.distributed import global_state  # the only way to its key-value store

            self._client = global_state.client
        how = self._config
        self.watchdog = Watchdog(self._client, self.index, self.count, how.heartbeat, how.step_timeout)
        self.watchdog.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        together = error is None or (kind is Stopped and self._stopping)
        if self._client is not None and not together:
            if kind in (jax.errors.JaxRuntimeError, ValueError):
                self.watchdog.wait_for_verdict()  # most likely a collective that lost its other half
            code = EXIT_STOPPED if kind is Stopped else 2 if kind is UserError else 1
            what = "" if kind in (UserError, Stopped) else f"{kind.__name__}: "
            said = " ".join(f"{what}{error}".split())  # the runtime's errors have many lines
            self.watchdog.tell(f"process {self.index} ({socket.gethostname()}): {said}", code)
        self.watchdog.stop()
        if self._client is not None and together:
            jax.distributed.shutdown()

    def from_first(self, question: Callable[[], T]) -> T:
        """What the first process answers, on all of them; a UserError of it is raised on all of them.

        All processes ask the same questions in the same order. The answer must survive JSON.
        """
        if self._client is None:
            return question()
        self._questions += 1
        key = f"mmrstraj/answer/{self._questions}"
        if self.primary:
            try:
                answer = {"value": question()}
            except UserError as error:
                answer = {"error": str(error)}
            self._client.key_value_set(key, json.dumps(answer))
        else:
            answer = json.loads(self._get(key))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def meet(self) -> None:
        """Returns when all processes have come here. Raises JaxRuntimeError after step_timeout seconds."""
        if self._client is not None:
            self._questions += 1
            patience = round(1000 * self._config.step_timeout)
            self._client.wait_at_barrier(f"mmrstraj/meet/{self._questions}", patience)

    def agree(self, what: str, mine: Mapping[str, Any]) -> None:
        """Raises UserError on all processes, naming keys and processes, where they do not hold the same."""
        if self._client is None:
            return
        prefix = f"mmrstraj/{what}/"
        self._client.key_value_set(
            f"{prefix}{self.index}", json.dumps(dict(mine), sort_keys=True, default=str)
        )

        def compare() -> None:
            first = json.loads(self._get(f"{prefix}0"))
            for other in range(1, self.count):
                theirs = json.loads(self._get(f"{prefix}{other}"))
                keys = sorted(
                    key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key)
                )
                if keys:
                    listed = "; ".join(f"{key}: {first.get(key)} and {theirs.get(key)}" for key in keys)
                    raise UserError(
                        f"process 0 and process {other} do not have the same {what}: {listed}; "
                        "start all with the same files and options"
                    )

        self.from_first(compare)

    def _get(self, key: str) -> str:
        return self._client.blocking_key_value_get(key, round(1000 * self._config.step_timeout))

    def vote(self, stop: StopSignal, mesh: Mesh) -> Callable[[], bool]:
        """A function that says on all processes alike whether one of them was told to stop.

        Each call starts a sum over all processes and answers with that of the call before, so that nobody
        waits for the device; all processes must call it equally often. Once true it stays true.
        """
        if self._client is None:
            return lambda: stop.requested is not None
        sharding = NamedSharding(mesh, P(mesh.axis_names))
        total = jax.jit(lambda votes: votes.sum(), out_shardings=NamedSharding(mesh, P()))
        pending = None

        def ask() -> bool:
            nonlocal pending
            if pending is not None and np.asarray(pending):
                self._stopping = True
            votes = np.full(jax.local_device_count(), stop.requested is not None, np.int32)
            pending = total(jax.make_array_from_process_local_data(sharding, votes))
            return self._stopping

        return ask


def code_fingerprint() -> str:
    """SHA-256 of this package's source: processes that run different code must not train together."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def facts(config: Config) -> dict[str, Any]:
    """What all processes of a run must have in common before any of them loads anything."""
    values = {name: settings.get(config, name) for name in settings.leaf_fields(Config)}
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return values | versions | {"code of mmrstraj_jax": code_fingerprint()}


def leave(code: int, at_once: bool) -> int:
    """The exit code of a command; a failed one goes at once where its clean end could take for ever.

    The runtime's end is a meeting of all processes, and the others may never come to it.
    """
    if code != 0 and at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
