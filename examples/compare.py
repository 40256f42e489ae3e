"""Compare two methods on a folder of images per class: the same images to train and to test, over three seeds.

python examples/compare.py photos/ zero_shot gda
"""

import sys
from statistics import mean

import heba

SEEDS = (1, 2, 3)


def main(photos: str, *methods: str) -> None:
    scores = {}
    for method in methods:
        # The seed draws the training images; the test images are always the same.
        scores[method] = [heba.adapt(photos, method, shots=4, seed=seed).accuracy for seed in SEEDS]
        print(f"{method:>16}  {mean(scores[method]):5.1f} %  {scores[method]}")
    best, *others = sorted(methods, key=lambda method: -mean(scores[method]))
    close = [m for m in others if any(a <= b for a, b in zip(scores[best], scores[m], strict=True))]
    print(f"{best} is best" + (f", but not on every seed: {', '.join(close)}" if close else " on every seed"))


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
