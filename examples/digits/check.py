#!/usr/bin/env python3
"""Checks a metrics.json of the training examples: the loss fell and the test accuracy is good enough.

Exit status: 0 if so, 1 with a sentence that says what is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys


def problem(metrics, min_accuracy):
    losses, accuracy = metrics["losses"], metrics["test_accuracy"]
    if len(losses) < 2:
        return "{} epoch(s): too few to see the loss fall".format(len(losses))
    if not all(math.isfinite(loss) for loss in losses):
        return "the loss is not finite: {}".format(losses)
    if losses[-1] >= losses[0]:
        return "the loss did not fall: first {:.4f}, last {:.4f}".format(losses[0], losses[-1])
    if not accuracy >= min_accuracy:
        return "test accuracy {:.4f} is below {:.4f}".format(accuracy, min_accuracy)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", metavar="METRICS.json")
    parser.add_argument("--min-accuracy", type=float, default=0.9)
    flags = parser.parse_args()
    try:
        with open(flags.metrics, encoding="utf-8") as file:
            metrics = json.load(file)
        wrong = problem(metrics, flags.min_accuracy)
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = "not a readable metrics.json: {!r}".format(error)
    if wrong is not None:
        print("{}: {}".format(flags.metrics, wrong), file=sys.stderr)
        return 1
    print("loss {:.4f} -> {:.4f}, test accuracy {:.4f}, params {}".format(
        metrics["losses"][0], metrics["losses"][-1], metrics["test_accuracy"], metrics.get("params_hash")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
