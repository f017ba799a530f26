//! The agent's side of bundles, driven as the real driver does it: directories, fetches, links to carriers, the closing of
//! the books of dead ones, and the reports made of journals. What waits to be sent is kept by the real code.

mod feed;

use std::collections::{BTreeMap, VecDeque};

use trainyard_agent_core::{
    BundleEffect, BundleEvent, Event, RecoveredBundle, RecoveredBundleState,
};
use trainyard_common::bundle::{DesiredBundle, ObservedBundlePhase, TaskReport, TaskSet};
use trainyard_common::ids::{BundleRef, Digest, TaskIndex};
use trainyard_common::member::{EndCause, Ending, MemberSpec, RankEnd};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::carrier::{BundleDir, CarrierStep, Entry, TaskEnd, missing};
use super::clock::{Micros, ms, secs};
use super::lanes::Lanes;
use super::world::{Happening, World};

/// How far a journal is, in records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Growth {
    journal: usize,
    over: bool,
}

/// A request that is carried out beside the others.
#[derive(Debug, Clone)]
enum Task {
    Accept(Box<DesiredBundle>),
    Fetch { cancelled: bool },
    Remove,
}

/// Where the follower of a carrier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Seeks,
    /// It has a connection to the carrier with this number.
    Talks(u64),
    /// The carrier is dead or never was.
    Settles,
    Settled,
}

/// The follower of a bundle's carrier.
#[derive(Debug)]
struct Link {
    desired: DesiredBundle,
    /// Why it is to be ended without a carrier, if it is.
    ended: Option<String>,
    sent: Option<DesiredBundle>,
    child: Option<u64>,
    stage: Stage,
    /// Of its next turn; others are old.
    turn: u64,
    word_at: Micros,
    pause: Micros,
}

/// Makes reports of a journal.
#[derive(Debug)]
struct Feed {
    token: u64,
    growth: Growth,
    recorded: u64,
    offset: usize,
    number: u64,
    pending: VecDeque<(u64, TaskReport, bool)>,
    message: Option<String>,
}

#[derive(Debug, Default)]
struct Refused {
    reported: TaskSet,
    next: u64,
}

/// What an agent's process knows of bundles beside its core.
#[derive(Debug, Default)]
pub(crate) struct Bundles {
    pub(crate) lanes: Lanes,
    tasks: BTreeMap<u64, (BundleRef, Task)>,
    links: BTreeMap<BundleRef, Link>,
    growth: BTreeMap<BundleRef, Growth>,
    feeds: BTreeMap<BundleRef, Feed>,
    refused: BTreeMap<BundleRef, Refused>,
}

impl Bundles {
    /// Whether requests are under way.
    pub(crate) fn has_requests(&self) -> bool {
        !self.tasks.is_empty()
    }

    /// Nothing is under way or waits to be told.
    pub(crate) fn idle(&self) -> bool {
        self.tasks.is_empty() && self.lanes.is_empty()
    }
}

/// What an agent does next about a bundle.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BundleStep {
    /// A request is done.
    Done(u64),
    /// A follower looks around.
    Link(u64),
    /// A follower's word reaches the driver.
    Told(Growth),
    /// A journal is read, by the feed with this number.
    Feed(u64),
    /// What belongs to a report was uploaded.
    Uploaded { feed: u64, number: u64 },
}

fn ending(end: &TaskEnd, uploaded: Option<Digest>) -> Ending {
    let rank = end.exit.map(|exit| RankEnd {
        rank: 0,
        exit,
        at: end.at,
        unprompted: end.unprompted,
        oom_killed: false,
    });
    Ending {
        cause: end.cause,
        message: end.message.clone(),
        started: end.started,
        ranks: rank.into_iter().collect(),
        ended_at: end.at,
        outputs: uploaded,
        checkpoint: None,
        warning: String::new(),
    }
}

fn unknown(task: TaskIndex, cause: EndCause, message: &str, at: Timestamp) -> TaskEnd {
    TaskEnd {
        task,
        started_at: None,
        started: true,
        exit: Some(ExitStatus::Unknown),
        unprompted: false,
        at,
        cause,
        message: message.to_owned(),
        left: false,
    }
}

