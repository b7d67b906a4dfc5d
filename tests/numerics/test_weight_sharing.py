"""One weight for several layers, against numpy's least squares."""

from __future__ import annotations

import numpy as np
import pytest

from onnxfuse.numerics.similarity import freeze_share
from onnxfuse.numerics.weight_sharing import RIDGE, gradient_shares, one_weight

RANDOM = np.random.default_rng(0)


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [RANDOM.standard_normal(shape) for shape in shapes]


def shared(
    weights: list[np.ndarray], mode: str, counts: list[int], seen: list[list[np.ndarray]]
) -> np.ndarray:
    return one_weight(weights, mode, counts, seen, 1, np.random.default_rng(1))  # type: ignore[arg-type]


def test_the_first_the_mean_and_a_draw() -> None:
    weights = arrays((4, 3), (4, 3), (4, 3))
    none: list[list[np.ndarray]] = [[], [], []]
    np.testing.assert_array_equal(shared(weights, "freeze", [1, 1, 1], none), weights[0])
    expected = (weights[0] + 2 * weights[1] + weights[2]) / 4
    np.testing.assert_allclose(shared(weights, "mean", [1, 2, 1], none), expected)
    mixed = shared(weights, "mix", [1, 1, 1], none)
    assert (np.stack(weights) == mixed).any(axis=0).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_fit_is_the_regression_on_all_inputs(groups: int) -> None:
    rows, columns = 4, 3
    weights = arrays((rows, columns), (rows, columns))
    inputs = arrays((50, groups * columns), (60, groups * columns), (70, groups * columns))
    inputs[2][:, 0] *= 5
    covariances = [x.T @ x / len(x) for x in inputs]
    seen = [covariances[:1], covariances[1:]]
    found = one_weight(weights, "fit", [1, 2], seen, groups, RANDOM)
    mean = (weights[0] + 2 * weights[1]) / 3
    own = [(weights[0], inputs[0]), (weights[1], inputs[1]), (weights[1], inputs[2])]
    out = rows // groups
    variances = [
        sum(
            np.vdot(part := x[:, g * columns :][:, :columns] @ w[g * out : (g + 1) * out].T, part) / len(x)
            for g in range(groups)
        )
        for w, x in own
    ]
    for g in range(groups):
        left, right, energy = [], [], 0.0
        for (w, x), variance in zip(own, variances, strict=True):
            scaled = x[:, g * columns :][:, :columns] / np.sqrt(len(x) * variance)
            left.append(scaled)
            right.append(scaled @ w[g * out : (g + 1) * out].T)
            energy += np.vdot(scaled, scaled) / columns
        pull = np.sqrt(RIDGE * energy)
        left.append(pull * np.eye(columns))
        right.append(pull * mean[g * out : (g + 1) * out].T)
        expected = np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=None)[0].T
        np.testing.assert_allclose(found[g * out : (g + 1) * out], expected, atol=1e-9)


def test_inputs_that_never_move_leave_the_mean() -> None:
    weights = arrays((2, 3), (2, 3))
    still = np.zeros((3, 3))
    found = shared(weights, "fit", [1, 1], [[still], [still]])
    np.testing.assert_allclose(found, (weights[0] + weights[1]) / 2)


def test_gradient_shares() -> None:
    weights = arrays((4, 3), (4, 3))
    assert gradient_shares(weights, "mean", [1, 3]) == [0.25] * 4
    kept, *rest = gradient_shares(weights, "freeze", [1, 2])
    assert kept == pytest.approx(freeze_share(weights[0], weights[1]))
    assert rest[0] == rest[1]
    assert kept + sum(rest) == pytest.approx(1)
