"""`python -m skrr_engine`: see cli.py."""

import contextlib
import os
import sys

from .cli.parser import main

if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # A process of a torchrun leaves at once: gloo's threads may let go of a tensor only now, and doing that in an
        # interpreter that is shutting down aborts the process (pytorch/pytorch, pull request 179291).
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
