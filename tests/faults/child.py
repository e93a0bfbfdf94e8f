"""One process of a run under test: `child.py FAULT TRAIN_OPTIONS...`; a fault is a function below.

Faults are put in from outside: the package has no hooks for them.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import training_case as case

from mmrstraj_jax import train as command
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.monitor import Monitor


def small_run(name, args, **_):
    """Stands for load_config: the tiny case with the options of the command line."""
    from mmrstraj_jax import settings
    from mmrstraj_jax.config import Config

    base = dataclasses.replace(
        case.CONFIG, steps=6, save_every=2, eval_samples=0, length_multiple=32, max_length=256
    )
    given = settings.overrides(args, Config)
    return settings.replace(base, given), frozenset(given)


if __name__ == "__main__":
    fault, *words = sys.argv[1:]
    command.load_config = small_run
    # Tries XLA's flags in a process of its own, which costs seconds each time (row 41 has its tests)
    command.environment.check = lambda *_: None
    # Nobody looks at the pictures, and their libraries take seconds to import
    Monitor._plot = Monitor._open_tensorboard = lambda *_: None
    if fault != "none":
        name, *values = fault.split(":")
        import faults_inside

        getattr(faults_inside, name)(*values)
    try:
        code = command.main(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
