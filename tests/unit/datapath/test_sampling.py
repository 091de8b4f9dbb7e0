"""Sampling against slow, obvious definitions."""

import itertools

import numpy as np
import pytest

from coeld.datapath.sampling import Sampling, choose


def draws(logits, sampling: Sampling, count: int) -> set[int]:
    generator = sampling.generator()
    return {choose(logits, sampling, generator) for _ in range(count)}


def test_greedy_takes_the_likeliest_and_the_lowest_id_among_equals() -> None:
    logits = np.array([0, 3, 3, 1], np.float32)
    assert choose(logits, Sampling(), np.random.default_rng()) == 1


@pytest.mark.parametrize("seed", range(20))
def test_top_k_draws_from_the_k_likeliest_only(seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(50).astype(np.float32)
    allowed = set(np.argsort(-logits)[:5].tolist())
    assert draws(logits, Sampling(1.5, top_k=5, seed=seed), 300) <= allowed


@pytest.mark.parametrize("seed", range(20))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int) -> None:
    logits = (np.random.default_rng(seed).standard_normal(30) * 3).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    allowed, mass = set(), 0.0
    for token in np.argsort(-p):
        allowed.add(int(token))
        mass += p[token]
        if mass >= 0.8:
            break
    assert draws(logits, Sampling(1.0, top_p=0.8, seed=seed), 300) <= allowed


def test_draws_follow_the_softmax_at_the_given_temperature() -> None:
    logits = np.array([0.0, 1.0, 2.0], np.float32)
    sampling = Sampling(temperature=2.0, seed=1)
    generator = sampling.generator()
    counts = np.bincount([choose(logits, sampling, generator) for _ in range(20_000)], minlength=3)
    expected = np.exp(logits / 2.0) / np.exp(logits / 2.0).sum()
    assert np.abs(counts / 20_000 - expected).max() < 0.015


def test_the_same_seed_gives_the_same_draws() -> None:
    logits = np.zeros(1000, np.float32)
    runs = []
    for _ in range(2):
        sampling = Sampling(1.0, seed=42)
        generator = sampling.generator()
        runs.append([choose(logits, sampling, generator) for _ in range(20)])
    assert runs[0] == runs[1]
    other = Sampling(1.0, seed=43)
    assert runs[0] != [choose(logits, other, other.generator()) for _ in range(20)]


@pytest.mark.parametrize("seed", [-1, -(1 << 63), (1 << 63) - 1])
def test_any_64_bit_seed_gives_draws_of_its_own(seed: int) -> None:
    logits = np.zeros(1000, np.float32)
    runs = []
    for one in (seed, seed, seed ^ 1):
        sampling = Sampling(1.0, seed=one)
        generator = sampling.generator()
        runs.append([choose(logits, sampling, generator) for _ in range(20)])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1.0, 1e4, 3e38])
def test_a_token_is_drawn_at_any_temperature_from_any_logits(
    temperature: float, scale: float
) -> None:
    generator = np.random.default_rng(7)
    for top_p, top_k in itertools.product((0.0, 5e-324, 0.5, 1.0), (0, 1, 1 << 24)):
        logits = (generator.uniform(-1, 1, 50) * scale).astype(np.float32)
        logits[:5] = -np.inf
        token = choose(logits, Sampling(temperature, top_p, top_k), generator)
        assert logits[token] > -np.inf
        if temperature < 1e-50 or top_p < 0.01 or top_k == 1:
            assert logits[token] == logits.max()
