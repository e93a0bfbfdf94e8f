"""The one error type that means "the user can fix this", and how a command reports it."""

import argparse
import errno
import sys
from collections.abc import Callable
from typing import NoReturn


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


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command's main on sys.argv; a UserError becomes one line on stderr and exit code 2.

    So does a path that the system refuses.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        if error.filename is None or error.errno not in _OF_THE_PATH:
            raise
        print(f"error: {error.filename}: {error.strerror}; name a path that can be used", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
