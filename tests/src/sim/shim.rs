//! Shims and the processes of ranks, as the real shim runs them: wait for go, start the ranks once, end them with grace
//! and then with force, prove that nothing is left, write that down, say it, exit. Ranks behave as a seed wants it.

use std::collections::BTreeMap;

use trainyard_common::ids::AttemptRef;
use trainyard_common::member::{Cleanup, EndCause, Ending, LeftProcess, MemberSpec, RankEnd, Stop};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::clock::{Micros, ProcessClock, micros, ms, secs};
use super::host::{File, Process, Role};
use super::world::{Happening, World};

/// Grace of what ranks leave behind, as in the real shim.
const LEFTOVER_GRACE: Micros = secs(5);
/// What outlives SIGKILL by this much is told of, as by the real shim.
const UNKILLABLE_AFTER: Micros = secs(5);

/// What a shim says and writes down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Ready { port: u16 },
    Running { started_at: Timestamp },
    Stopping,
    CleanupPending(Box<Cleanup>),
    Gone(Box<Ending>),
}

/// What a shim is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Go,
    Stop(Stop),
    /// It may live until then.
    Lease(Micros),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Waiting,
    /// The start is being recorded.
    Going,
    Running,
    Stopping {
        cause: EndCause,
        kill_at: Micros,
    },
    Gone,
}

#[derive(Debug, Clone, Copy)]
struct Rank {
    uid: Option<u64>,
    end: Option<RankEnd>,
}

/// A shim's process.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(crate) serial: u64,
    uid: u64,
    pub(crate) spec: MemberSpec,
    clock: ProcessClock,
    /// It holds the lock of the directory.
    pub(crate) locked: bool,
    phase: Phase,
    ranks: BTreeMap<u32, Rank>,
    started: bool,
    limit_at: Option<Micros>,
    /// Until when it may live, if it was told, and whether that is over.
    lease: Option<Micros>,
    lease_over: bool,
    stop_waits: Option<Stop>,
    state: Option<State>,
    version: u64,
    written: u64,
    reserve: bool,
}

impl Shim {
    pub(crate) fn new(serial: u64, uid: u64, spec: MemberSpec, clock: ProcessClock) -> Self {
        Self {
            serial,
            uid,
            spec,
            clock,
            locked: false,
            phase: Phase::Starting,
            ranks: BTreeMap::new(),
            started: false,
            limit_at: None,
            lease: None,
            lease_over: false,
            stop_waits: None,
            state: None,
            version: 0,
            written: 0,
            reserve: true,
        }
    }

    /// Whether it has no lease, or one that is not over.
    fn may_live(&self, now: Micros) -> bool {
        let open = self.lease.is_some_and(|until| now < until);
        self.spec.lease.is_none() || (open && !self.lease_over)
    }

    /// How its member ends, or would end now.
    fn ending(&self, cause: EndCause, now: Micros) -> Ending {
        let ended_at = self.clock.now(now);
        let ranks = self.ranks.iter().map(|(rank, found)| {
            found.end.unwrap_or(RankEnd {
                rank: *rank,
                exit: ExitStatus::Unknown,
                at: ended_at,
                unprompted: false,
                oom_killed: false,
            })
        });
        Ending {
            cause,
            message: String::new(),
            started: self.started,
            ranks: ranks.collect(),
            ended_at,
            outputs: None,
            checkpoint: None,
            warning: String::new(),
        }
    }

    /// What it says to whoever connects.
    pub(crate) fn written_state(&self) -> Option<State> {
        self.state.clone().filter(|_| self.written == self.version)
    }
}

/// How a rank will end by itself.
pub(crate) struct Fate {
    pub(crate) after: Micros,
    pub(crate) exit: ExitStatus,
    pub(crate) oom: bool,
}

