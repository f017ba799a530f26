//! The agent's whole state, and how each fact changes it.
//!
//! The promises that this file keeps: an attempt is accepted once ever and its ranks are started once at most; they are
//! never started after a stop, nor while an older attempt of the task has processes here; nothing is ended but on the
//! coordinator's word; nothing is deleted before the coordinator has its end on record.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use trainyard_common::ids::{AttemptNumber, AttemptRef, BundleRef};
use trainyard_common::limits::MAX_MEMBERS_PER_NODE;
use trainyard_common::member::{
    DesiredMember, DesiredPhase, EndCause, Ending, Go, MemberSpec, ObservedMember, ObservedPhase,
    Stop,
};
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::resources::Resources;
use trainyard_common::time::Timestamp;

use crate::bundle::{Bundles, RecoveredBundle};
use crate::effect::{Effect, Outbox};
use crate::event::{Event, Fault, RecoveredMember, RuntimeState, Uploaded};
use crate::holdings::Holdings;
use crate::member::{Member, Stage, Want, not_started, unaccounted};

/// Attempts whose end was forgotten and that are still refused by name. A late message about one that left this memory
/// would come from a coordinator that forgot it as often.
const MAX_FORGOTTEN: usize = MAX_MEMBERS_PER_NODE;

/// What the node offers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// Amounts that members may have together.
    pub capacity: Resources,
    /// The GPUs that they may have, by UUID.
    pub gpus: BTreeSet<String>,
}

/// The agent's state.
#[derive(Debug)]
pub struct Core {
    config: Config,
    members: BTreeMap<AttemptRef, Member>,
    forgotten: BTreeSet<AttemptRef>,
    bundles: Bundles,
    connected: bool,
    /// The records of before are lost, and the coordinator has not said yet what it placed here.
    anew: bool,
    /// What it had placed then and may have run, until that is on its record.
    unaccounted: BTreeSet<AttemptRef>,
}

impl Core {
    /// Starts with what was found on disk. The uploads of what ended meanwhile begin with the first session, and what was
    /// only half prepared is ended when the timer fires.
    #[must_use]
    pub fn new(config: Config, recovered: Vec<RecoveredMember>, now: Timestamp) -> Self {
        let members = recovered.into_iter().map(|found| {
            let mut member = Member::recovered(found, now);
            // The first session begins with the whole set.
            member.reported = Some(member.observed().phase);
            (member.attempt, member)
        });
        Self {
            config,
            members: members.collect(),
            forgotten: BTreeSet::new(),
            bundles: Bundles::default(),
            connected: false,
            anew: false,
            unaccounted: BTreeSet::new(),
        }
    }

    /// The records of before are lost: whatever the first session names that is not here may have run here, so it is not
    /// started but told as unaccounted for. To be called before any event.
    pub fn begin_anew(&mut self) {
        self.anew = true;
        self.bundles.begin_anew();
    }

    /// Whether nothing that was placed before the records were lost could still be taken for new.
    #[must_use]
    pub fn is_history_settled(&self) -> bool {
        !self.anew && self.unaccounted.is_empty() && self.bundles.is_history_settled()
    }

    /// The machine was looked at again: new members are checked against this from now on.
    pub fn set_config(&mut self, config: Config) {
        self.config = config;
    }

