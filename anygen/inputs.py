"""What callers pass as inputs: content lists in transformers' chat form, their items as media, media told in JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from anygen.documents import Media, Segment
from anygen.errors import InputError
from tokenizers_mm.codes import MODALITIES
from tokenizers_mm.media import Audio, PictureSource, Region, load_picture, load_sound

MaskSource = PictureSource | npt.NDArray[np.bool_]


def load_mask(mask: MaskSource) -> Image.Image:
    """A mask in shades of grey; arrays of bool are black and white.

    Raises:
        InputError: not a picture.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        mask = mask.astype(np.uint8) * 255
    return load_picture(mask).convert("L")


def check_name(what: str, name: Any, names: Collection[str]) -> None:
    """Raises InputError for anything but one of these names."""
    if not isinstance(name, str) or name not in names:
        raise InputError(f"unknown {what} {name!r}; expected one of {', '.join(names)}")


def sides_of(size: Any) -> tuple[int, int]:
    """Height and width in pixels of one side or two.

    Raises:
        InputError: something else.
    """
    sides = size if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int | np.integer) or s < 1 for s in sides):
        raise InputError(f"size must be a side or (height, width) in pixels; got {size!r}")
    return int(sides[0]), int(sides[1])


def check_duration(duration_s: Any) -> float:
    """A number of seconds above 0.

    Raises:
        InputError: something else.
    """
    if isinstance(duration_s, bool) or not isinstance(duration_s, int | float) or not 0 < duration_s < math.inf:
        raise InputError(f"duration_s must be a number of seconds above 0; got {duration_s!r}")
    return duration_s


def generators_of(given: Any, num_samples: int) -> list[torch.Generator]:
    """A generator for each sample: one for all, or one each.

    Raises:
        InputError: something else, too few, or one that is not on the CPU.
    """
    generators = list(given) if isinstance(given, Sequence) else [given] * num_samples
    if len(generators) != num_samples or any(
        not isinstance(g, torch.Generator) or g.device.type != "cpu" for g in generators
    ):
        raise InputError(f"generator must be one CPU torch.Generator or a list of {num_samples} of them")
    return generators


def checked_span(span: Sequence[float]) -> tuple[float, float]:
    """Two plain numbers, the first one smaller.

    Raises:
        InputError: something else.
    """
    values = list(span) if isinstance(span, tuple | list) or (isinstance(span, np.ndarray) and span.ndim == 1) else []
    if (
        len(values) != 2
        or any(isinstance(v, bool) or not isinstance(v, int | float | np.integer | np.floating) for v in values)
        or not 0 <= values[0] < values[1] < math.inf
    ):
        raise InputError(f"span must be (start, end) in seconds with 0 <= start < end; got {span!r}")
    return float(values[0]), float(values[1])


def flattened(content: Sequence[Mapping[str, Any]], *, is_message: bool = False) -> list[Mapping[str, Any]]:
    """Items of a content list, or of the content of chat messages.

    Raises:
        InputError: not a list of dicts.
    """
    if isinstance(content, str | bytes) or not isinstance(content, Sequence):
        raise InputError(
            f"content is a list of items such as {{'type': 'text', 'text': ...}}; got {type(content).__name__}"
        )
    items: list[Mapping[str, Any]] = []
    for item in content:
        if not isinstance(item, Mapping):
            raise InputError(f"content holds a {type(item).__name__}; every item is a dict with a 'type'")
        if "role" in item and "content" in item and not is_message:
            inner = item["content"]
            items += [{"type": "text", "text": inner}] if isinstance(inner, str) else flattened(inner, is_message=True)
        else:
            items.append(item)
    return items


def segment_of(item: Mapping[str, Any]) -> Segment:
    """One item, loaded and checked.

    Raises:
        InputError: an unknown type, no value, or a value that cannot be read.
    """
    modality = item.get("type")
    if modality not in MODALITIES:
        raise InputError(f"a content item needs a type, {', '.join(MODALITIES)}; got {modality!r}")
    names = [name for name in (modality, "path", "url") if name in item]  # the last two as in transformers' chats
    if not names:
        raise InputError(f"a content item of type {modality!r} needs its value under {modality!r}; got {sorted(item)}")
    value = item[names[0]]
    media: Media
    if modality == "text":
        if not isinstance(value, str):
            raise InputError(f"text must be a str; got {type(value).__name__}")
        if not value.strip():
            raise InputError("text is empty: leave it out to generate from the other inputs, or from nothing")
        media = value
    elif modality == "image":
        media = load_picture(value)
    elif modality == "audio":
        media = load_sound(value)
    else:
        media = value if isinstance(value, Region) else Region(tuple(value) if isinstance(value, Sequence) else value)
    return Segment(modality, media)


def describe(segment: Segment) -> dict[str, Any]:
    """JSON-able account of an input: text as it is, other media by the hash of their content."""
    content = segment.content
    if isinstance(content, Image.Image):
        return {"type": "image", "sha256": hashlib.sha256(content.tobytes()).hexdigest(), "size": list(content.size)}
    if isinstance(content, Audio):
        return {"type": "audio", "sha256": hashlib.sha256(content.samples_T.tobytes()).hexdigest()}
    return {"type": segment.modality, segment.modality: content.values if isinstance(content, Region) else str(content)}