impl World {
    fn bundles_of(&mut self, index: usize) -> Option<&mut Bundles> {
        Some(&mut self.hosts[index].agent.as_mut()?.bundles)
    }

    fn bundle_step(&mut self, wait: Micros, index: usize, bundle: BundleRef, step: BundleStep) {
        if let Some(agent) = self.agent_number(index) {
            self.after(wait, Happening::Bundle(index, agent, bundle, step));
        }
    }

    pub(crate) fn bundle_steps(
        &mut self,
        index: usize,
        number: u64,
        bundle: BundleRef,
        step: BundleStep,
    ) {
        if self.agent_number(index) != Some(number) {
            return;
        }
        match step {
            BundleStep::Done(token) => self.bundle_done(index, token),
            BundleStep::Link(turn) => self.link_turns(index, bundle, turn),
            BundleStep::Told(growth) => self.carrier_told(index, bundle, growth),
            BundleStep::Feed(token) => self.feed_reads(index, bundle, token),
            BundleStep::Uploaded { feed, number } => self.uploaded(index, bundle, feed, number),
        }
    }

    fn tell_bundle(&mut self, index: usize, event: BundleEvent) {
        self.tell_agent(index, Event::Bundle(event));
    }

    // === requests ===

    pub(crate) fn carry_out_bundle(&mut self, index: usize, effect: BundleEffect) {
        match effect {
            BundleEffect::Accept(desired) => {
                let bundle = desired.bundle;
                if let Some(bundles) = self.bundles_of(index) {
                    bundles.lanes.open(bundle, ObservedBundlePhase::Preparing);
                    bundles.lanes.recorded(bundle, desired.recorded);
                }
                let wait = self.rng.between(ms(1), ms(30));
                self.start_bundle_task(index, bundle, Task::Accept(desired), wait);
            }
            BundleEffect::Fetch(bundle) => {
                let wait = if self.goes_wrong(self.swarm.chances.fetch_hangs) {
                    self.see("fetch of a bundle hangs");
                    self.rng.between(secs(60), secs(600))
                } else {
                    self.rng.skewed(ms(1), secs(10))
                };
                let cancelled = false;
                self.start_bundle_task(index, bundle, Task::Fetch { cancelled }, wait);
            }
            BundleEffect::CancelFetch(bundle) => self.cancel_bundle_fetch(index, bundle),
            BundleEffect::Spawn(desired) => self.spawn_carrier(index, *desired),
            BundleEffect::Direct(desired) => {
                self.note_record(index, &desired);
                self.direct(index, *desired, None);
            }
            BundleEffect::End { desired, message } => {
                self.see("bundle ended without a carrier");
                self.note_record(index, &desired);
                self.direct(index, *desired, Some(message));
            }
            BundleEffect::Refuse {
                desired,
                message,
                may_have_run,
            } => self.refuse_bundle(index, &desired, &message, may_have_run),
            BundleEffect::Drop(bundle) => self.forget_bundle(index, bundle),
            BundleEffect::Remove(bundle) => {
                if let Some(bundles) = self.bundles_of(index) {
                    bundles.feeds.remove(&bundle);
                }
                self.forget_bundle(index, bundle);
                let wait = self.rng.between(ms(1), ms(200));
                self.start_bundle_task(index, bundle, Task::Remove, wait);
            }
            BundleEffect::Note { bundle, text } => {
                self.say(format!("agent {index} notes on {bundle}: {text}"));
            }
        }
    }

    fn start_bundle_task(&mut self, index: usize, bundle: BundleRef, task: Task, wait: Micros) {
        let token = self.next_serial();
        if let Some(bundles) = self.bundles_of(index) {
            bundles.tasks.insert(token, (bundle, task));
        }
        self.bundle_step(wait, index, bundle, BundleStep::Done(token));
    }

    fn cancel_bundle_fetch(&mut self, index: usize, bundle: BundleRef) {
        let wait = self.rng.between(100, ms(300));
        let Some(bundles) = self.bundles_of(index) else {
            return;
        };
        let fetch = bundles
            .tasks
            .iter_mut()
            .find(|(_, (of, task))| *of == bundle && matches!(task, Task::Fetch { .. }));
        if let Some((token, (_, task))) = fetch {
            let token = *token;
            *task = Task::Fetch { cancelled: true };
            self.bundle_step(wait, index, bundle, BundleStep::Done(token));
        }
    }

