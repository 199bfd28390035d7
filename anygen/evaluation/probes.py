"""What simple classifiers read from features: labels of records, a linear probe, nearest neighbours.

Every kind of features gets the same classifier, regularised by the same choice, so that their accuracies compare.

Dimension key: N pictures, D features.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anygen.data.records import Record
from anygen.errors import MissingDependency
from anygen.evaluation.scores import Score

MIN_TRAIN = 5
"""Training pictures of a class; classes with fewer are left out."""
MIN_HELD_OUT = 20
MAX_CLASSES = 1000
REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)
"""Inverse strengths to choose from, by a fifth of the training pictures."""
NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07
_TONE = re.compile(r"(?:light|medium-light|medium|medium-dark|dark) skin tone")

Right = npt.NDArray[np.bool_]
Features = Any
"""N x D: an array, or a sparse matrix of scipy."""


@dataclass(frozen=True)
class Task:
    """A set of labels, on the pictures that have one: rows among the training and among the held-out pictures."""

    name: str
    train_rows: tuple[int, ...]
    train_labels: tuple[str, ...]
    held_out_rows: tuple[int, ...]
    held_out_labels: tuple[str, ...]


def labels_of(record: Record) -> dict[str, str]:
    """The labels of a record by the name of their set.

    >>> sorted(labels_of(Record("a", "emoji", ("man kneeling facing right, dark skin tone",))).items())
    [('skin tone', 'dark skin tone'), ('subject', 'man kneeling')]
    >>> labels_of(Record("b", "emoji", ("kiss of a man and a man, dark skin tone, light skin tone",)))
    {'subject': 'kiss of a man and a man'}
    >>> labels_of(Record("c", "pair", ("a cat", "cat"))), labels_of(Record("d"))
    ({'caption': 'a cat'}, {})
    """
    if record.kind == "scene":
        return {"count": str(len(record.objects))} if record.objects else {}
    if not record.captions:
        return {}
    if record.kind != "emoji":
        return {"caption": record.captions[0]}
    subject, *features = record.captions[0].split(", ")
    labels = {"subject": subject.removesuffix(" facing right")}
    tones = [feature for feature in features if _TONE.fullmatch(feature)]
    return labels | ({"skin tone": tones[0]} if len(tones) == 1 else {})


def tasks_of(train: Sequence[Record], held_out: Sequence[Record]) -> tuple[list[Task], dict[str, str]]:
    """The sets of labels that can be probed, and of the others why not."""
    rows = [labels_of(record) for record in train], [labels_of(record) for record in held_out]
    names = list(dict.fromkeys(name for row in rows[0] for name in row))
    tasks: list[Task] = []
    skipped: dict[str, str] = {}
    for name in names:
        counts = Counter(row[name] for row in rows[0] if name in row)
        classes = {label for label, count in counts.items() if count >= MIN_TRAIN}
        train_rows, held_out_rows = (
            tuple(i for i, row in enumerate(part) if row.get(name) in classes) for part in rows
        )
        if not 2 <= len(classes) <= MAX_CLASSES:
            skipped[name] = f"{len(classes)} classes of {MIN_TRAIN} or more training pictures; needs 2 to {MAX_CLASSES}"
        elif len(held_out_rows) < MIN_HELD_OUT:
            skipped[name] = f"{len(held_out_rows)} held-out pictures of these classes; needs {MIN_HELD_OUT} or more"
        else:
            train_labels = tuple(rows[0][i][name] for i in train_rows)
            tasks.append(
                Task(name, train_rows, train_labels, held_out_rows, tuple(rows[1][i][name] for i in held_out_rows))
            )
    return tasks, skipped


def check_packages() -> None:
    """Raise MissingDependency where the packages of the extra `eval` are absent."""
    try:
        import skimage.metrics  # noqa: F401
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            'evaluating pictures needs scikit-learn and scikit-image: pip install "anygen[eval]"'
        ) from error


def linear_probe(train_ND: Features, held_out_ND: Features, task: Task) -> Right:
    """Which held-out pictures multinomial logistic regression gets right; both inputs hold the rows of the task.

    Dense features are standardised; sparse ones keep their zeros and get the same mean square in one common scale,
    for a code that occurs once would otherwise weigh as much as one that occurs everywhere.
    """
    from sklearn.model_selection import train_test_split

    labels = np.array(task.train_labels)
    train_ND, held_out_ND = _standardised(train_ND, held_out_ND)
    fit, check = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)

    def accuracy(regularisation: float) -> float:
        model = _fitted(train_ND[fit], labels[fit], regularisation)
        return float((model.predict(train_ND[check]) == labels[check]).mean())

    best = max(REGULARISATIONS, key=accuracy)  # of equals the strongest
    right: Right = _fitted(train_ND, labels, best).predict(held_out_ND) == np.array(task.held_out_labels)
    return right


def nearest_neighbours(train_ND: Features, held_out_ND: Features, task: Task) -> Right:
    """Which held-out pictures a vote of the 20 nearest by cosine gets right, weighted as in DINO (arXiv 2104.14294)."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(
        min(NUM_NEIGHBOURS, len(task.train_labels)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp(-distances / TEMPERATURE),
    )
    model.fit(train_ND, np.array(task.train_labels))
    right: Right = model.predict(held_out_ND) == np.array(task.held_out_labels)
    return right


