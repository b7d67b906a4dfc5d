"""Autoencoders of one hidden layer against numpy's own principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import normal

from onnxfuse.fitting.paired_rows import PairedRows
from onnxfuse.numerics.affine import Affine
from onnxfuse.pytorch.training.autoencoder import Autoencoder, fit

TARGET = Affine(normal(12, 20, seed=1).astype(np.float64), normal(12, seed=2).astype(np.float64))
MIX = normal(20, 20, seed=3) * np.linspace(2, 0.05, 20, dtype=np.float32)


def rows(count: int, seed: int) -> np.ndarray:
    """Correlated inputs, not centred."""
    return (normal(count, 20, seed=seed) @ MIX.T + 1).astype(np.float32)


def followed(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ TARGET.weight.T + TARGET.bias


def paired(x: np.ndarray, rest: np.ndarray | float = 0.0) -> PairedRows:
    """Rows of which the map is what is wanted, up to the other operand of a sum."""
    return PairedRows(x, rest, (followed(x) + rest).astype(np.float32))


ROWS, HELD = rows(3000, 4), rows(800, 5)
SEEN, JUDGED = paired(ROWS), paired(HELD)


def output(found: Autoencoder, x: np.ndarray, relu: bool = False) -> np.ndarray:
    code = x.astype(np.float64) @ found.encode.weight.T + found.encode.bias
    if relu:
        code = np.maximum(code, 0)
    return code @ found.decode.weight.T + found.decode.bias


def relative(found: np.ndarray, x: np.ndarray) -> float:
    y = followed(x)
    return float(np.square(found - y).sum() / np.square(y - y.mean(0)).sum())


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_it_starts_at_the_principal_components_of_what_it_follows(rank: int) -> None:
    found = fit(TARGET.weight, SEEN, JUDGED, rank=rank, epochs=0)
    y = followed(ROWS)
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
    found = fit(TARGET.weight, SEEN, JUDGED, rank=12, relu=relu, epochs=1)
    assert relative(output(found, HELD, relu), HELD) < (0.03 if relu else 1e-10)
    assert found.error <= found.start


@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("relu", [False, True])
def test_the_best_epoch_on_held_rows_is_kept(relu: bool, noise: float) -> None:
    """With far too much noise that is the start."""
    found = fit(TARGET.weight, SEEN, JUDGED, rank=4, relu=relu, noise=noise)
    assert found.error <= found.start
    assert found.error == pytest.approx(relative(output(found, HELD, relu), HELD), rel=1e-4)


def test_a_code_of_relus_learns() -> None:
    start = fit(TARGET.weight, SEEN, JUDGED, rank=4, relu=True, epochs=0)
    found = fit(TARGET.weight, SEEN, JUDGED, rank=4, relu=True, epochs=20)
    assert found.error < 0.99 * start.error


def test_equal_seeds_give_equal_numbers_on_any_number_of_threads() -> None:
    def run(seed: int, threads: int) -> Autoencoder:
        before, state = torch.get_num_threads(), torch.get_rng_state()
        torch.set_num_threads(threads)
        try:
            found = fit(TARGET.weight, SEEN, JUDGED, rank=4, relu=True, epochs=3, seed=seed, key="y")
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
    start = fit(TARGET.weight, paired(x), paired(judge), rank=4, relu=True, epochs=0)
    found = fit(TARGET.weight, paired(x), paired(judge), rank=4, relu=True)
    assert found.error < start.error
    np.testing.assert_allclose(found.encode.weight[:, 3], start.encode.weight[:, 3], rtol=1e-5)
    assert np.abs(found.encode.weight[:, 4] / start.encode.weight[:, 4] - 1).max() > 1e-3


@pytest.mark.filterwarnings("error")
def test_inputs_that_never_move() -> None:
    found = fit(
        TARGET.weight,
        paired(np.ones((50, 20), np.float32)),
        paired(np.ones((5, 20), np.float32)),
        rank=3,
        epochs=1,
    )
    expected = np.ones((5, 20)) @ TARGET.weight.T + TARGET.bias
    np.testing.assert_allclose(output(found, np.ones((5, 20))), expected, atol=1e-4)


@pytest.mark.parametrize("branch", [False, True])
def test_what_counts_is_behind_the_activation(branch: bool) -> None:
    """Eight of twelve outputs are large, and a ReLU cuts them off: a code of four numbers has room for the
    others, where one that is blind to the ReLU follows the large ones."""
    weight = TARGET.weight * np.repeat([1.0, 5.0], [4, 8])[:, None]
    shift = np.repeat([0.0, -2000.0], [4, 8])

    def seen(x: np.ndarray) -> PairedRows:
        rest = normal(len(x), 12, seed=7) * branch
        return PairedRows(x, rest if branch else 0.0, (x @ weight.T + shift + rest).astype(np.float32))

    def error(found: Autoencoder) -> float:
        rows = seen(HELD)
        ours, theirs = (np.maximum(y, 0) for y in (output(found, HELD) + rows.rest, rows.target))
        return float(np.square(ours - theirs).sum() / np.square(theirs - theirs.mean(0)).sum())

    blind = fit(weight, seen(ROWS), seen(HELD), rank=4, epochs=2)
    found = fit(weight, seen(ROWS), seen(HELD), rank=4, epochs=2, through=torch.relu)
    assert found.error == pytest.approx(error(found), rel=1e-3, abs=1e-6)
    assert found.error < 1e-4 < 0.1 < error(blind)


def test_training_lowers_the_error_behind_the_activation() -> None:
    shifted = PairedRows(ROWS, 0.0, SEEN.target - 4), PairedRows(HELD, 0.0, JUDGED.target - 4)
    found = fit(TARGET.weight, *shifted, rank=4, through=torch.relu)
    ours, theirs = (np.maximum(y, 0) for y in (output(found, HELD), followed(HELD) - 4))
    error = np.square(ours - theirs).sum() / np.square(theirs - theirs.mean(0)).sum()
    assert found.error == pytest.approx(error, rel=1e-3)
    assert found.error < 0.98 * found.start


def test_the_decoder_starts_at_the_regression_on_what_the_code_says() -> None:
    """Of inputs that a rewritten network changed: what is wanted is the map of others."""
    moved = (0.8 * ROWS + 0.2).astype(np.float32)
    found = fit(TARGET.weight, PairedRows(moved, 0.0, SEEN.target), JUDGED, rank=4, epochs=0)
    code = np.column_stack([moved.astype(np.float64) @ found.encode.weight.T, np.ones(len(moved))])
    expected = code @ np.linalg.lstsq(code, followed(ROWS), rcond=None)[0]
    np.testing.assert_allclose(output(found, moved), expected, atol=1e-3)