    fn bundle_done(&mut self, index: usize, token: u64) {
        let Some((bundle, task)) = self
            .bundles_of(index)
            .and_then(|bundles| bundles.tasks.remove(&token))
        else {
            return;
        };
        let event = match task {
            Task::Accept(desired) => self.accept_bundle(index, &desired),
            Task::Fetch { cancelled: true } => {
                self.see("fetch of a bundle cancelled");
                let error = "cancelled".to_owned();
                BundleEvent::FetchFailed { bundle, error }
            }
            Task::Fetch { .. } if self.goes_wrong(self.swarm.chances.fetch_fails) => {
                self.see("fetch of a bundle failed");
                let error = "the network is down".to_owned();
                BundleEvent::FetchFailed { bundle, error }
            }
            Task::Fetch { .. } => BundleEvent::FetchFinished(bundle),
            Task::Remove => self.remove_bundle(index, bundle),
        };
        if !self.agent_boundary(index) {
            self.tell_bundle(index, event);
        }
    }

    fn accept_bundle(&mut self, index: usize, desired: &DesiredBundle) -> BundleEvent {
        let bundle = desired.bundle;
        let wrong = self.goes_wrong(self.swarm.chances.accept_fails);
        let host = &mut self.hosts[index];
        let failed = |exists, error: &str| BundleEvent::AcceptFailed {
            bundle,
            exists,
            error: error.to_owned(),
        };
        if host.disk.bundles.contains_key(&bundle) {
            self.see("bundle accepted before");
            return failed(true, "it was accepted before");
        }
        let full = host.disk_full;
        let Some(spec) = desired.spec.as_deref().filter(|_| !full && !wrong) else {
            self.see("bundle not accepted");
            return failed(false, "no space left on the device");
        };
        self.make_bundle_dir(index, bundle, spec.clone());
        BundleEvent::Accepted(bundle)
    }

    fn make_bundle_dir(&mut self, index: usize, bundle: BundleRef, spec: MemberSpec) {
        self.see("bundle accepted");
        let host = &mut self.hosts[index];
        let dir = BundleDir {
            spec,
            boot: host.boot,
            shim: false,
            journal: Vec::new(),
            synced: 0,
        };
        host.disk.bundles.insert(bundle, dir);
    }

    fn remove_bundle(&mut self, index: usize, bundle: BundleRef) -> BundleEvent {
        let failed = |error: &str| BundleEvent::RemoveFailed {
            bundle,
            error: error.to_owned(),
        };
        if !self.hosts[index].disk.bundles.contains_key(&bundle) {
            return BundleEvent::Removed(bundle);
        }
        if self.carrier_of(index, bundle).is_some() {
            self.see("removal waits for a carrier");
            return failed("it still has a shim");
        }
        if let Some(bundles) = self.bundles_of(index) {
            bundles.links.remove(&bundle);
        }
        if self.goes_wrong(self.swarm.chances.remove_fails) {
            return failed("something in it cannot be deleted");
        }
        self.hosts[index].disk.bundles.remove(&bundle);
        self.check_bundle_removed(index, bundle);
        self.note_bundle_deleted(index, bundle);
        BundleEvent::Removed(bundle)
    }

    /// What became of requests that were under way when the agent's process ended.
    pub(crate) fn bundles_half_done(&mut self, index: usize, bundles: Bundles) {
        for (bundle, task) in bundles.tasks.into_values() {
            if !self.done_all_the_same() {
                continue;
            }
            match task {
                Task::Accept(desired) => {
                    let host = &self.hosts[index];
                    if !host.disk_full
                        && !host.disk.bundles.contains_key(&bundle)
                        && let Some(spec) = desired.spec
                    {
                        self.see("bundle accepted and nobody heard");
                        self.make_bundle_dir(index, bundle, *spec);
                    }
                }
                Task::Remove => {
                    if self.carrier_of(index, bundle).is_none()
                        && self.hosts[index].disk.bundles.remove(&bundle).is_some()
                    {
                        self.check_bundle_removed(index, bundle);
                    }
                }
                Task::Fetch { .. } => {}
            }
        }
    }