    /// Takes one fact and appends what is to be done about it.
    pub fn handle(&mut self, now: Timestamp, event: Event, out: &mut Outbox) {
        match event {
            Event::Connected { desired } => self.on_connected(now, desired, out),
            Event::DesiredChanged(desired) => {
                let attempt = desired.attempt;
                self.desire(now, *desired, out);
                self.advance(now, attempt, out);
            }
            Event::ForgetRequested(attempt) => self.on_forget(now, attempt, out),
            Event::Disconnected => self.connected = false,
            Event::Accepted(attempt) => self.on_accepted(now, attempt, out),
            Event::AcceptFailed {
                attempt,
                exists,
                error,
            } => {
                let ending = match exists {
                    true => unaccounted(error, now),
                    false => not_started(EndCause::PrepareFailed, error, now),
                };
                self.on_prepare_failed(now, attempt, Step::Accept, ending, out);
            }
            Event::FetchFinished(attempt) => self.on_fetched(now, attempt, out),
            Event::FetchFailed {
                attempt,
                error,
                fault,
            } => {
                let cause = match fault {
                    Fault::Infrastructure => EndCause::PrepareFailed,
                    Fault::Job => EndCause::CannotExecute,
                };
                let ending = not_started(cause, error, now);
                self.on_prepare_failed(now, attempt, Step::Fetch, ending, out);
            }
            Event::SpawnFailed { attempt, error } => {
                let ending = not_started(EndCause::PrepareFailed, error, now);
                self.on_prepare_failed(now, attempt, Step::Spawn, ending, out);
            }
            Event::GoFailed { attempt, error } => {
                self.on_request_failed(now, attempt, Request::Go, &error, out);
            }
            Event::StopFailed { attempt, error } => {
                self.on_request_failed(now, attempt, Request::Stop, &error, out);
            }
            Event::RuntimeReported { attempt, state } => {
                self.on_runtime(now, attempt, state, out);
            }
            Event::UploadFinished { attempt, uploaded } => {
                self.on_uploaded(now, attempt, uploaded, out);
            }
            Event::UploadFailed { attempt, error } => {
                self.on_request_failed(now, attempt, Request::Upload, &error, out);
            }
            Event::Removed(attempt) => self.on_removed(attempt),
            Event::RemoveFailed { attempt, error } => {
                self.on_request_failed(now, attempt, Request::Remove, &error, out);
            }
            Event::Bundle(event) => {
                let holdings = holdings(&self.config, &self.members);
                let room = |wanted: &Resources| holdings.check_amounts(wanted);
                self.bundles.handle(now, event, &room, out);
            }
            Event::TimerFired => {
                self.on_timer(now, out);
                self.bundles.on_timer(now, out);
            }
        }
    }

