//! How the shim sleeps: one `poll` over all it listens to, and one timer that also counts while the machine sleeps.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::peers::Peers;
use super::pipes::Pipe;
use trainyard_transport::clock::BootTime;

/// A timer of zero would be switched off.
const SHORTEST: std::time::Duration = std::time::Duration::from_nanos(1);

/// Wakes the loop at a time.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: TimerFd,
    armed: Option<BootTime>,
}

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self {
            fd: TimerFd::new(ClockId::CLOCK_BOOTTIME, flags)?,
            armed: None,
        })
    }

    /// Sets it to go off then, or never.
    pub(crate) fn set(&mut self, at: Option<BootTime>) -> io::Result<()> {
        if at == self.armed {
            return Ok(());
        }
        match at {
            Some(at) => {
                let left = BootTime::now().until(at).max(SHORTEST);
                let once = Expiration::OneShot(TimeSpec::from_duration(left));
                self.fd.set(once, TimerSetTimeFlags::empty())?;
            }
            None => self.fd.unset()?,
        }
        self.armed = at;
        Ok(())
    }

    /// It went off and is to be set again.
    pub(crate) fn clear(&mut self) {
        // Not blocking: at worst it went off for an earlier setting.
        let _ = self.fd.wait();
        self.armed = None;
    }
}

/// What has something to say.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    pub(crate) signals: bool,
    pub(crate) timer: bool,
    pub(crate) listener: bool,
    /// Places in the list of connections.
    pub(crate) peers: Vec<usize>,
    /// Places in the list of pipes.
    pub(crate) pipes: Vec<usize>,
}

/// Sleeps until at least one of them has.
pub(crate) fn wait(
    signals: &SignalFd,
    timer: &Timer,
    peers: &Peers,
    pipes: &[Pipe],
) -> io::Result<Ready> {
    let input = PollFlags::POLLIN;
    let mut fds = vec![
        PollFd::new(signals.as_fd(), input),
        PollFd::new(timer.fd.as_fd(), input),
        PollFd::new(peers.listener(), input),
    ];
    for (fd, sending) in peers.fds() {
        let output = if sending {
            PollFlags::POLLOUT
        } else {
            PollFlags::empty()
        };
        fds.push(PollFd::new(fd, input | output));
    }
    let first_pipe = fds.len();
    let mut open = Vec::with_capacity(pipes.len());
    for (index, pipe) in pipes.iter().enumerate() {
        if let Some(fd) = pipe.fd() {
            fds.push(PollFd::new(fd, input));
            open.push(index);
        }
    }
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut ready = Ready::default();
    for (index, fd) in fds.iter().enumerate() {
        if fd.any() != Some(true) {
            continue;
        }
        match index {
            0 => ready.signals = true,
            1 => ready.timer = true,
            2 => ready.listener = true,
            _ if index < first_pipe => ready.peers.push(index - 3),
            _ => ready.pipes.push(open[index - first_pipe]),
        }
    }
    Ok(ready)
}
