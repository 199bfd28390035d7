"""What a caller may ask for, checked once and turned into a document of inputs and options."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from anygen.documents import Document, Segment, default_task
from anygen.errors import InputError
from anygen.inputs import (
    MaskSource,
    check_duration,
    check_name,
    checked_span,
    describe,
    flattened,
    generators_of,
    load_mask,
    segment_of,
    sides_of,
)
from anygen.plan import Way
from anygen.sampling.choose import OPTION_NAMES, TEXT_ONLY, SamplingOptions
from anygen.vocabulary import TASKS
from tokenizers_mm.codes import MODALITIES, Modality
from tokenizers_mm.media import PictureSource, SoundSource

OutputName = Literal["text", "image", "audio", "region", "any"]
MAX_SAMPLES = 1024
MAX_WINDOW = 1024
INPUT_ORDER: tuple[Modality, ...] = ("image", "audio", "text")
"""As in training: a question follows what it is about."""
SHAPED: dict[str, Modality] = {"size": "image", "duration_s": "audio"}  # fields about one kind of output
_TASK_OUTPUT: dict[str, Modality] = {
    "depict": "image",
    "caption": "text",
    "speak": "audio",
    "transcribe": "text",
    "answer": "text",
    "locate": "region",
}
_SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `generate` or `stream`; every field is a keyword argument of theirs.

    Raises:
        InputError: a value of the wrong type or out of range, by name.
    """

    text: str | None = None
    """Where several are given, they stand in the order image, audio, text; `content` chooses another."""
    image: PictureSource | None = None
    """PIL image, path, or uint8 array H x W x 3."""
    audio: SoundSource | None = None
    """Path, `Audio`, or (float array, rate)."""
    content: Sequence[Mapping[str, Any]] | None = None
    """Instead of the three above: inputs in order, in transformers' chat form (`{"type": "text", "text": ...}`)."""
    output: OutputName | Sequence[OutputName] | None = None
    """What to generate, in order; `any` lets the model decide. May be left out where `task` says it."""
    task: str | None = None
    """`depict`, `caption`, `speak`, `transcribe`, `answer`, `locate`, `continue`, `infill`; by default from inputs and
    output. The same as by default is the same as none: then `via` decides it."""
    num_samples: int = 1
    seed: int | None = 0
    """Sample i is drawn from seed + i; None takes a new seed and reports it."""
    best_of: int | None = None
    """Draw so many answers for each sample and keep the one from which the model would best guess the input, or as the
    bundle judges (`anygen.ranking`). Sample i is one of those from seed + i best_of on; its own seed with `best_of=1`
    gives it again, unless several have another temperature. By default the bundle decides; streams tell the first."""
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    """CPU generators instead of a seed: one for all samples, or one each."""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    """Of text: pictures and sounds repeat codes with good reason."""
    guidance_scale: float | None = None
    """These six override the bundle's defaults, the first four and this one for every modality."""
    size: int | Sequence[int] | None = None
    """Height and width of generated pictures in pixels, or one side; by default the model chooses."""
    duration_s: float | None = None
    """Length of generated sounds; by default the model chooses. This and `size` also hold for what `any` brings."""
    speculative_window: int | None = None
    """How many codes of a picture or sound one pass may add; 1 is plain sampling, None what was measured to be fastest.
    What is drawn is the same."""
    mask: MaskSource | None = None
    """Edits `image`: what is white (or True) is drawn anew, the rest keeps its codes. It is scaled to the picture."""
    span: Sequence[float] | None = None
    """Edits `audio`: from when to when, in seconds, it is made anew; the rest keeps its codes, and the length stays."""
    keep_original: bool = False
    """Pixels outside the mask and samples outside the span come back as given, not as their codes give them."""
    decoder: Literal["codes", "diffusion", "voken"] = "codes"
    """What draws pictures; diffusion decoders come with bundles that carry them, and need `anygen[diffusion]`."""
    num_inference_steps: int | None = None
    """Steps of a diffusion decoder, 4 by default; more than 100 are refused."""
    via: Way | Literal["nothing"] | None = None
    """`text` writes what it hears or sees before it answers, and keeps that out of the answer (chain of modality,
    SpeechGPT, arXiv 2305.11000); `text_only` answers that text as if it alone had been given, with the same seed;
    `in_writing` is for sounds about something else: their words stand in their place, and what is to be said is written
    first; `one_by_one` makes each of several outputs by itself (`anygen.chains`). By default the bundle decides."""

    def __post_init__(self) -> None:
        if self.content is not None and any(v is not None for v in (self.text, self.image, self.audio)):
            raise InputError("pass either content or text, image and audio, not both")
        for name in (*OPTION_NAMES, *SHAPED):
            if isinstance(value := getattr(self, name), np.generic):
                object.__setattr__(self, name, value.item())
        self._take_integer("num_samples", 1, MAX_SAMPLES)
        if self.best_of is not None:
            self._take_integer("best_of", 1, MAX_SAMPLES // self.num_samples)
        if self.seed is not None:
            self._take_integer("seed", 0, _SEEDS - 1)
        if self.max_new_tokens is not None:
            self._take_integer("max_new_tokens", 1, 2**31)
        if self.speculative_window is not None:
            self._take_integer("speculative_window", 1, MAX_WINDOW)
        if self.task is not None:
            check_name("task", self.task, TASKS)
        check_name("decoder", self.decoder, ("codes", "diffusion", "voken"))
        if self.via is not None:
            check_name("via", self.via, (*get_args(Way), "nothing"))
        if self.size is not None:
            sides_of(self.size)
        if self.duration_s is not None:
            check_duration(self.duration_s)
        for name, of in SHAPED.items():
            if getattr(self, name) is not None and not {of, "any"} & set(self.outputs):
                raise InputError(f"{name} is of output {of!r}; got {self.outputs}: leave it out, or ask for both")
        if self.num_inference_steps is not None:
            if self.decoder == "codes":
                raise InputError("num_inference_steps is of diffusion decoders; decoder='codes' draws in one step")
            self._take_integer("num_inference_steps", 1, 100)
        self._check_edit()
        if self.via in get_args(Way) and (self.edited is not None or self.outputs[0] == "any"):
            raise InputError(f"via={self.via!r} is neither for edits nor for output 'any'; got {self.outputs}")
        made = "" if self.task in (None, "answer") else _TASK_OUTPUT.get(self.task, "")  # answers may be spoken
        first = {self.outputs[0], *(("text",) if self.via == "text" else ())}  # or of what is written first
        if made and not first & {made, "any"}:
            raise InputError(f"task {self.task!r} gives {made} first; got output {self.outputs}: leave one of them out")
        self.options({})

    def _take_integer(self, name: str, low: int, high: int) -> None:
        """Check an integer field, and make a numpy integer a plain one."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
            raise InputError(f"{name} must be an integer from {low} to {high}; got {value!r}")
        object.__setattr__(self, name, int(value))

    @property
    def edited(self) -> Literal["image", "audio"] | None:
        """What is edited, where something is."""
        return "image" if self.mask is not None else "audio" if self.span is not None else None

    def _check_edit(self) -> None:
        if not isinstance(self.keep_original, bool):
            raise InputError(f"keep_original must be True or False; got {self.keep_original!r}")
        if self.edited is None:
            if self.keep_original or self.task == "infill":
                name = "keep_original" if self.keep_original else "task 'infill'"
                raise InputError(f"{name} is of edits: pass an image with a mask, or audio with a span")
            return
        if self.mask is not None and self.span is not None:
            raise InputError("pass either a mask (edits a picture) or a span (edits a sound), not both")
        if self.outputs != (self.edited,):
            raise InputError(f"what is edited is the only output: output={self.edited!r}; got {self.outputs}")
        if self.size is not None or self.duration_s is not None or self.decoder == "voken":
            raise InputError("an edited picture or sound keeps its size or duration, and is drawn from codes")
        if self.span is not None:
            object.__setattr__(self, "span", checked_span(self.span))

    @cached_property
    def mask_picture(self) -> Image.Image | None:
        """The mask in shades of grey, loaded and checked."""
        return None if self.mask is None else load_mask(self.mask)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """A request from keyword arguments.

        Raises:
            TypeError: an unknown argument, with the nearest known one.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name in arguments:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(names)}"
                raise TypeError(f"unexpected argument {name!r}; {hint}")
        return cls(**arguments)

    @cached_property
    def outputs(self) -> tuple[OutputName, ...]:
        """What is asked for, in order."""
        output = self.output
        if output is None:
            if self.edited is not None:
                return (self.edited,)
            if self.task not in _TASK_OUTPUT:
                raise InputError("say what to generate: output (--output) text, image, audio, or several of them")
            return (_TASK_OUTPUT[self.task],)
        if not isinstance(output, str | Sequence):
            raise InputError(f"output is a name or several; got {output!r}")
        names = (output,) if isinstance(output, str) else tuple(output)
        for name in names:
            check_name("output", name, get_args(OutputName))
        if not names or ("any" in names and len(names) > 1):
            raise InputError(f"output must name at least one modality, and 'any' stands alone; got {names}")
        return names  # type: ignore[return-value]

    @cached_property
    def inputs(self) -> tuple[Segment, ...]:
        """The inputs as media, loaded and checked."""
        if self.content is not None:
            return tuple(segment_of(item) for item in flattened(self.content))
        given: list[Mapping[str, Any]] = []
        for modality in INPUT_ORDER:
            value = getattr(self, modality)
            if value is not None:
                given.append({"type": modality, modality: value})
        return tuple(segment_of(item) for item in given)

    @property
    def num_drawn(self) -> int:
        """How many answers are drawn for each sample."""
        return self.best_of or 1

    def with_best_of(self, number: int) -> Request:
        """The same request, its media loaded already, with so many answers for each sample."""
        other = copy.copy(self)
        object.__setattr__(other, "best_of", number)
        return other

    @property
    def own_task(self) -> str | None:
        """The task, where it is another than inputs and output suggest."""
        first = self.outputs[0]
        return None if first != "any" and self.task == default_task(self.kinds, first) else self.task

    @property
    def kinds(self) -> tuple[Modality, ...]:
        """Of the inputs, in order."""
        return tuple(segment.modality for segment in self.inputs)

    def document(self, via: Modality | None = None) -> Document:
        """The inputs, and the task that they and what is written first suggest.

        What is written by the way describes the other media: a caption, or what is said.
        """
        first, kinds = via or self.outputs[0], tuple(kind for kind in self.kinds if kind != via)
        suggested = None if first == "any" else default_task(kinds, first)
        return Document(self.inputs, self.own_task or suggested)

    def options(self, defaults: Mapping[str, SamplingOptions]) -> dict[str, SamplingOptions]:
        """Sampling options by modality: the bundle's defaults under this call's own."""
        given = {name: getattr(self, name) for name in OPTION_NAMES}
        options = {}
        for name in (*MODALITIES, "control"):
            own = {option: value for option, value in given.items() if name == "text" or option not in TEXT_ONLY}
            options[name] = defaults.get(name, SamplingOptions()).override(**own)
        return options

    def generators(self) -> list[tuple[torch.Generator, int | None]]:
        """A CPU generator for each answer that is drawn, `num_drawn` for a sample, and its seed where it has one."""
        if self.generator is not None:
            each = generators_of(self.generator, self.num_samples)
            return [(generator, None) for generator in each for _ in range(self.num_drawn)]
        first = secrets.randbits(48) if self.seed is None else self.seed
        seeds = [(first + i) % _SEEDS for i in range(self.num_samples * self.num_drawn)]
        return [(torch.Generator().manual_seed(seed), seed) for seed in seeds]

    def describe(self) -> dict[str, Any]:
        """JSON-able account of the request: texts as they are, media by the hash of their content."""
        facts: dict[str, Any] = {"output": list(self.outputs), "inputs": [describe(s) for s in self.inputs]}
        names = ("task", "max_new_tokens", *OPTION_NAMES, "size", "duration_s", "span", "num_inference_steps", "via")
        for name in (*names, "best_of"):
            if getattr(self, name) is not None:
                facts[name] = getattr(self, name)
        if self.mask_picture is not None:
            facts["mask"] = describe(Segment("image", self.mask_picture))
        for name in ("keep_original", "decoder"):
            if (value := getattr(self, name)) != getattr(type(self), name):  # a field's default
                facts[name] = value
        if isinstance(self.size, Sequence):
            facts["size"] = list(sides_of(self.size))
        return facts
