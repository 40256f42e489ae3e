"""docs/tutorial.md, block by block, as a reader does it in a fresh clone."""

import json
import re
import sys

import yaml

from heba.data.splits import read_split
from tests.pipeline.repository import ROOT, call

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    return BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))


def reduce(params):
    """Less of everything that takes time, after the reader's own entries."""
    params["seeds"] = [1]
    params["methods"] = ["zero_shot", "heba"]
    params["heba"] |= {"epochs": 1, "neg_ratio": 1}


def test_every_block_of_the_tutorial_runs(tmp_path):
    clone = tmp_path / "clone"
    assert call(tmp_path, "git", "clone", "-q", str(ROOT), str(clone)).returncode == 0
    kinds = [kind for kind, _ in blocks()]
    assert set(kinds) == {"python", "yaml", "sh"}
    params = clone / "params.yaml"
    output = ""
    for kind, text in blocks():
        if kind == "yaml":
            changed = yaml.safe_load(params.read_text(encoding="utf-8")) | yaml.safe_load(text)
            reduce(changed)
            params.write_text(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True), encoding="utf-8")
            continue
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-e", "-c", text]
        done = call(clone, *command)
        assert done.returncode == 0, text + done.stdout + done.stderr
        output = done.stdout
    assert list(changed["own"]) == ["digits"]
    assert changed["datasets"] == []
    averages = json.loads((clone / "reports" / "averages.json").read_text())
    assert {method: set(of) for method, of in averages["few_shot"]["digits"].items()} == {
        "zero_shot": {"16"},
        "heba": {"16"},
    }
    # The image of the last step is one that nothing was trained on, and the prediction names one of the classes.
    split = read_split(clone / "data" / "own" / "digits" / "split.json")
    predicted = re.search(r"photos/digits/(\S+\.png)", blocks()[-1][1])
    assert predicted[1] in [path for path, _, _ in split["test"]]
    assert any(name in output for _, _, name in split["test"])
