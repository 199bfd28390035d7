"""Of several answers to keep the best: how many a bundle draws, how wildly, and what it judges them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from anygen.config import Config
from anygen.plan import can_be_read_back

Judge = Literal["backward", "forward"]
"""log p(input | answer), or log p(answer | input): `anygen.ranking`."""


class BestOf(Config):
    """What a bundle does in one direction (`image>text`) where its caller does not say it; a number alone is the first.

    >>> BestOf.model_validate(8), BestOf(number=8).model_dump()
    (BestOf(number=8, judge='backward', temperature=None), 8)
    """

    number: int = Field(ge=1, strict=True)
    """How many answers are drawn for one that is kept."""
    judge: Judge = "backward"
    """`forward` is for what a model hears or sees well and could not make, as voices other than its own."""
    temperature: float | None = Field(None, ge=0, le=100)
    """At which several answers are drawn; by default as one would be."""

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, value: Any) -> Any:
        return {"number": value} if isinstance(value, int) else value

    @model_serializer(mode="wrap")
    def _as_number(self, written: SerializerFunctionWrapHandler) -> Any:
        facts = written(self)
        return self.number if self == BestOf(number=self.number) else facts


def checked_best_of(facts: Mapping[str, Any]) -> dict[str, BestOf]:
    """What is done by direction.

    Raises:
        ValueError: no direction whose answers can be read backwards, or not what is known of one.
    """
    for direction in facts:
        given, _, made = direction.partition(">")
        if not can_be_read_back([given], [made]):
            raise ValueError(
                f"best_of holds directions from one of text, image, audio to another; got {direction!r}: "
                f"{facts[direction]!r}"
            )
    try:
        return {direction: BestOf.model_validate(value) for direction, value in facts.items()}
    except ValidationError as error:
        expected = "best_of has for each direction a number of answers, or number, judge and temperature"
        raise ValueError(f"{expected}; got {dict(facts)!r}: {error.errors()[0]['msg']}") from error


def to_json(best_of: Mapping[str, BestOf]) -> dict[str, Any]:
    """As it stands in a recipe."""
    return {direction: usual.model_dump() for direction, usual in best_of.items()}
