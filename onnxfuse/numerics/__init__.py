"""Numbers without graphs: arrays in, arrays out.

Second moments and the regressions that they give (`moments`, `ridge`, `affine`), matrices as products
(`low_rank`), k-means and agglomeration, distances of weight matrices (`similarity`, `weight_sharing`), rows
sampled from tensors (`sampling`), the arithmetic of windows (`receptive_field`, `composition`), random
weights and significance. Every module may be imported by itself.

The lowest floor but for errors and records: it imports NumPy, SciPy and `onnxfuse.errors`, and knows nothing
of ONNX, sessions or passes.
"""
