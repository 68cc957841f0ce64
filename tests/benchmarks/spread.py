"""How sure a ratio of times is."""

import numpy as np
from scipy import stats


def ratio_interval(ratios: np.ndarray) -> dict[str, object]:
    """Geometric mean, median, and the mean's two-sided 95 % interval (Student's t on logarithms).

    The arithmetic mean of ratios is above 1 even where both times are alike: a slow denominator
    lowers a ratio by less than a slow numerator raises it.
    """
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    low, mean, high = np.exp(logs.mean() + half * np.array([-1.0, 0.0, 1.0]))
    return {
        "mean": round(float(mean), 4),
        "median": round(float(np.median(ratios)), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "pairs": len(ratios),
    }