    /// When [`Event::TimerFired`] is due next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let deadlines = self
            .members
            .values()
            .filter_map(|member| member.backoff.deadline());
        deadlines.chain(self.bundles.next_deadline()).min()
    }

    /// Every member that there is, for the start of a session.
    #[must_use]
    pub fn observed(&self) -> Vec<ObservedMember> {
        self.members.values().map(Member::observed).collect()
    }

    /// How a known member is started.
    #[must_use]
    pub fn spec(&self, attempt: AttemptRef) -> Option<&MemberSpec> {
        self.members.get(&attempt).map(|member| &member.spec)
    }

    /// Whether any member or bundle has, or is about to have, processes.
    #[must_use]
    pub fn has_live_members(&self) -> bool {
        self.members.values().any(Member::is_live) || self.bundles.has_live()
    }

    /// Takes the bundles that were found on disk, before any event.
    pub fn recover_bundles(&mut self, found: Vec<RecoveredBundle>) {
        self.bundles.recover(found);
    }

    /// How a known bundle's tasks are started.
    #[must_use]
    pub fn bundle_spec(&self, bundle: BundleRef) -> Option<&MemberSpec> {
        self.bundles.spec(bundle)
    }

    fn on_connected(&mut self, now: Timestamp, desired: Vec<DesiredMember>, out: &mut Outbox) {
        self.connected = true;
        let named: BTreeSet<_> = desired.iter().map(|member| member.attempt).collect();
        // Of what only waits to be accepted nothing exists, so nothing is left when it is not wanted.
        self.members
            .retain(|attempt, member| named.contains(attempt) || member.stage != Stage::Waiting);
        for (_, member) in self
            .members
            .iter_mut()
            .filter(|(id, _)| !named.contains(id))
        {
            member.unwish();
        }
        self.unaccounted.retain(|attempt| named.contains(attempt));
        // First all wishes and then all steps, so that an older attempt is seen to be older.
        for member in desired {
            self.desire(now, member, out);
        }
        self.anew = false;
        for member in self.members.values_mut() {
            if matches!(member.stage, Stage::Uploading { .. }) {
                member.backoff.begin();
            }
        }
        self.advance_all(now, out);
    }

    /// Notes what is wanted; steps follow with [`Self::advance`].
    fn desire(&mut self, now: Timestamp, desired: DesiredMember, out: &mut Outbox) {
        let attempt = desired.attempt;
        let gone = match self.members.get_mut(&attempt) {
            Some(member) if !matches!(member.stage, Stage::Removing { .. }) => {
                member.wish(desired.phase);
                return;
            }
            Some(_) => true,
            None => self.forgotten.contains(&attempt) && !planted(Mutation::ForgottenTakenAgain),
        };
        let refusal = if gone {
            Some(unaccounted(
                "it ended here before, and its record was deleted",
                now,
            ))
        } else if self.members.len() >= MAX_MEMBERS_PER_NODE {
            let text = format!("this node has {MAX_MEMBERS_PER_NODE} members, as many as it may");
            Some(not_started(EndCause::PrepareFailed, text, now))
        } else {
            None
        };
        if let Some(ending) = refusal {
            out.note(attempt, format!("refused a member: {}", ending.message));
            // Not kept: it is told again whenever it is wanted again.
            out.push(Effect::Report(ObservedMember {
                attempt,
                node_rank: desired.spec.node_rank,
                phase: ObservedPhase::Ended(ending),
            }));
            return;
        }
        let stage = match &desired.phase {
            DesiredPhase::Prepare | DesiredPhase::Start if self.anew => {
                out.note(attempt, "is of before this node's records were lost");
                self.unaccounted.insert(attempt);
                let text =
                    "the node's records were lost; whether it was started there is not known";
                Stage::Ended(unaccounted(text, now))
            }
            DesiredPhase::Prepare | DesiredPhase::Start => Stage::Waiting,
            // It was ready once, or nobody would want it to run; so it was here and may have run.
            DesiredPhase::Run(_) => {
                out.note(attempt, "was told to run a member that is not here");
                Stage::Ended(unaccounted(
                    "its directory is not on this node any more",
                    now,
                ))
            }
            DesiredPhase::Stop(_) => Stage::Ended(stopped_before_start(now)),
        };
        self.members.insert(attempt, Member::new(desired, stage));
    }

    fn on_forget(&mut self, now: Timestamp, attempt: AttemptRef, out: &mut Outbox) {
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        match &member.stage {
            Stage::Ended(ending) if member.on_disk => {
                let ending = ending.clone();
                member.enter(Stage::Removing {
                    ending,
                    busy: false,
                });
                self.advance(now, attempt, out);
            }
            Stage::Ended(_) => self.on_removed(attempt),
            Stage::Removing { .. } => {}
            Stage::Waiting
            | Stage::Accepting
            | Stage::Fetching { .. }
            | Stage::Starting
            | Stage::Ready { .. }
            | Stage::Running { .. }
            | Stage::Stopping
            | Stage::CleanupPending(_)
            | Stage::Uploading { .. } => {
                out.note(
                    attempt,
                    "was told to forget a member that has not ended; it stays",
                );
            }
        }
    }

    fn on_removed(&mut self, attempt: AttemptRef) {
        let Some(member) = self.members.get(&attempt) else {
            return;
        };
        match member.stage {
            Stage::Removing { .. } | Stage::Ended(_) => {}
            Stage::Waiting
            | Stage::Accepting
            | Stage::Fetching { .. }
            | Stage::Starting
            | Stage::Ready { .. }
            | Stage::Running { .. }
            | Stage::Stopping
            | Stage::CleanupPending(_)
            | Stage::Uploading { .. } => return,
        }
        self.members.remove(&attempt);
        self.unaccounted.remove(&attempt);
        self.forgotten.insert(attempt);
        if self.forgotten.len() > MAX_FORGOTTEN {
            self.forgotten.pop_first();
        }
    }

    fn on_accepted(&mut self, now: Timestamp, attempt: AttemptRef, out: &mut Outbox) {
        let superseded = self.has_newer(attempt);
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        if member.stage != Stage::Accepting {
            return;
        }
        match &member.want {
            Want::Stop(_) => member.end(stopped_before_start(now)),
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_) if superseded => {
                member.end(older(now));
            }
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_) => {
                member.enter(Stage::Fetching { cancelled: false });
                out.push(Effect::Fetch(attempt));
            }
        }
        self.advance(now, attempt, out);
    }

    fn on_fetched(&mut self, now: Timestamp, attempt: AttemptRef, out: &mut Outbox) {
        let superseded = self.has_newer(attempt);
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        if !matches!(member.stage, Stage::Fetching { .. }) {
            return;
        }
        match &member.want {
            Want::Stop(_) => member.end(stopped_before_start(now)),
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_) if superseded => {
                member.end(older(now));
            }
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_) => {
                member.enter(Stage::Starting);
                out.push(Effect::SpawnShim(attempt));
            }
        }
        self.advance(now, attempt, out);
    }

    /// One of the steps before the ranks failed for good. News of a step that is behind changes nothing: a shim may have
    /// been started since.
    fn on_prepare_failed(
        &mut self,
        now: Timestamp,
        attempt: AttemptRef,
        step: Step,
        ending: Ending,
        out: &mut Outbox,
    ) {
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        let current = match &member.stage {
            Stage::Accepting => Some(Step::Accept),
            Stage::Fetching { .. } => Some(Step::Fetch),
            Stage::Starting => Some(Step::Spawn),
            Stage::Waiting
            | Stage::Ready { .. }
            | Stage::Running { .. }
            | Stage::Stopping
            | Stage::CleanupPending(_)
            | Stage::Uploading { .. }
            | Stage::Ended(_)
            | Stage::Removing { .. } => None,
        };
        if current != Some(step) {
            return;
        }
        if matches!(member.want, Want::Stop(_)) && !ending.started {
            // Whatever went wrong, a stop was wanted, and here is its end.
            member.end(stopped_before_start(now));
        } else {
            let message = format!("cannot prepare a member: {}", ending.message);
            out.note(attempt, message);
            member.end(ending);
        }
        self.advance(now, attempt, out);
    }

    fn on_runtime(
        &mut self,
        now: Timestamp,
        attempt: AttemptRef,
        state: RuntimeState,
        out: &mut Outbox,
    ) {
        match self.members.get_mut(&attempt) {
            Some(member) => {
                if member.hear(state) {
                    self.advance(now, attempt, out);
                }
            }
            None => out.note(attempt, "a shim reported that belongs to no known member"),
        }
    }

    fn on_uploaded(
        &mut self,
        now: Timestamp,
        attempt: AttemptRef,
        uploaded: Uploaded,
        out: &mut Outbox,
    ) {
        if let Some(member) = self.members.get_mut(&attempt) {
            member.finish_upload(uploaded);
            self.advance(now, attempt, out);
        }
    }

    fn on_request_failed(
        &mut self,
        now: Timestamp,
        attempt: AttemptRef,
        request: Request,
        error: &str,
        out: &mut Outbox,
    ) {
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        match (request, &mut member.stage) {
            (Request::Go, Stage::Ready { .. }) if member.stop_sent.is_none() => {
                member.go_sent = false;
            }
            (
                Request::Stop,
                Stage::Starting
                | Stage::Ready { .. }
                | Stage::Running { .. }
                | Stage::Stopping
                | Stage::CleanupPending(_),
            ) => {
                member
                    .stop_sent
                    .take_if(|_| !planted(Mutation::StopNotRepeated));
            }
            (Request::Upload, Stage::Uploading { busy, .. })
            | (Request::Remove, Stage::Removing { busy, .. }) => {
                *busy = planted(Mutation::UploadNotRepeated)
            }
            // What failed does not matter any more.
            (Request::Go | Request::Stop | Request::Upload | Request::Remove, _) => return,
        }
        member.backoff.fail(now);
        out.note(
            attempt,
            format!(
                "cannot {} a member, will try again: {error}",
                request.verb()
            ),
        );
        self.settle(attempt, out);
    }

    fn on_timer(&mut self, now: Timestamp, out: &mut Outbox) {
        let due: Vec<_> = self
            .members
            .values()
            .filter(|member| {
                member
                    .backoff
                    .deadline()
                    .is_some_and(|deadline| deadline <= now)
            })
            .map(|member| member.attempt)
            .collect();
        for attempt in due {
            if let Some(member) = self.members.get_mut(&attempt) {
                member.backoff.begin();
            }
            self.advance(now, attempt, out);
        }
    }

    fn advance_all(&mut self, now: Timestamp, out: &mut Outbox) {
        let all: Vec<_> = self.members.keys().copied().collect();
        for attempt in all {
            self.advance(now, attempt, out);
        }
    }

    /// Makes the next step of a member, if there is one, and of those that waited for it.
    fn advance(&mut self, now: Timestamp, attempt: AttemptRef, out: &mut Outbox) {
        self.step(now, attempt, out);
        self.settle(attempt, out);
        let waiting: Vec<_> = self
            .newer(attempt)
            .filter(|member| member.stage == Stage::Waiting)
            .map(|member| member.attempt)
            .collect();
        for newer in waiting {
            self.step(now, newer, out);
            self.settle(newer, out);
        }
    }

    fn step(&mut self, now: Timestamp, attempt: AttemptRef, out: &mut Outbox) {
        let superseded = self.has_newer(attempt);
        let connected = self.connected;
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        let rests = member.backoff.rests(now);
        match &mut member.stage {
            Stage::Waiting => self.step_waiting(now, attempt, out),
            Stage::Accepting | Stage::Ended(_) => {}
            Stage::Fetching { cancelled } => {
                if matches!(member.want, Want::Stop(_)) && !*cancelled {
                    *cancelled = true;
                    out.push(Effect::CancelFetch(attempt));
                }
            }
            Stage::Starting
            | Stage::Ready { .. }
            | Stage::Running { .. }
            | Stage::Stopping
            | Stage::CleanupPending(_) => {
                step_shim(member, superseded, rests, out);
            }
            Stage::Uploading { ending, busy } => {
                if connected && !rests && !*busy {
                    *busy = true;
                    let started = ending.started;
                    member.backoff.begin();
                    out.push(Effect::Upload { attempt, started });
                }
            }
            Stage::Removing { busy, .. } => {
                if !rests && !*busy {
                    *busy = true;
                    member.backoff.begin();
                    out.push(Effect::Remove(attempt));
                }
            }
        }
    }

    /// Accepts a member, refuses it, or leaves it waiting.
    fn step_waiting(&mut self, now: Timestamp, attempt: AttemptRef, out: &mut Outbox) {
        let superseded = self.has_newer(attempt);
        let older_lives = self.older(attempt).any(Member::is_live);
        let Some(member) = self.members.get(&attempt) else {
            return;
        };
        let ending = match &member.want {
            Want::Stop(_) => Some(stopped_before_start(now)),
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_) if superseded => {
                Some(older(now))
            }
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_)
                if older_lives && !planted(Mutation::StartsBesideOlder) =>
            {
                return;
            }
            Want::Nothing | Want::Prepare | Want::Start | Want::Run(_) => {
                let refusal = self.holdings().check(&member.spec).err();
                refusal.map(|text| not_started(EndCause::PrepareFailed, text, now))
            }
        };
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        match ending {
            Some(ending) => {
                out.note(
                    attempt,
                    format!("did not accept a member: {}", ending.message),
                );
                member.end(ending);
            }
            None => {
                member.on_disk = true;
                member.enter(Stage::Accepting);
                out.push(Effect::Accept(Box::new(DesiredMember {
                    attempt,
                    phase: DesiredPhase::Prepare,
                    spec: member.spec.clone(),
                })));
            }
        }
    }

    /// Tells the coordinator if a member looks different now.
    fn settle(&mut self, attempt: AttemptRef, out: &mut Outbox) {
        let Some(member) = self.members.get_mut(&attempt) else {
            return;
        };
        let observed = member.observed();
        if member.reported.as_ref() != Some(&observed.phase) {
            member.reported = Some(observed.phase.clone());
            out.push(Effect::Report(observed));
        }
    }

    fn holdings(&self) -> Holdings<'_> {
        holdings(&self.config, &self.members)
    }

    fn older(&self, attempt: AttemptRef) -> impl Iterator<Item = &Member> {
        let first = AttemptRef {
            attempt: AttemptNumber(0),
            ..attempt
        };
        self.members.range(first..attempt).map(|(_, member)| member)
    }

    fn newer(&self, attempt: AttemptRef) -> impl Iterator<Item = &Member> {
        self.members
            .range(newer_range(attempt))
            .map(|(_, member)| member)
    }

    /// Whether a newer attempt of the same task is, or was, known here.
    fn has_newer(&self, attempt: AttemptRef) -> bool {
        self.newer(attempt).next().is_some()
            || self.forgotten.range(newer_range(attempt)).next().is_some()
    }
}

