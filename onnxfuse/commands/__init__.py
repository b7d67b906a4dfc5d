"""Commands: what the command line does, as functions, a module each."""
