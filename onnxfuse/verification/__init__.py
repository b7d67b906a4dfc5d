"""Two models side by side: whether they compute the same, how far they are apart, and how good each is.

`compare` is the judge, with tolerances measured in noise floors (`noise`); `interface` compares without a
run, `divergence` finds the first tensor that differs, `predictions` holds a pass to its claims, `metrics`
scores outputs against labels. `records` has what they return, `tally` the sums behind it.

Stands above `data` and below `pipeline`: it judges models, and does not know what a pass is.
"""
