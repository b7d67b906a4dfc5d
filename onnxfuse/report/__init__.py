"""Reports for people: a view for each command, on the console and in files.

A view turns a record of `onnxfuse.results` into the parts in `tables`; `files` writes `--report` folders,
`plots` draws, `live` shows progress. Import the view of a command from its module.

Stands above `onnxfuse.results` and below `onnxfuse.commands`.
"""
