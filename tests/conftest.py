"""One thread of torch per test process and per process that a test starts, unless the test says otherwise: several
workers with several threads each would wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch
