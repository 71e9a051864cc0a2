"""A linear head on top of the vectors: multinomial logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Best of 1, 3, 10, 30 and 100 in cross-validation on the sample; the vectors have length 1.
INVERSE_REGULARISATION = 3.0


@dataclass(frozen=True, slots=True)
class Head:
    """A trained head.

    Attributes:
        labels: in the order of the columns below.
        weight: float32 ``(labels, D)``.
        bias: float32 ``(labels,)``.
    """

    labels: tuple[str, ...]
    weight: np.ndarray
    bias: np.ndarray

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """``(N, labels)``, each row with a sum of 1."""
        logits = vectors @ self.weight.T + self.bias
        # no row may overflow
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def train(vectors: np.ndarray, labels: Sequence[str]) -> Head:
    """Fit a head to vectors ``(N, D)`` and their labels."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
    model.fit(vectors, labels)
    weight, bias = model.coef_.astype(np.float32), model.intercept_.astype(np.float32)
    if len(weight) == 1:
        # of two labels scikit-learn keeps the second's logit alone
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return Head(tuple(map(str, model.classes_)), weight, bias)


def out_of_fold(vectors: np.ndarray, labels: Sequence[str], folds: np.ndarray) -> np.ndarray:
    """Probabilities for each ticket by a head that has not seen its fold, ``(N, labels)``."""
    names = sorted(set(labels))
    everyone = np.array(labels)
    found = np.zeros((len(labels), len(names)), dtype=np.float32)
    for fold in np.unique(folds):
        out = folds == fold
        head = train(vectors[~out], everyone[~out].tolist())
        columns = [names.index(label) for label in head.labels]
        found[np.ix_(out, columns)] = head.probabilities(vectors[out])
    return found


def confidence_for(right: np.ndarray, confidence: np.ndarray, accuracy: float) -> float:
    """The lowest confidence from which on answers are right in ``accuracy`` of all cases.

    Args:
        right: whether each answer was right, on tickets that the head has not seen.
        confidence: the probability that each was given with.

    Returns:
        A threshold; above 1, so that nothing passes, where no threshold reaches ``accuracy``.
    """
    order = np.argsort(-confidence, kind="stable")
    reached = right[order].cumsum() / np.arange(1, len(order) + 1)
    passing = np.flatnonzero(reached >= accuracy)
    return float(confidence[order[passing[-1]]]) if len(passing) else 1.01