/// What live members hold. Bundles are not in it: how much of one's slots is in use changes with each task, and only the
/// coordinator can tell what it has given to whom. No bundle has GPUs.
fn holdings<'a>(config: &'a Config, members: &'a BTreeMap<AttemptRef, Member>) -> Holdings<'a> {
    let mut holdings = Holdings::new(&config.capacity, &config.gpus);
    for member in members.values().filter(|member| member.is_live()) {
        holdings.add(member.attempt, &member.spec);
    }
    holdings
}

/// What is done once, before the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Accept,
    Fetch,
    Spawn,
}

/// What may fail and is asked for again.
#[derive(Debug, Clone, Copy)]
enum Request {
    Go,
    Stop,
    Upload,
    Remove,
}

impl Request {
    fn verb(self) -> &'static str {
        match self {
            Self::Go => "start",
            Self::Stop => "stop",
            Self::Upload => "upload what is left of",
            Self::Remove => "remove",
        }
    }
}

/// Go or stop, as wanted; a stop wins, and whoever was told to stop is never told to go.
fn step_shim(member: &mut Member, superseded: bool, rests: bool, out: &mut Outbox) {
    let attempt = member.attempt;
    match &member.want {
        Want::Stop(stop) => {
            let stop: Stop = *stop;
            if member.stop_sent != Some(stop) && !rests {
                member.stop_sent = Some(stop);
                member.backoff.begin();
                out.push(Effect::StopRanks(attempt, stop));
            }
        }
        Want::Start | Want::Run(_) => {
            let Stage::Ready { port } = member.stage else {
                return;
            };
            if !superseded && !member.go_sent && !rests {
                let go = match &member.want {
                    Want::Run(go) => go.clone(),
                    Want::Start | Want::Nothing | Want::Prepare | Want::Stop(_) => Go::alone(port),
                };
                member.go_sent = true;
                member.backoff.begin();
                out.push(Effect::Go(attempt, go));
            }
        }
        Want::Nothing | Want::Prepare => {}
    }
}

fn newer_range(attempt: AttemptRef) -> (Bound<AttemptRef>, Bound<AttemptRef>) {
    let last = AttemptRef {
        attempt: AttemptNumber(u32::MAX),
        ..attempt
    };
    (Bound::Excluded(attempt), Bound::Included(last))
}

fn stopped_before_start(now: Timestamp) -> Ending {
    not_started(
        EndCause::Stopped,
        "stopped before anything was started",
        now,
    )
}

fn older(now: Timestamp) -> Ending {
    let text = "a newer attempt of the task is known on this node";
    not_started(EndCause::Stopped, text, now)
}