impl World {
    fn shim(&mut self, index: usize, attempt: AttemptRef, serial: u64) -> Option<&mut Shim> {
        self.hosts[index]
            .shims
            .get_mut(&attempt)
            .filter(|shim| shim.serial == serial)
    }

    pub(crate) fn shim_up(&mut self, index: usize, attempt: AttemptRef, serial: u64) {
        let fails = self.goes_wrong(self.swarm.chances.spawn_fails);
        let dies = self.goes_wrong(self.swarm.chances.spawn_fails);
        let port = u16::try_from(self.rng.between(30_000, 60_000)).unwrap_or(30_000);
        let now = self.now;
        let host = &mut self.hosts[index];
        let Some(shim) = host
            .shims
            .get_mut(&attempt)
            .filter(|shim| shim.serial == serial)
        else {
            return;
        };
        let again = match host.disk.dirs.get(&attempt) {
            Some(dir) => dir.status.exists() || dir.go,
            None => true,
        };
        if again || dies {
            self.see(if again {
                "late shim left"
            } else {
                "shim died without a word"
            });
            return self.shim_leaves(index, attempt);
        }
        shim.locked = true;
        shim.phase = Phase::Waiting;
        let time = shim.clock.now(now);
        if let Some(dir) = host.disk.dirs.get_mut(&attempt) {
            dir.shim = true;
        }
        if fails {
            shim.phase = Phase::Gone;
            let ending = super::runtime::ending(EndCause::PrepareFailed, "no port", None, time);
            return self.shim_state(index, attempt, State::Gone(Box::new(ending)));
        }
        self.see("shim ready");
        self.shim_state(index, attempt, State::Ready { port });
        self.after(0, Happening::ShimTurns(index, attempt, serial));
    }

    fn shim_state(&mut self, index: usize, attempt: AttemptRef, state: State) {
        let wait = self.rng.skewed(ms(1), ms(30));
        let Some(shim) = self.hosts[index].shims.get_mut(&attempt) else {
            return;
        };
        shim.state = Some(state);
        shim.version += 1;
        let (serial, version) = (shim.serial, shim.version);
        self.after(
            wait,
            Happening::ShimWritten(index, attempt, serial, version),
        );
    }

    pub(crate) fn shim_written(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        serial: u64,
        version: u64,
    ) {
        let full = self.hosts[index].disk_full;
        let Some(shim) = self.shim(index, attempt, serial) else {
            return;
        };
        if shim.version != version {
            return;
        }
        if full && shim.reserve {
            shim.reserve = false;
            self.see("shim wrote from its reserve");
            return self.after(
                secs(1),
                Happening::ShimWritten(index, attempt, serial, version),
            );
        }
        let Some(state) = shim.state.clone() else {
            return;
        };
        shim.written = version;
        if let Some(dir) = self.hosts[index].disk.dirs.get_mut(&attempt) {
            dir.status = File::Whole(state.clone());
        }
        if matches!(state, State::Gone(_)) {
            let wait = self.rng.skewed(100, ms(20));
            self.after(wait, Happening::ShimExits(index, attempt, serial));
        } else {
            self.shim_says(index, attempt, state);
        }
    }

    pub(crate) fn shim_exits(&mut self, index: usize, attempt: AttemptRef, serial: u64) {
        if self.shim(index, attempt, serial).is_some() {
            self.shim_leaves(index, attempt);
        }
    }

    /// The process of a shim is no more; whoever follows it looks what it left.
    fn shim_leaves(&mut self, index: usize, attempt: AttemptRef) {
        let host = &mut self.hosts[index];
        if let Some(shim) = host.shims.remove(&attempt) {
            host.processes.remove(&shim.uid);
        }
        self.look_after(index, attempt, ms(1));
    }

