"""`python -m pipeline.runner.safe_dvc ...`: DVC's command line; dvc.lock and its rwlock are written as a whole."""

import signal
import sys

from dvc.cli import main

from pipeline.runner.dvc_files import parse_once, replace_files_whole, write_entries_alone

if __name__ == "__main__":
    # In the background of a script ctrl-C is ignored, and what starts there inherits that; we interrupt DVC by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    replace_files_whole()
    write_entries_alone()
    parse_once()
    sys.exit(main(sys.argv[1:]))
