"""Files of `bench_fuzz.py`: each is told by a seed and its number alone."""

from __future__ import annotations

from random import Random

import fuzz_damage  # noqa: F401 - enters what it defines
import fuzz_damage_stored  # noqa: F401
import onnx
from fuzz_drawing import BYTES, PARTS
from fuzz_seeds import seeds


def made(seed: int, number: int) -> tuple[str, bytes, list[str]]:
    """File `number`: the network it is made from, its bytes, its damages."""
    draw = Random(f"{seed}/{number}")
    nets = seeds()
    net = draw.choices(list(nets), [weight for _, weight in nets.values()])[0]
    data, damages = _damaged(nets[net][0], draw)
    return net, data, damages


def _damaged(seed: bytes, draw: Random) -> tuple[bytes, list[str]]:
    """A file made from a seed, and the names of the damages: mostly one, up to four.

    Those to bytes come last: what they leave can't be parsed as a rule.
    """
    count = draw.choices((1, 2, 3, 4), (12, 4, 2, 1))[0]
    names = [draw.choice(tuple(PARTS)) for _ in range(count)]
    if draw.random() < 0.2:
        names[-1] = draw.choice(tuple(BYTES))
    proto = onnx.load_from_string(seed)
    parts = [name for name in names if name in PARTS]
    for name in parts:
        PARTS[name](proto, draw)
    data = bytearray(proto.SerializeToString() if parts else seed)
    for name in names:
        if name in BYTES:
            BYTES[name](data, draw)
    return bytes(data), names
