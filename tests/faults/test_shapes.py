"""The same numbers from every arrangement of processes, devices and weights; what programs hold (row 19)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import PATIENCE, QUICK, free_port

ARRANGEMENTS = {  # name: (processes, devices of each, fsdp)
    "one": (1, 1, 1),
    "1x8 data": (1, 8, 1),
    "1x8 fsdp": (1, 8, 4),
    "2x4 data": (2, 4, 1),
    "2x4 fsdp": (2, 4, 8),
}


@pytest.fixture(scope="module")
def reports(world, tmp_path_factory):
    """What each arrangement reports; the first one's checkpoint is there when the others begin."""
    work, found = tmp_path_factory.mktemp("shapes"), {}
    script = str(Path(__file__).parent / "shapes.py")
    for name, (count, devices, fsdp) in ARRANGEMENTS.items():
        env = os.environ | {
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_COMPILATION_CACHE_DIR": str(world.caches / "programs"),
        }
        address = f"127.0.0.1:{free_port()}"
        places = [[address, str(count), str(at)] for at in range(count)] if count > 1 else [[]]
        children = [
            subprocess.Popen(
                [sys.executable, script, str(work), name, str(fsdp), *place],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for place in places
        ]  # fmt: skip
        for child in children:
            output, _ = child.communicate(timeout=PATIENCE)
            assert child.returncode == 0, output[-3000:]
        found[name] = json.loads((work / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", list(ARRANGEMENTS)[1:])
def test_losses_are_the_same(reports, name):
    """Row 19: 50 steps with dropout, and 5 more from a state that another arrangement saved."""
    assert reports[name]["devices"] == 8
    one = reports["one"]["losses"]
    assert len(one) == 50 and len(set(one)) == 50
    np.testing.assert_allclose(reports[name]["losses"], one, rtol=1e-5)
    np.testing.assert_allclose(reports[name]["after restore"], one[25:30], rtol=1e-5)


def stacked_and_split(report) -> dict[str, list[int]]:
    """Frozen weights [layers, out, in] that fsdp splits."""
    return {
        name: shape
        for name, shape in report["shapes"].items()
        if ".layers." in name and len(shape) == 3 and ".lora_" not in name and "fsdp" in report["specs"][name]
    }


def test_weights_lie_where_the_table_says(reports):
    for name, report in reports.items():
        split = stacked_and_split(report)
        assert bool(split) == ("fsdp" in name)
        if split:
            specs = report["specs"]
            assert specs["language_model.layers.mlp.up_proj.weight"].endswith("(None, 'fsdp')")
            assert specs["vision_tower.layers.mlp.fc1.lora_A"].endswith("(None, None, 'fsdp')")
            assert specs["language_model.layers.input_layernorm.weight"].endswith("()")
            assert len(split) == 7 + 6  # of the language model and of the tower


@pytest.mark.parametrize("name", ["1x8 fsdp", "2x4 fsdp"])
def test_layers_are_gathered_in_the_loop_and_nothing_else_is(reports, name):
    """shapes.py has run hlo.check_fsdp: no whole stack of weights exists, no activation travels."""
    in_loops = [found for found in reports[name]["collectives"] if found["loop"]]
    assert {"all-gather", "all-reduce"} == {found["kind"] for found in in_loops}


@pytest.mark.parametrize("name", ["1x8 data", "2x4 data"])
def test_with_replicated_weights_only_gradients_and_scalars_travel(reports, name):
    """The loss adds nothing but scalars: everything larger is a trainable's gradient, or a layer of it."""
    report, gradients = reports[name], [[]]
    for leaf, shape in report["shapes"].items():
        if ".lora_" in leaf:
            gradients += [shape, shape[1:]]
    assert report["collectives"]
    for found in report["collectives"]:
        assert found["kind"] == "all-reduce"
        assert all(shape in gradients for shape in found["shapes"]), found
