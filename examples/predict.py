"""Name what is in a picture, with an adapter or with CLIP alone.

python examples/predict.py photo.jpg adapter/
python examples/predict.py photo.jpg cat dog
"""

import sys
from pathlib import Path

import heba


def main(image: str, *words: str) -> None:
    """`words`: the folder of an adapter, or the names to choose from."""
    if len(words) == 1 and Path(words[0]).is_dir():
        classifier = heba.load(words[0])
    else:
        # For photographs: heba.zero_shot("ViT-B-16-quickgelu", "openai", words)
        classifier = heba.zero_shot("tiny", "embedded", words)
    for prediction in classifier.predict(image, top=3):
        if prediction.error:
            sys.exit(prediction.error)
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            print(f"{probability:6.1%}  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
