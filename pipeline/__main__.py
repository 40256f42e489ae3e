import sys

from pipeline.runner import warm


def main() -> None:
    # Not above: it takes longer to import than a command of the server takes to start.
    try:
        from pipeline.commands import cli
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is missing; pip install -c constraints.txt -e '.[pipeline]'")
    cli.main()


if sys.argv[1:2] == [warm.SERVE]:
    warm.serve(sys.argv[2], main)
    sys.exit()
code = warm.run_in_server()
if code is not None:
    sys.exit(code)
main()
