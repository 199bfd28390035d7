"""Going on from another run: its stages are taken over by links, and stay as they are."""

from __future__ import annotations

from anygen.stages.base import StageConfig
from anygen.stages.catalogue import STAGES


def take_over(config: StageConfig) -> None:
    """Link what stages before this one made in `config.earlier_run` into the run, where it has no work of its own.

    Work that follows from what this run has made itself is not taken: it was made from something else.
    """
    earlier, root = config.earlier_run, config.root
    if earlier is None:
        return
    before = _before(config.stage)
    for stage in STAGES:
        here = root / stage
        if here.is_symlink() and not here.exists():  # that run has been moved
            here.unlink()
        own = any((root / need).exists() and not (root / need).is_symlink() for need in _before(stage))
        if stage in before and not own and not here.exists() and (earlier / stage / "stage.json").exists():
            here.symlink_to((earlier / stage).resolve(), target_is_directory=True)


def _before(stage: str) -> set[str]:
    """All stages that it builds on."""
    needs = set(STAGES[stage].needs)
    return needs.union(*(_before(need) for need in needs))
