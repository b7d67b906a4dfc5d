"""Operators: one table of what each one is, and how an analysis sees a node.

`table` has a row for each operator that any part of onnxfuse knows; it imports nothing. `facet` holds the
rules of one analysis, under the same keys, (domain, name), with what it takes from a row where there is no
rule; the rules themselves stay beside their analysis. `view` is the base of the wrappers in which rules see a
node. `linear` and its neighbors read, write and build operators y = W x + b, `channel_affine` reads those
that scale and shift channels, `coverage` records what the analyses know.

Stands above `runtime` and below `analysis`.
"""
