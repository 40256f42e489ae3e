"""Adapt CLIP to a folder with a folder of images per class, and use the result.

python examples/adapt.py photos/ adapter/
"""

import sys

import heba


def main(photos: str, out: str) -> None:
    # For photographs: backbone="ViT-B-16-quickgelu", pretrained="openai"
    found = heba.adapt(photos, method="heba", shots=16, settings={"epochs": 8, "scale": 0.1}, out=out)
    low, high = found.interval
    print(f"{found.accuracy:.1f} % of {found.n_test} test images, between {low:.1f} and {high:.1f} %")
    for name, row in zip(found.classes, found.confusion, strict=True):
        print(f"{name:>16} {row}")

    classifier = heba.load(out)  # in another process, on another day
    print(f"{out} knows {', '.join(classifier.classes)}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
