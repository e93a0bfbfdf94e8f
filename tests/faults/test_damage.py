"""Checkpoints that are damaged, interrupted, or cannot be written (rows 2, 12 to 15, 17, 18)."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_checkpoint import equal, restored, saved, state

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import manifest
from mmrstraj_jax.training.checkpoint import Checkpoints, SaveFailed, read_trainable
from mmrstraj_jax.training.manifest import Damaged


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "c"
    saved(folder, {1: None, 2: None}).close()
    return folder


@pytest.fixture
def copy(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "c"))


def assert_falls_back(folder: Path, reason: str):
    lines = []
    again = restored(Checkpoints(folder, 2, say=lines.append))
    assert again.step == 1 and len(lines) == 1
    assert "WARNING" in lines[0] and reason in lines[0] and "kept as unreadable-2" in lines[0]
    equal((again.trainable, again.opt_state), state(1))


def test_a_flipped_bit_in_any_file_is_seen(copy):
    """Row 12."""
    step = copy / "2"
    assert len(files(step)) > 10
    for number, path in enumerate(files(step)):
        content = path.read_bytes()
        at = (number * 7919) % max(1, len(content))
        flipped = bytearray(content or b"\0")
        flipped[at] ^= 1 << number % 8
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match=path.name):
            manifest.verify(step)
        path.write_bytes(content)
    manifest.verify(step)
    path = max(files(step / "trainable"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert_falls_back(copy, "its SHA-256 is")


@pytest.mark.parametrize("kind", ["truncated", "empty", "missing", "empty folder", "no manifest"])
def test_cut_and_missing_files_are_seen(copy, kind):
    """Row 13."""
    path = max(files(copy / "2" / "trainable"), key=lambda path: path.stat().st_size)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    elif kind == "no manifest":
        (copy / "2" / manifest.NAME).unlink()
    else:
        shutil.rmtree(copy / "2")
        (copy / "2").mkdir()
    assert_falls_back(
        copy, "No such file" if kind in ("missing", "empty folder", "no manifest") else "SHA-256"
    )


def test_when_all_are_damaged_nothing_starts_over_unless_asked(copy):
    """Row 14."""
    for path in files(copy):
        path.write_bytes(path.read_bytes()[:7])
    again = Checkpoints(copy, say=lambda _: None)
    with pytest.raises(UserError, match="none of the checkpoints 1, 2 can be read.*--allow-fresh"):
        again.newest_intact()
    assert sorted(path.name for path in copy.iterdir()) == ["unreadable-1", "unreadable-2"]
    shutil.copytree(copy / "unreadable-2", copy / "2")
    assert again.newest_intact(allow_fresh=True) is None


def test_killed_while_it_writes(two_steps, copy):
    """Row 2: kill -9 when all files of step 3 are there and the manifest is not."""
    code = f"""
import sys, time
sys.path[:0] = {sys.path!r}
from test_checkpoint import state
from mmrstraj_jax.training import manifest
from mmrstraj_jax.training.checkpoint import Checkpoints
manifest.write = lambda *_: (print("writing", flush=True), time.sleep(600))
checkpoints = Checkpoints({str(copy)!r}, 2)
checkpoints.save(3, *state(3), {{}})
checkpoints.wait()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (copy / "3.partial").is_dir()
    lines = []
    checkpoints = Checkpoints(copy, 2, say=lines.append)
    checkpoints.clean()
    assert restored(checkpoints).step == 2
    assert lines == ["removed 3.partial: the save of step 3 was interrupted; finished steps are used"]
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_full_disk_leaves_the_older_ones(copy):
    """Row 15: files cannot grow (EFBIG comes from the same place as ENOSPC)."""
    checkpoints = Checkpoints(copy, 2, say=lambda _: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        checkpoints.save(3, *state(3), {})
        checkpoints._thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(SaveFailed, match=r"step 3 could not be saved .*finished checkpoints \(1, 2\)"):
        checkpoints.check()
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]
    manifest.verify(copy / "2")
    again = Checkpoints(copy, 2)  # the same command, and there is room
    again.save(3, *state(3), {})
    again.close()
    assert again.steps() == [2, 3]


@pytest.mark.parametrize("where", ["save", "wait", "close", "check"])
def test_a_failed_save_surfaces(copy, monkeypatch, where):
    """Row 17."""

    def fails(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(copy, 2, say=lambda _: None)
    monkeypatch.setattr(manifest, "write", fails)
    checkpoints.save(3, *state(3), {})
    checkpoints._thread.join()
    with pytest.raises(SaveFailed, match="step 3 could not be saved .OSError.*No space left"):
        {"save": lambda: checkpoints.save(4, *state(4), {})}.get(where, getattr(checkpoints, where))()
    assert checkpoints.steps() == [1, 2]


def test_an_old_step_that_cannot_be_deleted_is_tried_again(tmp_path, monkeypatch):
    """Rows 17 and 18: NFS keeps a file that somebody reads, and its folder with it."""
    real = shutil.rmtree

    def busy(path, *rest, **how):
        if "removed-" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        real(path, *rest, **how)

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        checkpoints = saved(tmp_path / "c", {1: None, 2: None, 3: None}, keep_last=1, say=lines.append)
        (tmp_path / "c" / "4.partial").mkdir()
        checkpoints.clean()
    assert checkpoints.steps() == [3] and not (tmp_path / "c" / "4.partial").exists()
    assert [line.split()[0] for line in lines] == ["WARNING:", "WARNING:", "removed", "WARNING:"]
    assert "removed-1 cannot be deleted yet (Directory not empty)" in lines[0]
    checkpoints.save(4, *state(4), {})
    checkpoints.close()
    assert os.listdir(tmp_path / "c") == ["4"]


def test_a_reader_is_not_disturbed_by_deletion(tmp_path):
    """Row 18: the newest step is read again and again while every save deletes the one before it."""
    checkpoints = saved(tmp_path / "c", {1: None}, keep_last=1)
    done, seen, failed = threading.Event(), [], []

    def read():
        like = state(99)[0]
        while not done.is_set():
            try:
                step, trainable = read_trainable(tmp_path / "c", like, say=failed.append)
                equal(trainable, state(step)[0])
                seen.append(step)
            except BaseException as error:
                failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 14):
        checkpoints.save(step, *state(step), {})
        checkpoints.wait()
    time.sleep(0.1)
    done.set()
    reader.join()
    checkpoints.close()
    assert not failed and len(set(seen)) > 1
    assert os.listdir(tmp_path / "c") == ["13"]
