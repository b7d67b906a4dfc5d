"""Interval analysis: bounds of every tensor that hold whatever is fed.

`rules.intervals` is the way in, and its module says what is claimed. `interval` has the values, `rounding`
the steps that keep them true in floating point, `node` what a rule sees; the rules are in
`elementwise_rules`, `linear_rules` and `shape_rules`.

Stands within `analysis`, above `ops`.
"""
