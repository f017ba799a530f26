//! The read ends of the ranks' standard output and error. Knows nothing of what becomes of the bytes.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use trainyard_common::logrecord::LogKind;

/// Bytes that are read at once.
pub(crate) const READ_BYTES: usize = 64 << 10;
/// What a pipe holds before its writer has to wait: enough for the moments in which the shim does something else. A
/// user's pipes together have a limit (64 MiB by default), so more for each would leave none for later ones.
const PIPE_BYTES: i32 = 256 << 10;

/// One read end.
#[derive(Debug)]
pub(crate) struct Pipe {
    file: Option<File>,
    /// The place of its rank in the list of logs.
    pub(crate) log: usize,
    pub(crate) kind: LogKind,
}

impl Pipe {
    pub(crate) fn new(fd: OwnedFd, log: usize, kind: LogKind) -> Self {
        // Refused above the user's limit; then the ordinary size has to do.
        let _ = fcntl(&fd, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        if let Ok(flags) = fcntl(&fd, FcntlArg::F_GETFL) {
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
            let _ = fcntl(&fd, FcntlArg::F_SETFL(flags));
        }
        Self {
            file: Some(File::from(fd)),
            log,
            kind,
        }
    }

    /// Whether more may come.
    pub(crate) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    pub(crate) fn close(&mut self) {
        self.file = None;
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// What is there, never waiting; zero at the end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.read(buffer),
            None => Ok(0),
        }
    }
}
