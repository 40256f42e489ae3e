"""`python -m benchmarks.gpu`, tried on a CPU."""

import json

import pytest

from benchmarks import gpu, kernels


def test_a_part_writes_as_it_goes_and_names_what_fails(tmp_path):
    part = gpu.Part(tmp_path, "graphs", "cpu", tiny=True)

    def fail():
        assert json.loads(part.path.read_text()) == [{"a": 1, "ok": True}]
        raise ValueError("no room\nleft")

    part.attempt(lambda: {"ok": True}, a=1)
    part.attempt(fail, a=2)
    assert json.loads(part.path.read_text())[1] == {"a": 2, "ok": False, "error": "no room left"}
    gpu.page(tmp_path, {"graphs": "cut off after 3 s"}, "cpu")
    text = (tmp_path / "README.md").read_text()
    assert "CUDA graphs against eager steps" in text
    assert "cut off after 3 s" in text
    assert "| no room left |" in text


def test_losses_that_differ_are_told(tmp_path):
    assert gpu.compared([1.0, 2.0], [1.0, 2.0001], "fp32")["ok"]
    assert not gpu.compared([1.0, 2.0], [1.0, 2.001], "fp32")["ok"]
    part = gpu.Part(tmp_path, "steps", "cpu", tiny=True)
    gpu.steps(part)
    assert [(row["method"], row["ok"]) for row in part.rows] == [("heba", True), ("coop", True)]
    assert all(0 < row["relative"] < 0.05 for row in part.rows)


def test_a_part_that_takes_too_long_ends_and_the_others_go_on(tmp_path, capsys):
    gpu.main(tmp_path, minutes=0.02, parts="graphs,evaluation", device="cpu", tiny=True)
    text = (tmp_path / "README.md").read_text()
    assert "cut off after 0 s" in text
    assert "## evaluation" in text


@pytest.mark.slow
def test_all_parts(tmp_path, capsys):
    gpu.main(tmp_path, minutes=30, device="cpu", tiny=True)
    for name in gpu.PARTS:
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        assert rows
        assert not [row for row in rows if row.get("ok") is False], name
    assert "failed" not in (tmp_path / "README.md").read_text().replace("| failed", "")


def test_kernels_are_counted():
    found = kernels.count_all("tiny", images=2, classes=3, test=2)
    for counts in found.values():
        assert counts["kernels"] > 100
        assert counts["TFLOP"] > 0
        assert counts["index_put"] == 0
