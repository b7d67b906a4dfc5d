"""Passes: what they promise, how they are found, chosen and run.

Authors of passes import from `base` (the face, `onnxfuse`, has the same names), and from `choosing` and
`goals` for options that all passes spell alike. `recipe` reads which passes run, `discovery` and `catalog`
find the installed ones, `manager` runs them and holds them to their contracts, `instruments` watch it,
`schedule` takes turns with training.

Stands above `verification` and below `channels`: it runs passes, and imports none.
"""
