"""The methods that are compared, a folder each, found by its name.

settings.py   what the pipeline must know without running the method; imports no torch
    class Settings(BaseModel)     its block in params.yaml; `prompts` among them says what names a class
    TITLE                         its name in tables
    FAMILY                        what it does to CLIP, a word of FAMILIES; figures colour methods by it
    READS                         "features": frozen image features, in training too (`LabelledImages.views`);
                                  "pixels": images through the towers
    NEW_CLASSES                   whether it classifies classes that it was not trained on
    DRAWS                         whether its results depend on the seed
    EVALUATION                    settings that change no training, only what is made of it
    problems(settings, depth, width)      what does not fit together, or not the backbone
    work(settings, n_images, n_classes)   what a training costs
method.py     the method; its docstring has the equations
    build(clip, n_classes, settings, seed) -> nn.Module       the model, on the device of `clip`
    trained(model) -> nn.Module                               what of it is trained and saved; never CLIP itself
    fit(model, train, val, classes, settings, run) -> dict    train it in place; gives what it chose on `val`
    classifier(model, classes, settings, trained) -> tensors  what is kept of some class names
    logits(model, classifier, images) -> Tensor [n, classes]  images to logits
    detach(model)                                             leave CLIP as it was
    A model has encode_image (preprocessed images to features) and encode_text (tokens to features) where a tower
    is not the frozen one; their operations are counted.
    Models of several seeds may be on one CLIP at once. One that leaves the first blocks of the image tower as they
    are goes on from `images.after_blocks(clip, n)`, which is computed once for all of them.
ablations.py    where it has ablations
convert.py      where it has official checkpoints, which `heba.fit.official` reads
    fits(tensors) -> bool                                     whether those of a checkpoint are its own
    from_official(checkpoint, given) -> (tensors, settings)   ours of a checkpoint, with `given` settings
    texts_of(model, classes, settings) -> Texts | None        of which a checkpoint keeps embeddings
    to_official(tensors, settings, shots, run, source) -> Path    the checkpoint written under the folder `run`
"""

import pkgutil
from importlib import import_module
from types import ModuleType

FAMILIES = {
    "frozen": "CLIP as it is, with words alone",
    "cache": "similarity to stored features of the training images",
    "linear": "a linear classifier on frozen image features",
    "adapter": "a module or matrix after the towers, on their features",
    "tower": "modules or low-rank updates in the blocks of the towers",
    "prompt": "learned tokens in the text or image input",
}


def names() -> list[str]:
    """All methods, by name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def has_part(name: str, what: str) -> bool:
    """Whether a method has the module `what`."""
    return what in [module.name for module in pkgutil.iter_modules([f"{path}/{name}" for path in __path__])]


def part(name: str, what: str) -> ModuleType:
    """The module `what` ("settings", "method", "ablations" or "convert") of a method; ValueError for a method that
    does not exist or has no such part."""
    if name not in names():
        raise ValueError(f"there is no method {name!r}; known are {', '.join(names())}")
    if not has_part(name, what):
        raise ValueError(f"the method {name} has no {what}")
    return import_module(f"heba.methods.{name}.{what}")
