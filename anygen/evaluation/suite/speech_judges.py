"""Judges of speech: what an independent recogniser and the model itself hear, whose voice it is, how clear it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from anygen.data.scenes import NUMBER_WORDS, counted
from anygen.evaluation.fidelity import mean_of
from anygen.evaluation.recogniser import lists_of, spelled
from anygen.evaluation.scores import num_word_errors, proportion, word_error_rate
from anygen.evaluation.sounds import SoundMeasures
from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.cases import Case, Measured
from anygen.evaluation.voices import aligned_mel_distance
from tokenizers_mm.media import Audio

MAX_ALIGNED = 40
"""Sounds of a group that are compared with a recording: aligning two takes a tenth of a second."""


def judge_speech(bench: Bench, cases: Sequence[Case], sounds: list[Audio]) -> Iterator[Measured]:
    """Words and voice."""
    if bench.recogniser is not None:
        yield from _heard(bench, cases, sounds)
    if bench.has("jiwer"):
        texts = bench.transcribe(sounds, [case.request.seed for case in cases])
        truths = [_nearest(case.said, text) for case, text in zip(cases, texts, strict=True)]
        yield Measured("word error rate, own transcript", word_error_rate(truths, texts))
    if bench.has("scipy"):
        yield from _voice(bench, cases, sounds)


def judge_spoken_answers(bench: Bench, cases: Sequence[Case], sounds: list[Audio]) -> Iterator[Measured]:
    """The one right answer, as the recogniser hears it among every possible one."""
    if bench.recogniser is None:
        return
    nouns = [thing.parts.subject for thing in bench.things]
    bench.recogniser.listen_for([*NUMBER_WORDS[1:], *(counted(noun, count) for noun in nouns for count in (1, 2))])
    pairs = [
        (spelled(case.said[0]), bench.recogniser.heard(sound))
        for case, sound in zip(cases, sounds, strict=True)
        if bench.recogniser.knows(case.said[0])
    ]
    yield Measured("exact answer, recogniser", proportion([truth == heard for truth, heard in pairs], pairs))


def judge_codec(bench: Bench, cases: Sequence[Case], sounds: list[Audio]) -> Iterator[Measured]:
    """The same as of speech, and how near each sound is to its original: only a codec keeps time with it."""
    yield from judge_speech(bench, cases, sounds)
    if not bench.has("pystoi"):
        return
    measures = SoundMeasures(sounds[0].rate_hz)
    originals = [case.truth["audio"] for case in cases]
    table = measures.of(
        "recordings", [o.resampled(sounds[0].rate_hz) for o in originals if isinstance(o, Audio)], sounds
    )
    bench.skipped |= measures.skipped
    for name, values_N in table.items():
        if not np.isnan(values_N).all():
            yield Measured(name, mean_of(values_N[~np.isnan(values_N)]))


def _heard(bench: Bench, cases: Sequence[Case], sounds: list[Audio]) -> Iterator[Measured]:
    assert bench.recogniser is not None
    recogniser, pairs = bench.recogniser, []
    for rows, texts in lists_of([case.said for case in cases], bench.sayings):
        recogniser.listen_for(texts)
        for row in rows:
            right = [spelled(text) for text in cases[row].said if recogniser.knows(text)]
            if right:
                heard = recogniser.heard(sounds[row])
                pairs.append((_nearest(right, heard) if bench.has("jiwer") else right[0], heard))
    if bench.has("jiwer"):
        truths, answers = [truth for truth, _ in pairs], [answer for _, answer in pairs]
        yield Measured("word error rate, recogniser", word_error_rate(truths, answers))
    yield Measured("exact words, recogniser", proportion([truth == answer for truth, answer in pairs], pairs))


def _voice(bench: Bench, cases: Sequence[Case], sounds: list[Audio]) -> Iterator[Measured]:
    found = [bench.known_voices.nearest(sound) for sound in sounds]
    yield Measured("speaker similarity", mean_of(np.array([similarity for _, similarity in found])))
    distances = [
        min(aligned_mel_distance(sound, bench.speak(text, voice)) for text in case.said)
        for case, sound, (voice, _) in list(zip(cases, sounds, found, strict=True))[:MAX_ALIGNED]
    ]
    yield Measured("distance to a recording", mean_of(np.array(distances)))


def _nearest(truths: Sequence[str], heard: str) -> str:
    """The truth with the fewest word errors."""
    return min(truths, key=lambda truth: num_word_errors(truth, heard))
