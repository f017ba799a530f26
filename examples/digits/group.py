"""The gang's process group: ranks find each other and add up vectors, over plain TCP.

Owns the rendezvous (rank 0 listens on MASTER_PORT, the others connect), the framing and the all-reduce.
Must not know what is being trained.

The topology is a star: every rank sends its vector to rank 0, which adds them in rank order and sends the sum back.
That order never changes, so the same ranks with the same inputs get bit-identical sums in every run.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import struct
import sys
import time
from array import array

# A frame is a 4-byte big-endian length and that many bytes.
HEADER = struct.Struct("!I")
# Far above any frame sent here (the model has a few thousand parameters); a stranger's bytes must not make us allocate.
MAX_FRAME_BYTES = 64 * 1024 * 1024
# The first frame of a connection is a short JSON text; strangers that send more, or nothing, are turned away.
MAX_HELLO_BYTES = 4096
HELLO_TIMEOUT_SECONDS = 5.0
CONNECT_RETRY_SECONDS = 0.1
PROTOCOL = "trainyard-digits/1"


class GroupError(Exception):
    """The gang cannot be formed, or a peer is gone. The message is meant for the user."""


class Group:
    """All ranks of one attempt. A group of one rank needs no network and no MASTER_ADDR."""

    def __init__(self, rank, world_size, master_addr, master_port, join_timeout, peer_timeout):
        self.rank = rank
        self.world_size = world_size
        self._peer_timeout = peer_timeout
        self._peers = {}  # rank -> socket; rank 0 has all others, the others have only rank 0
        # Ranks of an older attempt may still be alive somewhere; this keeps them out of ours.
        self._key = "{}/{}".format(os.environ.get("YARD_JOB_ID", ""), os.environ.get("YARD_ATTEMPT", ""))
        if world_size == 1:
            return
        deadline = time.monotonic() + join_timeout
        if rank == 0:
            self._gather_peers(master_addr, master_port, deadline)
        else:
            self._join(master_addr, master_port, deadline)
        for peer in self._peers.values():
            peer.settimeout(peer_timeout)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # ---- what training uses -------------------------------------------------------------------------------------

    def all_reduce(self, values):
        """The element-wise sum of every rank's `values` (an array('d') of the same length everywhere)."""
        if self.world_size == 1:
            return values
        if self.rank != 0:
            self._send(0, to_bytes(values))
            return self._receive_vector(0, len(values))
        total = values
        for peer in range(1, self.world_size):
            other = self._receive_vector(peer, len(values))
            total = array("d", [a + b for a, b in zip(total, other)])
        payload = to_bytes(total)
        for peer in range(1, self.world_size):
            self._send(peer, payload)
        return total

    def broadcast(self, message):
        """Rank 0's `message` (anything that JSON can carry; floats survive exactly), on every rank."""
        if self.world_size == 1:
            return message
        if self.rank != 0:
            return json.loads(self._receive(0).decode("utf-8"))
        payload = json.dumps(message).encode("utf-8")
        for peer in range(1, self.world_size):
            self._send(peer, payload)
        return message

    def close(self):
        for peer in self._peers.values():
            peer.close()
        self._peers = {}

    # ---- rendezvous ---------------------------------------------------------------------------------------------

    def _gather_peers(self, addr, port, deadline):
        with listen(addr, port, self.world_size, deadline) as listener:
            while len(self._peers) < self.world_size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, source = listener.accept()
                except socket.timeout:
                    missing = [r for r in range(1, self.world_size) if r not in self._peers]
                    raise GroupError("rank 0 waited in vain on port {} for rank(s) {}".format(port, missing)) from None
                peer = self._check_hello(connection, source)
                if peer is None:
                    connection.close()
                elif peer in self._peers:
                    raise GroupError("two processes say that they are rank {}".format(peer))
                else:
                    self._peers[peer] = connection

    def _check_hello(self, connection, source):
        """The rank that the new connection belongs to; None for strangers and for ranks of another attempt."""
        try:
            connection.settimeout(HELLO_TIMEOUT_SECONDS)
            hello = json.loads(read_frame(connection, MAX_HELLO_BYTES).decode("utf-8"))
            wanted = {"protocol": PROTOCOL, "key": self._key, "world_size": self.world_size}
            got = {name: hello.get(name) for name in wanted}
            peer = hello.get("rank")
            valid = got == wanted and isinstance(peer, int) and 0 < peer < self.world_size
            if not valid:
                note("turned away {}: wanted {}, got {}".format(source[0], wanted, hello))
                return None
            write_frame(connection, b"welcome")
            return peer
        except (OSError, ValueError, AttributeError) as error:
            note("turned away {}: {}".format(source[0], error))
            return None

    def _join(self, addr, port, deadline):
        hello = {"protocol": PROTOCOL, "key": self._key, "world_size": self.world_size, "rank": self.rank}
        last_error = None
        while time.monotonic() < deadline:
            connection = None
            try:
                remaining = max(0.01, deadline - time.monotonic())
                connection = socket.create_connection((addr, port), timeout=remaining)
                if connection.getsockname() == connection.getpeername():
                    # Loopback only: a connect to a port nobody listens on yet can, by chance, meet itself.
                    raise OSError("connected to itself")
                write_frame(connection, json.dumps(hello).encode("utf-8"))
                if read_frame(connection, MAX_HELLO_BYTES) != b"welcome":
                    raise OSError("unexpected answer")
                self._peers[0] = connection
                return
            except OSError as error:
                # Rank 0 may not listen yet, or something that kept the port for it has just let go: try again.
                last_error = error
                if connection is not None:
                    connection.close()
                time.sleep(CONNECT_RETRY_SECONDS)
        raise GroupError("rank {} cannot join rank 0 at {}:{}: {}".format(self.rank, addr, port, last_error))

    # ---- frames between ranks -----------------------------------------------------------------------------------

    def _send(self, peer, payload):
        try:
            write_frame(self._peers[peer], payload)
        except OSError as error:
            raise self._lost(peer, error) from None

    def _receive(self, peer):
        try:
            return read_frame(self._peers[peer], MAX_FRAME_BYTES)
        except OSError as error:
            raise self._lost(peer, error) from None

    def _receive_vector(self, peer, length):
        values = from_bytes(self._receive(peer))
        if len(values) != length:
            raise GroupError("rank {} sent {} numbers, wanted {}".format(peer, len(values), length))
        return values

    def _lost(self, peer, error):
        if isinstance(error, socket.timeout):
            error = "silent for {:g} s".format(self._peer_timeout)
        return GroupError("rank {} lost rank {}: {}".format(self.rank, peer, error))


