"""Copy the part of the oracle that every clone checks: `python tests/oracle/make_subset.py FULL_ORACLE`."""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

KEEP = {
    "forward": ["a.equal.scale0.3", "a.ragged.scale0.3"],
    "grad": ["negatives"],
    "trajectory": ["fewer_classes_than_batch"],
}


def main(full: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for kind, cases in KEEP.items():
        info = json.loads((full / f"{kind}.json").read_text())
        dropped = [case for case in info["cases"] if case not in cases]
        info["cases"] = {case: info["cases"][case] for case in cases}
        info.pop("truncation", None)
        tensors = load_file(full / f"{kind}.safetensors")
        unused = ["clip2.", "adapter.c", "plain.", "debug.", "images.clip2", "tokens.clip2"]
        prefixes = [f"expected.{case}." for case in dropped] + [f"{case}." for case in dropped] + unused
        kept = {k: v for k, v in tensors.items() if not k.startswith(tuple(prefixes))}
        save_file(kept, out / f"{kind}.safetensors")
        (out / f"{kind}.json").write_text(json.dumps(info, indent=1) + "\n")
    for name in ("init.json", "fewshot.json"):
        info = json.loads((full / name).read_text())
        if name == "fewshot.json":
            info["fewshot"] = {}
        (out / name).write_text(json.dumps(info, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "data")
