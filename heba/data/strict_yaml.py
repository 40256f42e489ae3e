"""Read YAML files from outside, guarding against repeated keys and exploding aliases."""

from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 100_000  # of a file, its aliases written out
MOST_DIGITS = 1000  # of a number; Python refuses to print longer ones


def read_yaml(path: Path) -> Any:
    """What the file holds, of the types of `yaml.safe_load`.

    Raises ValueError, which names the file and lists the problems: it cannot be read; it is not YAML; a key is
    there twice; a value contains itself; there are more than MOST_VALUES values, aliases written out; a number has
    more than MOST_DIGITS digits.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return None
        problems = _problems(root)
        if not problems:
            return loader.construct_document(root)
    # PyYAML lets through what goes wrong with an explicit tag, such as !!int "".
    except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    raise ValueError("\n".join([f"{path} cannot be read:", *(f"  {problem}" for problem in problems)]))


def _problems(root: yaml.Node) -> list[str]:
    """What is wrong with a file that was parsed and not built yet, so that an alias is still one node."""
    problems: list[str] = []
    sizes: dict[int, int | None] = {}  # values in a node by its id; None: not counted to the end

    def size_of(node: yaml.Node, key: str) -> int:
        line = node.start_mark.line + 1
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                problems.append(f"{key}: contains itself, by an alias to line {line}")
            return known or 0
        sizes[id(node)] = None
        size = 1
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for name, value in node.value:
                inner = f"{key}.{name.value}" if key else str(name.value)
                at = name.start_mark.line + 1
                if isinstance(name, yaml.ScalarNode):
                    first = lines.get((name.tag, name.value))
                    if first:
                        problems.append(f"{inner}: there twice, in lines {first} and {at}")
                    lines[name.tag, name.value] = at
                size += size_of(name, inner) + size_of(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(size_of(value, f"{key}.{i}") for i, value in enumerate(node.value))
        elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
            problems.append(f"{key}: a number of more than {MOST_DIGITS} digits")
        if size > MOST_VALUES:
            problems.append(f"{key or 'the file'}: more than {MOST_VALUES} values, with the aliases written out")
            size = 0  # told once
        sizes[id(node)] = size
        return size

    size_of(root, "")
    return problems
