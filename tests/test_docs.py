"""The commands of README and docs are ones that the package takes."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mmrstraj_jax import evaluate, plan
from mmrstraj_jax.config import MODEL_PRESETS, load_config
from mmrstraj_jax.models.mmrstraj import init_model
from mmrstraj_jax.settings import take_flag, take_option
from mmrstraj_jax.training import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(name: str) -> list:
    """Every command `python -m mmrstraj_jax.<name> ...` of the pages' blocks of code, as its words."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.split()[:3] == ["python", "-m", f"mmrstraj_jax.{name}"]:
                    words = shlex.split(line, comments=True)
                    found.append(pytest.param(words[3:], id=f"{page.stem}: {' '.join(words[3:])}"))
    assert found, name
    return found


def config_of(args: list[str]):
    name, args = take_option(args, "--config")
    config, _ = load_config(name, args)
    return config


@pytest.mark.parametrize("args", commands("train"))
def test_train_takes_the_options_and_knows_what_to_train(args):
    config = config_of(take_flag(args, "--print-config")[1])

    def model():
        made = init_model(MODEL_PRESETS["tiny"], jax.random.key(0), jnp.float32)
        run.attach(made, config)
        return made

    assert nnx.eval_shape(model) is not None


@pytest.mark.parametrize("args", commands("plan"))
def test_plan_takes_the_options(args):
    for name in plan.OPTIONS:
        if name != "--config":
            args = take_flag(args, name)[1] if name == "--dry-run" else take_option(args, name)[1]
    assert config_of(args)


@pytest.mark.parametrize("args", commands("evaluate"))
def test_evaluate_takes_the_options(args):
    if args[0] in evaluate.STUDIES:
        assert "--out" in args
    else:
        assert evaluate._arguments(args).task


def test_architecture_names_every_module_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = page.partition("## The rooms")[2].partition("## The way of one sample")[0]
    named = set(re.findall(r"\b\w+\.py\b", rooms))
    modules = {path.name for path in (ROOT / "mmrstraj_jax").rglob("*.py") if path.parent.name != "rules"}
    assert modules - {"__init__.py"} - named == set()
    benchmarks = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert named - modules - benchmarks == set()


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
