"""Adapters against peft, and five optimizer steps against torch.optim.AdamW, with and without clipping."""

import pytest

from . import cases, ours

pytest.importorskip("torch", reason="live parity needs CPU torch; the golden file covers machines without it")
pytest.importorskip("peft", reason="live LoRA parity needs peft")

from . import reference  # noqa: E402


@pytest.fixture(scope="module")
def theirs(folders):
    """(peft model, its adapters, the batch)."""
    rows = [sample for sample in cases.samples("untied") if sample.name in cases.LORA_ROWS]
    return *reference.with_adapters(reference.load(folders["untied"])), reference.batch("untied", rows)


def used(tree):
    """Without the adapters of the tower layers above the feature layer, which take no part."""
    return {path: value for path, value in tree.items() if ".layers.2." not in path}


def test_first_gradients(theirs, adapters):
    loss, expected = reference.first_gradients(*theirs)
    own_loss, actual = ours.first_gradients(adapters)
    assert own_loss == pytest.approx(loss, abs=cases.ATOL)
    assert len(expected) == 2 * (2 * 6 + 2)
    cases.assert_leaves_close(actual, expected, cases.GRADIENT_TOLERANCE)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_five_steps(theirs, adapters, clip):
    norms, expected = reference.train(*theirs, steps=5, clip=clip, **cases.LEARNING_RATES)
    assert norms[0] > 2 * 0.5, "the clipping must bite"
    own_norms, actual = ours.train(adapters, 5, clip)
    assert own_norms == pytest.approx(norms, rel=1e-3)
    cases.assert_leaves_close(actual, used(expected), cases.CHANGE_TOLERANCE)
