#!/usr/bin/env python3
"""PyTorch DistributedDataParallel on the handwritten digits: a small convolutional network, gloo, CPU only.

Needs torch 1.13 or newer and nothing else. Runs as plain ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the
environment) and under torchrun. What a runtime may set besides: YARD_OUTPUT_DIR, YARD_CHECKPOINT_DIR,
YARD_RESUME_FROM, YARD_ATTEMPT; GLOO_SOCKET_IFNAME is read by torch itself.

A resumed run ends with the same params= hash as one without interruption, at the same world size, torch and machine
type. Exit status: 0 trained; 1 a peer is gone or a file is unusable; 2 wrong flags or environment; 3 asked to crash;
75 told to stop by SIGTERM, with a checkpoint at the exact mini-batch.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import hashlib
import io
import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CRASH = 3
EXIT_STOPPED = 75
HERE = os.path.dirname(os.path.abspath(__file__))
CHECKPOINT_FILE = "checkpoint.pt"
PIXELS = 64
CLASSES = 10
PIXEL_MAX = 16.0
# Every fifth row is for testing, the same ones as in the plain Python example.
TEST_EVERY = 5
# How rank 0 tells the others where training starts.
FRESH, RESUME, UNUSABLE = 0, 1, 2


class UsageError(Exception):
    """Wrong flags or environment. The message is meant for the user."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is meant for the user."""


class Stopped(Exception):
    """All ranks have agreed to stop after the same mini-batch."""


def parse_flags(arguments):
    parser = argparse.ArgumentParser(description="Train a handwritten-digit classifier with PyTorch DDP.")
    parser.add_argument("--epochs", type=positive_int, default=5)
    parser.add_argument("--batch", type=positive_int, default=32, help="rows per step, over all ranks together")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--channels", type=positive_int, default=16, help="channels of the convolution")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peer-timeout", type=float, default=120.0, help="seconds without a rank that mean it is gone")
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


# ---- data and model ---------------------------------------------------------------------------------------------


def data_file():
    """$DIGITS_DATA, or data/ beside this script, or the copy of the plain Python example."""
    named = os.environ.get("DIGITS_DATA")
    places = [named] if named else [os.path.join(HERE, "data"), os.path.join(HERE, "..", "digits", "data")]
    for place in places:
        path = os.path.join(place, "digits.csv.gz")
        if os.path.exists(path):
            return path
    raise UsageError("no digits.csv.gz in {}; set DIGITS_DATA to its directory".format(" or ".join(places)))


def load_digits(path):
    """((images, digits) for training, the same for testing); images are 1 x 8 x 8 with values from 0 to 1."""
    with gzip.open(path, "rt", encoding="ascii", newline="") as lines:
        table = torch.tensor([[float(value) for value in record] for record in csv.reader(lines)])
    images = (table[:, :PIXELS] / PIXEL_MAX).reshape(-1, 1, 8, 8)
    digits = table[:, PIXELS].long()
    for_test = torch.arange(len(table)) % TEST_EVERY == 0
    return (images[~for_test], digits[~for_test]), (images[for_test], digits[for_test])


def build_model(channels):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(channels * 16, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def parameters_hash(model):
    """Equal hashes mean bit-identical parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(bytes(parameter.detach().contiguous().view(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]


# ---- files ------------------------------------------------------------------------------------------------------


def write_file(directory, name, write):
    """`write(file)` into `directory`/`name`, so that a crash at any moment leaves the old file or the new one."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, name)
    temporary = "{}.tmp".format(path)
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)  # the rename itself must survive a power cut too
    finally:
        os.close(handle)


def load_newest(settings):
    """The bytes of the furthest checkpoint in this attempt's directory and the one to resume from, or None.

    A damaged one is skipped with a warning, but if nothing else is left that is an error: starting from zero in
    silence would throw away the user's time.
    """
    newest, damaged = None, []
    for directory in (os.environ.get("YARD_CHECKPOINT_DIR"), os.environ.get("YARD_RESUME_FROM")):
        path = os.path.join(directory, CHECKPOINT_FILE) if directory else None
        if path is None or not os.path.exists(path):
            continue
        try:
            with open(path, "rb") as file:
                content = file.read()
            state = decode_checkpoint(content)
            position = (state["epoch"], state["step"])
        except Exception as error:  # torch.load raises many types for a damaged file
            damaged.append(path)
            print("ignored the damaged checkpoint {}: {!r}".format(path, error), file=sys.stderr, flush=True)
            continue
        for name, value in settings.items():
            if state.get(name) != value:
                raise CheckpointError("{} was made with {} {}, this run has {}".format(
                    path, name, state.get(name), value))
        if newest is None or position > newest[0]:
            newest = (position, content)
    if newest is None and damaged:
        raise CheckpointError("no usable checkpoint; remove {} to start anew".format(", ".join(damaged)))
    return newest[1] if newest is not None else None


