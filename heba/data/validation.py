"""What pydantic refuses, in words."""

from pydantic import ValidationError


def keys_and_reasons(error: ValidationError) -> str:
    """The keys that are wrong, each with the reason; the reason alone where it is about all keys together."""
    found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
    return "; ".join(f"{key}: {reason}" if key else reason for key, reason in found)
