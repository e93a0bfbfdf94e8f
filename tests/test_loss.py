"""The chunked loss on gathered positions against the definition on full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrstraj_jax.models.qwen2 import _scores, along_rows
from mmrstraj_jax.training.loss import MAX_LOGITS, chunk_positions, row_coefficients, supervised_loss

B, L, K, H, W = 3, 9, 7, 8, 20


@pytest.fixture
def case():
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(B, L, H)), jnp.float32)
    head = jnp.asarray(random.normal(size=(W, H)), jnp.float32)
    positions = random.integers(0, L - 1, (B, K))
    targets = random.integers(0, W, (B, K))
    weights = (np.arange(K) < np.array([[7], [4], [0]])).astype(np.float32)
    return hidden, head, positions, targets, weights


def loss(hidden, head, positions, targets, weights, answer=None, chunk=K):
    answer = weights > 0 if answer is None else answer
    arrays = [jnp.asarray(x) for x in (targets, weights, answer)]
    hidden = along_rows(hidden, jnp.asarray(positions))
    return supervised_loss(lambda h: h @ head.T, hidden, *arrays, chunk=chunk)


def reference(hidden, head, positions, targets, weights):
    logits = jnp.take_along_axis(hidden @ head.T, jnp.asarray(positions)[..., None], axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets)) * weights


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_equals_cross_entropy_on_full_logits(case, chunk):
    np.testing.assert_allclose(loss(*case, chunk=chunk).nll, reference(*case).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 7])
def test_gradients_equal_the_reference(case, chunk):
    hidden, head, *rest = case
    ours = jax.grad(lambda h, w: loss(h, w, *rest, chunk=chunk).nll.sum(), (0, 1))(hidden, head)
    theirs = jax.grad(lambda h, w: reference(h, w, *rest).sum(), (0, 1))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_full_logits_are_never_built(case):
    text = str(
        jax.make_jaxpr(lambda h, w: jax.grad(lambda h: loss(h, w, *case[2:], chunk=2).nll.sum())(h))(
            *case[:2]
        )
    )
    assert f"[{B},2,{W}]" in text
    assert f"[{B},{L},{W}]" not in text and f"[{B},{K},{W}]" not in text


@pytest.mark.parametrize("chunk, products", [(K, 2), (2, 3)])  # logits, their gradient; logits once more
def test_logits_of_one_chunk_are_computed_once(case, chunk, products):
    hidden, head, *rest = case
    grad = jax.make_jaxpr(jax.grad(lambda h: loss(h, head, *rest, chunk=chunk).nll.sum()))(hidden)
    assert str(grad).count("dot_general[") == products


def test_padding_with_non_finite_values_does_not_reach_the_loss(case):
    hidden, head, positions, targets, weights = case
    poisoned = hidden.at[2].set(jnp.inf)  # the row without a target
    value, grad = jax.value_and_grad(lambda h: loss(h, head, positions, targets, weights).nll[:2].sum())(
        poisoned
    )
    assert np.isfinite(value) and np.isfinite(grad[:2]).all()
    assert loss(poisoned, head, positions, targets, weights).nll[2] == 0


@pytest.mark.parametrize("chunk", [3, 7])
def test_correct_needs_every_answer_token(case, chunk):
    hidden, head, positions, _, weights = case
    best = np.argmax(np.take_along_axis(np.asarray(hidden @ head.T), positions[..., None], 1), -1)
    answer = np.zeros((B, K), bool)
    answer[:, 1:4] = True
    assert loss(hidden, head, positions, best, weights, answer, chunk).correct.all()
    wrong_outside, wrong_inside = best.copy(), best.copy()
    wrong_outside[0, 0] = (best[0, 0] + 1) % W
    wrong_inside[1, 3] = (best[1, 3] + 1) % W
    assert loss(hidden, head, positions, wrong_outside, weights, answer, chunk).correct.all()
    assert loss(hidden, head, positions, wrong_inside, weights, answer, chunk).correct.tolist() == [
        True,
        False,
        True,
    ]
    assert not loss(hidden, head, positions, best, weights, np.zeros((B, K), bool), chunk).correct.any()


def test_normalisations():
    weights = jnp.asarray(np.arange(4) < np.array([[[1], [2]], [[4], [0]]]), jnp.float32)  # [A 2, B 2, K 4]
    np.testing.assert_allclose(row_coefficients(weights, "token", 1), np.full((2, 2), 1 / 7))
    # three micro-batches of one row have targets
    np.testing.assert_allclose(row_coefficients(weights, "microbatch", 1)[:, 0], [1 / 3, 1 / 12])
    np.testing.assert_allclose(row_coefficients(weights, "microbatch", 1)[0, 1], 1 / 6)
    np.testing.assert_allclose(row_coefficients(weights, "microbatch", 2), [[1 / 6] * 2, [1 / 8] * 2])


def test_a_batch_without_targets_is_zero_not_nan():
    assert np.isfinite(row_coefficients(jnp.zeros((1, 2, 3)), "token", 1)).all()
    assert np.isfinite(row_coefficients(jnp.zeros((1, 2, 3)), "microbatch", 2)).all()


def test_chunks_stay_under_the_cap():
    assert chunk_positions(1, 150, 152064) == 150
    assert chunk_positions(8, 1024, 152064) * 8 * 152064 <= MAX_LOGITS
    assert chunk_positions(4096, 8, 152064) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_own_backward_is_that_of_the_plain_product(tied):
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    head = jnp.asarray(np.random.default_rng(1).normal(size=(11, 8)), jnp.float32)

    def loss(scores, hidden, head):
        hidden = hidden + head[:3] if tied else hidden  # tied: rows of the head are embeddings, too
        return jax.nn.logsumexp(scores(hidden, head), axis=-1).sum()

    plain = jax.grad(lambda h, w: loss(lambda a, b: jnp.einsum("...h,vh->...v", a, b), h, w), (0, 1))
    ours = jax.jit(jax.grad(lambda h, w: loss(_scores, h, w), (0, 1)))
    for mine, theirs in zip(ours(hidden, head), plain(hidden, head), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