def encode_checkpoint(progress, model, optimizer):
    """The bytes of a checkpoint file.

    Numbers go in as JSON text: torch 1.13 with weights_only reads tensors and strings, but no Python floats.
    """
    content = {"progress": json.dumps(progress), "model": model.state_dict(),
               "optimizer": optimizer.state_dict()["state"]}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def decode_checkpoint(content):
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return dict(json.loads(tensors["progress"]), model=tensors["model"], optimizer=tensors["optimizer"])


# ---- training ---------------------------------------------------------------------------------------------------


class Trainer:
    """One rank's view of the training; `self.state` is the same on all ranks after every step.

    `epoch` counts finished epochs, `step` the finished steps of the one after, `loss_sum` its losses so far.
    """

    def __init__(self, flags):
        self.flags = flags
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        if flags.batch < self.world_size:
            raise UsageError("--batch {} is less than one row for each of {} ranks".format(
                flags.batch, self.world_size))
        self.train_rows, self.test_rows = load_digits(data_file())
        self.stop_requested = False
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self.first_attempt = os.environ.get("YARD_ATTEMPT", "1") in ("", "1") and not restarted

        torch.manual_seed(flags.seed)
        model = build_model(flags.channels)
        start = self._agree_on_start()
        self.resumed = start is not None
        self.state = {"epoch": 0, "step": 0, "loss_sum": 0.0, "losses": [], "accuracies": []}
        if self.resumed:
            self.state = {name: start[name] for name in self.state}
            model.load_state_dict(start["model"])
        self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=flags.lr, momentum=0.9)
        if self.resumed:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": start["optimizer"], "param_groups": groups})
        self._settle_buckets()
        self.start_epoch = self.state["epoch"] + 1

    def _settle_buckets(self):
        """DDP lays its gradient buckets out anew after the first backward pass, which changes the order of additions.

        From three ranks on, a resumed run's first step would so differ in the last bit from the same step of a run
        without interruption. One pass that changes no parameter puts that behind us.
        """
        self.model(self.train_rows[0][:1]).sum().backward()
        self.optimizer.zero_grad()

    def _settings(self):
        return {"channels": self.flags.channels, "seed": self.flags.seed, "batch": self.flags.batch}

    def _agree_on_start(self):
        """What rank 0 found to resume from, on all ranks: a checkpoint directory may exist on one node only."""
        status, content = FRESH, b""
        if self.rank == 0:
            try:
                found = load_newest(self._settings())
                if found is not None:
                    status, content = RESUME, found
            except CheckpointError as error:
                status, content = UNUSABLE, str(error).encode("utf-8")
        status, content = self._broadcast(status, content)
        if status == UNUSABLE:
            raise CheckpointError(content.decode("utf-8"))
        return decode_checkpoint(content) if status == RESUME else None

    def _broadcast(self, status, content):
        """Rank 0's number and bytes, on all ranks. (torch's own broadcast of objects needs numpy.)"""
        header = torch.tensor([status, len(content)])
        dist.broadcast(header, src=0)
        status, length = header.tolist()
        if length > 0:
            body = torch.tensor(list(content), dtype=torch.uint8) if self.rank == 0 else torch.empty(
                length, dtype=torch.uint8)
            dist.broadcast(body, src=0)
            content = bytes(body.tolist())
        return status, content

    def run(self):
        self._say("ranks={} train_rows={} test_rows={} params={} start_epoch={} resumed={} torch={}".format(
            self.world_size, len(self.train_rows[1]), len(self.test_rows[1]),
            sum(p.numel() for p in self.model.parameters()), self.start_epoch, str(self.resumed).lower(),
            torch.__version__))
        while self.state["epoch"] < self.flags.epochs:
            self._run_epoch()

    def _run_epoch(self):
        state, flags = self.state, self.flags
        number = state["epoch"] + 1
        started = time.monotonic()
        generator = torch.Generator()
        # From seed and epoch alone, so a resumed run sees the same order without keeping a generator's state.
        generator.manual_seed(flags.seed * 1_000_003 + number)
        order = torch.randperm(len(self.train_rows[1]), generator=generator)
        # A last batch with fewer rows than ranks would leave a rank without work: left out, in this epoch.
        batches = [batch for batch in order.split(flags.batch) if len(batch) >= self.world_size]
        while state["step"] < len(batches):
            self._run_step(batches[state["step"]])
            if flags.crash_at_epoch == number and self.first_attempt and flags.crash_rank == self.rank:
                print("rank {} crashes in epoch {}, as asked".format(self.rank, number), flush=True)
                os._exit(EXIT_CRASH)
        loss = state["loss_sum"] / sum(len(batch) for batch in batches)
        accuracy = self._test()
        state.update(epoch=number, step=0, loss_sum=0.0)
        state["losses"].append(loss)
        state["accuracies"].append(accuracy)
        self._save()
        self._say("epoch={} loss={:.4f} test_accuracy={:.4f} seconds={:.1f}".format(
            number, loss, accuracy, time.monotonic() - started))

    def _run_step(self, batch):
        mine = batch[self.rank::self.world_size]
        images, digits = self.train_rows[0][mine], self.train_rows[1][mine]
        loss_sum = nn.functional.cross_entropy(self.model(images), digits, reduction="sum")
        self.optimizer.zero_grad()
        # DDP takes the mean over ranks; scaled like this it is the mean over the rows, also for uneven shares.
        (loss_sum * self.world_size / len(batch)).backward()
        self.optimizer.step()
        if self.flags.step_sleep > 0:
            time.sleep(self.flags.step_sleep)
        # "Stop" travels in a sum: all ranks learn of it at the same step, whichever of them got the signal.
        totals = self._sum([loss_sum.item(), 1.0 if self.stop_requested else 0.0])
        self.state["loss_sum"] += totals[0]
        self.state["step"] += 1
        if totals[1] > 0.0:
            self._save()
            raise Stopped()

    def _test(self):
        images = self.test_rows[0][self.rank::self.world_size]
        digits = self.test_rows[1][self.rank::self.world_size]
        with torch.no_grad():
            # The plain module: DDP's own forward may talk to the other ranks.
            correct = (self.model.module(images).argmax(1) == digits).sum().item()
        return self._sum([float(correct)])[0] / len(self.test_rows[1])

    def _sum(self, numbers):
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values)
        return values.tolist()

    def _save(self):
        directory = os.environ.get("YARD_CHECKPOINT_DIR")
        if self.rank != 0 or not directory:
            return
        progress = dict(self.state, **self._settings())
        content = encode_checkpoint(progress, self.model.module, self.optimizer)
        write_file(directory, CHECKPOINT_FILE, lambda file: file.write(content))

    def write_outputs(self):
        """Rank 0's metrics.json and model.pt."""
        if self.rank != 0:
            return
        directory = os.environ.get("YARD_OUTPUT_DIR") or "output"
        losses, accuracies = self.state["losses"], self.state["accuracies"]
        digest = parameters_hash(self.model)
        metrics = {
            "world_size": self.world_size, "epochs": self.state["epoch"], "start_epoch": self.start_epoch,
            "resumed": self.resumed, "losses": losses, "test_accuracies": accuracies,
            "test_accuracy": accuracies[-1], "params_hash": digest, "torch": torch.__version__}
        write_file(directory, "model.pt", lambda file: torch.save(self.model.module.state_dict(), file))
        write_file(directory, "metrics.json", lambda file: file.write(json.dumps(metrics).encode("utf-8") + b"\n"))
        self._say("done epochs={} test_accuracy={:.4f} params={}".format(self.state["epoch"], accuracies[-1], digest))

    def _say(self, text):
        if self.rank == 0:
            print(text, flush=True)


