"""Which process this is, from options, JAX's variables, Kubernetes or SLURM."""

import os
import socket
import subprocess
import sys

import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.distributed import Place, Processes, find_place, first_host

ALONE = (None, None, None)
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004,7],x1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
JOBSET = {
    "JAX_COORDINATOR_ADDRESS": "train-workers-0-0.train:1234",
    "JAX_NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "2",
}


def test_alone():
    assert find_place(ALONE, {}) is None
    assert find_place(ALONE, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    # sbatch's own environment, without srun: one process
    assert find_place(ALONE, {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) is None


def test_options_come_first_then_variables_then_slurm():
    assert find_place(("h:1", "2", "1"), JOBSET | SLURM) == Place("h:1", 2, 1)
    assert find_place(ALONE, JOBSET | SLURM) == Place("train-workers-0-0.train:1234", 4, 2)
    assert find_place(ALONE, JOBSET | {"JAX_PROCESS_ID": "3"}).index == 3
    found = find_place(ALONE, SLURM)
    assert (found.host, found.count, found.index) == ("gpu003", 16, 3) and 61440 <= found.port < 65536
    assert found.port != find_place(ALONE, SLURM | {"SLURM_JOB_ID": "4712"}).port


def test_a_task_drives_its_node_s_gpus_or_its_own():
    assert find_place(ALONE, SLURM).local_device_ids is None  # one task a node
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "3"}
    assert find_place(ALONE, shared).local_device_ids == (3,)
    assert find_place(ALONE, shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_device_ids == (3,)
    for own in ({"SLURM_GPUS_PER_TASK": "2"}, {"CUDA_VISIBLE_DEVICES": "3"}, {"JAX_LOCAL_DEVICE_IDS": "3"}):
        assert find_place(ALONE, shared | own).local_device_ids is None


@pytest.mark.parametrize("own, visible", [("None", "all"), ("(2, 3)", "2,3")])
def test_jax_takes_no_gpu_away_from_a_process_under_srun(own, visible):
    """JAX recognises srun by itself, and would leave a process the GPU of its number on the node alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = (
        "import jax; from mmrstraj_jax.config import ClusterConfig\n"
        "from mmrstraj_jax.training.distributed import Place, connect\n"
        f"connect(Place('127.0.0.1:{port}', 1, 0, {own}), ClusterConfig(start_timeout=30))\n"
        "print(jax.config.values['jax_cuda_visible_devices'])"
    )
    step = SLURM | {"SLURM_NTASKS": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | step, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == visible, done.stderr


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("n1", "n1"),
        ("a-b[01-03]", "a-b01"),
        ("n[7,9]", "n7"),
        ("x.y,n[1-2]", "x.y"),
        ("r1n[1-2]-ib", "r1n1-ib"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "given, message",
    [
        (("h:1", None, "0"), "--num-processes: missing; several processes need --coordinator"),
        (("h:1", "two", "0"), "--num-processes two: expected a whole number"),
        (("h:1", "2", "2"), "--process-id 2: expected 0 to 1"),
        (("h", "2", "1"), "--coordinator h: expected HOST:PORT"),
        (("h:99999", "2", "1"), "--coordinator h:99999: expected HOST:PORT"),
    ],
)
def test_half_a_place_is_an_error(given, message):
    with pytest.raises(UserError, match=message):
        find_place(given, {})


def test_one_process_asks_nobody():
    from mmrstraj_jax.config import ClusterConfig

    with Processes(None, ClusterConfig()) as processes:
        assert processes.primary and processes.from_first(lambda: {"a": 1}) == {"a": 1}
        processes.agree("settings", {"seed": 1})
