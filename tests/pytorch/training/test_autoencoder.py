"""Autoencoders of one hidden layer against numpy's own principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import normal

from onnxfuse.numerics.affine import Affine
from onnxfuse.pytorch.training.autoencoder import Autoencoder, fit

TARGET = Affine(normal(12, 20, seed=1).astype(np.float64), normal(12, seed=2).astype(np.float64))
MIX = normal(20, 20, seed=3) * np.linspace(2, 0.05, 20, dtype=np.float32)


def rows(count: int, seed: int) -> np.ndarray:
    """Correlated inputs, not centred."""
    return (normal(count, 20, seed=seed) @ MIX.T + 1).astype(np.float32)


ROWS, HELD = rows(3000, 4), rows(800, 5)


def output(found: Autoencoder, x: np.ndarray, relu: bool = False) -> np.ndarray:
    code = x.astype(np.float64) @ found.encode.weight.T + found.encode.bias
    if relu:
        code = np.maximum(code, 0)
    return code @ found.decode.weight.T + found.decode.bias


def relative(found: np.ndarray, x: np.ndarray) -> float:
    y = x.astype(np.float64) @ TARGET.weight.T + TARGET.bias
    return float(np.square(found - y).sum() / np.square(y - y.mean(0)).sum())


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_it_starts_at_the_principal_components_of_what_it_follows(rank: int) -> None:
    found = fit(TARGET, ROWS, HELD, rank=rank, epochs=0)
    y = ROWS.astype(np.float64) @ TARGET.weight.T + TARGET.bias
    u, s, v = np.linalg.svd(y - y.mean(0), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank] + y.mean(0)
    np.testing.assert_allclose(output(found, ROWS), best, atol=1e-4)
    assert found.start == found.error == pytest.approx(relative(output(found, HELD), HELD), rel=1e-4)
    code = ROWS.astype(np.float64) @ found.encode.weight.T
    assert found.encode.weight.shape == (rank, 20)
    assert found.decode.weight.shape == (12, rank)
    np.testing.assert_allclose(np.cov(code.T), np.eye(rank), atol=2e-3)


@pytest.mark.parametrize("relu", [False, True])
def test_full_rank_is_exact_up_to_what_a_relu_cuts(relu: bool) -> None:
    found = fit(TARGET, ROWS, HELD, rank=12, relu=relu, epochs=1)
    assert relative(output(found, HELD, relu), HELD) < (0.03 if relu else 1e-10)
    assert found.error <= found.start


@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("relu", [False, True])
def test_the_best_epoch_on_held_rows_is_kept(relu: bool, noise: float) -> None:
    """With far too much noise that is the start."""
    found = fit(TARGET, ROWS, HELD, rank=4, relu=relu, noise=noise)
    assert found.error <= found.start
    assert found.error == pytest.approx(relative(output(found, HELD, relu), HELD), rel=1e-4)


def test_a_code_of_relus_learns() -> None:
    start = fit(TARGET, ROWS, HELD, rank=4, relu=True, epochs=0)
    found = fit(TARGET, ROWS, HELD, rank=4, relu=True, epochs=20)
    assert found.error < 0.99 * start.error


def test_equal_seeds_give_equal_numbers_on_any_number_of_threads() -> None:
    def run(seed: int, threads: int) -> Autoencoder:
        before, state = torch.get_num_threads(), torch.get_rng_state()
        torch.set_num_threads(threads)
        try:
            found = fit(TARGET, ROWS, HELD, rank=4, relu=True, epochs=3, seed=seed, key="y")
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert torch.equal(torch.get_rng_state(), state)
        return found

    one, two, other = run(0, 1), run(0, 2), run(1, 1)
    np.testing.assert_array_equal(one.encode.weight, two.encode.weight)
    np.testing.assert_array_equal(one.decode.bias, two.decode.bias)
    assert np.abs(one.encode.weight - other.encode.weight).max() > 0


def test_an_input_that_is_constant_keeps_what_it_had() -> None:
    """No row says anything of its weights: they are the start's, up to what the decoder takes over."""
    x, judge = ROWS.copy(), HELD.copy()
    x[:, 3] = judge[:, 3] = 1e4
    start = fit(TARGET, x, judge, rank=4, relu=True, epochs=0)
    found = fit(TARGET, x, judge, rank=4, relu=True)
    assert found.error < start.error
    np.testing.assert_allclose(found.encode.weight[:, 3], start.encode.weight[:, 3], rtol=1e-5)
    assert np.abs(found.encode.weight[:, 4] / start.encode.weight[:, 4] - 1).max() > 1e-3


@pytest.mark.filterwarnings("error")
def test_inputs_that_never_move() -> None:
    found = fit(TARGET, np.ones((50, 20), np.float32), np.ones((5, 20), np.float32), rank=3, epochs=1)
    expected = np.ones((5, 20)) @ TARGET.weight.T + TARGET.bias
    np.testing.assert_allclose(output(found, np.ones((5, 20))), expected, atol=1e-4)
