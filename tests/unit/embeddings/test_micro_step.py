"""The micro-step: the gradient of its loss, its bounds, and learning of structure but not noise."""

from zlib import crc32

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embeddings.towers.micro_step import MicroSettings, MicroStep
from embeddings.towers.numerics import unit

D = 64


def vectors(n: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32))


CATALOGUE = vectors(800, 1)
DEFAULT = MicroSettings()


def keys(n: int) -> list[str]:
    return [f"event-{i}" for i in range(n)]


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
@pytest.mark.parametrize("rate", [0.001, 0.03])
def test_it_is_one_step_of_autograd(temperature: float, rate: float) -> None:
    torch.set_num_threads(1)
    chosen = MicroSettings(temperature=temperature, rate=rate, norm_max=9.0)
    micro = MicroStep(CATALOGUE, chosen)
    n = 40
    f, e, targets = vectors(n, 2), vectors(n, 3) * np.float32(0.3), np.arange(n)
    drawn = micro.draw(keys(n))
    drawn_f64 = torch.from_numpy(CATALOGUE[drawn]).double()
    e64 = torch.from_numpy(e).double().requires_grad_()
    u = torch.nn.functional.normalize(torch.from_numpy(f).double() + e64, dim=1)
    positive = (u * torch.from_numpy(CATALOGUE[targets]).double()).sum(
        1, keepdim=True
    ) / temperature
    negative = torch.einsum("nkd,nd->nk", drawn_f64, u) / temperature
    negative = negative.masked_fill(torch.from_numpy(drawn == targets[:, None]), -torch.inf)
    loss = torch.nn.functional.cross_entropy(
        torch.cat([positive, negative], 1), torch.zeros(n, dtype=torch.long), reduction="sum"
    )
    loss.backward()
    expected = e64.detach() * (1 - chosen.decay) - rate * e64.grad
    found = micro.step(f, e, targets.tolist(), keys(n))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)
    # The step itself, not only its sum with the previous embedding.
    moved = np.linalg.norm(found - e * (1 - chosen.decay) + rate * e64.grad.numpy(), axis=1)
    assert (moved <= 2e-3 * rate * np.linalg.norm(e64.grad.numpy(), axis=1) + 1e-6).all()


def test_an_event_has_the_same_bits_in_any_batch() -> None:
    micro = MicroStep(CATALOGUE, DEFAULT)
    n = 150
    f, e, t, k = vectors(n, 2), vectors(n, 3) * np.float32(0.2), range(n), keys(n)
    together = micro.step(f, e, t, k)
    for size in (1, 7, 32, 33, 64):
        for at in range(0, n - size, 9):
            some = slice(at, at + size)
            assert (
                micro.step(f[some], e[some], t[some], k[some]).tobytes() == together[some].tobytes()
            )
    assert micro.step(f[:0], e[:0], t[:0], []).shape == (0, D)


def mixed(z: int) -> int:
    """splitmix64's finalizer in plain integers."""
    mask = (1 << 64) - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def negatives_of(key: str, n: int, pool: int, negatives: int) -> list[int]:
    """The negatives of one event over n items, computed item by item."""
    ring = sorted(range(n), key=mixed)[:pool]
    start = (mixed(crc32(key.encode())) >> 32) * len(ring) >> 32
    return [ring[(start + at) % len(ring)] for at in range(min(negatives, len(ring)))]


@pytest.mark.parametrize("pool", [1, 2, 6, 7, 8, 799, 800, 801, 10**9])
@pytest.mark.parametrize("negatives", [1, 7, 256, 800, 10**6])
def test_negatives_are_a_function_of_the_key(pool: int, negatives: int) -> None:
    micro = MicroStep(CATALOGUE, MicroSettings(pool=pool, negatives=negatives))
    drawn = micro.draw(keys(40))
    expected = [negatives_of(key, len(CATALOGUE), pool, negatives) for key in keys(40)]
    assert drawn.tolist() == expected
    assert len({len(set(row)) for row in expected}) == 1 and len(set(expected[0])) == len(
        expected[0]
    )
    assert MicroStep(CATALOGUE, MicroSettings(pool=pool, negatives=negatives)).draw(
        ["event-7"]
    ).tolist() == [expected[7]]


@pytest.mark.parametrize("name", ["pool", "negatives"])
def test_there_is_at_least_one_negative(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"{name}"):
        msgspec.json.decode(f'{{"{name}": 0}}', type=MicroSettings)
    assert msgspec.json.decode(f'{{"{name}": 1}}', type=MicroSettings) == MicroSettings(**{name: 1})


def test_negatives_are_drawn_evenly() -> None:
    micro = MicroStep(CATALOGUE, MicroSettings(negatives=1))
    counts = np.bincount(micro.draw(keys(80_000)).ravel(), minlength=800)
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert chi_square < 970  # 799 degrees of freedom: p = 3e-5
    # Neighbours in the pool are not neighbours in the catalogue, whose order may carry meaning.
    apart = np.abs(np.diff(MicroStep(CATALOGUE, DEFAULT).draw(["x"])[0]))
    assert 200 < apart.mean() < 330


