"""Of several answers to keep the best: how many a bundle draws, how wildly, and what it judges them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from anygen.config import Config
from anygen.plan import can_be_read_back

Judge = Literal["backward", "forward", "both"]
"""log p(input | answer), log p(answer | input), or the first and, by its mean id, the second: `anygen.ranking`."""


class BestOf(Config):
    """How a bundle chooses among several answers in one direction (`image>text`); a plain number is `number`.

    By way of a text (`Request.via`) a direction gives its number; judge and temperature are those of each step, as of
    `audio>text` and `text>image`, but its own judge `both` stands above those of its steps. Judge and temperature also
    hold where the caller says how many.

    >>> BestOf.model_validate(8), BestOf(number=8).model_dump()
    (BestOf(number=8, judge='backward', temperature=None), 8)
    """

    number: int = Field(ge=1, strict=True)
    """How many are drawn for one that is kept, where the caller does not say it."""
    judge: Judge = "backward"
    """`forward` is for what a model hears or sees well and could not make, as voices other than its own; `both` is for
    ways by a text that can be put in several words, of which it says or draws some better than others."""
    temperature: float | None = Field(None, ge=0, le=100, strict=True)
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
        ValueError: no direction whose answers can be read backwards, or a value that is no `BestOf`.
    """
    checked = {}
    for direction, value in facts.items():
        given, _, made = direction.partition(">")
        if not can_be_read_back([given], [made]):
            raise ValueError(f"best_of holds directions from one of text, image, audio to another, not {direction!r}")
        try:
            checked[direction] = BestOf.model_validate(value)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(["best_of", direction, *map(str, fault["loc"])])
            raise ValueError(f"{key}: {fault['msg']}, got {fault['input']!r}") from error
    return checked


def best_of_to_json(best_of: Mapping[str, BestOf]) -> dict[str, Any]:
    """As it stands in a recipe."""
    return {direction: usual.model_dump() for direction, usual in best_of.items()}
