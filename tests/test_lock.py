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
    owned_by(tmp_path, pid=os.getpid(), host=lock._me()["host"], started="12")
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
