"""What operators are: one table of them, and how an analysis sees a node.

`table` has a row for each operator that any part of onnxfuse knows; it imports nothing. `facet` holds the
rules of one analysis, under the same keys, (domain, name), with what it takes from a row where there is no
rule; the rules themselves stay beside their analysis. `view` is the base of the wrappers in which rules see a
node.
"""
