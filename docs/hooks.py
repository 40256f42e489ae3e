"""What `mkdocs build` needs besides the pages: a section for each method, and docstrings as written here."""

import re
from typing import Any

import griffe
import yaml

from heba import methods


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """settings.md, with a section for each method: its docstring and its defaults."""
    if page.file.src_uri != "settings.md":
        return markdown
    return "\n\n".join([markdown, *map(_section, methods.names())])


def _section(name: str) -> str:
    about = methods.part(name, "settings")
    defaults = yaml.safe_dump({name: about.Settings().model_dump()}, sort_keys=False)
    documented = f"::: heba.methods.{name}.settings.Settings\n    options: {{show_root_heading: false}}"
    return f"## {about.TITLE}\n\n{documented}\n\n```yaml\n{defaults}```"


class Sections(griffe.Extension):
    """Sections of docstrings as lists. A line of theirs may be about several names, which griffe takes for one."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^(Args|Attributes|Raises|Returns):$", r"\n**\1**\n", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"^    (\S[^:\n]*): ", r"- `\1`: ", text, flags=re.M)
