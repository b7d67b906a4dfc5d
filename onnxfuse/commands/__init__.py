"""Commands: what the command line does, as functions, a module each.

Each takes a model as a path, bytes, a ModelProto or a `Model`, and samples as a path or as arrays
(`Calibration.open` lists the kinds), and returns a record of `onnxfuse.results`; nothing is printed. Bad
input and models that ONNX Runtime can't run raise an `OnnxfuseError`; a run that failed its checks is a
result that is false. The face of the package, `onnxfuse/__init__.py`, names them all; `judge`, `turns` and
`loading` are what they share.

Stands above `report` and below `cli`.
"""
