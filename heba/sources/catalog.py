"""catalog.yaml: what each real benchmark consists of, validated."""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from heba.data.strict_yaml import read_yaml

CATALOG = Path(__file__).with_name("catalog.yaml")
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class File(_Strict):
    """A file of the network. `url` is null where only the user can get it, `mirrors` are further URLs of the same
    bytes; of the checksums those that are published. `inner` names an archive that holds the images, should there
    be one in this one. `size` in bytes may be rough, 0 if unknown; a server that sends more than
    `heba.sources.unpack.most_bytes` of it is refused."""

    file: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    url: str | None
    mirrors: Annotated[tuple[str, ...], Field(strict=False)] = ()
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    git_sha1: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    size: Count = 0
    inner: str | None = None

    @property
    def has_checksum(self) -> bool:
        return bool(self.sha256 or self.md5 or self.git_sha1)


class Counts(_Strict):
    train: Count
    val: Count
    test: Count


class Benchmark(_Strict):
    """One data set.

    Attributes:
        layout: how the split is found: `coop` (a split file), `fgvc` (its own lists), `imagenet`, or the test sets
            of domain generalisation with folders named by `wnid` or by the `index` of a wnid.
        counts: images of the split, all classes.
        terms: licence or conditions, and where they are; `account` says how to get files that have no URL.
        sources: alternatives in order of preference, each a complete list of archives.
        split: CoOp's split file. descriptions: the class descriptions, as the official code ships them.
    """

    layout: Literal["coop", "fgvc", "imagenet", "wnid", "index"]
    classes: Annotated[int, Field(ge=2)]
    counts: Counts
    terms: str
    account: str | None = None
    sources: Annotated[list[Annotated[list[File], Field(min_length=1)]], Field(min_length=1)]
    split: File | None = None
    descriptions: File

    @model_validator(mode="after")
    def _split_and_checksums(self) -> "Benchmark":
        if (self.layout == "coop") != (self.split is not None):
            raise ValueError(f"layout {self.layout} does not go with this split: coop needs one, others have none")
        for file in (self.descriptions, self.split):
            # An archive without a checksum is judged by its images; nothing judges these.
            if file and not file.has_checksum:
                raise ValueError(f"{file.file} needs a checksum")
        return self


@cache
def load_catalog(path: Path = CATALOG) -> dict[str, Benchmark]:
    """Read and validate a catalogue; ValueError lists all that is wrong with it."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a catalogue maps data set names to their description")
    found, problems = {}, []
    for name, entry in raw.items():
        try:
            found[str(name)] = Benchmark.model_validate(entry)
        except ValidationError as error:
            problems += [f"  {name}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if problems:
        raise ValueError(f"{path}:\n" + "\n".join(problems))
    return found
