"""Editing: of a picture or sound that is given, some codes are known and the rest is sampled.

The answer is the whole block, with the walk told what is known: those ids are not chosen, and come back as they were.
A causal model does not see what comes behind, so where it was trained to (directions `infill_image`, `infill_audio`) it
first reads the known part with holes; other models have only what stands before in the answer.

Dimension key: K codebooks, T steps, H x W pixels, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from anygen.bundle import Bundle
from anygen.documents import Document, Holed, Segment, default_task
from anygen.errors import InputError
from anygen.grammar import Block
from anygen.request import Request
from anygen.sequence import Sequencer
from anygen.vocabulary import Vocabulary
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.image import ImageTokenizer, square
from tokenizers_mm.media import Audio, FloatArray

_RAMP_S = 0.005
"""Inside a span's ends, over which kept samples pass into new ones."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What is known of the picture or sound that is edited."""

    codes: Codes
    known_KT: npt.NDArray[np.bool_]
    others: tuple[Segment, ...]
    """The inputs beside it."""
    original: Image.Image | Audio
    """What is edited, as its tokenizer takes it in: a square, or samples at its rate."""
    share: npt.NDArray[np.float32]
    """Of each pixel (H x W x 1) or sample (N), how much of it is new; the rest is the original's."""
    keeps_original: bool

    def document(self, vocabulary: Vocabulary, task: str | None) -> Document:
        """What the model reads: the known part first where the task is `infill`, otherwise the other inputs alone."""
        if task == "infill":
            if task not in vocabulary.control_names:
                raise InputError("this model was made before task 'infill'; leave task out to edit all the same")
            return Document((Segment(self.codes.modality, Holed(self.codes, self.known_KT)), *self.others), task)
        kinds = tuple(segment.modality for segment in self.others)
        return Document(self.others, task or default_task(kinds, self.codes.modality))

    def block(self, sequencer: Sequencer) -> Block:
        """The block to generate, with the ids that are known."""
        order = sequencer.orders[self.codes.modality]
        head = 1 + sequencer.num_shape_numbers(self.codes.modality)
        ids_S = sequencer.block_ids(self.codes)[head:-1]
        known_S = order.apply(self.known_KT * 1) > 0
        shape = sequencer.shape_of(self.codes)
        return Block(self.codes.modality, shape, known=tuple(np.where(known_S, ids_S, -1).tolist()))

    def whole(self, document: Document) -> Document:
        """The answer in codes, with what no code says of the original: its length to the sample, its loudness."""
        (segment,) = document.segments
        codes = replace(segment.codes, num_samples=self.codes.num_samples, scales=self.codes.scales)
        return replace(document, segments=(replace(segment, content=codes),))

    def finished(self, document: Document) -> Document:
        """The answer as media, with the original where that is to be kept."""
        (segment,) = document.segments
        content = segment.content
        if isinstance(content, Audio):
            content = Audio(self.samples(content.samples_T), content.rate_hz)
        elif isinstance(content, Image.Image) and self.keeps_original:
            content = self._picture(content)
        return replace(document, segments=(replace(segment, content=content),))

    def _picture(self, drawn: Image.Image) -> Image.Image:
        assert isinstance(self.original, Image.Image)
        mixed_HW3 = np.asarray(drawn) * self.share + np.asarray(self.original) * (1 - self.share)
        return Image.fromarray(mixed_HW3.round().astype(np.uint8))

    def samples(self, decoded_N: FloatArray, start: int = 0) -> FloatArray:
        """What comes back of decoded samples, of which `start` came before; those beyond the original are cut."""
        assert isinstance(self.original, Audio)
        decoded_N = decoded_N[: max(0, len(self.original.samples_T) - start)]
        if not self.keeps_original:
            return decoded_N
        place = slice(start, start + len(decoded_N))
        share_N = self.share[place]
        return (decoded_N * share_N + self.original.samples_T[place] * (1 - share_N)).astype(np.float32)


def edit_of(request: Request, bundle: Bundle) -> Edit | None:
    """The edit that a request asks for, if it does.

    Raises:
        InputError: not one picture or sound to edit, a mask without white, or a span beyond the sound.
    """
    if request.edited is None:
        return None
    given = [segment for segment in request.inputs if segment.modality == request.edited]
    name = "mask" if request.edited == "image" else "span"
    if len(given) != 1:
        raise InputError(f"a {name} needs one {request.edited} to edit; got {len(given)}")
    others = tuple(segment for segment in request.inputs if segment is not given[0])
    tokenizer: Any = bundle.tokenizers[request.edited]
    edit: Any = _edit_picture if request.edited == "image" else _edit_sound
    found: Edit = edit(request, given[0].content, others, tokenizer)
    return found


def infills(bundle: Bundle) -> bool:
    """True where the model was trained to: its vocabulary has the task, and the recipes it tells of have examples."""
    if "infill" not in bundle.vocabulary.control_names:
        return False
    recipes = bundle.provenance.get("recipes", {})
    mixtures = [recipe["mixture"] for recipe in recipes.values() if isinstance(recipe, Mapping) and "mixture" in recipe]
    return not mixtures or any("infill_" in direction for mixture in mixtures for direction in mixture)


def _edit_picture(
    request: Request, picture: Image.Image, others: tuple[Segment, ...], tokenizer: ImageTokenizer
) -> Edit:
    side, patch = tokenizer.config.side_px, tokenizer.config.patch_px
    assert request.mask_picture is not None
    mask = request.mask_picture
    if mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.BOX)
    is_new_HW = np.asarray(square(mask, side, fill="black")) >= 128
    redrawn = is_new_HW.reshape(side // patch, patch, side // patch, patch).any(axis=(1, 3)).ravel()
    if not redrawn.any():
        raise InputError("the mask leaves nothing to draw anew: what is to change is white (or True)")
    codes = tokenizer.encode(picture)
    known_KT = np.broadcast_to(~redrawn, codes.codes_KT.shape)
    share_HW1 = is_new_HW[:, :, None].astype(np.float32)
    return Edit(codes, known_KT, others, square(picture, side), share_HW1, request.keep_original)


def _edit_sound(request: Request, sound: Audio, others: tuple[Segment, ...], tokenizer: AudioTokenizer) -> Edit:
    assert request.span is not None
    start_s, end_s = request.span
    if end_s > sound.duration_s + 1e-6:
        raise InputError(f"span must end within the sound, at most {sound.duration_s:.3f} s; got {request.span}")
    sound = sound.resampled(tokenizer.sample_rate_hz)
    codes = tokenizer.encode(sound)
    frames_T = np.arange(codes.num_steps)
    is_new_T = (frames_T >= math.floor(start_s * tokenizer.rate_hz)) & (frames_T < math.ceil(end_s * tokenizer.rate_hz))
    known_KT = np.broadcast_to(~is_new_T, codes.codes_KT.shape)
    place_N = np.arange(len(sound.samples_T)) / sound.rate_hz
    share_N = np.clip(np.minimum(place_N - start_s, end_s - place_N) / _RAMP_S, 0, 1).astype(np.float32)
    return Edit(codes, known_KT, others, sound, share_N, request.keep_original)
