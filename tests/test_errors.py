import errno
import subprocess
import sys
import warnings

import pytest

import mmrstraj_jax
from mmrstraj_jax.errors import UserError, run_command


def _exit_code(main):
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", "--steps", "3"])

    def main(args):
        assert args == ["--steps", "3"]
        raise UserError("rows.json line 3: expected a list, got 7")

    assert _exit_code(main) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: rows.json line 3: expected a list, got 7\n" and captured.out == ""


def test_exit_codes_of_main_are_kept(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    assert _exit_code(lambda args: None) == 0
    assert _exit_code(lambda args: 75) == 75


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(args):
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        run_command(main)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda folder: (folder / "file" / "below").mkdir(), "file/below: Not a directory"),
        (lambda folder: (folder / "file").mkdir(), "file: File exists"),
        (lambda folder: (folder / "folder").write_text("x"), "folder: Is a directory"),
        (lambda folder: (folder / ("x" * 300)).mkdir(), "xxx: File name too long"),
    ],
)
def test_a_path_that_the_system_refuses_is_the_users(tmp_path, capsys, monkeypatch, use, message):
    monkeypatch.setattr(sys, "argv", ["command"])
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    assert _exit_code(lambda args: use(tmp_path)) == 2
    assert message + "; name a path" in capsys.readouterr().err


def test_a_disk_that_is_full_while_a_file_is_written_is_the_users(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(args):
        raise OSError(errno.ENOSPC, "No space left on device")  # as file.write does it, without a name

    assert _exit_code(main) == 2
    assert capsys.readouterr().err == (
        "error: No space left on device; make room, then give the command again\n"
    )


def test_a_file_that_is_missing_within_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(FileNotFoundError):
        run_command(lambda args: (tmp_path / "none").read_text())


def test_a_reader_that_has_gone_ends_a_command_without_a_word():
    """`train --print-config | head`: much output, whose reader closes before any or all of it came."""
    for lines in (1, 100_000):
        program = f"""
from mmrstraj_jax.errors import run_command
run_command(lambda args: [print("a line") for _ in range({lines})] and 0)
"""
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            child.stdout.close()
            assert (child.stderr.read(), child.wait()) == (b"", 141), lines


def test_a_broken_pipe_to_somebody_else_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(args):
        raise BrokenPipeError("a server's")

    with pytest.raises(BrokenPipeError, match="a server's"):
        run_command(main)


def test_user_error_is_public_and_a_value_error():
    assert mmrstraj_jax.UserError is UserError and issubclass(UserError, ValueError)


def test_deprecated_calls_by_our_modules_are_errors_and_others_are_not():
    def deprecated_call_in(module):
        warnings.warn_explicit("old", DeprecationWarning, f"{module}.py", 1, module=module)

    with pytest.raises(DeprecationWarning):
        deprecated_call_in("mmrstraj_jax.models.layers")
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("default", module="elsewhere")
        deprecated_call_in("elsewhere")
    assert len(seen) == 1


def test_the_package_and_its_settings_import_without_jax():
    heavy = "sys.exit(bool({'jax', 'tyro', 'torch'} & set(sys.modules)))"
    code = f"import sys, mmrstraj_jax, mmrstraj_jax.config; {heavy}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_attribute_of_the_package_is_named():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = mmrstraj_jax.nope