    /// What is on record need not be reported; in a new session all the rest is.
    fn note_record(&mut self, index: usize, desired: &DesiredBundle) {
        let (bundle, recorded) = (desired.bundle, desired.recorded);
        let Some(bundles) = self.bundles_of(index) else {
            return;
        };
        if !bundles.lanes.recorded(bundle, recorded) {
            bundles.feeds.remove(&bundle);
            self.see("coordinator has fewer reports on record than before");
        }
        let Some(bundles) = self.bundles_of(index) else {
            return;
        };
        match bundles.feeds.get_mut(&bundle) {
            Some(feed) => feed.recorded = recorded,
            None => self.start_feed(index, bundle),
        }
    }

    fn refuse_bundle(
        &mut self,
        index: usize,
        desired: &DesiredBundle,
        message: &str,
        may_have_run: bool,
    ) {
        let (now, bundle) = (self.now, desired.bundle);
        self.see(match may_have_run {
            true => "bundle refused that may have run",
            false => "bundle refused",
        });
        let Some(agent) = &mut self.hosts[index].agent else {
            return;
        };
        let time = agent.clock.now(now);
        let bundles = &mut agent.bundles;
        let refused = bundles.refused.entry(bundle).or_default();
        refused.next = refused.next.max(desired.recorded);
        let mut reports = Vec::new();
        for range in missing(&desired.tasks, &refused.reported) {
            refused.reported.insert(range);
            if may_have_run {
                reports.extend(range.tasks().map(|task| TaskReport::Ended {
                    task,
                    started_at: None,
                    ending: Box::new(ending(
                        &unknown(task, EndCause::SupervisorLost, message, time),
                        None,
                    )),
                }));
            } else {
                reports.push(TaskReport::Returned(range));
            }
        }
        let lanes = &mut bundles.lanes;
        lanes.open(bundle, ObservedBundlePhase::Preparing);
        lanes.recorded(bundle, desired.recorded);
        for report in reports {
            lanes.push(bundle, refused.next, report);
            refused.next += 1;
        }
        let (total, message) = (refused.next, message.to_owned());
        lanes.set_phase(bundle, ObservedBundlePhase::Ended { total, message });
    }

    fn forget_bundle(&mut self, index: usize, bundle: BundleRef) {
        if let Some(bundles) = self.bundles_of(index) {
            bundles.refused.remove(&bundle);
            bundles.growth.remove(&bundle);
            bundles.lanes.close(bundle);
        }
    }

    // === links to carriers ===

    fn spawn_carrier(&mut self, index: usize, desired: DesiredBundle) {
        let bundle = desired.bundle;
        self.note_record(index, &desired);
        if self.goes_wrong(self.swarm.chances.spawn_fails) {
            self.see("carrier could not be started");
            let error = "no process can be made".to_owned();
            // The answer comes with the next turn of the driver.
            let event = Event::Bundle(BundleEvent::SpawnFailed { bundle, error });
            return self.tell_agent(index, event);
        }
        let child = self.start_carrier(index, bundle);
        if self.goes_wrong(self.swarm.chances.spawn_fails) {
            self.see("agent killed as it starts a carrier");
            let wait = self.rng.skewed(10, ms(50));
            let fault = super::swarm::Fault::AgentKilled;
            self.after(wait, Happening::FaultEnds(fault, index));
        }
        self.follow_carrier(index, desired, None, child);
    }

    fn direct(&mut self, index: usize, desired: DesiredBundle, why: Option<String>) {
        let bundle = desired.bundle;
        let Some(link) = self
            .bundles_of(index)
            .and_then(|bundles| bundles.links.get_mut(&bundle))
        else {
            return self.follow_carrier(index, desired, why, None);
        };
        if link.desired == desired && link.ended.is_none() == why.is_none() {
            // A watch tells of it all the same; the books are looked at again.
            self.see("told the same again");
        }
        let Some(link) = self
            .bundles_of(index)
            .and_then(|bundles| bundles.links.get_mut(&bundle))
        else {
            return;
        };
        link.desired = desired;
        link.ended = link.ended.take().or(why);
        if link.stage == Stage::Settled {
            link.stage = Stage::Settles;
        }
        let wait = self.rng.skewed(50, ms(5));
        self.turn_link(index, bundle, wait);
    }

