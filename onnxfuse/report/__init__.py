"""Reports for people: a view a command, on the console and in files. Reads the records of `onnxfuse.results`,
and stands below `onnxfuse.commands`.
"""