def join_group(flags):
    """The process group; without RANK and WORLD_SIZE a group of this process alone, which needs no network."""
    timeout = datetime.timedelta(seconds=flags.peer_timeout)
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError("WORLD_SIZE is above 1, but {} is not set".format(", ".join(missing)))
    dist.init_process_group("gloo", timeout=timeout)


def request_stop(trainer):
    trainer.stop_requested = True


def main(arguments):
    flags = parse_flags(arguments)
    # One thread: the order of additions must not depend on the machine, and ranks often share few cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        join_group(flags)
        trainer = Trainer(flags)
        # Only now: until the ranks have met there is nothing to save, and SIGTERM may end the process as usual.
        signal.signal(signal.SIGTERM, lambda _signal, _frame: request_stop(trainer))
        trainer.run()
        trainer.write_outputs()
        dist.destroy_process_group()
        return 0
    except Stopped:
        print("rank {} stopped by SIGTERM after epoch {}, step {}".format(
            trainer.rank, trainer.state["epoch"], trainer.state["step"]), flush=True)
        return EXIT_STOPPED
    except UsageError as error:
        print("train.py: {}".format(error), file=sys.stderr, flush=True)
        return EXIT_USAGE
    except (CheckpointError, RuntimeError, OSError, ValueError) as error:
        # gloo says "Connection closed by peer" and the like with a RuntimeError.
        print("train.py: rank {} failed: {}".format(os.environ.get("RANK", "0"), error), file=sys.stderr, flush=True)
        return EXIT_FAILED


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a lost peer, gloo's threads can hang in their clean-up at interpreter exit.
    os._exit(status)
