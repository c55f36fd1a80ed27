"""A learning rate to start from, when none is given."""

import math


def suggested_rate(hidden_size: int, scale: float, pace: float = 1.0) -> float:
    """Return a rule of thumb for the learning rate of a low-rank adapter trained with AdamW; no more than that.

    hidden_size: width of the model; wider models want smaller steps.
    scale: alpha / rank. A step of Adam moves each number by the rate, and the update by scale times that.
    pace: how many times as fast another method learns.
    """
    rate = pace * 1e-3 * math.sqrt(512 / hidden_size) * math.sqrt(2 / abs(scale))
    digits = 1 - math.floor(math.log10(rate))
    return round(rate, digits)
