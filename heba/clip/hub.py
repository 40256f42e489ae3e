"""Files of the Hugging Face hub. We ask it once, with a deadline; its own client retries for minutes."""

import threading
from concurrent.futures import Future
from pathlib import Path

DEADLINE = 10.0  # seconds for the hub to say what it has; looking up its address alone knows no timeout


class HubError(ValueError):
    """A file that cannot be had; the message says why, and where a browser finds it."""


def fetch(repo: str, names: list[str]) -> Path:
    """The first of the files `names` that the repository `repo` has: from the hub's cache, without a network, or
    downloaded into it. HubError when none can be had."""
    from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

    for name in names:
        if isinstance(cached := try_to_load_from_cache(repo, name), str):
            return Path(cached)
    try:
        return Path(hf_hub_download(repo, _ask(repo, names)))
    except Exception as error:  # whatever its client raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        others = f", or {', '.join(names[1:])} there" if names[1:] else ""
        raise HubError(
            f"not in the cache, nor to be had from {hf_hub_url(repo, names[0])}{others} ({reason})"
        ) from None


def _ask(repo: str, names: list[str]) -> str:
    """The first of `names` that the hub has; an exception of its client, or TimeoutError."""
    found: Future[str] = Future()

    def ask() -> None:
        try:
            found.set_result(_first(repo, names))
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.result(DEADLINE)
    except TimeoutError:
        raise TimeoutError(f"no answer within {DEADLINE:.0f} s") from None


def _first(repo: str, names: list[str]) -> str:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            get_hf_file_metadata(hf_hub_url(repo, name), timeout=DEADLINE)
            return name
        except EntryNotFoundError:
            continue
    raise ValueError(f"{repo} has none of these")
