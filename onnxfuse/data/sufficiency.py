"""Whether samples can prove anything: how many there are, and how many of them differ.

An error is measured on held-out samples, as a share of the output's spread from sample to sample. One sample
has no spread; a handful bounds the error of others badly: with n samples whose squared errors vary as much as
they are large, the root mean square is off by 1 / sqrt(2 n), twice that in one case of twenty. Samples that
are all equal are one sample, and one that was fitted as well is not held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxfuse.data.sample_checks import LABELS
from onnxfuse.errors import InputError
from onnxfuse.wording import counted

if TYPE_CHECKING:
    from onnxfuse.data.calibration import Calibration
    from onnxfuse.ir.shapes import TensorInfo

ENOUGH = 16
"""Samples on which a measured error is within about a third of that of others, in 19 cases of 20."""

_DUPLICATES = 0.1  # share of held-out samples that may be among the fitted ones


def doubts_of(calibration: Calibration, inputs: Sequence[TensorInfo], *, approximate: bool) -> list[str]:
    """What is to be said of samples that prove little, a line each; nothing of made-up ones.

    Args:
        calibration: the samples.
        inputs: of the model.
        approximate: whether something will be fitted to them, so that errors on held-out samples count.

    Raises:
        InputError: something will be fitted, and they can't prove anything about it.
    """
    if calibration.synthetic:
        return []
    held, total = calibration.held_out.samples, calibration.samples
    found = [_fed_as_input(info.name) for info in inputs if info.name in LABELS]
    if approximate and held == 1:
        raise InputError(f"1 of {total} samples is held out, which {_wanting(calibration)}")
    if 0 < (held or total) < ENOUGH:
        which = f"{held} of {total} samples are held out" if held else f"there are {counted(total, 'sample')}"
        found.append(f"FEW SAMPLES: {which}, which {_wanting(calibration)}")
    fitted = set(calibration.fit.digests(inputs))
    new = list(calibration.held_out.digests(inputs))
    if len(fitted.union(new)) == 1 and total > 1:
        said = f"all {total} samples are the same"
        if approximate and held:
            raise InputError(
                f"{said}: what is fitted to them can't be measured on others; give some that differ"
            )
        found.append(
            f"EQUAL SAMPLES: {said}, so the models were compared at one point; give some that differ"
        )
    elif held and (again := sum(digest in fitted for digest in new)) >= max(_DUPLICATES * held, 1):
        found.append(
            f"EQUAL SAMPLES: {again} of {held} held-out samples are among the fitted ones as well, so errors "
            "measured on them flatter; give every sample once"
        )
    return found


def _wanting(calibration: Calibration) -> str:
    """What so few samples can't do, and how many would."""
    held, total = calibration.held_out.samples, calibration.samples
    if not held:
        return f"bounds the error of others badly; {ENOUGH} would tell it within about a third"
    lacks = "has no spread to measure an error by" if held == 1 else "bound the error of others badly"
    wanted = math.ceil(ENOUGH * total / held)
    return f"{lacks}; {wanted} samples would hold out {ENOUGH}, which tell it within about a third"


def _fed_as_input(name: str) -> str:
    return (
        f"array '{name}' is fed to the model's input of that name, not taken for labels; if it holds labels, "
        f"the model is one that computes its own loss: export it without, or call the labels {_other(name)}"
    )


def _other(name: str) -> str:
    return next(f"'{label}'" for label in LABELS if label != name)
