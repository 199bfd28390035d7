"""Going on from another run or a bundle: its stages are taken over by links, and stay as they are."""

from __future__ import annotations

from anygen.stages.base import StageConfig
from anygen.stages.catalogue import STAGES
from anygen.stages.from_bundle import as_run, bundle_at

_WHATEVER: dict[str, set[str]] = {
    "text_tokenizer": {"data"},
    "teacher": {"data"},
    "image_tokenizer": {"data", "text_tokenizer"},
    "audio_tokenizer": {"data"},
    "decoder": {"data", "tokenize", "text_tokenizer", "audio_tokenizer"},
}
"""Stage -> stages before it that the run may have made anew: what the stage made serves all the same."""


def take_over(config: StageConfig) -> None:
    """Link what stages before this one made in `config.earlier_run` into the run, where it has no work of its own.

    Work that follows from what this run has made itself is not taken: it was made from something else. But the
    teacher, tokenizers and a decoder of their codes serve any data. Of a bundle there are tokenizers and a decoder.

    Raises:
        CheckpointError: it is a bundle, and damaged.
    """
    if config.earlier_run is None:
        return
    root, bundle = config.root, bundle_at(config.earlier_run)
    earlier = config.earlier_run if bundle is None else as_run(bundle, root)
    before = _before(config.stage)
    for stage in STAGES:
        here = root / stage
        if here.is_symlink() and not here.exists():  # that run has been moved
            here.unlink()
        made_from = _before(stage) - _WHATEVER.get(stage, set())
        own = any((root / need).exists() and not (root / need).is_symlink() for need in made_from)
        if stage in before and not own and not here.exists() and (earlier / stage / "stage.json").exists():
            here.symlink_to((earlier / stage).resolve(), target_is_directory=True)


def _before(stage: str) -> set[str]:
    """All stages that it builds on."""
    needs = set(STAGES[stage].needs)
    return needs.union(*(_before(need) for need in needs))
