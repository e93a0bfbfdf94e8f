"""Which process this is, from options, JAX's variables, Kubernetes or SLURM."""

import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.distributed import Place, Processes, find_place, first_host

ALONE = (None, None, None)
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "3",
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
