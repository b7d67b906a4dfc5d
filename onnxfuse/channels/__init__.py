"""Coupled channels: which indices of which weights only make sense together, and taking some of them.

A channel of a network lies in many places at once: a row of one weight, columns of others, an entry of a
bias, a number in a Reshape. `find_groups` finds these equivalence classes over (tensor, axis, block) by a
rule for each operator; a `Group` says what a cut would touch before anything is cut. `take` keeps some
indices of some groups, on every axis they lie on; with repetitions it grows a network. `mask` is what a cut
must equal. Beside these names, `moments_seen` gathers what consumers see, `importance` scores channels,
`budget` and `timing` choose widths, `aligning` permutes, `consumers` reads the operators behind a group.

Stands above `pipeline` and below `fitting`.
"""

from onnxfuse.channels.edits import Edits, take
from onnxfuse.channels.groups import ChannelGroups, Choice, Group, Touch, find_groups
from onnxfuse.channels.masking import mask

__all__ = ["ChannelGroups", "Choice", "Edits", "Group", "Touch", "find_groups", "mask", "take"]
