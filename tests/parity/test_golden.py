"""Against the outputs of transformers and peft that `make_golden` stored: runs where torch is absent."""

import zlib

import numpy as np
import pytest

from . import cases, ours
from .conftest import GOLDEN


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def test_views(golden, outputs, name):
    for sample, out in zip(cases.samples(name), outputs[name], strict=True):
        assert zlib.crc32(out.views.tobytes()) == golden[f"{name}/{sample.name}/views_crc"], sample.name


def test_outputs(golden, outputs, name):
    tolerance = {"rtol": 0, "atol": cases.ATOL}
    for sample, out in zip(cases.samples(name), outputs[name], strict=True):
        key = f"{name}/{sample.name}"
        assert len(out.features) == golden[f"{key}/num_features"], key
        for what, value in (("features", out.features), ("logits", out.logits)):
            expected = golden[f"{key}/{what}"]
            np.testing.assert_allclose(cases.excerpt(value), expected, **tolerance, err_msg=f"{key}/{what}")
        np.testing.assert_allclose(out.loss, golden[f"{key}/loss"], **tolerance, err_msg=key)


def test_greedy_ids(golden, answers, name):
    for sample, ids in zip(cases.samples(name), answers[name], strict=True):
        np.testing.assert_array_equal(ids, golden[f"{name}/{sample.name}/greedy"], err_msg=sample.name)


def test_first_lora_gradients(golden, adapters):
    prefix = "gradient/"
    expected = {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}
    _, actual = ours.first_gradients(adapters)
    cases.assert_leaves_close(actual, expected, cases.GRADIENT_TOLERANCE)
