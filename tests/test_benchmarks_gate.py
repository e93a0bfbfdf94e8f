"""The comparison with PyTorch refuses sides that disagree, die or drift apart."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
# A side without a model: `factor` scales what it computes, `seconds` is what a step "takes".
STUB = """
import sys
import numpy as np
from speed import child

class Side:
    def prepare(self, item, budget, cache):
        return {"lower_s": 0.25, "compile_s": 1.0, "fused_attention": False}
    def outputs(self, path):
        factor = float(sys.argv[1])
        rest = np.full(500, 9, np.float32)
        gradient = factor * np.linspace(1, 2, 50, dtype=np.float32)
        np.savez(path, loss=np.float32(2.0), gradient=gradient, rest=rest)
        return {}
    asked = 0
    def time(self):
        self.asked += 1
        return {"seconds": eval(sys.argv[2], {"number": self.asked}), "loss": float(sys.argv[3])}
    def memory(self, reset):
        return {"peak": 2**20}
    def limits(self, dtype, large):
        return {"matmul": 1e12, "copy": 2e10, "read": 1e10}
    def about(self):
        return {"versions": {"stub": "1"}, "device": "", "threads": 1}

child.serve(Side())
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def stub(factor: float = 1.0, seconds: float | str = 1.0, loss: float = 2.0) -> list[str]:
    """seconds: also an expression of `number`, which counts the steps."""
    return [sys.executable, "-c", STUB, str(factor), str(seconds), str(loss)]


def setting(**commands):
    from speed.measure import Setting

    return Setting(commands, {}, [min(os.sched_getaffinity(0))], pairs=5, pause=0.0, look=0.02)


@pytest.fixture
def item():
    from speed.workloads import Item

    return Item("train", "tiny", "float32", 1, 1, "block")


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"loss": np.float32(2.5), "a": random.normal(size=(40, 8)).astype(np.float32), "ids": np.arange(5)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_sides_agree(dtype):
    from speed.gate import disagreements

    assert disagreements(arrays(), arrays(), dtype) == ([], 0.0)


@pytest.mark.parametrize(
    "name, planted",
    [
        ("a", lambda value: value * 1.002),  # a scale that is slightly wrong
        ("a", lambda value: np.roll(value, 1, axis=0)),  # off by one position
        ("a", lambda value: value[:-1]),
        ("a", lambda value: np.where(np.arange(8) == 3, np.nan, value)),
        ("loss", lambda value: value + np.float32(0.01)),
        ("ids", lambda value: value + (np.arange(5) == 4)),
    ],
)
def test_a_planted_difference_is_found(name, planted):
    from speed.gate import disagreements

    wrong = arrays() | {name: planted(arrays()[name])}
    for sides in ((arrays(), wrong), (wrong, arrays())):
        (line,), _ = disagreements(*sides, "float32")
        assert line.startswith(f"{name}:")


def test_a_missing_array_is_a_disagreement():
    from speed.gate import disagreements

    fewer = {name: value for name, value in arrays().items() if name != "a"}
    assert disagreements(arrays(), fewer, "float32")[0] == ["different arrays: ['a']"]
    assert disagreements({}, {}, "float32")[0], "nothing compared is nothing known"


@pytest.mark.parametrize(
    "mine, rival, passes",
    [
        (0.05, 0.04, True),  # apart by more than the limit, each within it
        (0.07, 0.19, True),  # the rival's rounding
        (0.07, 0.05, False),  # ours
        (0.01, 0.60, False),  # more than rounding: another computation
        (0.55, 0.60, False),
    ],
)
def test_float32_decides_where_16_bits_differ(mine, rival, passes):
    from speed.gate import disagreements

    truth = arrays() | {"b": np.full(4000, 3, np.float32)}  # what makes most of the gradient agrees
    noise = np.random.default_rng(1).normal(size=truth["a"].shape).astype(np.float32)
    noise *= np.linalg.norm(truth["a"]) / np.linalg.norm(noise)
    ours, theirs = (truth | {"a": truth["a"] + error * noise} for error in (mine, -rival))
    assert disagreements(ours, theirs, "bfloat16")[0], "without float32 nothing over the limit passes"
    found, worst = disagreements(ours, theirs, "bfloat16", truth)
    assert bool(found) != passes and worst > 0.06
    assert passes or "from float32 ours" in found[0]
    scaled = theirs | {"b": 1.07 * truth["b"]}
    assert len(disagreements(ours, scaled, "bfloat16", truth)[0]) == 2, "together they are not the same"


