//! The main thread of a carrier: listens to the agent, hands tasks to slots, gives back what waits too long, and ends when
//! there is nothing left to do. It makes no processes, so its children are orphans.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal as SignalName;
use nix::sys::signalfd::SignalFd;
use trainyard_common::bundle::{BundlePhase, DesiredBundle, MAX_SLOTS, TaskRange};
use trainyard_transport::clock::BootTime;

use super::super::peers::Peers;
use super::super::shim::note;
use super::super::supervise::stop_message;
use super::super::wait::Ready;
use super::super::wire::line;
use super::client::Told;
use super::journal::{Record, missing};
use super::processes::{Orphans, Whose, find, kill};
use super::slot;
use super::work::{Shared, StopOrder, pause, poll_timeout};

/// The agent is told of news at most so often: under load each message then brings some dozens of tasks, and of a task
/// that ends alone it is told at once.
const TELL_EVERY: Duration = Duration::from_millis(20);
/// How often orphans are looked after while tasks run. Their exit statuses must be taken, or a task that makes daemons
/// without end would use up the machine's process numbers.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How often a slot that could not be made is tried again.
const SLOT_RETRY: Duration = Duration::from_secs(1);
/// Rounds of killing what is left at the very end, some milliseconds each at first; what does not die then is told of.
const LAST_ROUNDS: u32 = 1000;
const LAST_PAUSE_MS: u16 = 5;

