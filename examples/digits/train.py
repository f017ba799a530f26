#!/usr/bin/env python3
"""Data-parallel training of a handwritten-digit classifier in plain Python: nothing to install, any number of ranks.

Every rank computes the gradient of its share of each mini-batch, all ranks add up theirs (group.py), and every rank
takes the same step. What a runtime must set: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (with none of them it is one
process alone). What it may set: YARD_OUTPUT_DIR, YARD_CHECKPOINT_DIR, YARD_RESUME_FROM, YARD_ATTEMPT.

Exit status: 0 trained; 1 a peer is gone or a file is unusable; 2 wrong flags or environment; 3 asked to crash;
75 told to stop by SIGTERM, with a checkpoint at the exact mini-batch.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from array import array

import checkpoint
from group import Group, GroupError
from mlp import Mlp, initial_parameters, load_digits

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CRASH = 3
EXIT_STOPPED = 75
HERE = os.path.dirname(os.path.abspath(__file__))
# What every rank adds to the sum besides its gradient: loss, and whether it was told to stop.
EXTRA_SUMS = 2


class UsageError(Exception):
    """Wrong flags or environment. The message is meant for the user."""


class Stopped(Exception):
    """All ranks have agreed to stop after the same mini-batch."""


def parse_flags(arguments):
    parser = argparse.ArgumentParser(description="Train a handwritten-digit classifier on any number of ranks.")
    parser.add_argument("--epochs", type=positive_int, default=10)
    parser.add_argument("--batch", type=positive_int, default=32, help="rows per step, over all ranks together")
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate")
    parser.add_argument("--hidden", type=positive_int, default=32, help="hidden units")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", default=os.environ.get("DIGITS_DATA") or os.path.join(HERE, "data"),
                        help="directory of digits.csv.gz")
    parser.add_argument("--join-timeout", type=float, default=60.0, help="seconds to wait for all ranks")
    parser.add_argument("--peer-timeout", type=float, default=120.0, help="seconds of silence that mean a rank is gone")
    parser.add_argument("--step-sleep", type=float, default=0.0, help="seconds to sleep per step, to make a slow job")
    parser.add_argument("--crash-at-epoch", type=positive_int, metavar="N",
                        help="in the first attempt, exit with 3 in epoch N, after its first step")
    parser.add_argument("--crash-rank", type=int, default=0, help="the rank that crashes")
    return parser.parse_args(arguments)


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def integer_from(name, default, minimum, maximum):
    text = os.environ.get(name)
    if text is None or text == "":
        if default is None:
            raise UsageError("WORLD_SIZE is above 1, but {} is not set".format(name))
        return default
    try:
        value = int(text)
    except ValueError:
        raise UsageError("{}={!r} is not a number".format(name, text)) from None
    if not minimum <= value <= maximum:
        raise UsageError("{}={} is not within {} and {}".format(name, value, minimum, maximum))
    return value


def join_group(flags):
    world_size = integer_from("WORLD_SIZE", 1, 1, 4096)
    rank = integer_from("RANK", 0 if world_size == 1 else None, 0, world_size - 1)
    if world_size == 1:
        return Group(0, 1, None, None, 0.0, 0.0)
    addr = os.environ.get("MASTER_ADDR")
    if not addr:
        raise UsageError("WORLD_SIZE is above 1, but MASTER_ADDR is not set")
    port = integer_from("MASTER_PORT", None, 1, 65535)
    return Group(rank, world_size, addr, port, flags.join_timeout, flags.peer_timeout)


class Trainer:
    """One rank's view of the training; `self.state` is the same on all ranks after every step.

    `epoch` counts finished epochs, `step` the finished steps of the one after, `loss_sum` its losses so far.
    """

    def __init__(self, flags, group):
        self.flags = flags
        self.group = group
        self.train_rows, self.test_rows = load_digits(os.path.join(flags.data, "digits.csv.gz"))
        self.checkpoint_dir = os.environ.get("YARD_CHECKPOINT_DIR") or None
        self.state = group.broadcast(self._first_state() if group.rank == 0 else None)
        if "failed" in self.state:
            # Told to all, so that no rank has to guess from a broken connection.
            raise checkpoint.CheckpointError(self.state["failed"])
        self.resumed = self.state.pop("resumed")
        self.start_epoch = self.state["epoch"] + 1
        self.model = Mlp(self.state["hidden"], self.state.pop("params"))
        self.stop_requested = False
        self.first_attempt = os.environ.get("YARD_ATTEMPT", "1") in ("", "1")

    def _first_state(self):
        flags = self.flags
        settings = {"hidden": flags.hidden, "seed": flags.seed, "batch": flags.batch}
        try:
            found = checkpoint.load_newest([self.checkpoint_dir, os.environ.get("YARD_RESUME_FROM")], settings)
            if found is not None:
                return dict(found, resumed=True)
        except checkpoint.CheckpointError as error:
            return {"failed": str(error)}
        return dict(settings, resumed=False, epoch=0, step=0, loss_sum=0.0, losses=[], accuracies=[],
                    params=initial_parameters(flags.hidden, flags.seed))

    def run(self):
        self._say("ranks={} train_rows={} test_rows={} params={} start_epoch={} resumed={}".format(
            self.group.world_size, len(self.train_rows), len(self.test_rows), len(self.model.params),
            self.start_epoch, str(self.resumed).lower()))
        while self.state["epoch"] < self.flags.epochs:
            self._run_epoch()

    def _run_epoch(self):
        state, flags = self.state, self.flags
        number = state["epoch"] + 1
        started = time.monotonic()
        order = list(range(len(self.train_rows)))
        # From seed and epoch alone, so a resumed run sees the same order without keeping a generator's state.
        random.Random("order {} {}".format(flags.seed, number)).shuffle(order)
        batches = [order[i:i + flags.batch] for i in range(0, len(order), flags.batch)]
        while state["step"] < len(batches):
            self._run_step(batches[state["step"]])
            if flags.crash_at_epoch == number and self.first_attempt and flags.crash_rank == self.group.rank:
                print("rank {} crashes in epoch {}, as asked".format(self.group.rank, number), flush=True)
                os._exit(EXIT_CRASH)
        loss = state["loss_sum"] / len(self.train_rows)
        accuracy = self._test()
        state.update(epoch=number, step=0, loss_sum=0.0)
        state["losses"].append(loss)
        state["accuracies"].append(accuracy)
        self._save()
        self._say("epoch={} loss={:.4f} test_accuracy={:.4f} seconds={:.1f}".format(
            number, loss, accuracy, time.monotonic() - started))

    def _run_step(self, batch):
        mine = [self.train_rows[i] for i in batch[self.group.rank::self.group.world_size]]
        gradient, loss = self.model.gradient(mine)
        if self.flags.step_sleep > 0:
            time.sleep(self.flags.step_sleep)
        # "Stop" travels in the sum: all ranks learn of it at the same step, whichever of them got the signal.
        total = self.group.all_reduce(array("d", gradient + [loss, 1.0 if self.stop_requested else 0.0]))
        self.model.descend(total[:-EXTRA_SUMS], self.flags.lr / len(batch))
        self.state["loss_sum"] += total[-2]
        self.state["step"] += 1
        if total[-1] > 0.0:
            self._save()
            raise Stopped()

    def _test(self):
        mine = self.test_rows[self.group.rank::self.group.world_size]
        correct = self.group.all_reduce(array("d", [float(self.model.count_correct(mine))]))
        return correct[0] / len(self.test_rows)

    def _save(self):
        if self.group.rank == 0 and self.checkpoint_dir is not None:
            checkpoint.save(self.checkpoint_dir, dict(
                self.state, world_size=self.group.world_size, params=self.model.params))

    def write_outputs(self):
        """Rank 0's metrics.json and model.json."""
        if self.group.rank != 0:
            return
        directory = os.environ.get("YARD_OUTPUT_DIR") or "output"
        losses, accuracies = self.state["losses"], self.state["accuracies"]
        digest = checkpoint.parameters_hash(self.model.params)
        checkpoint.write_json(directory, "model.json", {
            "hidden": self.model.hidden, "params": self.model.params, "params_hash": digest})
        checkpoint.write_json(directory, "metrics.json", {
            "world_size": self.group.world_size, "epochs": self.state["epoch"], "start_epoch": self.start_epoch,
            "resumed": self.resumed, "losses": losses, "test_accuracies": accuracies,
            "test_accuracy": accuracies[-1], "params_hash": digest})
        self._say("done epochs={} test_accuracy={:.4f} params={}".format(self.state["epoch"], accuracies[-1], digest))

    def _say(self, text):
        if self.group.rank == 0:
            print(text, flush=True)


def request_stop(trainer):
    trainer.stop_requested = True


def main(arguments):
    flags = parse_flags(arguments)
    try:
        group = join_group(flags)
        trainer = Trainer(flags, group)
        # Only now: until the ranks have met there is nothing to save, and SIGTERM may end the process as usual.
        signal.signal(signal.SIGTERM, lambda _signal, _frame: request_stop(trainer))
        trainer.run()
        trainer.write_outputs()
        group.close()
        return 0
    except Stopped:
        print("rank {} stopped by SIGTERM after epoch {}, step {}".format(
            group.rank, trainer.state["epoch"], trainer.state["step"]), flush=True)
        return EXIT_STOPPED
    except UsageError as error:
        print("train.py: {}".format(error), file=sys.stderr, flush=True)
        return EXIT_USAGE
    except (GroupError, checkpoint.CheckpointError, OSError, ValueError) as error:
        print("train.py: {}".format(error), file=sys.stderr, flush=True)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