    fn follow_carrier(
        &mut self,
        index: usize,
        desired: DesiredBundle,
        ended: Option<String>,
        child: Option<u64>,
    ) {
        let bundle = desired.bundle;
        let word_at = self.now;
        if let Some(bundles) = self.bundles_of(index) {
            let link = Link {
                desired,
                ended,
                sent: None,
                child,
                stage: Stage::Seeks,
                turn: 0,
                word_at,
                pause: ms(2),
            };
            bundles.links.insert(bundle, link);
        }
        let wait = self.rng.skewed(50, ms(5));
        self.turn_link(index, bundle, wait);
    }

    /// The follower looks around then; an earlier plan is given up.
    fn turn_link(&mut self, index: usize, bundle: BundleRef, wait: Micros) {
        let turn = self.next_serial();
        if let Some(link) = self
            .bundles_of(index)
            .and_then(|bundles| bundles.links.get_mut(&bundle))
        {
            link.turn = turn;
            self.bundle_step(wait, index, bundle, BundleStep::Link(turn));
        }
    }

    fn link_mut(&mut self, index: usize, bundle: BundleRef) -> Option<&mut Link> {
        self.bundles_of(index)?.links.get_mut(&bundle)
    }

    fn link_turns(&mut self, index: usize, bundle: BundleRef, turn: u64) {
        let locked = self.carrier_of(index, bundle);
        let host = &mut self.hosts[index];
        let Some(agent) = &mut host.agent else { return };
        let Some(link) = agent.bundles.links.get_mut(&bundle) else {
            return;
        };
        if link.turn != turn {
            return;
        }
        match link.stage {
            Stage::Seeks => {
                // The connection with which it was started holds what is said before it listens.
                let child = link.child.filter(|child| host.carriers.contains_key(child));
                let first = child.filter(|_| link.sent.is_none());
                if let Some(serial) = first.or(locked.filter(|_| link.ended.is_none())) {
                    link.stage = Stage::Talks(serial);
                    link.sent = None;
                    self.link_hears(index, bundle, serial);
                    return self.turn_link(index, bundle, 0);
                }
                if link.ended.is_some() || (child.is_none() && locked.is_none()) {
                    link.stage = Stage::Settles;
                    link.pause = ms(2);
                    return self.turn_link(index, bundle, ms(1));
                }
                self.pause_link(index, bundle);
            }
            Stage::Talks(serial) => {
                let Some(carrier) = host.carriers.get_mut(&serial) else {
                    link.stage = Stage::Seeks;
                    link.pause = ms(2);
                    return self.turn_link(index, bundle, ms(1));
                };
                if link.sent.as_ref() != Some(&link.desired) {
                    link.sent = Some(link.desired.clone());
                    carrier.inbox.push_back(link.desired.clone());
                    let wait = self.rng.skewed(100, ms(20));
                    self.after(wait, Happening::Carrier(index, serial, CarrierStep::Turn));
                }
            }
            Stage::Settles => {
                if !self.settle_bundle(index, bundle) {
                    return self.pause_link(index, bundle);
                }
                if let Some(link) = self.link_mut(index, bundle) {
                    link.stage = Stage::Settled;
                    link.pause = ms(2);
                }
                let length = self.hosts[index].disk.bundles.get(&bundle);
                let journal = length.map_or(0, |dir| dir.journal.len());
                let over = true;
                self.link_tells(index, bundle, Growth { journal, over });
            }
            Stage::Settled => {}
        }
    }

    fn pause_link(&mut self, index: usize, bundle: BundleRef) {
        if let Some(link) = self.link_mut(index, bundle) {
            let pause = link.pause;
            link.pause = (pause * 2).min(secs(1));
            self.turn_link(index, bundle, pause);
        }
    }

