"""The comparison with PyTorch: its tables, files, page and commands, and the scaling model."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_the_median_and_its_interval():
    from speed.tables import ratio

    found = ratio([1.0, 1.1, 0.9, 1.0, 5.0], [2.0] * 5)  # one disturbed round
    assert found["median"] == 0.5 and found["low"] >= 0.45 and found["high"] == 2.5


def test_what_bounds_decoding():
    from speed import tables
    from speed.workloads import Item

    one = Item("decode", "0.5b", "bfloat16", batch=1)
    needed = tables.work(one)
    assert needed["bytes"] == pytest.approx(2 * 494e6, rel=0.01)  # every weight once, and a short cache
    result = {"work": needed, "sides": {"ours": {"median_s": needed["bytes"] / 20e9}}, "run": run()}
    result["run"]["limits"] = {"matmul": 1e12, "copy": 35e9, "read": 40e9}
    assert tables.bound(result) == ("memory bandwidth", pytest.approx(0.5))


def test_weights_do_not_depend_on_the_process():
    from speed import workloads

    name = "vision_tower.layers.3.mlp.fc1.weight"
    value = workloads.weight(name, (30, 20))
    np.testing.assert_array_equal(value, workloads.weight(name, (30, 20)))
    assert value.std() == pytest.approx(20**-0.5, rel=0.1)
    assert (
        abs(np.corrcoef(value.ravel(), workloads.weight(name.replace("3", "4"), (30, 20)).ravel())[0, 1])
        < 0.2
    )


# ---- files and page ----


def run() -> dict:
    """Where and how a result was taken."""
    from speed import store

    return {
        "command": "python benchmarks/compare.py --size 0.5b",
        "date": "2026-01-01",
        "device": "cpu",
        "versions": {"jax": "1"},
        "limits": {"matmul": 1e12, "copy": 1e10, "read": 1e10},
        "pairs": 9,
        "code": store.code_of("train"),
    }


def result_of(name: str, rivals: dict[str, float], **changed) -> dict:
    """A measured training item; rivals: name -> ratio. changed: of its `run`."""
    from speed.workloads import Item

    side = {"median_s": 1.0, "peak": 2**30}
    return {
        "name": name,
        "item": dataclasses.asdict(Item("train", "0.5b", "float32", 1, 1, name.split("-")[1])),
        "work": {"flops": 5e11},
        "relative_error": dict.fromkeys(rivals, 0.0),
        "sides": {"ours": side} | {rival: side | {"median_s": 1 / ratio} for rival, ratio in rivals.items()},
        "ratios": {rival: dict.fromkeys(("median", "low", "high"), ratio) for rival, ratio in rivals.items()},
        "refused": {},
        "other_work": 0.0,
        "run": run() | changed,
    }


HEAD = {"device": "cpu", "size": "0.5b", "dtype": "float32", "machine": "stub", "host": "stub host"}


def test_items_of_several_runs_become_one_file(tmp_path):
    from speed import store

    path = tmp_path / "speed-cpu-0.5b-float32-stub.json"
    store.add(path, HEAD, result_of("train-block", {"PyTorch eager": 0.9, "PyTorch compiled": 0.95}))
    store.add(path, HEAD, result_of("train-dots", {"PyTorch eager": 0.8}))
    store.add(path, HEAD, result_of("train-block", {"PyTorch eager": 0.7}))
    ratios = [{name: one["median"] for name, one in each["ratios"].items()} for each in store.read(path)]
    assert ratios == [{"PyTorch compiled": 0.95}, {"PyTorch eager": 0.8}, {"PyTorch eager": 0.7}]
    item = result_of("train-block", {})["item"]
    both = ["PyTorch eager", "library defaults"]
    assert store.missing(path, item, both, run()) == ["library defaults"]
    assert store.missing(path, item, both, run() | {"pairs": 11}) == both
    assert store.missing(path, item, both, run() | {"versions": {"jax": "2"}}) == both


def test_what_may_not_be_shown_reads_not_measured(tmp_path, capsys):
    import report
    from speed import store

    path = tmp_path / "speed-cpu-0.5b-float32-stub.json"
    store.add(path, HEAD, result_of("train-block", {"PyTorch eager": 0.9}))
    store.add(path, HEAD, result_of("train-dots", {"PyTorch eager": 0.8}, code="of another day"))
    busy = result_of("train-none", {"PyTorch eager": 0.7}) | {"other_work": 0.5}
    store.add(path, HEAD, busy)
    page = report.speed(tmp_path, tmp_path)
    assert (
        "| train-block, 1 x 1 views | PyTorch eager | 1 s | 1.11 s | **0.90** (0.90-0.90) | 1.00 reached"
        in page
    )
    assert "| train-block | PyTorch compiled | Not measured |" in page
    for gap in ("train-dots", "train-none"):
        assert f"| {gap} | PyTorch eager | Not measured |" in page
    said = capsys.readouterr().err
    assert "train-dots is left out, the package's code" in said and "other work took 50 %" in said
    assert "### 7B, bfloat16, one GPU\n\nNot measured." in page
    assert "| LoRA step, layers recomputed | 0.90, - | Not measured |" in report.summary(tmp_path)
    store.add(path, HEAD, result_of("train-block", {"PyTorch compiled": 1.1}))  # a run of its own
    assert "| LoRA step, layers recomputed | 0.90, 1.10 | Not measured |" in report.summary(tmp_path)


def test_a_missed_goal_stands_beside_what_the_machine_allows():
    from speed import tables

    slow = result_of("train-block", {"PyTorch eager": 1.25})  # 5e11 FLOPs in 1 s, of 1e12 a second
    assert tables.goal(slow, "PyTorch eager") == "1.00 missed, limit 0.62; memory 0.80 missed"


def test_machines_are_not_mixed(tmp_path):
    import report
    from speed import store

    for machine, ratio, names in (("a", 0.9, ["train-block"]), ("b", 0.8, ["train-block", "decode-1"])):
        path = tmp_path / f"speed-cpu-0.5b-float32-{machine}.json"
        for name in names:
            result = result_of("train-block", {"PyTorch eager": ratio}) | {"name": name}
            result["item"]["length"] = len(name)  # another item
            store.add(path, HEAD | {"host": f"host {machine}"}, result)
    store.add(
        tmp_path / "speed-cpu-0.5b-float32-c.json", HEAD, result_of("train-block", {"PyTorch eager": 0.7})
    )
    table = report.summary(tmp_path)
    assert "| LoRA step, layers recomputed | 0.80, - |" in table and "| answer, batch 1 | 0.80, - |" in table
    page = report.speed(tmp_path, tmp_path)
    for machine in "ab":  # a table and a plot of each
        assert f"host {machine}.\n" in page and f"speed-cpu-0.5b-float32-{machine}.png)" in page
        assert (tmp_path / f"speed-cpu-0.5b-float32-{machine}.png").stat().st_size > 0


def test_savings_and_captions_on_the_page(tmp_path):
    import report
    from speed import store

    assert report.wins(tmp_path) == report.captions(tmp_path) == report.pipeline(tmp_path) == report.NOTHING
    one = result_of("train-dots", {"layers unrolled": 0.5})
    one["sides"]["ours"] = one["sides"]["ours"] | {
        "lower_s": 0.5,
        "compile_s": 3.0,
        "from_cache": [{"lower_s": 0.5, "compile_s": cached} for cached in (0.75, 0.25, 0.5)],
    }
    store.add(tmp_path / "wins-cpu-0.5b-float32-stub.json", HEAD, one)
    row = "| train-dots | layers unrolled | 1 s | 2 s | **0.50** (0.50-0.50) | 1,024 / 1,024 MiB "
    assert row + "| 3.5 s; 1.00 s (0.75-1.25) from cache / - |" in report.wins(tmp_path)
    found = {"median_s": {"ours": 0.5, "pycocoevalcap": 2.0}, "ratio": one["ratios"]["layers unrolled"]}
    record = {"command": "c", "date": "d", "host": "h", "other_work": 0.0, "results": {"short": found}}
    for code, shown in ((store.fingerprint(store.CAPTION_CODE), True), ("old", False)):
        (tmp_path / "captions.json").write_text(json.dumps(record | {"code": code}))
        assert ("| short | 500 ms | 2 s | **0.50**" in report.captions(tmp_path)) == shown


def test_the_fingerprint_sees_code_and_no_comment(tmp_path, monkeypatch):
    from speed import store

    monkeypatch.setattr(store, "_PACKAGE", tmp_path)
    marks = []
    for text in ("def f(x):\n    return x + 1\n", 'def f(x):\n    """Said."""\n\n    return x + 1  # so\n'):
        (tmp_path / "a.py").write_text(text)
        marks.append(store.fingerprint(["a.py"]))
    (tmp_path / "a.py").write_text("def f(x):\n    return x + 2\n")
    assert marks[0] == marks[1] != store.fingerprint(["a.py"])


def test_only_the_blocks_of_the_page_change():
    import report

    page = "before\n<!-- made by benchmarks/report.py: speed -->\nold\n<!-- end -->\nafter\n"
    filled = report.fill(page, {"speed": "new\n"})
    assert filled == page.replace("old", "new")
    assert report.fill(filled, {"speed": "new\n"}) == filled


def documented() -> list[list[str]]:
    """The words of every compare.py command of docs/performance.md, less those below its tables."""
    page = (FOLDER.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = page.split("## Against PyTorch")[0].splitlines()
    return [line.split()[2:] for line in lines if line.startswith("python benchmarks/compare.py")]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_are_understood(words, monkeypatch):
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    args = compare.arguments()
    how = compare.setting(args)
    assert args.items and len(how.commands) == 1 + len(args.rivals)
    assert how.fused == (args.device == "gpu")


# ---- scaling ----


def test_wire_time():
    from scaling import Links

    links = Links(node=8, inside=100.0, between=10.0, latency=1e-3)
    assert links.seconds(1e9, 1) == 0
    assert links.seconds(1e9, 8) == pytest.approx(0.01 + 6e-3)
    assert links.seconds(1e9, 16) == pytest.approx(0.1 + 8e-3), "the network, as soon as a node is left"


def test_strategies_of_a_known_case():
    from scaling import Links, curve
    from speed.workloads import Item

    row = Item("train", "0.5b", "bfloat16", 1, 1, "block")
    points = curve(row, 0.1, Links(8, 300.0, 50.0, 0.0), counts=(1, 8, 1024))
    by = {(one.strategy, one.devices): one for one in points}
    adapters = 4 * 4_217_344  # float32 gradients
    assert by["data parallel", 1].wire_bytes == 0
    assert by["data parallel", 8].wire_bytes == pytest.approx(2 * 7 / 8 * adapters)
    assert by["data parallel", 1024].memory_gib == by["data parallel", 8].memory_gib
    sharded = by["fsdp, all devices", 8]
    weights, head = 2 * 893e6, 2 * 136e6  # layers are gathered twice, the head once
    assert sharded.wire_bytes == pytest.approx(7 / 8 * (2 * (weights + adapters) - head), rel=0.02)
    # at 1,024 few axes divide: those leaves stay whole and are not sent, and memory grows again
    assert by["fsdp, all devices", 1024].wire_bytes < 2 * weights
    assert sharded.memory_gib < by["data parallel", 8].memory_gib
    assert sharded.serial_s == pytest.approx(0.1 + sharded.wire_bytes / 300e9)
    assert sharded.overlapped_s == 0.1
    low, high = sharded.samples_per_s
    assert low < high == pytest.approx(80)


def test_the_page_has_the_scaling_models_present_figures(tmp_path, monkeypatch):
    """It is computed, not measured: no machine is needed to follow the code."""
    import report
    import scaling

    for path in (FOLDER / "measured").glob("scaling-*.json"):
        record = json.loads(path.read_text())
        words = [
            *record["command"].split()[1:],
            "--out",
            str(tmp_path),
            "--image",
            str(tmp_path / "plot.png"),
        ]
        monkeypatch.setattr(sys, "argv", words)
        scaling.main()
        assert json.loads((tmp_path / path.name).read_text())["points"] == record["points"]
    page = (FOLDER.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert report.scaling(FOLDER / "measured") in page


# ---- what the scripts need ----


def test_the_comparison_imports_its_own_libraries_alone():
    """compare.py, its JAX side and report.py, as if nothing else were installed."""
    code = """
