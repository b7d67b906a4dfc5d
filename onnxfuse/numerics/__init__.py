"""Numbers without graphs: arrays in, arrays out.

Nothing here knows of ONNX, sessions or passes; it imports NumPy, SciPy and `onnxfuse.errors` alone.
"""