    /// A carrier said how long its journal is.
    pub(crate) fn link_hears(&mut self, index: usize, bundle: BundleRef, serial: u64) {
        let host = &self.hosts[index];
        let up = host.carriers.get(&serial).is_some_and(|carrier| carrier.up);
        let journal = host.disk.bundles.get(&bundle).map(|dir| dir.journal.len());
        let talks = self
            .link_mut(index, bundle)
            .is_some_and(|link| link.stage == Stage::Talks(serial));
        if let (true, true, Some(journal)) = (up, talks, journal) {
            let over = false;
            self.link_tells(index, bundle, Growth { journal, over });
        }
    }

    fn link_tells(&mut self, index: usize, bundle: BundleRef, growth: Growth) {
        let now = self.now;
        let wait = self.rng.skewed(50, ms(20));
        if let Some(link) = self.link_mut(index, bundle) {
            let at = (now + wait).max(link.word_at + 1);
            link.word_at = at;
            self.bundle_step(at - now, index, bundle, BundleStep::Told(growth));
        }
    }

    /// A carrier's process is gone, and its connection with it.
    pub(crate) fn link_broken(&mut self, index: usize, bundle: BundleRef, serial: u64) {
        let talks = self
            .link_mut(index, bundle)
            .is_some_and(|link| link.stage == Stage::Talks(serial));
        if talks {
            self.turn_link(index, bundle, ms(1));
        }
    }

    // === the books of a bundle without a carrier ===

    /// Whether it is done: not while a carrier or a process of the bundle lives, nor on a full disk.
    fn settle_bundle(&mut self, index: usize, bundle: BundleRef) -> bool {
        let now = self.now;
        if self.carrier_of(index, bundle).is_some() {
            self.see("books wait for a living carrier");
            return false;
        }
        let host = &self.hosts[index];
        let (Some(dir), Some(agent)) = (host.disk.bundles.get(&bundle), &host.agent) else {
            return false;
        };
        let Some(link) = agent.bundles.links.get(&bundle) else {
            return false;
        };
        let (desired, why, time) = (
            link.desired.clone(),
            link.ended.clone(),
            agent.clock.now(now),
        );
        let account = dir.account();
        let (was_carried, rebooted) = (dir.shim, dir.boot != host.boot);
        let full = host.disk_full;
        let new = missing(&desired.tasks, &account.handed);
        let give_back = |new: &[_], entries: &mut Vec<Entry>| {
            for range in new {
                entries.extend([Entry::Handed(*range), Entry::Returned(*range)]);
            }
        };
        let mut entries = Vec::new();
        if account.over {
            give_back(&new, &mut entries);
            if entries.is_empty() {
                return true;
            }
            self.see("tasks handed after the end returned");
            return !full && self.write_books(index, bundle, entries, false);
        }
        if rebooted && was_carried {
            self.see("bundle lost with a reboot");
            let to = desired.recorded;
            if !planted(Mutation::LostReportsNotSkipped) {
                entries.push(Entry::Skipped { to });
            }
            entries.extend(new.iter().copied().map(Entry::Handed));
            let fresh: TaskSet = new.into_iter().collect();
            let cause = EndCause::NodeRebooted;
            for task in desired.tasks.tasks() {
                if fresh.contains(task) || account.open.contains(task) {
                    let end = unknown(task, cause, "the node was rebooted", time);
                    entries.push(Entry::Ended(Box::new(end)));
                }
            }
        } else {
            if was_carried && self.kill_bundle(index, bundle) {
                self.see("agent kills what a dead carrier left");
                return false;
            }
            if was_carried {
                self.see("bundle of a dead carrier settled");
            }
            let mut unbegun = account.open.clone();
            let given_back = planted(Mutation::BegunGivenBack);
            for task in account.begun.iter().filter(|_| !given_back) {
                unbegun.remove(*task);
                let cause = EndCause::SupervisorLost;
                let end = unknown(*task, cause, "the shim was killed", time);
                entries.push(Entry::Ended(Box::new(end)));
            }
            entries.extend(unbegun.ranges().iter().copied().map(Entry::Returned));
            give_back(&new, &mut entries);
        }
        let message = match why {
            Some(why) => why,
            None if rebooted => "the node was rebooted".to_owned(),
            None if !account.handed.is_empty() => "the shim was killed".to_owned(),
            None => "the shim ended before it was ready".to_owned(),
        };
        entries.push(Entry::Over { message });
        !full && self.write_books(index, bundle, entries, true)
    }

