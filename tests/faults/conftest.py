"""Faults put into real runs. Every test of this folder carries the marker, so that `-m faults` finds it."""

import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    import training_case as case
    from children import World

    made = case.world(tmp_path_factory.mktemp("world"))
    options = [word for name, path in made.items() for word in (f"--{name.replace('_', '-')}", path)]
    found = World(options, tmp_path_factory.mktemp("caches"))
    yield found
    for child in found.children:
        child.stop()


@pytest.fixture(scope="session")
def straight(world, tmp_path_factory):
    """The run directory of an uninterrupted run."""
    child = world.start(tmp_path_factory.mktemp("straight") / "run")
    child.ends(0)
    return child.run_dir


EVALUATED = ("--eval-samples", "5", "--eval-every", "2")


@pytest.fixture(scope="session")
def evaluated(world, tmp_path_factory):
    """The same with held-out data."""
    child = world.start(tmp_path_factory.mktemp("evaluated") / "run", *EVALUATED)
    child.ends(0)
    return child.run_dir


@pytest.fixture
def halfway(straight, tmp_path):
    """That run as it was after step 4 of 6, which lies in its second epoch."""
    run_dir = Path(shutil.copytree(straight, tmp_path / "halfway"))
    (run_dir / "summary.json").unlink()
    for folder in (run_dir / "checkpoints").iterdir():
        if int(folder.name) > 4:
            shutil.rmtree(folder)
    return run_dir
