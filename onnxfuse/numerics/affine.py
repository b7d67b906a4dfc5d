"""An affine map y = W x + b as its numbers, and the type that numerics compute in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """y = W x + b, with weight (dy, dx / groups) and bias (dy,), float64.

    With groups, outputs [g dy/groups, (g+1) dy/groups) see inputs [g dx/groups, (g+1) dx/groups) only.
    """

    weight: Array
    bias: Array

    def __call__(self, x: npt.ArrayLike, groups: int = 1) -> Array:
        """Apply to rows x (n, dx); returns (n, dy)."""
        rows = np.asarray(x, dtype=np.float64)
        stack = self.weight.reshape(groups, -1, self.weight.shape[1])
        out = np.einsum("ngp,gqp->ngq", rows.reshape(len(rows), groups, -1), stack, optimize=True)
        return out.reshape(len(rows), -1) + self.bias
