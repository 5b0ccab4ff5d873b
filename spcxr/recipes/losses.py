"""The losses of labels: several findings at once, or one class of many; unknown ones add nothing.

Targets may be soft (an uncertain label that counts as .7): both losses take any value in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_bce(
    logits: Tensor,
    values: Tensor,
    positive_weight: Tensor | None = None,
    *,
    smoothing: float = 0.0,
) -> Tensor:
    """Binary cross-entropy over the known labels: logits and values ``[B, K]``, NaN = unknown.

    The mean over known entries of the batch; an unknown one adds neither loss nor gradient.
    ``smoothing`` moves each value that share of the way to 1/2.

    >>> float(masked_bce(torch.zeros(1, 2), torch.tensor([[1.0, float("nan")]])))
    0.6931471824645996
    """
    known = ~torch.isnan(values)
    target = values.nan_to_num(0.0) * (1.0 - smoothing) + 0.5 * smoothing
    loss = F.binary_cross_entropy_with_logits(
        logits, target, pos_weight=positive_weight, reduction="none"
    )
    return (loss * known).sum() / known.sum().clamp(min=1)


def one_of_many(
    logits: Tensor, values: Tensor, weight: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of logits ``[B, K]`` against one-hot ``values [B, K]``, classes weighted.

    ``smoothing`` is shared out among all classes (arXiv 1512.00567).

    >>> round(float(one_of_many(torch.zeros(1, 4), torch.eye(4)[:1])), 4)
    1.3863
    """
    return F.cross_entropy(logits, values.argmax(1), weight=weight, label_smoothing=smoothing)
