"""Mean and standard deviation of all that was seen so far, over all ranks."""

import math

from support.devices import in_float64


class RunningMoments:
    """Mean and standard deviation of all scores so far, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, n=0.0, mean=0.0, squares=0.0):
        self.n, self.mean, self.squares = n, mean, squares

    def add(self, scores, dist):
        n, total = dist.sum(scores.numel(), scores.sum().item())
        mean = total / n
        (squares,) = dist.sum(((in_float64(scores) - mean) ** 2).sum().item())
        gap, both = mean - self.mean, self.n + n
        self.squares += squares + gap**2 * self.n * n / both
        self.mean += gap * n / both
        self.n = both

    def normalise(self, scores):
        return (scores - self.mean) / (math.sqrt(self.squares / max(self.n, 1)) + 1e-8)

    def state_dict(self):
        return [self.n, self.mean, self.squares]

    def load_state_dict(self, state):
        self.n, self.mean, self.squares = state
