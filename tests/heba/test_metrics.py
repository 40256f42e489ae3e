"""The harmonic mean, and that it comes without torch."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from heba.evaluation.metrics import harmonic_mean


@given(st.floats(0, 100), st.floats(0, 100))
def test_harmonic_mean_lies_between_and_below_the_mean(a, b):
    h = harmonic_mean(a, b)
    assert h == harmonic_mean(b, a)
    assert min(a, b) - 1e-9 <= h <= (a + b) / 2 + 1e-9


def test_the_report_needs_no_torch():
    code = "import sys, pipeline.report.render; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