    /// A shim is killed. Its ranks are tied to its life; what they started is not.
    pub(crate) fn kill_shim(&mut self, index: usize, attempt: AttemptRef) {
        let ranks: Vec<(u64, Micros)> = self.hosts[index]
            .living(attempt)
            .filter(|(_, process)| matches!(process.role, Role::Rank(_)))
            .map(|(uid, process)| (*uid, process.stuck_for))
            .collect();
        for (uid, stuck) in ranks {
            self.ends_after(index, uid, ms(1) + stuck, ExitStatus::Signal(9));
        }
        self.say(format!("host {index}: the shim of {attempt} is killed"));
        self.shim_leaves(index, attempt);
    }

    fn ends_after(&mut self, host: usize, uid: u64, wait: Micros, exit: ExitStatus) {
        let oom = false;
        self.after(
            wait,
            Happening::ProcessEnds {
                host,
                uid,
                exit,
                oom,
            },
        );
    }

    // === go ===

    pub(crate) fn shim_ordered(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        serial: u64,
        order: Order,
    ) {
        let now = self.now;
        let wait = self.rng.skewed(ms(1), ms(20));
        let Some(shim) = self.shim(index, attempt, serial) else {
            return;
        };
        if let Order::Lease(until) = order {
            // One that is over is not renewed.
            if shim.lease.is_none_or(|known| now < known) {
                shim.lease = shim.lease.max(Some(until));
            }
            return self.at(until, Happening::ShimTurns(index, attempt, serial));
        }
        let may_live = shim.may_live(now);
        match (order, shim.phase) {
            (Order::Lease(_), _) => {}
            // It is not listening yet; what it is told waits in its socket.
            (_, Phase::Starting) => {
                self.after(ms(5), Happening::ShimOrdered(index, attempt, serial, order));
            }
            (Order::Go, Phase::Waiting) if !may_live => self.end_lease(index, attempt),
            (Order::Go, Phase::Waiting) => {
                shim.phase = Phase::Going;
                self.after(wait, Happening::ShimGoes(index, attempt, serial));
            }
            (Order::Go, Phase::Going | Phase::Running | Phase::Stopping { .. } | Phase::Gone) => {
                self.see("second go ignored");
            }
            (Order::Stop(stop), Phase::Going) => shim.stop_waits = Some(stop),
            (Order::Stop(stop), _) => {
                self.shim_stops(index, attempt, EndCause::Stopped, micros(stop.grace));
            }
        }
    }

    pub(crate) fn shim_goes(&mut self, index: usize, attempt: AttemptRef, serial: u64) {
        let now = self.now;
        let full = self.hosts[index].disk_full;
        let Some(shim) = self.shim(index, attempt, serial) else {
            return;
        };
        if shim.phase != Phase::Going {
            return;
        }
        if full {
            self.see("start could not be recorded");
            return self.shim_finishes(index, attempt, EndCause::PrepareFailed);
        }
        let (spec, clock) = (shim.spec.clone(), shim.clock);
        let may_live = shim.may_live(now);
        if let Some(dir) = self.hosts[index].disk.dirs.get_mut(&attempt) {
            dir.go = true;
        }
        if !may_live {
            return self.end_lease(index, attempt);
        }
        if self.goes_wrong(self.swarm.chances.rank_fails / 8) {
            return self.cannot_execute(index, attempt, &spec, clock.now(now));
        }
        self.check_go(index, attempt, &spec);
        let Some(shim) = self.shim(index, attempt, serial) else {
            return;
        };
        shim.phase = Phase::Running;
        shim.started = true;
        shim.limit_at = spec.time_limit.map(|limit| now + micros(limit));
        let (limit_at, stop) = (shim.limit_at, shim.stop_waits);
        for rank in spec.supervised_ranks() {
            self.start_rank(index, attempt, &spec, rank);
        }
        let started_at = clock.now(now);
        self.shim_state(index, attempt, State::Running { started_at });
        if let Some(at) = limit_at {
            self.at(at, Happening::ShimTurns(index, attempt, serial));
        }
        if let Some(stop) = stop {
            self.shim_stops(index, attempt, EndCause::Stopped, micros(stop.grace));
        }
    }

