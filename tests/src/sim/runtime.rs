//! The agent's side of attempts' directories and shims, as the real runtime has it: accepting, starting a shim, go, stop,
//! what is found after a restart, and the cleaning up after a shim that died. Nothing here decides what is wanted.

use trainyard_agent_core::{Event, RecoveredMember, RecoveredState, RuntimeState, Uploaded};
use trainyard_common::ids::{AttemptRef, Digest};
use trainyard_common::member::{
    DesiredMember, DesiredPhase, EndCause, Ending, MemberSpec, RankEnd,
};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::agent::{Follower, Task};
use super::clock::{Micros, ProcessClock, ms, secs};
use super::host::{Dir, File, Process, Role};
use super::shim::{Order, Shim, State};
use super::world::{Happening, World};

/// What an agent finds when it starts.
pub(crate) struct Recovery {
    pub(crate) members: Vec<RecoveredMember>,
    pub(crate) followed: Vec<AttemptRef>,
}

/// The end of a member of which nobody saw the end, or which never began.
pub(crate) fn ending(
    cause: EndCause,
    message: &str,
    started: Option<&MemberSpec>,
    now: Timestamp,
) -> Ending {
    let ranks = started.map_or(0..0, MemberSpec::supervised_ranks);
    Ending {
        cause,
        message: message.to_owned(),
        started: started.is_some(),
        ranks: ranks
            .map(|rank| RankEnd {
                rank,
                exit: match planted(Mutation::StatusInvented) {
                    true => ExitStatus::Code(0),
                    false => ExitStatus::Unknown,
                },
                at: now,
                unprompted: false,
                oom_killed: false,
            })
            .collect(),
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

fn runtime_state(state: State) -> RuntimeState {
    match state {
        State::Ready { port } => RuntimeState::Ready { port },
        State::Running { started_at } => RuntimeState::Running { started_at },
        State::Stopping => RuntimeState::Stopping,
        State::CleanupPending(cleanup) => RuntimeState::CleanupPending(*cleanup),
        State::Gone(ending) => RuntimeState::Gone(*ending),
    }
}

impl World {
    // === requests ===

    pub(crate) fn perform(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        task: Task,
    ) -> Option<Event> {
        let chances = self.swarm.chances;
        match task {
            Task::Accept(member) => Some(self.accept(index, &member)),
            Task::Fetch => None,
            Task::SpawnShim => {
                let error = if self.goes_wrong(chances.spawn_fails) {
                    Err("no process can be made")
                } else {
                    self.spawn_shim(index, attempt)
                };
                failed(error, |error| Event::SpawnFailed { attempt, error })
            }
            Task::Go(go) => {
                let error = if self.goes_wrong(chances.go_fails) {
                    self.see("go failed");
                    Err("the shim's record cannot be read")
                } else {
                    self.order_go(index, attempt, go)
                };
                failed(error, |error| Event::GoFailed { attempt, error })
            }
            Task::Stop(stop) => {
                let error = if self.goes_wrong(chances.stop_fails) {
                    self.see("stop failed");
                    Err("the shim's record cannot be read")
                } else {
                    self.order_stop(index, attempt, Order::Stop(stop))
                };
                failed(error, |error| Event::StopFailed { attempt, error })
            }
            Task::Upload => Some(self.upload(index, attempt)),
            Task::Remove => Some(self.remove(index, attempt)),
        }
    }

    fn accept(&mut self, index: usize, member: &DesiredMember) -> Event {
        let attempt = member.attempt;
        let wrong = self.goes_wrong(self.swarm.chances.accept_fails);
        let host = &mut self.hosts[index];
        let failed = |exists, error: &str| Event::AcceptFailed {
            attempt,
            exists,
            error: error.to_owned(),
        };
        if host.disk.dirs.contains_key(&attempt) {
            self.see("accepted before");
            return failed(true, "it was accepted before");
        }
        if host.disk_full || wrong {
            self.see("accept failed");
            return failed(false, "no space left on the device");
        }
        self.make_dir(index, member);
        Event::Accepted(attempt)
    }

    fn make_dir(&mut self, index: usize, member: &DesiredMember) {
        let host = &mut self.hosts[index];
        let dir = Dir {
            member: File::Whole(member.spec.clone()),
            boot: host.boot,
            shim: false,
            go: false,
            status: File::Missing,
            upload: File::Missing,
        };
        host.disk.dirs.insert(member.attempt, dir);
    }

    fn spawn_shim(&mut self, index: usize, attempt: AttemptRef) -> Result<(), &'static str> {
        let now = self.now;
        let host = &mut self.hosts[index];
        let Some(agent) = &mut host.agent else {
            return Ok(());
        };
        if agent.followers.contains_key(&attempt) {
            return Ok(());
        }
        let Some(dir) = host.disk.dirs.get(&attempt) else {
            return Err("it is not on this node");
        };
        if matches!(dir.status.read(), Some(State::Gone(_))) {
            return Err("it has ended");
        }
        let Some(spec) = dir.member.read().cloned() else {
            return Err("its record cannot be read");
        };
        agent.followers.insert(attempt, Follower::default());
        if host.shims.contains_key(&attempt) {
            return Ok(());
        }
        let clock = host.clock.start(now);
        self.start_shim(index, attempt, spec, clock);
        self.order_lease(index, attempt, 0);
        Ok(())
    }

    /// The coordinator answered what was sent then: the agent renews the leases of the shims that it follows.
    pub(crate) fn renew_leases(&mut self, index: usize, sent: Micros) {
        let Some(agent) = &mut self.hosts[index].agent else {
            return;
        };
        agent.heard = agent.heard.max(Some(sent));
        let followed: Vec<AttemptRef> = agent.followers.keys().copied().collect();
        for attempt in followed {
            let wait = self.rng.skewed(100, ms(50));
            self.order_lease(index, attempt, wait);
        }
    }

    fn order_lease(&mut self, index: usize, attempt: AttemptRef, wait: Micros) {
        let host = &self.hosts[index];
        let heard = host.agent.as_ref().and_then(|agent| agent.heard);
        let (Some(shim), Some(heard)) = (host.shims.get(&attempt), heard) else {
            return;
        };
        let Some(lease) = shim.spec.lease else { return };
        let clock = host.clock.start(heard);
        let until = clock.when(heard, clock.now(heard).after(lease));
        let (serial, order) = (shim.serial, Order::Lease(until));
        self.after(wait, Happening::ShimOrdered(index, attempt, serial, order));
    }

    fn start_shim(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        spec: MemberSpec,
        clock: ProcessClock,
    ) {
        let (serial, uid) = (self.next_serial(), self.next_serial());
        let host = &mut self.hosts[index];
        let pid = host.pid();
        host.processes.insert(
            uid,
            Process {
                pid,
                attempt,
                bundle: None,
                job: spec.job_name.clone(),
                role: Role::Shim,
                ignores_term: true,
                stuck_for: 0,
                killed: false,
            },
        );
        host.shims
            .insert(attempt, Shim::new(serial, uid, spec, clock));
        let wait = self.rng.skewed(ms(2), ms(800));
        self.after(wait, Happening::ShimUp(index, attempt, serial));
    }

    fn order_go(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        go: trainyard_common::member::Go,
    ) -> Result<(), &'static str> {
        let host = &mut self.hosts[index];
        let Some(agent) = &mut host.agent else {
            return Ok(());
        };
        let Some(follower) = agent.followers.get_mut(&attempt) else {
            return match host.disk.dirs.get(&attempt).map(|dir| dir.status.read()) {
                None => Err("it is not on this node"),
                Some(Some(State::Gone(_))) => Err("it has ended"),
                Some(_) => Err("it has no shim"),
            };
        };
        follower.go.get_or_insert(go);
        self.pass_on(index, attempt, Order::Go);
        Ok(())
    }

    pub(crate) fn order_stop(
        &mut self,
        index: usize,
        attempt: AttemptRef,
        order: Order,
    ) -> Result<(), &'static str> {
        let now = self.now;
        let host = &mut self.hosts[index];
        let Some(agent) = &mut host.agent else {
            return Ok(());
        };
        if agent.followers.contains_key(&attempt) {
            self.pass_on(index, attempt, order);
            return Ok(());
        }
        let Some(dir) = host.disk.dirs.get_mut(&attempt) else {
            return Err("it is not on this node");
        };
        if matches!(dir.status.read(), Some(State::Gone(_))) {
            return Ok(());
        }
        let locked = host.shims.get(&attempt).is_some_and(|shim| shim.locked);
        if !locked && !dir.shim {
            if host.disk_full {
                return Err("no space left on the device");
            }
            let time = agent.clock.now(now);
            let state = State::Gone(Box::new(ending(EndCause::Stopped, "stopped", None, time)));
            dir.status = File::Whole(state.clone());
            agent.followers.insert(attempt, Follower::default());
            self.see("ended before its shim said anything");
            self.shim_says(index, attempt, state);
            return Ok(());
        }
        agent.followers.insert(attempt, Follower::default());
        self.follow(index, attempt);
        self.pass_on(index, attempt, order);
        Ok(())
    }

    fn pass_on(&mut self, index: usize, attempt: AttemptRef, order: Order) {
        let wait = self.rng.skewed(100, ms(50));
        if let Some(shim) = self.hosts[index].shims.get(&attempt) {
            let serial = shim.serial;
            // One line, which has the lease in it.
            self.order_lease(index, attempt, wait.saturating_sub(1));
            self.after(wait, Happening::ShimOrdered(index, attempt, serial, order));
        }
    }

    /// Whether something else than the session would get through.
    pub(crate) fn reaches(&self, index: usize) -> bool {
        let line = self.hosts[index].line;
        self.coordinator.acts(self.now)
            && line.up_cut_until <= self.now
            && line.down_cut_until <= self.now
    }

    fn upload(&mut self, index: usize, attempt: AttemptRef) -> Event {
        if !self.reaches(index) || self.goes_wrong(self.swarm.chances.upload_fails) {
            self.see("upload failed");
            let error = "the coordinator cannot be reached".to_owned();
            return Event::UploadFailed { attempt, error };
        }
        let mut tree = || {
            let byte = u8::try_from(self.rng.below(250)).unwrap_or_default();
            self.rng.chance(300).then_some(Digest([byte; 32]))
        };
        let uploaded = Uploaded {
            outputs: tree(),
            checkpoint: tree(),
            warning: None,
        };
        let full = self.hosts[index].disk_full;
        if let Some(dir) = self.hosts[index].disk.dirs.get_mut(&attempt)
            && !full
        {
            dir.upload = File::Whole(uploaded.clone());
        }
        Event::UploadFinished { attempt, uploaded }
    }

    fn remove(&mut self, index: usize, attempt: AttemptRef) -> Event {
        let wrong = self.goes_wrong(self.swarm.chances.remove_fails);
        let host = &mut self.hosts[index];
        let failed = |error: &str| Event::RemoveFailed {
            attempt,
            error: error.to_owned(),
        };
        let Some(dir) = host.disk.dirs.get(&attempt) else {
            return Event::Removed(attempt);
        };
        let followed = host
            .agent
            .as_ref()
            .is_some_and(|agent| agent.followers.contains_key(&attempt));
        let ended = matches!(dir.status.read(), Some(State::Gone(_)));
        let locked = host.shims.get(&attempt).is_some_and(|shim| shim.locked);
        if followed || locked || (!ended && dir.shim) {
            self.see("removal waits for a shim");
            return failed("it still has a shim");
        }
        if wrong {
            return failed("something in it cannot be deleted");
        }
        host.disk.dirs.remove(&attempt);
        self.check_removed(index, attempt);
        self.note_deleted(index, attempt);
        Event::Removed(attempt)
    }

    /// What became of a request that was under way when the agent's process ended.
    pub(crate) fn half_done(&mut self, index: usize, attempt: AttemptRef, task: Task, power: bool) {
        if !self.done_all_the_same() {
            return;
        }
        match task {
            Task::Accept(member) => {
                let host = &self.hosts[index];
                if !host.disk_full && !host.disk.dirs.contains_key(&attempt) {
                    self.see("accepted and nobody heard");
                    self.make_dir(index, &member);
                }
            }
            Task::SpawnShim if !power => {
                let now = self.now;
                let host = &self.hosts[index];
                let clock = host.clock.start(now);
                let spec = host
                    .disk
                    .dirs
                    .get(&attempt)
                    .and_then(|dir| dir.member.read().cloned());
                if let Some(spec) = spec
                    && !host.shims.contains_key(&attempt)
                {
                    self.see("shim started and nobody heard");
                    self.start_shim(index, attempt, spec, clock);
                }
            }
            Task::Remove => {
                self.remove(index, attempt);
            }
            Task::Fetch | Task::SpawnShim | Task::Go(_) | Task::Stop(_) | Task::Upload => {}
        }
    }

    // === shims ===

    /// A shim said something, or something is said in its name: its agent hears it if it follows.
    pub(crate) fn shim_says(&mut self, index: usize, attempt: AttemptRef, state: State) {
        let now = self.now;
        let wait = self.rng.skewed(50, ms(20));
        let host = &mut self.hosts[index];
        let Some(agent) = &mut host.agent else { return };
        let number = agent.number;
        let Some(follower) = agent.followers.get_mut(&attempt) else {
            return;
        };
        follower.words.push_back(state);
        let at = (now + wait).max(follower.word_at + 1);
        follower.word_at = at;
        let (host, agent) = (index, number);
        self.at(
            at,
            Happening::ShimHeard {
                host,
                agent,
                attempt,
            },
        );
    }

    pub(crate) fn shim_heard(&mut self, index: usize, number: u64, attempt: AttemptRef) {
        let Some(agent) = self.hosts[index]
            .agent
            .as_mut()
            .filter(|a| a.number == number)
        else {
            return;
        };
        let Some(state) = agent
            .followers
            .get_mut(&attempt)
            .and_then(|follower| follower.words.pop_front())
        else {
            return;
        };
        if let State::Gone(_) = state {
            agent.followers.remove(&attempt);
        }
        let state = runtime_state(state);
        self.tell_agent(index, Event::RuntimeReported { attempt, state });
    }

    /// Begins to follow a shim that was started earlier: it says where it is, or is found dead.
    pub(crate) fn follow(&mut self, index: usize, attempt: AttemptRef) {
        self.order_lease(index, attempt, ms(1));
        let host = &self.hosts[index];
        let said = host.shims.get(&attempt).map(|shim| shim.written_state());
        match said {
            Some(Some(state)) if !matches!(state, State::Gone(_)) => {
                self.shim_says(index, attempt, state);
            }
            // It says so itself when it has something to say; its ending is told when it has exited.
            Some(_) => {}
            None => self.look_after(index, attempt, ms(1)),
        }
    }

    /// A shim is gone: its agent, if it follows, looks what is left.
    pub(crate) fn look_after(&mut self, index: usize, attempt: AttemptRef, wait: Micros) {
        let host = &self.hosts[index];
        let Some(agent) = &host.agent else { return };
        if !agent.followers.contains_key(&attempt) {
            return;
        }
        let (host, agent) = (index, agent.number);
        self.after(
            wait,
            Happening::Settle {
                host,
                agent,
                attempt,
            },
        );
    }

    pub(crate) fn settle(&mut self, index: usize, number: u64, attempt: AttemptRef) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let Some(agent) = host.agent.as_mut().filter(|agent| agent.number == number) else {
            return;
        };
        let time = agent.clock.now(now);
        let Some(follower) = agent.followers.get_mut(&attempt) else {
            return;
        };
        if host.shims.contains_key(&attempt) {
            return;
        }
        let Some(dir) = host.disk.dirs.get_mut(&attempt) else {
            return;
        };
        if let Some(state @ State::Gone(_)) = dir.status.read().cloned() {
            return self.shim_says(index, attempt, state);
        }
        let (came_up, went) = (dir.shim, dir.go);
        let spec = dir.member.read().cloned();
        let stopping = !std::mem::replace(&mut follower.told_stopping, true);
        if came_up && host.lives(attempt) && !planted(Mutation::LeftoversLive) {
            self.see("agent kills what a dead shim left");
            self.kill_tree(index, attempt);
            if stopping {
                self.shim_says(index, attempt, State::Stopping);
            }
            return self.look_after(index, attempt, ms(50));
        }
        if host.disk_full || spec.is_none() {
            return self.look_after(index, attempt, secs(1));
        }
        let ending = match came_up {
            false => ending(
                EndCause::PrepareFailed,
                "the shim ended before it was ready",
                None,
                time,
            ),
            true => {
                let started = spec.as_ref().filter(|_| went);
                ending(
                    EndCause::SupervisorLost,
                    "the shim was killed",
                    started,
                    time,
                )
            }
        };
        let state = State::Gone(Box::new(ending));
        if let Some(dir) = self.hosts[index].disk.dirs.get_mut(&attempt) {
            dir.status = File::Whole(state.clone());
        }
        self.shim_says(index, attempt, state);
    }

    // === restart ===

    pub(crate) fn recover(&mut self, index: usize, clock: ProcessClock) -> Recovery {
        let now = self.now;
        let mut recovery = Recovery {
            members: Vec::new(),
            followed: Vec::new(),
        };
        let attempts: Vec<AttemptRef> = self.hosts[index].disk.dirs.keys().copied().collect();
        for attempt in attempts {
            let host = &mut self.hosts[index];
            let boot = host.boot;
            let locked = host.shims.get(&attempt).is_some_and(|shim| shim.locked);
            let Some(dir) = host.disk.dirs.get_mut(&attempt) else {
                continue;
            };
            let Some(spec) = dir.member.read().cloned() else {
                self.see("directory that cannot be read left alone");
                continue;
            };
            let status = dir.status.read().cloned();
            let state = match status {
                Some(state @ State::Gone(_)) if !locked => {
                    RecoveredState::Shim(runtime_state(state))
                }
                _ if dir.boot != boot => {
                    let started = dir.go.then_some(&spec);
                    let time = clock.now(now);
                    let message = "the node was rebooted";
                    let ending = ending(EndCause::NodeRebooted, message, started, time);
                    let state = State::Gone(Box::new(ending));
                    dir.status = File::Whole(state.clone());
                    RecoveredState::Shim(runtime_state(state))
                }
                status if locked => {
                    recovery.followed.push(attempt);
                    match status {
                        None => RecoveredState::Accepted,
                        Some(State::Gone(_)) => RecoveredState::Shim(RuntimeState::Stopping),
                        Some(state) => RecoveredState::Shim(runtime_state(state)),
                    }
                }
                _ if !dir.shim => RecoveredState::Accepted,
                _ => {
                    recovery.followed.push(attempt);
                    RecoveredState::Shim(RuntimeState::Stopping)
                }
            };
            let uploaded = dir.upload.read().cloned();
            self.see(match &state {
                RecoveredState::Accepted => "recovered: accepted",
                RecoveredState::Shim(RuntimeState::Gone(_)) => "recovered: gone",
                RecoveredState::Shim(_) => "recovered: alive",
            });
            recovery.members.push(RecoveredMember {
                member: DesiredMember {
                    attempt,
                    phase: DesiredPhase::Prepare,
                    spec,
                },
                state,
                uploaded,
            });
        }
        recovery
    }
}

fn failed(result: Result<(), &str>, event: impl FnOnce(String) -> Event) -> Option<Event> {
    result.err().map(|error| event(error.to_owned()))
}
