"""The one error type that means "the user can fix this", and how a command reports it."""

import argparse
import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO


class UserError(ValueError):
    """Bad input: the message is one line naming the file, row or key, what was expected and what to do."""


# A path that cannot be used as asked. Not ENOENT: a file that should be there and is not may be a bug of ours
_OF_THE_PATH = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT),
}


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, and whose options cannot be abbreviated."""

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"python -m mmrstraj_jax.{command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether nobody reads it any more; what it still holds is thrown away then."""
    writing = select.poll()
    writing.register(stream.fileno(), 0)
    if not writing.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return True


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command's main on sys.argv; a UserError becomes one line on stderr and exit code 2.

    So does a path that the system refuses, or a full disk. A reader who has seen enough (`| head`) ends it
    without a word.
    """
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()  # here, and not at the interpreter's end, which would complain
    except BrokenPipeError:
        if not _reader_is_gone(sys.stdout):
            raise
        code = 128 + signal.SIGPIPE  # as of a program that dies of it
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        if error.filename is not None and error.errno in _OF_THE_PATH:
            what = f"{error.filename}: {error.strerror}; name a path that can be used"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a file that was open: it has no name here
            what = f"{error.strerror}; make room, then give the command again"
        else:
            raise
        print(f"error: {what}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