def listen(addr, port, backlog, deadline):
    """Rank 0's listener: on MASTER_ADDR if that is an address of this machine, else on all addresses.

    A name is not bound to: many machines map their own name to 127.0.1.1, where no other machine could connect.
    """
    try:
        literal = ipaddress.ip_address(addr)
    except ValueError:
        literal = None
    family = socket.AF_INET6 if literal is not None and literal.version == 6 else socket.AF_INET
    host = "" if literal is None else addr
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(backlog)
            return listener
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRNOTAVAIL and host:
                host = ""  # behind address translation: the others reach us by an address that we do not have
            elif error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(CONNECT_RETRY_SECONDS)
            else:
                raise GroupError("rank 0 cannot listen on {}:{}: {}".format(host or "*", port, error)) from None


def write_frame(connection, payload):
    connection.sendall(HEADER.pack(len(payload)) + payload)


def read_frame(connection, limit):
    (length,) = HEADER.unpack(read_exactly(connection, HEADER.size))
    if length > limit:
        raise OSError("frame of {} bytes, at most {} allowed".format(length, limit))
    return read_exactly(connection, length)


def read_exactly(connection, count):
    data = bytearray(count)
    view = memoryview(data)
    done = 0
    while done < count:
        received = connection.recv_into(view[done:])
        if received == 0:
            raise ConnectionError("connection closed by the other side")
        done += received
    return bytes(data)


def to_bytes(values):
    """Little-endian IEEE doubles, whatever the machine."""
    if sys.byteorder == "big":
        values = array("d", values)
        values.byteswap()
    return values.tobytes()


def from_bytes(payload):
    values = array("d")
    if len(payload) % values.itemsize != 0:
        raise GroupError("a frame of {} bytes holds no whole number of doubles".format(len(payload)))
    values.frombytes(payload)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def note(text):
    print(text, file=sys.stderr, flush=True)
