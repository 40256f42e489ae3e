import sys

from pipeline.runner import warm


def main() -> None:
    try:
        from pipeline.commands import cli  # not above: it takes longer than a command of the server takes to start

        cli.main()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "heba", "pipeline"):
            raise
        sys.exit(f"error: the package {error.name} is missing; pip install -c constraints.txt -e '.[pipeline]'")


if sys.argv[1:2] == [warm.SERVE]:
    warm.serve(sys.argv[2], main)
    sys.exit()
code = warm.run_in_server()
if code is not None:
    sys.exit(code)
main()
