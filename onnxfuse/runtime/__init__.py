"""ONNX Runtime: models run, timed, and asked for what only a run shows.

Import `Runtime` and `Session` from `session`; `observe` runs a model over batches with inner tensors tapped,
`spool` keeps tensors of many batches, `memory` is the budget that all of these keep to, `latency` times
models side by side, `observed_shapes` gives the shapes at a feed's sizes (from `static_shapes` without a run,
where they follow), `versions` says whether a model is too new. What these share is in `providers`,
`handover`, `feeds`, `narrow`, `failures` and `onnx_runtime`, the only module that imports ONNX Runtime.

Stands above `ir` and below `ops`: it knows models, and nothing of what their operators mean.
"""