PROBES: Mapping[str, Callable[[Features, Features, Task], Right]] = {
    "linear probe": linear_probe,
    "kNN": nearest_neighbours,
}


def ratio_of(right: Right, reference: Right) -> Score:
    """Accuracy over the reference's on the same pictures, with a bootstrap interval over pictures.

    >>> ratio_of(np.array([True, False] * 50), np.array([True] * 100)).value
    0.5
    """
    assert len(right) == len(reference), (len(right), len(reference))
    if not reference.any():
        return Score(float("nan"), float("nan"), float("nan"), len(right))
    draws = np.random.default_rng(0).integers(0, len(right), (1000, len(right)))
    low, high = np.percentile(right[draws].sum(1) / reference[draws].sum(1).clip(1), [2.5, 97.5])
    return Score(float(right.sum() / reference.sum()), float(low), float(high), len(right))


def bag_of_codes(codes_NKT: npt.NDArray[np.int64], codebook_size: int) -> Features:
    """Histograms of the codes of each picture, square roots, unit length: N x (codebooks x size), sparse (CSR)."""
    from scipy.sparse import csr_matrix

    num_pictures, num_codebooks, num_codes = codes_NKT.shape
    columns = codes_NKT + np.arange(num_codebooks)[:, None] * codebook_size
    rows = np.repeat(np.arange(num_pictures), num_codebooks * num_codes)
    ones = np.ones(columns.size, dtype=np.float32)
    counts = csr_matrix((ones, (rows, columns.ravel())), shape=(num_pictures, num_codebooks * codebook_size))
    return counts.sqrt() / np.float32((num_codebooks * num_codes) ** 0.5)


def _standardised(train_ND: Features, held_out_ND: Features) -> tuple[Features, Features]:
    if not isinstance(train_ND, np.ndarray):
        scale = (train_ND.shape[0] * train_ND.shape[1] / train_ND.multiply(train_ND).sum()) ** 0.5
        return train_ND * scale, held_out_ND * scale
    mean_D, deviation_D = train_ND.mean(axis=0), train_ND.std(axis=0)
    deviation_D = np.where(deviation_D > 0, deviation_D, 1)
    return (train_ND - mean_D) / deviation_D, (held_out_ND - mean_D) / deviation_D


def _fitted(features_ND: Features, labels: npt.NDArray[np.str_], regularisation: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # a weak regularisation that has not converged loses the choice, or is good enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=regularisation, max_iter=200, tol=1e-3).fit(features_ND, labels)
