"""The bridge: an ONNX model as a torch.fx GraphModule that trains, and the weights back into its graph.

From the bottom: `operator`, `tensors`, `keys`; `values` (what flows through an import, and the `Call` that a
rule sees); `registry`, `operands`, `hostmath`; `rules`, a module for each family of operators; `weights`,
`store`, `scopes`; `importer` (`to_torch`) and `writeback` (`from_torch`). Users take their names from
`onnxfuse.pytorch`, training from these modules. The bridge knows nothing of training.
"""
