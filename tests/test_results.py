"""The tables of docs/results.md from answers whose scores are known."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from mmrstraj_jax.config import load_config
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation.readers import Item
from mmrstraj_jax.settings import take_option

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", FOLDER / "results.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["results"] = module  # anyres_policies imports it by this name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["results"]


def item(n, type_, question, answer, domain="B"):
    return Item(f"{n}", (), question, type_, (answer,), {"domain": domain})


def test_the_question_majority_knows_the_answers(results):
    items = [
        item(0, "presence", "Is there a car?", "yes"),
        item(1, "presence", "Is there a car?", "yes"),
        item(2, "presence", "Is there a car?", "no"),
        item(3, "presence", "Is there a ship?", "no"),
        item(4, "zoning", "Is there a car?", "park"),
        item(5, "presence", "Any pool?", "no"),
        item(6, "presence", "Any tank?", "no"),
    ]
    assert results.question_majority(items) == {
        "0": "yes", "1": "yes", "2": "yes", "3": "no", "4": "park", "5": "no", "6": "no",
    }  # fmt: skip


def test_tables_state_counts_intervals_and_paired_gains(results):
    items = [item(n, "hierarchy", "Which class?", "local") for n in range(50)]
    items += [item(100 + n, "color", "Which color?", "red", "A") for n in range(30)]
    right = {name: np.zeros(80) for name in results.MODELS}
    right["stage1"][:10] = 1
    right["stage2"][:40] = 1
    text = results.tables(items, right)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert lines["hierarchy"].startswith("| hierarchy | 50 | 0.0 (0-7)")
    assert lines["hierarchy"].endswith("20.0 (11-33) | 80.0 (67-89) |")
    assert "| 30 |" in lines["**all general**"] and "| 50 |" in lines["**traffic, domain B**"]
    assert "traffic, domain A" not in text.replace("**", "")
    low, high = lines["stage 2, traffic"].split("| +60.0 | ")[1].strip(" |").split(" to ")
    assert 40 < float(low) < 60 < float(high) < 80


def test_the_commands_are_run_in_order_and_once(results, tmp_path, monkeypatch):
    """The whole flow with commands that only note their words and leave what the real ones would."""
    from PIL import Image

    for name in ("sample", "bench"):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / name / "images" / "a.png")
    (tmp_path / "sample" / "stage1.json").write_text("[]")
    (tmp_path / "sample" / "stage2.json").write_text("[]")
    monkeypatch.setattr(results, "ensure_sample", lambda: {"stage1": tmp_path / "sample" / "stage1.json"})
    monkeypatch.setattr(results, "ensure_bench", lambda: tmp_path / "bench" / "annotations.json")
    calls = []

    def command(module, *words, programs):
        calls.append((module, *map(str, words)))
        place = Path(words[words.index("--run-dir" if module == "train" else "--out") + 1])
        place.mkdir(parents=True)
        (place / ("summary.json" if module == "train" else "scores.json")).touch()
        if module == "train":
            args = [str(word) for word in words]
            _, args = take_option(args, "--config")
            config, _ = load_config(words[1], args)  # every option is one that train.py has
            assert config.steps == 7 and (config.data is None) == ("blind" not in place.name)
        return 1.0

    monkeypatch.setattr(results, "command", command)
    assert len(results.run_all(tmp_path / "out", 7, 5)) == len(calls) == 8
    # two chains side by side, each in its order
    blind = [c for c in calls if any("blind" in word for word in c) or "--weights" in c]
    seeing = [c for c in calls if c not in blind]
    assert [c[0] for c in seeing] == ["train", "evaluate"] * 2
    assert [c[0] for c in blind] == ["train", "train", "evaluate", "evaluate"]
    assert blind[2][blind[2].index("--images") + 1] == str(tmp_path / "out" / "blank_bench" / "images")
    grey = Image.open(tmp_path / "out" / "blank" / "images" / "a.png")
    assert grey.size == (30, 20) and np.asarray(grey).min() == np.asarray(grey).max() == 127
    assert results.run_all(tmp_path / "out", 7, 5) == {} and len(calls) == 8
    with pytest.raises(UserError, match="another base"):
        results.run_all(tmp_path / "out", 8, 5)


def test_a_section_is_replaced_and_nothing_else(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\nkept\n<!-- end -->\n")
    results.replace_section(page, "<!-- a -->", "new")
    assert page.read_text() == (
        "before\n<!-- a -->\n\nnew\n\n<!-- end -->\nbetween\n<!-- b -->\nkept\n<!-- end -->\n"
    )
    with pytest.raises(AssertionError, match="no section"):
        results.replace_section(page, "<!-- c -->", "new")


def test_policies_differ_in_tokens_and_their_plot_is_drawn(results, tmp_path):
    spec = importlib.util.spec_from_file_location("anyres_policies", FOLDER / "anyres_policies.py")
    policies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policies)
    plans = {n: policies.anyres.plan(224, 224, p.anyres) for n, p in policies.POLICIES.items()}
    assert {name: plan.num_views for name, plan in plans.items()} == {
        "base": 2, "tau45": 5, "tau90": 5, "tau": 5, "full": 5,
    }  # fmt: skip
    tokens = [plans[name].num_tokens for name in ("tau45", "tau90", "tau", "full")]
    assert tokens == sorted(set(tokens)) and tokens[-1] == 64 + 16 * 17
    rows = [
        {
            "policy": n,
            "tokens": p.num_tokens,
            "ms_per_sample": 10 + k,
            "right": {"all": [k, 9], "car": [0, 0]},
        }
        for k, (n, p) in enumerate(plans.items())
    ]
    assert "| tau of the paper |" in policies.table(rows)
    policies.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    data = policies.write_rows(tmp_path, "base", 5)
    path = policies.write_config(tmp_path, "base", 3, data)
    config, _ = load_config(str(path), [], model="tiny")
    assert config.anyres == policies.POLICIES["base"].anyres and config.steps == 3
    assert config.data == str(data) and not config.lora.vision_tower