    fn cannot_execute(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        spec: &MemberSpec,
        at: Timestamp,
    ) {
        self.see("command could not be executed");
        let Some(shim) = self.hosts[index].shims.get_mut(&attempt) else {
            return;
        };
        for rank in spec.supervised_ranks() {
            let end = RankEnd {
                rank,
                exit: ExitStatus::NotStarted,
                at,
                unprompted: rank == spec.first_rank(),
                oom_killed: false,
            };
            shim.ranks.insert(
                rank,
                Rank {
                    uid: None,
                    end: Some(end),
                },
            );
        }
        self.shim_finishes(index, attempt, EndCause::CannotExecute);
    }

    fn start_rank(&mut self, index: usize, attempt: AttemptRef, spec: &MemberSpec, rank: u32) {
        let uid = self.next_serial();
        let nasty = self.goes_wrong(self.swarm.chances.rank_nasty);
        let stubborn = spec.command.first().is_some_and(|word| word == "stubborn");
        let ignores_term = stubborn || nasty && self.rng.chance(400);
        let stuck_for = match nasty && self.rng.chance(300) {
            true => self.rng.between(secs(1), secs(90)),
            false => 0,
        };
        let daemon = nasty && self.rng.chance(400);
        let fate = match self.scripted_fate(&spec.command, attempt, rank) {
            Some(fate) => fate,
            None => self.fate(),
        };
        let host = &mut self.hosts[index];
        let pid = host.pid();
        let process = Process {
            pid,
            attempt,
            bundle: None,
            job: spec.job_name.clone(),
            role: Role::Rank(rank),
            ignores_term,
            stuck_for,
            killed: false,
        };
        host.processes.insert(uid, process.clone());
        if let Some(shim) = host.shims.get_mut(&attempt) {
            shim.ranks.insert(
                rank,
                Rank {
                    uid: Some(uid),
                    end: None,
                },
            );
        }
        if stuck_for > 0 {
            self.see("rank that cannot be killed for a while");
        }
        if ignores_term {
            self.see("rank that ignores SIGTERM");
        }
        self.say(format!(
            "host {index} starts {attempt} rank {rank} as pid {pid}"
        ));
        self.check_spawn(index, attempt, uid, rank);
        if daemon {
            self.see("rank that leaves a process behind");
            let child = self.next_serial();
            let host = &mut self.hosts[index];
            let pid = host.pid();
            let role = Role::Child;
            host.processes.insert(
                child,
                Process {
                    pid,
                    role,
                    ..process
                },
            );
        }
        let (host, exit, oom) = (index, fate.exit, fate.oom);
        self.after(
            fate.after,
            Happening::ProcessEnds {
                host,
                uid,
                exit,
                oom,
            },
        );
    }

    pub(crate) fn fate(&mut self) -> Fate {
        let mut after = self.rng.skewed(ms(20), self.swarm.longest_run);
        if self.goes_wrong(80) {
            after *= 4;
        }
        let fails = self.goes_wrong(self.swarm.chances.rank_fails);
        if !fails {
            return Fate {
                after,
                exit: ExitStatus::Code(0),
                oom: false,
            };
        }
        let (exit, oom) = match self.rng.below(4) {
            0 => (ExitStatus::Signal(11), false),
            1 => (ExitStatus::Signal(9), true),
            _ => (ExitStatus::Code(3), false),
        };
        if oom {
            self.see("rank out of memory");
        }
        Fate { after, exit, oom }
    }

    // === end ===