@pytest.mark.parametrize("pool", [300, 16_384])
def test_the_target_is_not_a_negative(pool: int) -> None:
    """Against the formula in float64, one event at a time."""
    chosen = MicroSettings(pool=pool)
    f, e = vectors(800, 2), vectors(800, 3) * np.float32(0.3)
    micro = MicroStep(CATALOGUE, chosen)
    drawn = micro.draw(keys(800))
    inside = (drawn == np.arange(800)[:, None]).any(axis=1)
    assert 0 < inside.sum() < 800
    found = micro.step(f, e, range(800), keys(800))
    for n in np.flatnonzero(inside)[:20].tolist() + np.flatnonzero(~inside)[:5].tolist():
        others = [row for row in drawn[n] if row != n]
        u = (f[n] + e[n]).astype(np.float64)
        norm = np.linalg.norm(u)
        u /= norm
        scores = CATALOGUE[[n, *others]] @ u / chosen.temperature
        p = np.exp(scores - scores.max())
        p /= p.sum()
        g = p @ CATALOGUE[[n, *others]] - CATALOGUE[n]
        g = (g - (g @ u) * u) * chosen.rate / chosen.temperature / norm
        np.testing.assert_allclose(found[n], e[n] * (1 - chosen.decay) - g, atol=1e-6)


def test_a_catalogue_of_few_items() -> None:
    for n in (1, 2, 255, 256, 257):
        micro = MicroStep(CATALOGUE[:n], DEFAULT)
        assert micro.draw(["x"]).shape == (1, min(n, 256))
        after = micro.step(vectors(3, 2), vectors(3, 3) * np.float32(0.1), [0, 0, n - 1], keys(3))
        assert np.isfinite(after).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([1e-4, 1e-3, 0.1, 10.0]),
    start=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    temperature=st.sampled_from([0.01, 0.07, 1.0]),
)
@example(
    seed=195, rate=1e-3, start=0.5, temperature=0.07
)  # a float32 norm just below the bound, a true one above
@example(seed=1046, rate=1e-3, start=0.5, temperature=0.07)
def test_the_norm_stays_bounded_and_finite(
    seed: int, rate: float, start: float, temperature: float
) -> None:
    micro = MicroStep(CATALOGUE, MicroSettings(rate=rate, temperature=temperature))
    f, e = vectors(20, seed), vectors(20, seed + 1) * np.float32(start)
    e[0] = -f[0]  # u = norm(0): no direction at all
    for _ in range(3):
        e = micro.step(f, e, range(20), keys(20))
        assert np.isfinite(e).all()
        assert np.linalg.norm(e.astype(np.float64), axis=1).max() <= DEFAULT.norm_max


def test_without_a_gradient_it_decays() -> None:
    micro = MicroStep(CATALOGUE, MicroSettings(rate=0.0))
    e = vectors(5, 3) * np.float32(0.4)
    after = micro.step(vectors(5, 2), e, range(5), keys(5))
    np.testing.assert_allclose(after, e * np.float32(1 - 0.002), rtol=1e-6)


def test_the_items_of_the_events_rise() -> None:
    micro = MicroStep(CATALOGUE, DEFAULT)
    n = 200
    f, targets = vectors(n, 2), CATALOGUE[:n]
    e = np.zeros((n, D), np.float32)
    before = (unit(f + e) * targets).sum(1)
    after = (unit(f + micro.step(f, e, range(n), keys(n))) * targets).sum(1)
    assert (after > before).mean() > 0.97


def learned(taste: float, *, events: int = 150, users: int = 40) -> float:
    """How much the query gains towards the user's own cluster, relative to the other clusters.

    taste: share of events in the user's own cluster beyond chance; 0 is noise
    """
    rng = np.random.default_rng(7)
    centres = vectors(8, 11)
    clusters = np.arange(800) % 8
    catalogue = unit(centres[clusters] + vectors(800, 12))
    micro = MicroStep(catalogue, MicroSettings(rate=0.01))
    own = np.arange(users) % 8
    f = vectors(users, 13)
    e = np.zeros((users, D), np.float32)
    for event in range(events):
        at_home = rng.random(users) < taste
        rows = np.where(at_home, own + 8 * rng.integers(0, 100, users), rng.integers(0, 800, users))
        e = micro.step(f, e, rows.tolist(), [f"{u}/{event}" for u in range(users)])
    gain = (unit(f + e) - f) @ centres.T
    at_own = gain[np.arange(users), own]
    return float((at_own - (gain.sum(1) - at_own) / 7).mean())


def test_it_learns_structure_and_finds_nothing_in_noise() -> None:
    assert learned(0.8) > 0.3
    assert abs(learned(0.0)) < 0.05
