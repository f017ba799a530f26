//! The shim's side of its socket: whoever connects is told the newest state, and again at each change, and may send
//! commands. Knows nothing of what states and commands mean. A peer that does not read misses states, never delays them.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use serde::de::DeserializeOwned;

use super::ShimState;
use super::shim::note;
use super::wait::Ready;
use super::wire::{Lines, Status, line};

/// The agent, a successor that came before its predecessor was quite gone, and an operator's look. Beyond that the
/// oldest is dropped, so that strangers of the same user cannot lock the agent out.
const MAX_PEERS: usize = 8;
/// Reads from one peer before the others get their turn.
const READS_PER_TURN: usize = 16;

/// The socket and all connections.
#[derive(Debug)]
pub(crate) struct Peers {
    listener: UnixListener,
    peers: Vec<Peer>,
    /// The newest state as a line; empty before there is one.
    state: Vec<u8>,
}

#[derive(Debug)]
struct Peer {
    stream: UnixStream,
    lines: Lines,
    /// What is left of the line that is being sent.
    out: Vec<u8>,
    /// Whether a newer state than that line is to be told.
    stale: bool,
    closed: bool,
}

impl Peers {
    /// `first` is the connection that the agent gave along, if it did.
    pub(crate) fn new(listener: UnixListener, first: Option<UnixStream>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut peers = Self {
            listener,
            peers: Vec::new(),
            state: Vec::new(),
        };
        if let Some(stream) = first {
            stream.set_nonblocking(true)?;
            peers.add(stream);
        }
        Ok(peers)
    }

    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Each connection, and whether something is to be sent.
    pub(crate) fn fds(&self) -> impl Iterator<Item = (BorrowedFd<'_>, bool)> {
        self.peers
            .iter()
            .map(|peer| (peer.stream.as_fd(), !peer.out.is_empty()))
    }

    /// Tells everybody a new state.
    pub(crate) fn set(&mut self, state: &ShimState) {
        match line(&Status::new(state.clone())) {
            Ok(line) => self.set_line(line),
            Err(error) => note(&format!("a state could not be put into words: {error}")),
        }
    }

    /// Tells everybody a line, which must have its end.
    pub(crate) fn set_line(&mut self, line: Vec<u8>) {
        self.state = line;
        for peer in &mut self.peers {
            peer.stale = true;
        }
        self.tell();
    }

    /// Sends what can be sent without waiting.
    pub(crate) fn tell(&mut self) {
        for peer in &mut self.peers {
            peer.send(&self.state);
        }
        self.peers.retain(|peer| !peer.closed);
    }

    /// Takes new connections and commands.
    pub(crate) fn serve<T: DeserializeOwned>(&mut self, ready: &Ready) -> Vec<T> {
        let mut commands = Vec::new();
        for index in &ready.peers {
            if let Some(peer) = self.peers.get_mut(*index) {
                peer.receive(&mut commands);
            }
        }
        if ready.listener {
            self.accept();
        }
        self.tell();
        commands
    }

    fn accept(&mut self) {
        for _ in 0..MAX_PEERS {
            let Ok((stream, _)) = self.listener.accept() else {
                return;
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.peers.len() == MAX_PEERS {
                self.peers.remove(0);
            }
            self.add(stream);
        }
    }

    fn add(&mut self, stream: UnixStream) {
        self.peers.push(Peer {
            stream,
            lines: Lines::default(),
            out: Vec::new(),
            stale: !self.state.is_empty(),
            closed: false,
        });
    }
}

impl Peer {
    fn send(&mut self, state: &[u8]) {
        while !self.closed {
            if self.out.is_empty() {
                if !std::mem::take(&mut self.stale) {
                    return;
                }
                state.clone_into(&mut self.out);
            }
            match self.stream.write(&self.out) {
                Ok(sent) => drop(self.out.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.closed = true,
            }
        }
    }

    fn receive<T: DeserializeOwned>(&mut self, commands: &mut Vec<T>) {
        let mut buffer = [0; 4096];
        for _ in 0..READS_PER_TURN {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.closed = true;
                    break;
                }
                Ok(length) => self.lines.push(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.closed = true;
                    break;
                }
            }
        }
        loop {
            match self.lines.take() {
                Ok(Some(line)) => match serde_json::from_slice(&line) {
                    Ok(command) => commands.push(command),
                    Err(error) => note(&format!("a command was not understood: {error}")),
                },
                Ok(None) => return,
                Err(error) => {
                    note(&format!("a connection was given up: {error}"));
                    self.closed = true;
                    return;
                }
            }
        }
    }
}
