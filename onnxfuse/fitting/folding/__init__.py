"""Exact simplifications of a graph: the rules of the pass `fold`, and what they see and edit it by.

A rule looks at one node of a `Workspace` and decides: an `Edit` to be made, a `Skip` with the reason against
it, or None. `no_ops` takes out what does nothing, `affine` moves scales and shifts into linear operators,
`pairs` joins linear operators.
"""
