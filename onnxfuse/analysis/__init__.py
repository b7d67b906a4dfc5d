"""Facts about a model that follow from its graph and weights; nothing is fitted, and no sample is needed.

Each module answers one question: what it costs (`cost`), what is constant (`constant_folding`), what does
nothing (`noops`), which layers, residual blocks and normalizations there are (`layers`, `residual_blocks`,
`normalization`), which weights serve alike (`weight_layers`, `attention_roles`, `layer_similarity`), how two
graphs differ (`structural_diff`). `intervals` bounds every tensor, `regions` finds what one affine operator
can replace. Every module may be imported by itself.

Stands above `ops` and below `data`.
"""
