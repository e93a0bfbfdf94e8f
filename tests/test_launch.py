"""launch/: run as far as a machine without SLURM, Kubernetes and Apptainer allows."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_case as case

from mmrstraj_jax import environment
from mmrstraj_jax.errors import UserError

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = [path for path in sorted(LAUNCH.iterdir()) if path.read_bytes().startswith(b"#!/usr/bin/env bash")]
# sbatch's own options, as far as a job of this kind needs them
SBATCH = (
    "job-name nodes ntasks-per-node gpus-per-node cpus-per-task exclusive time signal requeue open-mode "
    "output"
).split()


@pytest.fixture
def stubs(tmp_path):
    """A PATH with programs that note how they were called, and a Python that knows every flag but one."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def stub(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls"\n{body}\n')
        path.chmod(0o755)

    cores = f'echo "${{SRUN_CPUS_PER_TASK:-}}" >> "{tmp_path}/cores"\n'
    code = 'case "$*" in *check.py*) exit "${CHECK_CODE:-0}";; *) exit "${TRAIN_CODE:-0}";; esac'
    stub("srun", cores + code)
    stub("scontrol", "")
    stub("apptainer", 'shift 6; exec python-stub "$@"')  # exec --nv --bind FOLDERS IMAGE python3
    stub("python-stub", 'case "$*" in *environment*) shift 2; echo "$*";; esac')
    return tmp_path


