import sys

from pipeline.runner import lifetime, warm


def main() -> None:
    try:
        from pipeline.commands import cli  # not above: it takes longer than a command of the server takes to start

        cli.main()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "heba", "pipeline"):
            raise
        sys.exit(f"error: the package {error.name} is missing; pip install -c constraints.txt -e '.[pipeline]'")


if sys.argv[1:2] == [lifetime.SERVE]:
    address, *numbers = sys.argv[2:]
    listener, number, start = map(int, numbers)
    warm.serve(address, listener, lifetime.Process(number, start), main)
    sys.exit()
code = warm.run_in_server()
if code is not None:
    sys.exit(code)
main()
