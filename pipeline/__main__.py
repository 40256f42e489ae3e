import sys

from pipeline.runner.warm import run_in_server

code = run_in_server()
if code is not None:
    sys.exit(code)

# Not above: it takes longer to import than a command of the server takes to start.
try:
    from pipeline.commands.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"error: the package {error.name} is missing; pip install -c constraints.txt -e .")

main()
