"""Training state on disk: written whole or not at all, read back bit for bit.

Owns the format of checkpoint.json and the atomic write. Must not know of ranks or of the network's arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys

FILE_NAME = "checkpoint.json"
FORMAT = 1


class CheckpointError(Exception):
    """No usable checkpoint where one was promised. The message is meant for the user."""


def parameters_hash(params):
    """Equal hashes mean bit-identical parameters (as little-endian doubles)."""
    return hashlib.sha256(struct.pack("<{}d".format(len(params)), *params)).hexdigest()[:16]


def write_json(directory, name, value):
    """Writes `directory`/`name` so that a crash at any moment leaves the old file or the new one, never a part."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, name)
    temporary = "{}.tmp".format(path)
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)  # the rename itself must survive a power cut too
    finally:
        os.close(handle)


def save(directory, state):
    write_json(directory, FILE_NAME, dict(state, format=FORMAT, params_hash=parameters_hash(state["params"])))


def load_newest(directories, settings):
    """The furthest checkpoint in `directories` (None entries are skipped), or None if none of them has one.

    A damaged one is skipped with a warning, but if nothing else is left that is an error: starting from zero in
    silence would throw away the user's time. `settings` are values that the checkpoint must have been made with.
    """
    newest, damaged = None, []
    for directory in directories:
        path = os.path.join(directory, FILE_NAME) if directory else None
        if path is None or not os.path.exists(path):
            continue
        try:
            state = read(path)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            damaged.append(path)
            print("ignored the damaged checkpoint {}: {!r}".format(path, error), file=sys.stderr, flush=True)
            continue
        for name, value in settings.items():
            if state.get(name) != value:
                raise CheckpointError("{} was made with {} {}, this run has {}".format(
                    path, name, state.get(name), value))
        if newest is None or (state["epoch"], state["step"]) > (newest["epoch"], newest["step"]):
            newest = state
    if newest is None and damaged:
        raise CheckpointError("no usable checkpoint; remove {} to start anew".format(", ".join(damaged)))
    return newest


def read(path):
    with open(path, encoding="utf-8") as file:
        state = json.load(file)
    if state["format"] != FORMAT:
        raise ValueError("format {}, wanted {}".format(state["format"], FORMAT))
    if not all(isinstance(state[name], int) for name in ("epoch", "step")):
        raise ValueError("epoch and step must be integers")
    if not all(isinstance(state[name], list) for name in ("params", "losses", "accuracies")):
        raise ValueError("params, losses and accuracies must be lists")
    if parameters_hash(state["params"]) != state["params_hash"]:
        raise ValueError("params do not match params_hash")
    return state
