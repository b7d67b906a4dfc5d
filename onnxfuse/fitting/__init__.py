"""Rewritten networks fitted to the original, and the choice of what to rewrite and how far to go.

`walk` re-solves the operators of one network against another (`sites`, `frontier`), `local_fits` fits regions
from one run. `rewriting` has the steps that passes share, `search` how far the error bound allows, `trials`
what candidates do to the outputs; `compensating`, `factoring`,
`paired_rows` and `folding` are the methods of single passes.

Stands above `channels` and below `growth`.
"""
