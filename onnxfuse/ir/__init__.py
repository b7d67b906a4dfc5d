"""The model in memory: a graph that is loaded, edited, typed and written.

Import `Model` from `model`, `Node` and `Tensor` from `nodes`, `TensorInfo` from `shapes`; `marks` has the
notes that passes leave on nodes, `functions` models without local functions, `file_size` what a model takes
on disk. The other modules are the parts that `Model` is made of: the graph and its edits, protos, external
data, validation, shape inference, export and saving.

Stands above `numerics` and below `runtime`: nothing here opens a session.
"""
