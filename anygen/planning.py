"""From a request to what is written for it: which blocks, in which shapes, and what before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anygen.errors import InputError
from anygen.inputs import check_duration, sides_of
from anygen.layout import Layout
from anygen.plan import Block, Plan, Way, misfit
from anygen.request import Request
from anygen.vocabulary import NUM_NUMBERS
from tokenizers_mm.codes import MODALITIES, Modality

_VIA_IDS, _SHORTEST = 256, 3


def way_of(request: Request, usual: Mapping[str, Way]) -> Way | None:
    """What is written before the answer: as asked, else what is usual for this direction (`audio>image`)."""
    if request.via is not None:
        return None if request.via == "nothing" else request.via
    if request.own_task is not None or request.edited is not None or request.outputs == ("any",):
        return None
    inputs = ",".join(segment.modality for segment in request.inputs)
    return usual.get(f"{inputs}>{','.join(request.outputs)}")


def steps_of(request: Request, usual: Mapping[str, Way]) -> tuple[str, ...]:
    """From one medium to one other: the direction itself (`audio>image`), or by way of a text (`audio>text`, ...)."""
    given, wanted = request.kinds[0], request.outputs[0]
    if way_of(request, usual) in ("text", "text_only") and "text" not in (given, wanted):
        return f"{given}>text", f"text>{wanted}"
    return (f"{given}>{wanted}",)


def check_way(way: Way | None, request: Request) -> None:
    """Raise InputError where this way is none for the request."""
    if way is not None and (unfit := misfit(way, request.kinds, request.outputs)):
        raise InputError(
            f"via={way!r} {unfit}; got {', '.join(request.kinds) or 'no input'} -> {', '.join(request.outputs)}"
        )


def ids_of_via(room: int) -> int:
    """How many ids a text before the answer may take, of those that fit behind the inputs."""
    return max(_SHORTEST, min(_VIA_IDS, room // 4))


def plan_of(
    request: Request,
    layout: Layout,
    modalities: Sequence[str],
    *,
    patch_px: int,
    frame_rate_hz: float,
    via: Modality | None = None,
    room: int = 4 * _VIA_IDS,
) -> Plan:
    """The blocks to generate, with their shapes where they are fixed.

    Args:
        request: what is asked for.
        layout: of the model: longest sounds, native grid of pictures.
        modalities: those that it has.
        patch_px: side of what one picture code stands for.
        frame_rate_hz: frames of sound codes in a second.
        via: what is written before all that was asked for.
        room: ids that fit behind the inputs; what is written before takes a quarter of it at most.

    Raises:
        InputError: a size or duration that the model cannot write.
    """

    def block(name: Modality) -> Block:
        if name == "image" and request.decoder != "codes":
            return _drawn(request, layout, patch_px)
        if name == "image" and request.size is not None:
            return Block(name, _grid(request, patch_px))
        if name == "audio" and request.duration_s is not None:
            return Block(name, _length(request, layout, frame_rate_hz))
        return Block(name)

    if request.outputs == ("any",):
        return Plan(tuple(block(m) for m in MODALITIES if m in modalities and m != "region"), free=True)
    first = () if via is None else (Block(via, ids_apart=ids_of_via(room)),)
    return Plan((*first, *(block(name) for name in request.outputs)))  # type: ignore[arg-type]


def _drawn(request: Request, layout: Layout, patch_px: int) -> Block:
    """A picture for a diffusion decoder, which draws one size only."""
    height, width = layout.native_grid_hw
    if request.size is not None and _grid(request, patch_px) != (height, width):
        raise InputError(
            f"decoder={request.decoder!r} draws {height * patch_px} x {width * patch_px} px only; leave size out"
        )
    if request.decoder == "voken":
        return Block("image", as_vokens=True)
    return Block("image", (height, width))


def _grid(request: Request, patch_px: int) -> tuple[int, int]:
    height, width = sides_of(request.size)
    if height % patch_px or width % patch_px:
        raise InputError(f"pictures of this model have sides in multiples of {patch_px} px; got size {request.size!r}")
    return height // patch_px, width // patch_px


def _length(request: Request, layout: Layout, frame_rate_hz: float) -> tuple[int, int]:
    duration_s, longest_s = check_duration(request.duration_s), layout.max_frames / frame_rate_hz
    if duration_s > longest_s:
        raise InputError(f"duration_s must be above 0 and at most {longest_s:.1f}; got {duration_s!r}")
    return divmod(max(1, round(duration_s * frame_rate_hz)), NUM_NUMBERS)