    pub(crate) fn process_ends(&mut self, index: usize, uid: u64, exit: ExitStatus, oom: bool) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let Some(process) = host.processes.remove(&uid) else {
            return;
        };
        let attempt = process.attempt;
        if let Role::Rank(rank) = process.role {
            self.oracle
                .exits
                .insert((attempt, process.job.clone(), rank), exit);
            self.say(format!(
                "host {index}: {attempt} rank {rank} ends with {exit}"
            ));
        }
        if process.bundle.is_some() {
            return self.task_exited(index, &process, uid, exit);
        }
        let Some(shim) = self.hosts[index].shims.get_mut(&attempt) else {
            return;
        };
        let unprompted = shim.phase == Phase::Running;
        let at = shim.clock.now(now);
        for (rank, found) in &mut shim.ranks {
            if found.uid == Some(uid) {
                found.uid = None;
                found.end = Some(RankEnd {
                    rank: *rank,
                    exit,
                    at,
                    unprompted,
                    oom_killed: unprompted && oom,
                });
            }
        }
        let serial = shim.serial;
        self.after(100, Happening::ShimTurns(index, attempt, serial));
    }

    /// The coordinator was out of reach for too long.
    fn end_lease(&mut self, index: usize, attempt: AttemptRef) {
        let Some(shim) = self.hosts[index].shims.get_mut(&attempt) else {
            return;
        };
        let grace = micros(shim.spec.grace);
        if std::mem::replace(&mut shim.lease_over, true) {
            return;
        }
        let what = match shim.phase {
            Phase::Running => "lease over, ranks ended",
            Phase::Stopping { .. } => "lease over while it stopped",
            Phase::Starting | Phase::Waiting | Phase::Going | Phase::Gone => {
                "lease over before the start"
            }
        };
        if shim.phase == Phase::Going {
            shim.phase = Phase::Waiting;
        }
        self.see(what);
        self.shim_stops(index, attempt, EndCause::LeaseExpired, grace);
    }

    pub(crate) fn shim_turns(&mut self, index: usize, attempt: AttemptRef, serial: u64) {
        let now = self.now;
        let alive = self.hosts[index].lives(attempt);
        let Some(shim) = self.shim(index, attempt, serial) else {
            return;
        };
        let late = shim.lease.is_some_and(|until| until <= now) && !shim.lease_over;
        // One that is just starting looks when it is up, or told to go.
        if late && !matches!(shim.phase, Phase::Starting | Phase::Going) {
            return self.end_lease(index, attempt);
        }
        match shim.phase {
            Phase::Starting | Phase::Waiting | Phase::Going | Phase::Gone => {}
            Phase::Running => {
                let grace = micros(shim.spec.grace);
                let failed = shim
                    .ranks
                    .values()
                    .filter_map(|rank| rank.end)
                    .any(|end| !end.exit.is_success());
                let all = shim.ranks.values().all(|rank| rank.end.is_some());
                let late = shim.limit_at.is_some_and(|at| at <= now);
                if failed {
                    self.shim_stops(index, attempt, EndCause::RankFailed, grace);
                } else if all {
                    self.shim_stops(
                        index,
                        attempt,
                        EndCause::Completed,
                        grace.min(LEFTOVER_GRACE),
                    );
                } else if late {
                    self.see("time limit passed");
                    self.shim_stops(index, attempt, EndCause::TimeLimit, grace);
                }
            }
            Phase::Stopping { cause, kill_at }
                if !alive || (planted(Mutation::GoneAtKill) && kill_at <= now) =>
            {
                self.shim_finishes(index, attempt, cause);
            }
            Phase::Stopping { kill_at, .. } if kill_at <= now => {
                self.kill_tree(index, attempt);
                if kill_at + UNKILLABLE_AFTER < now {
                    self.tell_left(index, attempt);
                }
                self.after(ms(200), Happening::ShimTurns(index, attempt, serial));
            }
            Phase::Stopping { kill_at, .. } => {
                self.at(kill_at, Happening::ShimTurns(index, attempt, serial));
            }
        }
    }

    /// A shim tells what outlives SIGKILL, if that is news.
    fn tell_left(&mut self, index: usize, attempt: AttemptRef) {
        let now = self.now;
        let host = &self.hosts[index];
        let living = host.living(attempt).map(|(_, process)| LeftProcess {
            pid: process.pid,
            state: 'D',
            name: "python3".to_owned(),
        });
        let left: Vec<LeftProcess> = living.take(8).collect();
        let Some(shim) = host.shims.get(&attempt) else {
            return;
        };
        let Phase::Stopping { cause, .. } = shim.phase else {
            return;
        };
        if let Some(State::CleanupPending(told)) = &shim.state
            && told.left == left
        {
            return;
        }
        let ending = shim.ending(cause, now);
        self.see("processes that outlive SIGKILL told");
        let (left, more) = (left, 0);
        let cleanup = Cleanup { ending, left, more };
        self.shim_state(index, attempt, State::CleanupPending(Box::new(cleanup)));
    }

    fn shim_stops(&mut self, index: usize, attempt: AttemptRef, cause: EndCause, grace: Micros) {
        let now = self.now;
        let alive = self.hosts[index].lives(attempt);
        let Some(shim) = self.hosts[index].shims.get_mut(&attempt) else {
            return;
        };
        let serial = shim.serial;
        match &mut shim.phase {
            Phase::Gone | Phase::Going => {}
            Phase::Starting | Phase::Waiting => self.shim_finishes(index, attempt, cause),
            Phase::Stopping { kill_at, .. } => {
                *kill_at = (*kill_at).min(now + grace);
                self.after(0, Happening::ShimTurns(index, attempt, serial));
            }
            Phase::Running => {
                shim.phase = Phase::Stopping {
                    cause,
                    kill_at: now + grace,
                };
                if alive {
                    self.terminate_tree(index, attempt);
                    self.shim_state(index, attempt, State::Stopping);
                }
                self.after(0, Happening::ShimTurns(index, attempt, serial));
            }
        }
    }

    pub(crate) fn terminate_tree(&mut self, index: usize, attempt: AttemptRef) {
        let listening: Vec<u64> = self.hosts[index]
            .living(attempt)
            .filter(|(_, process)| !process.ignores_term && process.role != Role::Child)
            .map(|(uid, _)| *uid)
            .collect();
        for uid in listening {
            let wait = self.rng.skewed(ms(1), secs(4));
            // Some programs take the signal for a wish to end well.
            let exit = match self.rng.below(4) {
                0 => ExitStatus::Code(0),
                1 => ExitStatus::Code(143),
                _ => ExitStatus::Signal(15),
            };
            self.ends_after(index, uid, wait, exit);
        }
    }

    /// Kills every process of an attempt but its shim; those that cannot die yet do so later.
    pub(crate) fn kill_tree(&mut self, index: usize, attempt: AttemptRef) {
        let mut killed = Vec::new();
        for process in self.hosts[index].processes.iter_mut() {
            let (uid, process) = process;
            if process.attempt == attempt && process.role != Role::Shim && !process.killed {
                process.killed = true;
                killed.push((*uid, process.stuck_for));
            }
        }
        for (uid, stuck) in killed {
            self.ends_after(index, uid, 200 + stuck, ExitStatus::Signal(9));
        }
    }

    fn shim_finishes(&mut self, index: usize, attempt: AttemptRef, cause: EndCause) {
        // A shim with a bug of its own says that all is well and leaves out what is not.
        let garbled = self.goes_wrong(self.swarm.chances.rank_nasty / 3);
        let now = self.now;
        let Some(shim) = self.hosts[index].shims.get_mut(&attempt) else {
            return;
        };
        let mut ending = shim.ending(cause, now);
        if garbled && cause == EndCause::RankFailed {
            ending.cause = EndCause::Completed;
            ending.ranks.retain(|end| end.exit.is_success());
        }
        shim.phase = Phase::Gone;
        self.shim_state(index, attempt, State::Gone(Box::new(ending)));
    }
}