/// The main thread's own.
#[derive(Debug)]
pub(super) struct Control {
    shared: Arc<Shared>,
    peers: Peers,
    signals: SignalFd,
    orphans: Orphans,
    slots: u32,
    /// No more tasks will come.
    closed: bool,
    stopped: bool,
    /// Bytes of the journal that the agent was told of.
    told: Option<u64>,
    tell_at: BootTime,
    sweep_at: BootTime,
    /// When more slots may be made, after that failed.
    slots_at: BootTime,
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>, peers: Peers, signals: SignalFd) -> Self {
        let now = BootTime::now();
        Self {
            shared,
            peers,
            signals,
            orphans: Orphans::new(),
            slots: 0,
            closed: false,
            stopped: false,
            told: None,
            tell_at: now,
            sweep_at: now,
            slots_at: now,
        }
    }

    /// Returns when nothing is left of the bundle and that is recorded.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            let now = BootTime::now();
            self.give_back(now);
            self.sweep(now);
            if (self.closed || self.stopped) && self.shared.is_idle() {
                break;
            }
            self.add_slots(now);
            self.tell(now);
            let ready = self.wait()?;
            self.turn(&ready);
        }
        self.end_everything();
        let message = String::new();
        self.shared.record(&[Record::Over { message }]);
        // Nobody waits for this, but the machine may be switched off next.
        self.shared.sync();
        self.tell_at = BootTime::now();
        self.tell(self.tell_at);
        Ok(())
    }

    // === what comes in ===

    fn wait(&self) -> io::Result<Ready> {
        let input = PollFlags::POLLIN;
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), input),
            PollFd::new(self.shared.bell.fd(), input),
            PollFd::new(self.peers.listener(), input),
        ];
        for (fd, sending) in self.peers.fds() {
            let output = match sending {
                true => PollFlags::POLLOUT,
                false => PollFlags::empty(),
            };
            fds.push(PollFd::new(fd, input | output));
        }
        let timeout = poll_timeout(self.sleep());
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        if ready[1] {
            self.shared.bell.silence();
            self.shared.answer();
        }
        let peers = ready.iter().skip(3).enumerate();
        Ok(Ready {
            signals: ready[0],
            listener: ready[2],
            peers: peers
                .filter_map(|(at, ready)| ready.then_some(at))
                .collect(),
            ..Ready::default()
        })
    }

    fn sleep(&self) -> Option<Duration> {
        let now = BootTime::now();
        let idle = self.shared.is_idle();
        let tell = (self.told != Some(self.shared.journal_length())).then_some(self.tell_at);
        let sweep = (!idle).then_some(self.sweep_at);
        let slots = (self.slots_at > now).then_some(self.slots_at);
        let due = [tell, sweep, slots, self.shared.return_at()];
        due.into_iter().flatten().min().map(|due| now.until(due))
    }

    fn turn(&mut self, ready: &Ready) {
        if ready.signals {
            while let Ok(Some(info)) = self.signals.read_signal() {
                if info.ssi_signo == SignalName::SIGTERM as u32 {
                    let message = "the shim was asked to end by SIGTERM".to_owned();
                    self.stop(message, self.shared.file.spec.grace);
                }
            }
        }
        let wishes: Vec<DesiredBundle> = self.peers.serve(ready);
        for wish in wishes {
            self.obey(wish);
        }
    }

    fn obey(&mut self, desired: DesiredBundle) {
        if desired.bundle != self.shared.dir.bundle() {
            return note(&format!("told about another bundle, {}", desired.bundle));
        }
        self.slots = desired.slots.min(MAX_SLOTS);
        let new = missing(&desired.tasks, &self.shared.handed());
        match &desired.phase {
            BundlePhase::Run => {}
            BundlePhase::Close => self.closed = true,
            BundlePhase::Stop(stop) => self.stop(stop_message(stop), stop.grace),
        }
        if new.is_empty() {
            return;
        }
        let mut records: Vec<Record> = new.iter().copied().map(Record::Handed).collect();
        if self.stopped {
            records.extend(new.iter().copied().map(Record::Returned));
            self.shared.refuse(&new);
            self.shared.record(&records);
        } else {
            self.shared.record(&records);
            self.shared.add(&new, BootTime::now());
        }
    }

    // === tasks ===

    fn add_slots(&mut self, now: BootTime) {
        if now < self.slots_at {
            return;
        }
        for _ in 0..self.shared.wanted_slots(self.slots) {
            if let Err(error) = slot::start(&self.shared) {
                note(&format!("a slot could not be made: {error}"));
                self.slots_at = now.after(SLOT_RETRY);
                return;
            }
        }
    }

    fn give_back(&mut self, now: BootTime) {
        if self.shared.return_at().is_some_and(|at| at <= now) {
            // Whatever is older than the oldest may be.
            let age = self.shared.file.return_after;
            let back = self.shared.take_back(|since| since.after(age) <= now);
            self.returned(&back);
        }
    }

    fn returned(&self, ranges: &[TaskRange]) {
        let records: Vec<Record> = ranges.iter().copied().map(Record::Returned).collect();
        if !records.is_empty() {
            self.shared.record(&records);
        }
    }

    fn sweep(&mut self, now: BootTime) {
        if now < self.sweep_at {
            return;
        }
        self.sweep_at = now.after(SWEEP_EVERY);
        let running = || self.shared.running();
        if self.orphans.are_none(running) {
            return;
        }
        // Most orphans are daemons of tasks that live.
        if !find(&self.shared.marks, Whose::Nobody, running).is_empty() {
            kill(&self.shared.marks, Whose::Nobody, running);
        }
    }

    // === the end ===

    fn stop(&mut self, message: String, grace: Duration) {
        self.stopped = true;
        self.returned(&self.shared.take_back(|_| true));
        let kill_at = BootTime::now().after(grace);
        self.shared.stop(StopOrder { message, kill_at });
    }

    /// No task is left, and nothing that one of them started may be.
    fn end_everything(&self) {
        let running = || self.shared.running();
        for _ in 0..LAST_ROUNDS {
            if self.orphans.are_none(running) {
                return;
            }
            kill(&self.shared.marks, Whose::Everybody, running);
            pause(LAST_PAUSE_MS);
        }
        note("processes of this bundle do not die and are left");
    }

    /// Tells how long the journal is, unless that was just done.
    fn tell(&mut self, now: BootTime) {
        let length = self.shared.journal_length();
        if self.told == Some(length) || now < self.tell_at {
            return;
        }
        self.told = Some(length);
        self.tell_at = now.after(TELL_EVERY);
        match line(&Told { journal: length }) {
            Ok(line) => self.peers.set_line(line),
            Err(error) => note(&format!("the journal's length could not be told: {error}")),
        }
    }
}
