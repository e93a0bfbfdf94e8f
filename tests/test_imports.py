"""The model rooms import on a machine that has little more than JAX, and arrows point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmrstraj_jax"
ALLOWED = {"jax", "jaxlib", "flax", "optax", "einops", "jaxtyping", "numpy", "mmrstraj_jax"}
RUNS = {"config", "models", "errors", "settings", "parallel", "data", "weights"}  # what a run is made of
# What each room may import of the others; commands and api.py may import everything.
MAY_IMPORT = {
    "models": {"config", "models", "errors"},
    "weights": {"config", "models", "errors", "settings", "weights", "data"},
    "data": {"config", "models", "errors", "settings", "data"},
    "synthcity": {"errors", "synthcity"},
    "inference": {"config", "models", "errors", "data", "weights", "inference", "parallel"},
    "training": {"synthcity", "training", *RUNS},
    "construction": {
        "config",
        "errors",
        "settings",
        "jsonl",
        "data",
        "synthcity",
        "evaluation",
        "construction",
    },
    "planning": {"training", "synthcity", "planning", *RUNS},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_model_rooms_import_with_jax_flax_optax_einops_and_jaxtyping_alone():
    modules = [
        f"mmrstraj_jax.models.{p.stem}" for p in (PACKAGE / "models").glob("*.py") if p.stem != "__init__"
    ]
    modules += ["mmrstraj_jax.training.loss", "mmrstraj_jax.parallel"]
    blocked = (
        "orbax grain tokenizers tyro PIL safetensors transformers torch tqdm tensorboardX matplotlib openai "
        "qwix"
    )
    code = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked.split()!r}:
            raise ModuleNotFoundError(name)
# Flax imports orbax for its own checkpoint helpers; it may
import flax.nnx
sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ["models"])
def test_no_foreign_package_in_the_model_room(room):
    for path in (PACKAGE / room).glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path)}
        tops -= {"qwix"} if path.name == "quantized.py" else set()  # an extra, asked for when it is used
        assert tops - ALLOWED - set(sys.stdlib_module_names) == set(), path


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_point_one_way(room):
    for path in (PACKAGE / room).rglob("*.py"):
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("mmrstraj_jax.")}
        assert ours - MAY_IMPORT[room] == set(), path
