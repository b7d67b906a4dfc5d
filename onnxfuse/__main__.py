"""`python -m onnxfuse`: the command line."""

import sys

from onnxfuse.cli.app import main

sys.exit(main())