    fn write_books(
        &mut self,
        index: usize,
        bundle: BundleRef,
        entries: Vec<Entry>,
        sync: bool,
    ) -> bool {
        if let Some(dir) = self.hosts[index].disk.bundles.get_mut(&bundle) {
            dir.journal.extend(entries);
            if sync {
                dir.synced = dir.journal.len();
            }
        }
        true
    }

    // === reports ===

    fn carrier_told(&mut self, index: usize, bundle: BundleRef, growth: Growth) {
        let Some(bundles) = self.bundles_of(index) else {
            return;
        };
        if !bundles.links.contains_key(&bundle) {
            return;
        }
        let before = bundles.growth.insert(bundle, growth);
        if let Some(feed) = bundles.feeds.get_mut(&bundle) {
            feed.growth = growth;
            let token = feed.token;
            let wait = self.rng.skewed(100, ms(5));
            self.bundle_step(wait, index, bundle, BundleStep::Feed(token));
        } else {
            self.start_feed(index, bundle);
        }
        if before.is_some() && !growth.over {
            return;
        }
        if growth.over {
            return self.tell_bundle(index, BundleEvent::Over(bundle));
        }
        if let Some(bundles) = self.bundles_of(index) {
            let running = ObservedBundlePhase::Running;
            bundles.lanes.set_phase(bundle, running);
        }
        self.tell_bundle(index, BundleEvent::Running(bundle));
    }

    /// What an agent finds of bundles when it starts.
    pub(crate) fn recover_bundles(&mut self, index: usize) -> (Bundles, Vec<RecoveredBundle>) {
        let mut bundles = Bundles::default();
        let mut found = Vec::new();
        let names: Vec<BundleRef> = self.hosts[index].disk.bundles.keys().copied().collect();
        for bundle in names {
            let locked = self.carrier_of(index, bundle).is_some();
            let Some(dir) = self.hosts[index].disk.bundles.get(&bundle) else {
                continue;
            };
            let (spec, journal) = (dir.spec.clone(), dir.journal.len());
            let over = dir.account().over;
            let carried = dir.shim || locked;
            let running = ObservedBundlePhase::Running;
            let (state, phase) = if over {
                bundles.growth.insert(bundle, Growth { journal, over });
                (RecoveredBundleState::Over, running)
            } else if carried {
                (RecoveredBundleState::Carried, running)
            } else {
                (
                    RecoveredBundleState::Accepted,
                    ObservedBundlePhase::Preparing,
                )
            };
            self.see(match state {
                RecoveredBundleState::Over => "bundle recovered: over",
                RecoveredBundleState::Carried if locked => "carrier outlived its agent",
                RecoveredBundleState::Carried => "bundle recovered: carrier dead",
                RecoveredBundleState::Accepted => "bundle recovered: accepted",
            });
            bundles.lanes.open(bundle, phase);
            found.push(RecoveredBundle {
                bundle,
                spec,
                state,
            });
        }
        (bundles, found)
    }

    /// The power is gone: what was not synced of journals may be lost, from some point on.
    pub(crate) fn journals_torn(&mut self, index: usize) {
        let names: Vec<BundleRef> = self.hosts[index].disk.bundles.keys().copied().collect();
        for bundle in names {
            let Some(dir) = self.hosts[index].disk.bundles.get(&bundle) else {
                continue;
            };
            let (synced, length) = (dir.synced as u64, dir.journal.len() as u64);
            let kept = self.kept_of(synced, length);
            if kept < length {
                self.see("journal's end lost");
            }
            if let Some(dir) = self.hosts[index].disk.bundles.get_mut(&bundle) {
                dir.journal
                    .truncate(usize::try_from(kept).unwrap_or(usize::MAX));
                dir.synced = dir.journal.len();
            }
        }
    }
}
