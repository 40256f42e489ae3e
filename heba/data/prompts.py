"""Class descriptions to prompts to tokens (paper section 3; descriptions after CuPL)."""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch takes seconds to import, and only `tokenize` meets its tensors
    from torch import Tensor

TEMPLATE = "a photo of a {}."
TEMPLATE_PATTERN = r"^[^{}]*\{\}[^{}]*$"  # one {} for the class name, and no other brace
DESCRIPTION_TEMPLATE = "a photo of a {}, {}"

# The prompts of a class: the data set's template; an ensemble of templates; the descriptions; or the ensemble and
# the descriptions, every text with the same weight (CuPL).
Kind = Literal["template", "ensemble", "descriptions", "both"]
PARTS = ("template", "ensemble", "descriptions")
KINDS: dict[Kind, tuple[str, ...]] = {
    "template": ("template",),
    "ensemble": ("ensemble",),
    "descriptions": ("descriptions",),
    "both": ("ensemble", "descriptions"),
}


@dataclass(frozen=True)
class Prompts:
    """All prompts of a data set, class by class.

    Attributes:
        texts: the prompts.
        class_index: the class of every prompt, ascending.
        fallback: names of the classes that had no description and use the data set's template.
    """

    texts: list[str]
    class_index: list[int]
    fallback: list[str]


def spoken_class_name(name: str) -> str:
    """A class name as prompts have it, with spaces for underscores."""
    # macOS may name a folder with accents apart from their letters (NFD); what people type has them in one (NFC).
    return unicodedata.normalize("NFC", name.replace("_", " "))


def normalise_class_name(name: str) -> str:
    """A class name as prompts have it, in lower case: the key under which descriptions are filed."""
    return spoken_class_name(name).lower()


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """Read {class name: [description, ...]} from JSON; ValueError names the file and the key."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable descriptions file: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected an object that maps class names to lists of descriptions")
    for name, texts in raw.items():
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{path}: class {name!r}: expected a list of non-empty strings")
    return raw


def build_prompts(class_names: list[str], descriptions: dict[str, list[str]], template: str) -> Prompts:
    """ "a photo of a {class}, {description}" for every description of every class; `template`, which fits
    TEMPLATE_PATTERN, for a class without any.

    Raises ValueError for another template, and when not one class has a description although descriptions were
    given: the file then belongs to another data set (the official code goes on without a word).
    """
    _check_template(template)
    by_name = {normalise_class_name(name): texts for name, texts in descriptions.items()}
    texts: list[str] = []
    class_index: list[int] = []
    fallback: list[str] = []
    for i, name in enumerate(class_names):
        spoken = spoken_class_name(name)
        own = [DESCRIPTION_TEMPLATE.format(spoken, d) for d in by_name.get(normalise_class_name(name), [])]
        if not own:
            fallback.append(name)
            own = [template.format(spoken)]
        texts += own
        class_index += [i] * len(own)
    if descriptions and len(fallback) == len(class_names):
        raise ValueError(
            f"none of the {len(class_names)} classes has a description; the descriptions name "
            f"{', '.join(sorted(by_name)[:3])} ..., the classes are {', '.join(class_names[:3])} ..."
        )
    return Prompts(texts, class_index, fallback)


def _check_template(template: str) -> None:
    if not re.search(TEMPLATE_PATTERN, template):
        raise ValueError(f"a template needs one {{}} for the class name, and no other brace, got {template!r}")


def template_prompts(class_names: list[str], templates: list[str]) -> Prompts:
    """Every template with every class name, class by class; a template fits TEMPLATE_PATTERN."""
    for template in templates:
        _check_template(template)
    texts = [t.format(spoken_class_name(name)) for name in class_names for t in templates]
    return Prompts(texts, [i for i in range(len(class_names)) for _ in templates], [])


def all_prompts(
    class_names: list[str], descriptions: dict[str, list[str]], template: str, ensemble: list[str]
) -> dict[str, Prompts]:
    """The prompts of each of PARTS."""
    return {
        "template": template_prompts(class_names, [template]),
        "ensemble": template_prompts(class_names, ensemble),
        "descriptions": build_prompts(class_names, descriptions, template),
    }


def prompts_of(kind: Kind, parts: dict[str, Prompts]) -> Prompts:
    """The prompts of a kind, class by class, of the `parts` of `all_prompts`."""
    chosen = [parts[name] for name in KINDS[kind]]
    pairs = [pair for part in chosen for pair in zip(part.class_index, part.texts, strict=True)]
    pairs.sort(key=lambda pair: pair[0])
    fallback = [name for part in chosen for name in part.fallback]
    return Prompts([text for _, text in pairs], [i for i, _ in pairs], fallback)


def tokenize(texts: list[str], tokenizer: Any) -> "tuple[Tensor, list[str]]":
    """Tokens [n, context_length] of `texts`, and those texts that had to be cut to fit.

    `tokenizer` is one of open_clip's: its own, which puts EOT last, or its wrapper of one of Hugging Face.
    """
    tokens = tokenizer(texts)
    context = tokens.shape[1]
    if hasattr(tokenizer, "tokenizer"):
        whole = tokenizer.tokenizer([tokenizer.clean_fn(text) for text in texts]).input_ids
        return tokens, [text for text, ids in zip(texts, whole, strict=True) if len(ids) > context]
    # A text of exactly the context length is not cut, so only the candidates are encoded again to count.
    full = (tokens.argmax(dim=-1) == context - 1).nonzero().flatten().tolist()
    return tokens, [texts[i] for i in full if len(tokenizer.encode(texts[i])) + 2 > context]
