"""Regions of a graph that one affine operator can stand for.

`search.find_regions` is the way in, `region` the record that it gives, `check.check_geometry` the proof by a
run. `view` has the flows by which a tensor hangs on the region's input, `facts` what rules may ask of the
graph, `rules` the table of the rules in `linear_rules` and `shape_rules`, and `growing` grows one region over
the `indexed_graph`.

Stands within `analysis`, above `ops`.
"""