def sbatch(stubs: Path, *args: str, **env: str) -> tuple[int, list[str]]:
    """What sbatch does with a script: reads its directives, runs it on the first node."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    for line in re.findall(r"^#SBATCH (.*)$", text.partition("set -euo")[0], re.M):
        name = re.fullmatch(r"--([a-z-]+)(=\S+)?", line)
        assert name and name[1] in SBATCH, line
    assert "#SBATCH" not in text.partition("set -euo")[2]  # sbatch stops reading at the first command
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "python-stub", "SCRATCH": "/scratch"}
    path = f"{stubs / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *args],
        env={"PATH": path} | job | env,
        capture_output=True,
        text=True,
    )
    calls = (stubs / "calls").read_text().splitlines()
    return done.returncode, [call for call in calls if not call.startswith("python-stub")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_strict(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.name != "environment.sh":  # it is sourced: its options would be the caller's
        assert "set -euo pipefail" in script.read_text()


def test_a_finished_job_is_not_queued_again(stubs):
    code, calls = sbatch(stubs, "--config", "stage1", "--run-dir", "a folder")
    assert code == 0 and len(calls) == 2
    assert calls[0] == f"srun --kill-on-bad-exit=1 python-stub launch/check.py --folder {ROOT}"
    assert calls[1] == (
        "srun --kill-on-bad-exit=0 python-stub -m mmrstraj_jax.train --compilation-cache "
        "/scratch/mmrstraj-programs --config stage1 --run-dir a folder"
    )


AGAIN = [69, 75, 134, 137, 139, 143]  # "run me again", and died by SIGABRT, SIGKILL, SIGSEGV, SIGTERM


@pytest.mark.parametrize("code", AGAIN)
def test_a_job_that_says_run_me_again_or_was_killed_is_queued_again(stubs, code):
    result, calls = sbatch(stubs, TRAIN_CODE=str(code))
    assert result == 0 and calls[-1] == "scontrol requeue 7"
    # SLURM does not count the first start
    for bound in ({"SLURM_RESTART_COUNT": "50"}, {"MAX_RESTARTS": "0"}):
        result, calls = sbatch(stubs, TRAIN_CODE=str(code), **bound)
        assert result == code and calls[-1].startswith("srun")


def test_tasks_get_the_cores_of_the_job(stubs):
    sbatch(stubs)
    assert (stubs / "cores").read_text() == "\n\n"  # of check and train; SLURM gave none
    sbatch(stubs, SLURM_CPUS_PER_TASK="64")
    assert (stubs / "cores").read_text() == "\n\n64\n64\n"


def test_other_failures_end_the_job(stubs):
    for given, expected in (({"TRAIN_CODE": "2"}, 2), ({"CHECK_CODE": "1"}, 1)):
        code, calls = sbatch(stubs, **given)
        assert code == expected and not any(call.startswith("scontrol") for call in calls)


def test_a_job_in_a_container(stubs):
    code, calls = sbatch(stubs, IMAGE="mmrstraj.sif", CHECK="0", PYTHON="there-is-none-outside")
    assert code == 0 and len(calls) == 2
    inside = f"apptainer exec --nv --bind {ROOT},/scratch mmrstraj.sif python3 -m mmrstraj_jax"
    assert calls[0].startswith(f"{inside}.environment --xla") and f" {inside}.train" in calls[1]


def test_a_python_without_jax_is_named_not_its_traceback(tmp_path, monkeypatch):
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(UserError, match="bare-python: ModuleNotFoundError: No module named 'jax'"):
        environment.known_flags(["--xla_gpu_autotune_level=1"])


def test_a_python_that_starts_too_slowly_is_one_line(monkeypatch):
    monkeypatch.setattr(environment, "SECONDS", 0.01)
    with pytest.raises(UserError, match="JAX did not start with them within 0.01 s"):
        environment.known_flags(["--xla_gpu_autotune_level=1"])


def test_the_environment_file_keeps_what_was_set(stubs):
    script = f"source {LAUNCH}/environment.sh; echo $XLA_PYTHON_CLIENT_MEM_FRACTION; echo $XLA_FLAGS"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={
            "PATH": f"{stubs / 'bin'}:{os.environ['PATH']}",
            "PYTHON": "python-stub",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
            "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    fraction, flags = done.stdout.splitlines()
    assert fraction == "0.5" and flags.split()[-1] == "--xla_gpu_enable_latency_hiding_scheduler=false"


@pytest.mark.parametrize(
    "given, seen",
    [({}, "01"), ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, "45"), ({"CUDA_VISIBLE_DEVICES": ""}, None)],
)
def test_local_processes_share_a_coordinator_and_the_first_failure_counts(stubs, given, seen):
    trainer = stubs / "bin" / "python-stub"
    trainer.write_text(
        '#!/usr/bin/env bash\ncase "$*" in *environment*) exit;; esac\n'
        f'echo "$CUDA_VISIBLE_DEVICES $*" >> "{stubs}/calls"\n'
        'case "$*" in *"--process-id 1") exit 75;; esac\n'
    )
    done = subprocess.run(
        ["bash", str(LAUNCH / "local.sh"), "--steps", "3"],
        env={"PATH": f"{stubs / 'bin'}:{os.environ['PATH']}", "PYTHON": "python-stub"}
        | {"PROCESSES": "2", "PORT": "4444"}
        | given,
    )
    assert done.returncode == 75
    options = "-m mmrstraj_jax.train --steps 3 --coordinator 127.0.0.1:4444 --num-processes 2 --process-id"
    expected = [f"{seen[i] if seen else ''} {options} {i}" for i in range(2)]
    assert sorted((stubs / "calls").read_text().splitlines()) == expected


def test_local_processes_need_a_gpu_each(stubs):
    done = subprocess.run(
        ["bash", str(LAUNCH / "local.sh")],
        env={"PATH": f"{stubs / 'bin'}:{os.environ['PATH']}", "PYTHON": "python-stub"}
        | {"PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: CUDA_VISIBLE_DEVICES=4: expected one GPU for each of PROCESSES=2")


TRAINER = """#!{python}
import pathlib, signal, sys, time
if "mmrstraj_jax.environment" in sys.argv:
    sys.exit()
seen = ["deaf"] if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
file = pathlib.Path({folder!r}, "process-" + sys.argv[-1])
file.touch()
while not {{"SIGINT", "SIGTERM"}} & set(seen):
    time.sleep(0.01)
