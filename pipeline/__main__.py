import sys

from pipeline.warm import run_in_server

code = run_in_server()
if code is not None:
    sys.exit(code)

# Not above: it takes longer to import than a command of the server takes to start.
from pipeline.cli import main  # noqa: E402

main()
