"""The bounds of the methods' settings: beyond every sensible value, and within what torch accepts."""

from typing import Annotated

from pydantic import Field

MOST_SEED = 2**32 - 1

Positive = Annotated[float, Field(ge=1e-9, le=1e6, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=0.1, le=1e6, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Steps = Annotated[int, Field(ge=1, le=10_000)]
Words = Annotated[str, Field(min_length=1, max_length=400, pattern=r"\S")]
Context = Annotated[int, Field(ge=1, le=64)]  # learned vectors of a prompt
