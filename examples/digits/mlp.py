"""A small neural network (64 pixels, one hidden ReLU layer, softmax over 10 digits), with its gradient by hand.

Owns the arithmetic and the data. Must not know of ranks, files of a run or the network: it gets rows, it gives sums.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from operator import mul

PIXELS = 64
CLASSES = 10
PIXEL_MAX = 16.0
# Every fifth row is for testing, the same ones in every run.
TEST_EVERY = 5


def load_digits(path):
    """Training rows and test rows, each a list of (64 pixels from 0 to 1, digit)."""
    train, test = [], []
    with gzip.open(str(path), "rt", encoding="ascii", newline="") as lines:
        for number, record in enumerate(csv.reader(lines)):
            if len(record) != PIXELS + 1:
                raise ValueError("{}: row {} has {} columns, wanted {}".format(path, number, len(record), PIXELS + 1))
            pixels = [float(value) / PIXEL_MAX for value in record[:PIXELS]]
            row = (pixels, int(record[PIXELS]))
            (test if number % TEST_EVERY == 0 else train).append(row)
    return train, test


def parameter_count(hidden):
    return hidden * PIXELS + hidden + CLASSES * hidden + CLASSES


def initial_parameters(hidden, seed):
    """One flat list; layout: hidden weights row by row, hidden biases, output weights row by row, output biases."""
    source = random.Random("parameters {}".format(seed))
    first = [source.gauss(0.0, math.sqrt(2.0 / PIXELS)) for _ in range(hidden * PIXELS)]
    second = [source.gauss(0.0, math.sqrt(1.0 / hidden)) for _ in range(CLASSES * hidden)]
    return first + [0.0] * hidden + second + [0.0] * CLASSES


class Mlp:
    """The network. `params` is the flat list; after changing it call `set_parameters`."""

    def __init__(self, hidden, params):
        self.hidden = hidden
        self.set_parameters(params)

    def set_parameters(self, params):
        hidden = self.hidden
        if len(params) != parameter_count(hidden):
            raise ValueError("{} parameters, wanted {}".format(len(params), parameter_count(hidden)))
        self.params = list(params)
        end = hidden * PIXELS
        self._w1 = [self.params[i:i + PIXELS] for i in range(0, end, PIXELS)]
        self._b1 = self.params[end:end + hidden]
        begin, end = end + hidden, end + hidden + CLASSES * hidden
        self._w2 = [self.params[i:i + hidden] for i in range(begin, end, hidden)]
        self._b2 = self.params[end:]

    def descend(self, gradient, rate):
        """One step of plain gradient descent."""
        self.set_parameters([p - rate * g for p, g in zip(self.params, gradient)])

    def gradient(self, rows):
        """Sums over `rows`: the gradient (flat, laid out like the parameters) and the cross-entropy loss."""
        g_w1 = [None] * self.hidden
        g_b1 = [0.0] * self.hidden
        g_w2 = [[0.0] * self.hidden for _ in range(CLASSES)]
        g_b2 = [0.0] * CLASSES
        loss = 0.0
        w2_columns = list(zip(*self._w2))
        for pixels, digit in rows:
            active = self._activate(pixels)
            delta = self._softmax(active)
            loss -= math.log(max(delta[digit], 1e-300))
            delta[digit] -= 1.0
            for k, d in enumerate(delta):
                g_w2[k] = [g + d * a for g, a in zip(g_w2[k], active)]
                g_b2[k] += d
            for j, a in enumerate(active):
                if a > 0.0:  # elsewhere the ReLU's slope is 0
                    d = sum(map(mul, w2_columns[j], delta))
                    g_b1[j] += d
                    old = g_w1[j]
                    g_w1[j] = [d * x for x in pixels] if old is None else [g + d * x for g, x in zip(old, pixels)]
        flat = []
        for row in g_w1:
            flat.extend([0.0] * PIXELS if row is None else row)
        flat.extend(g_b1)
        for row in g_w2:
            flat.extend(row)
        flat.extend(g_b2)
        return flat, loss

    def count_correct(self, rows):
        correct = 0
        for pixels, digit in rows:
            probabilities = self._softmax(self._activate(pixels))
            if probabilities.index(max(probabilities)) == digit:
                correct += 1
        return correct

    def _activate(self, pixels):
        return [max(0.0, b + sum(map(mul, w, pixels))) for w, b in zip(self._w1, self._b1)]

    def _softmax(self, active):
        scores = [b + sum(map(mul, w, active)) for w, b in zip(self._w2, self._b2)]
        top = max(scores)
        powers = [math.exp(s - top) for s in scores]
        total = sum(powers)
        return [p / total for p in powers]
