"""The one error type that means "the user can fix this", and how a command reports it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message is one line naming the file, row or key, what was expected and what to do."""


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command's main on sys.argv; a UserError becomes one line on stderr and exit code 2."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