import importlib, importlib.machinery, importlib.metadata, re, sys

def needed(names):
    found = set()
    while names:
        name = re.split(r"[^A-Za-z0-9_.-]", names.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names += [each for each in asked if "extra ==" not in each]
    return found

allowed = needed("jax flax optax numpy torch transformers peft einops jaxtyping".split())
blocked = {
    top for top, packages in importlib.metadata.packages_distributions().items()
    if not any(each.lower().replace("_", "-") in allowed for each in packages)
} - {"mmrstraj_jax"}
assert {"grain", "PIL", "tyro"} <= blocked, blocked

class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
for name in ("compare", "report", "speed.ours"):
    importlib.import_module(name)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# ---- the real sides ----


def torch_sides():
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason="the comparison with PyTorch needs it")


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path):
    torch_sides()
    command = [sys.executable, FOLDER / "compare.py", "--size", "tiny", "--pairs", "5", "--views", "5"]
    command += ["--rivals", "eager,defaults", "--out", tmp_path]
    names = ["vision-5", "prefill", "decode-4", "train-block", "train-none"]
    for only in (names[:2], names):  # the second goes on with what is missing
        done = subprocess.run([*command, "--only", ",".join(only)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr.count("nothing to do") == (2 if only is names else 0)
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert [result["name"] for result in results] == names
    for result in results:
        rivals = {"PyTorch eager"} | ({"library defaults"} if "train" in result["name"] else set())
        assert result["ratios"].keys() == rivals and not result["refused"]
        assert max(result["relative_error"].values()) < 1e-4


@pytest.mark.slow
def test_every_saving_computes_the_same_numbers(tmp_path):
    import wins

    command = [sys.executable, FOLDER / "wins.py", "--size", "tiny", "--pairs", "5", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("wins-*.json")
    compared = {name for result in json.loads(path.read_text())["results"] for name in result["ratios"]}
    offered = [wins.WINS[name] for name in wins.offered("cpu", "tiny", "float32")]
    assert compared == {name for win in offered for name in win.before}


def test_caption_sets_are_scored_alike():
    pytest.importorskip("pycocoevalcap")
    import captions

    given = captions.texts(20, 3, (8, 16))
    mine, rival = captions.ours(given, False), captions.theirs(given, False)
    assert mine == pytest.approx(rival, abs=1e-6) and 0 < mine["bleu4"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [w for w in documented() if "gpu" in w], ids=" ".join)
def test_gpu_commands_at_tiny_size_on_this_cpu(words, tmp_path):
    torch_sides()
    words = ["tiny" if word in ("0.5b", "7b") else "cpu" if word == "gpu" else word for word in words]
    command = [sys.executable, FOLDER / "compare.py", *words, "--pairs", "5", "--views", "5"]
    done = subprocess.run([*command, "--threads", "1", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" not in done.stdout
