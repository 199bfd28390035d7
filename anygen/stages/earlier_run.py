"""Going on from another run: its stages are taken over by links, and stay as they are."""

from __future__ import annotations

from anygen.stages.base import StageConfig
from anygen.stages.catalogue import STAGES

_SERVE_ANY_DATA = ("text_tokenizer", "teacher", "image_tokenizer", "audio_tokenizer", "decoder")


def take_over(config: StageConfig) -> None:
    """Link what stages before this one made in `config.earlier_run` into the run, where it has no work of its own.

    Work that follows from what this run has made itself is not taken: it was made from something else. But the
    teacher, tokenizers and a decoder of their codes serve any data.
    """
    earlier, root = config.earlier_run, config.root
    if earlier is None:
        return
    before = _before(config.stage)
    for stage in STAGES:
        here = root / stage
        if here.is_symlink() and not here.exists():  # that run has been moved
            here.unlink()
        made_from = _before(stage) - ({"data", "tokenize"} if stage in _SERVE_ANY_DATA else set())
        own = any((root / need).exists() and not (root / need).is_symlink() for need in made_from)
        if stage in before and not own and not here.exists() and (earlier / stage / "stage.json").exists():
            here.symlink_to((earlier / stage).resolve(), target_is_directory=True)


def _before(stage: str) -> set[str]:
    """All stages that it builds on."""
    needs = set(STAGES[stage].needs)
    return needs.union(*(_before(need) for need in needs))
