"""How outs come from DVC's cache: as links, or as copies that take the disk twice."""

from pathlib import Path

from pipeline.runner import dvc_inside

LOCAL = "dvc config --local cache.type"
RELINK = "dvc checkout --relink"


def examine(root: Path) -> tuple[str, str, str]:
    """The state, what was found and the remedy, for a row of `python -m pipeline doctor`."""
    with dvc_inside.repository(root) as repo:
        kinds, working = dvc_inside.cache_links(repo)
    wanted, shown = kinds[0], ",".join(kinds)
    if wanted == "reflink" and wanted in working:
        return "ok", "outs are reflinks to DVC's cache: no disk taken twice, and they may be written to", ""
    if wanted in ("copy", "reflink"):
        why = "" if wanted == "copy" else ", where DVC takes copies for reflinks and there are none on this disk"
        best = "reflink,hardlink,symlink" if "reflink" in working else "hardlink,symlink"
        found = f"outs and DVC's cache take the disk twice: cache.type is {shown}{why}"
        return "warn", found, f"{LOCAL} {best} && {RELINK}"
    used = next((kind for kind in kinds if kind in working), "none")
    found = f"outs are {used}s to DVC's cache: no disk taken twice, and they are read-only"
    if "reflink" in working:
        found += f"; this disk has reflinks, which may be written to: `{LOCAL} reflink,{shown} && {RELINK}`"
    return "ok", found, ""
