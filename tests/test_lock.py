"""One run directory, one run: live, killed and suspended owners, on this machine and on others."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import lock, run
from mmrstraj_jax.training.lock import LockLost, RunLock


def owned_by(folder, **owner):
    (folder / lock.NAME).write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": "1"} | owner))


def test_a_second_run_is_refused_and_the_first_leaves_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run") as held:
        with pytest.raises(UserError, match=rf"another run \(process {os.getpid()} on .*\) is running here"):
            RunLock(tmp_path / "run").__enter__()
        held.check()
    assert not (tmp_path / "run").exists()  # it was empty


def test_an_owner_that_was_killed_here_is_seen_at_once(tmp_path):
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from mmrstraj_jax.training.lock import RunLock
RunLock({str(tmp_path)!r}).__enter__()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (tmp_path / lock.NAME).exists()
    with RunLock(tmp_path) as held:
        held.check()


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path):
    owned_by(tmp_path, **lock._me() | {"started": "12"})
    with RunLock(tmp_path):
        pass


def test_an_owner_elsewhere_lives_as_long_as_it_touches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 3.0)
    owned_by(tmp_path)
    done = threading.Event()

    def touch():
        while not done.wait(0.2):
            os.utime(tmp_path / lock.NAME)

    owner = threading.Thread(target=touch)
    owner.start()
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        RunLock(tmp_path).__enter__()
    done.set()
    owner.join()
    begin = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - begin > 1.5  # it was given time to show itself


@pytest.mark.parametrize("hours", [1, -1])
def test_the_clock_of_the_file_server_may_jump(tmp_path, monkeypatch, hours):
    """Forward: a live owner's sign of life looks old. Back: a dead one's lies in the future."""
    monkeypatch.setattr(lock, "STALE", 1.5)
    owned_by(tmp_path)
    path, now = tmp_path / lock.NAME, time.time() - 3600 * hours
    os.utime(path, (now, now))
    touch = threading.Timer(0.2, os.utime, (path, (now + 10, now + 10)))
    touch.start()
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        RunLock(tmp_path).__enter__()
    touch.join()
    said = []
    with RunLock(tmp_path, said.append):
        pass
    assert len(said) == 1 and "process 7 on elsewhere" in said[0] and "watching it for 1.5 s" in said[0]


def test_of_two_that_find_a_dead_owner_one_takes_over(tmp_path):
    (tmp_path / "config.json").touch()  # an empty folder would go with its lock
    dead = lock._me() | {"pid": 7, "started": "1"}
    owned_by(tmp_path, **dead)
    slow = RunLock(tmp_path)
    judged = slow._dead_owner()
    with RunLock(tmp_path) as quick:
        assert not slow._take(judged)
        quick.check()
    assert not slow._take(judged) and not slow.path.exists()
    owned_by(tmp_path, **dead)
    turn = tmp_path / f"lock.taken-{lock.hashlib.sha256(judged.encode()).hexdigest()[:16]}"
    turn.touch()  # another one is at it this very moment
    assert not slow._take(judged)
    turn.unlink()
    assert slow._take(judged)
    slow.check()


def test_the_same_name_after_a_boot_is_another_machine(tmp_path, monkeypatch):
    """Its process numbers say nothing, so it is watched like any other."""
    monkeypatch.setattr(lock, "STALE", 0.3)
    owned_by(tmp_path, **lock._me() | {"machine": "before"})
    said = []
    with RunLock(tmp_path, said.append):
        assert len(said) == 1


def test_a_run_that_was_suspended_notices_that_it_lost_the_directory(tmp_path):
    with RunLock(tmp_path) as held:
        owned_by(tmp_path)
        with pytest.raises(LockLost, match="process 7 on elsewhere.* took over"):
            held.check()
    assert (tmp_path / lock.NAME).exists()  # the other one's


@pytest.mark.parametrize("kind", ["file", "below a file", "not a file system for files", "no permission"])
def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path, kind):
    target = tmp_path / "run"
    if kind == "file":
        target.write_text("x")
    elif kind == "below a file":
        (tmp_path / "file").write_text("x")
        target = tmp_path / "file" / "run"
    elif kind == "not a file system for files":
        target = type(tmp_path)("/proc/run")
    else:
        if os.getuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written .*name another folder with --run-dir"):
        run.prepare(target)


def test_paths_that_cannot_be_looked_at_are_an_error_at_once(tmp_path):
    """Below a folder of somebody else (as user "nobody", where root runs the tests), and a name too long."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0)
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from mmrstraj_jax.config import Config
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import run
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
for path in ({str(tmp_path / "locked" / "run")!r}, {str(tmp_path / "locked")!r}, "/tmp/" + "x" * 300):
    try:
        run.status(Path(path), Config())
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr
    assert all("cannot be written" in line and "--run-dir" in line for line in lines)


def test_a_full_disk_leaves_no_probe(tmp_path, monkeypatch):
    def full(self, _):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        run.prepare(tmp_path)
    assert not list(tmp_path.iterdir())