def test_every_dtype_computes_with_the_same_weights(item):
    import ml_dtypes
    from speed.workloads import weight

    for name in ("layers.0.self_attn.q_proj.lora_B", "layers.0.mlp.fc1.weight", "layer_norm1.weight"):
        drawn = weight(name, (32, 48))
        assert drawn.std() > 0 and np.array_equal(drawn, drawn.astype(ml_dtypes.bfloat16).astype(np.float32))


# ---- a run of stubs ----


def test_a_rival_that_only_rounds_more_is_measured(item):
    from speed import measure

    said = []
    how = setting(ours=stub(), rounds=stub(factor=1.1), wrong=stub(factor=1.6))
    result = measure.measure(dataclasses.replace(item, dtype="bfloat16"), how, said.append)
    assert result["ratios"].keys() == {"rounds"} and result["refused"].keys() == {"wrong"}
    assert result["from_float32"] == pytest.approx({"ours": 0.0, "rounds": 0.1, "wrong": 0.6}, abs=1e-3)
    assert sum("float32 decides" in line for line in said) == 2


def test_no_figure_of_a_side_that_disagrees(item):
    from speed import measure, tables

    said = []
    how = setting(ours=stub(seconds=0.5), good=stub(seconds=2.0), wrong=stub(factor=1.01, seconds=9.0))
    result = measure.measure(item, how, said.append)
    assert result["ratios"].keys() == {"good"} and result["sides"].keys() == {"ours", "good"}
    assert result["ratios"]["good"] == {"median": 0.25, "low": 0.25, "high": 0.25}
    assert result["refused"]["wrong"] == ["gradient: relative error 0.0099, limit 0.001"]
    assert any("wrong REFUSED" in line for line in said)
    limits = {"matmul": 1e12, "copy": 1e10, "read": 1e10}
    table = tables.markdown([result | {"run": {"device": "cpu", "limits": limits}}])
    assert "views | good | 500 ms | 2 s | **0.25** (0.25-0.25) |  | 1 / 1 MiB = 1.00 |" in table
    assert "views | wrong | refused: gradient" in table and "9" not in table.split("wrong")[1][:12]


@pytest.mark.parametrize("kind, timed", [("train", [3, 5, 7, 9, 11]), ("decode", [2, 3, 4, 5, 6])])
def test_a_turns_first_step_is_not_timed(item, kind, timed):
    from speed import measure

    item = dataclasses.replace(item, kind=kind)
    result = measure.measure(item, setting(ours=stub(), rival=stub(seconds="number")), lambda text: None)
    assert result["sides"]["rival"]["second_step_s"] == 1
    assert result["sides"]["rival"]["seconds"] == timed


def test_no_figure_without_fused_attention_where_it_is_asked_for(item):
    from speed import measure

    how = dataclasses.replace(setting(ours=stub(), rival=stub()), fused=True)
    result = measure.measure(item, how, lambda text: None)
    assert not result["ratios"] and "cuDNN" in result["refused"]["rival"][0]


def test_sides_that_drift_apart_are_refused_after_the_rounds(item):
    from speed import measure

    result = measure.measure(item, setting(ours=stub(), drifts=stub(loss=2.1)), lambda text: None)
    assert not result["ratios"] and not result["sides"]
    assert result["refused"] == {"drifts": ["last loss: ours 2, drifts 2.1"]}


def test_a_dead_side_is_named(item):
    from speed import measure

    how = setting(ours=stub(), dead=[sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match=r"dead: its process ended \(3\)"):
        measure.measure(item, how, lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vision_tower.layers.2.mlp.fc1.weight", "multi_modal_projector.linear_1.lora_B"]
)
def test_one_wrong_weight_is_refused(name, item):
    for library in ("torch", "transformers", "peft"):
        pytest.importorskip(library, reason="the comparison with PyTorch needs it")
    from speed import measure

    planted = (
        "import sys; from speed import workloads; right = workloads.weight; "
        f"workloads.weight = lambda n, shape: right(n, shape) * (1.05 if n == {name!r} else 1); "
        "from speed import theirs; theirs.main()"
    )
    commands = {
        "ours": [sys.executable, "-m", "speed.ours"],
        "planted": [sys.executable, "-c", planted, "--threads", "1"],
    }
    result = measure.measure(item, setting(**commands), print)
    assert not result["ratios"] and result["refused"]["planted"]