time.sleep(0.5)  # a second signal would come now
file.write_text(" ".join(seen))
sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_local_processes_get_one_signal_and_are_waited_for(stubs, name):
    """Ctrl-C goes to the whole process group, SIGTERM to the script alone."""
    (stubs / "bin" / "python-stub").write_text(TRAINER.format(python=sys.executable, folder=str(stubs)))
    script = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh")],
        env={"PATH": f"{stubs / 'bin'}:{os.environ['PATH']}", "PYTHON": "python-stub", "PROCESSES": "2"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal
    )
    files = [stubs / f"process-{i}" for i in range(2)]
    try:
        while not all(file.exists() for file in files):
            assert script.poll() is None
            time.sleep(0.05)
        (os.killpg if name == "SIGINT" else os.kill)(script.pid, signal.Signals[name])
        assert script.wait(60) == 75 and [file.read_text() for file in files] == [name, name]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


def test_the_jobset_agrees_with_the_exit_codes_and_itself():
    yaml = pytest.importorskip("yaml")
    (job,) = list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))
    (part,) = job["spec"]["replicatedJobs"]
    spec = part["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    # A Job that fails by its policy ends the set, and only codes other than these fail it so
    assert spec["podFailurePolicy"]["rules"] == [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": container["name"], "operator": "NotIn", "values": AGAIN},
        }
    ]
    (rule,) = job["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["backoffLimit"] == 0 and job["spec"]["failurePolicy"]["maxRestarts"] == 50
    (script,) = container["args"]
    name = f"{job['metadata']['name']}-{part['name']}-0-0.{job['metadata']['name']}"
    assert f"--coordinator {name}:" in script and f"--num-processes {spec['completions']} " in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_the_recipe_has_the_sections_apptainer_knows():
    text = (LAUNCH / "apptainer.def").read_text()
    assert set(re.findall(r"^%(\w+)", text, re.M)) == {"files", "post", "environment", "test", "runscript"}
    post = text.partition("%post")[2].partition("%environment")[0]
    subprocess.run(["sh", "-n"], input=post, text=True, check=True)


# ---- for real ----


def processes(count: int, command: list[str], port: int) -> list[tuple[int, str]]:
    """(exit code, output) of `count` processes that are told of each other."""
    common = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*command, *common, "--process-id", str(rank)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    return [(child.wait(600), child.stdout.read()) for child in running]


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.faults
def test_check_of_two_processes(tmp_path):
    command = [sys.executable, str(LAUNCH / "check.py"), "--folder", str(tmp_path), "--megabytes", "1"]
    (code, shown), (other, _) = processes(2, command, free_port())
    assert (code, other) == (0, 0), shown
    for part in ("process 0: ", "process 1: ", "clocks at most", "all-reduce of 1 MB over 2 devices"):
        assert part in shown
    assert not list(tmp_path.iterdir())
    (code, shown), _ = processes(2, [*command, "--min-bandwidth", "1e6"], free_port())
    assert code == 1 and "FAILED: all-reduce:" in shown


def test_check_makes_no_folder(tmp_path):
    """A share that is not mounted, or misspelt, would be reported as well."""
    folder = tmp_path / "no such share"
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "check.py"), "--folder", str(folder), "--megabytes", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not folder.exists()
    assert f"{folder}: No such file or directory" in done.stderr and "FAILED" in done.stdout


@pytest.mark.faults
def test_two_processes_started_by_the_launcher_train(tmp_path):
    world = case.world(tmp_path / "world")
    named = [word for key, path in world.items() for word in (f"--{key.replace('_', '-')}", path)]
    small = "--model tiny --steps 2 --batch-size 2 --micro-batch-size 1 --dtype float32 --eval-samples 2"
    done = subprocess.run(
        ["bash", str(LAUNCH / "local.sh"), *named, *small.split(), "--run-dir", str(tmp_path / "run")],
        env=os.environ
        | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
        | {"MMRSTRAJ_CACHE": str(tmp_path / "cache"), "PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").is_file() and "2 steps" in done.stdout
