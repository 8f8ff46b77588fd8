"""The blender learns what is there to learn, finds nothing in noise, and is stored to the bit."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from serving.answer.blender import Blender, BlenderRejected

CONTEXTS = ["all", "new"]
FEATURES = ["a.rank", "b.rank", "age"]


def fresh() -> Blender:
    return Blender.start(CONTEXTS, FEATURES, ["a.rank", "b.rank"])


def test_it_begins_as_a_fusion_by_rank() -> None:
    x = np.array([[1.0, 0.0, 9.0], [0.5, 0.25, -9.0]])
    assert fresh().scores(np.array([1.0, 1.0]), x).tolist() == [1.0, 0.75]


def test_a_step_is_that_of_adagrad_on_the_softmax_loss() -> None:
    """Against the gradient by differences, and the rule written out."""
    rng = np.random.default_rng(5)
    blender, q, x = fresh(), rng.normal(size=2), rng.normal(size=(6, 3))

    def loss(weights: np.ndarray) -> float:
        scores = x @ (q @ weights)
        return float(np.log(np.exp(scores).sum()) - scores[4])

    before, gradient = blender.weights, np.zeros((2, 3))
    for at in np.ndindex(2, 3):
        step = np.zeros((2, 3))
        step[at] = 1e-6
        gradient[at] = (loss(before + step) - loss(before - step)) / 2e-6
    assert blender.learn(q, x, 4) == pytest.approx(loss(before))
    squares = 0.01 + gradient**2
    assert blender.weights == pytest.approx(before - 0.1 * gradient / np.sqrt(squares), abs=1e-7)
    assert blender.squares == pytest.approx(squares, abs=1e-7)


def test_it_learns_which_path_is_right_in_which_context() -> None:
    """New users click what path a has first, others what b has first."""
    rng = np.random.default_rng(7)
    blender, start = fresh(), fresh()
    hits = before = 0
    for number in range(2_000):
        new = float(rng.integers(2))
        x = rng.random((20, 3))
        clicked = int(np.argmax(x[:, 0 if new else 1]))
        q = np.array([1.0, new])
        if number >= 1_500:
            hits += int(np.argmax(blender.scores(q, x))) == clicked
            before += int(np.argmax(start.scores(q, x))) == clicked
        blender.learn(q, x, clicked)
    right, wrong = blender.weights[0] + blender.weights[1], blender.weights[0]
    assert right[0] > right[1] and wrong[1] > wrong[0]
    assert hits > 1.5 * before
    assert blender.learned == 2_000


def test_it_finds_nothing_in_noise() -> None:
    """Random clicks: it does no better than chance, and its loss stays near that of chance."""
    rng = np.random.default_rng(11)
    blender, hits, losses = fresh(), 0, []
    for number in range(3_000):
        x, clicked = rng.random((20, 3)), int(rng.integers(20))
        q = np.array([1.0, float(rng.integers(2))])
        hits += number >= 1_000 and int(np.argmax(blender.scores(q, x))) == clicked
        losses.append(blender.learn(q, x, clicked))
    assert 60 < hits < 145  # 100 are expected of 2,000; four standard deviations
    assert np.mean(losses[1_000:]) < np.log(20) + 0.02


def test_the_parts_of_a_score_add_up_to_it() -> None:
    rng = np.random.default_rng(3)
    blender, q, x = fresh(), rng.random(2), rng.random((4, 3))
    blender.learn(q, x, 1)
    assert blender.parts(q, x).sum(axis=1) == pytest.approx(blender.scores(q, x))


def test_the_same_clicks_give_the_same_bits_across_a_restart() -> None:
    rng = np.random.default_rng(13)
    clicks = [(rng.random(2), rng.random((9, 3)), int(rng.integers(9))) for _ in range(40)]
    whole, stopped = fresh(), fresh()
    for number, click in enumerate(clicks):
        whole.learn(*click)
        if number == 17:
            stopped = Blender.decode(stopped.encode())
        stopped.learn(*click)
    assert stopped.encode() == whole.encode()
    assert (stopped.weights == whole.weights).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_teach_nothing(bad: float) -> None:
    blender = fresh()
    before = blender.encode()
    with np.errstate(invalid="ignore"):
        blender.learn(np.array([1.0, 0.0]), np.array([[bad, 0, 0], [0, 1, 0.0]]), 1)
    assert blender.encode() == before


def test_one_candidate_teaches_nothing() -> None:
    blender = fresh()
    weights = blender.weights.tolist()
    assert blender.learn(np.array([1.0, 0.0]), np.ones((1, 3)), 0) == 0.0
    assert blender.weights.tolist() == weights


def stored(**changes: object) -> bytes:
    names = ("format", "contexts", "features", "learned", "weights", "squares")
    fields = dict(zip(names, msgspec.msgpack.decode(fresh().encode()), strict=True))
    return msgspec.msgpack.encode(list((fields | changes).values()))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "cannot be read"),
        (b"\xff", "cannot be read"),
        (stored(format=2), "format 2, this version reads 1"),
        (stored(weights=b"\0" * 47), "weights: 47 bytes, expected 2 × 3 × 8"),
        (stored(squares=b"\0" * 49), "squares: 49 bytes"),
        (stored(weights=np.full(6, np.nan).tobytes()), "weights are not finite"),
        (stored(squares=np.zeros(6).tobytes()), "squares: expected numbers above 0"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(value: bytes, why: str) -> None:
    with pytest.raises(BlenderRejected, match=why):
        Blender.decode(value)
