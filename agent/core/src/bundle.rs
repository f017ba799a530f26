//! Bundles: which ones the coordinator wants here, which ones there are, and what to do next. What becomes of their tasks
//! is in their journals, and read from there by others.
//!
//! The promises: a bundle is accepted once ever and has one carrier at most; it is ended but on the coordinator's word,
//! and deleted but after its end is on the coordinator's record. A bundle that is not taken is answered all the same, so
//! that each of its tasks comes back.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_common::bundle::{BundlePhase, DesiredBundle};
use trainyard_common::ids::BundleRef;
use trainyard_common::limits::MAX_TASKS_PER_JOB;
use trainyard_common::member::MemberSpec;
use trainyard_common::mutation::{Mutation, planted};
use trainyard_common::resources::Resources;
use trainyard_common::time::Timestamp;

use crate::backoff::Backoff;
use crate::effect::{Effect, Outbox};

/// Bundles of one node. Each has a process, some threads and a few connections; a node that runs tasks of more arrays at
/// the same time than this is better served by single attempts.
pub const MAX_BUNDLES_PER_NODE: usize = 256;
/// Bundles that were refused and are answered from memory. A coordinator that knows the limit above makes none.
const MAX_REFUSED: usize = MAX_BUNDLES_PER_NODE;
/// Bundles whose end was forgotten and that are still refused by name.
const MAX_FORGOTTEN: usize = 10_000;

/// A fact about bundles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BundleEvent {
    /// A session began; these are all bundles that the coordinator wants here.
    AllDesired(Vec<DesiredBundle>),
    /// The coordinator wants one, or wants it differently.
    Desired(Box<DesiredBundle>),
    /// Everything about this one is on the coordinator's record.
    ForgetRequested(BundleRef),
    /// Its directory was made and is durable.
    Accepted(BundleRef),
    /// It could not be made.
    AcceptFailed {
        /// Which one.
        bundle: BundleRef,
        /// It was there already, so this bundle was accepted before.
        exists: bool,
        /// Why, without a final period.
        error: String,
    },
    /// The snapshot is in place.
    FetchFinished(BundleRef),
    /// It cannot be brought here; also the answer to a cancelled fetch.
    FetchFailed {
        /// Which one.
        bundle: BundleRef,
        /// Why, without a final period.
        error: String,
    },
    /// No carrier could be started.
    SpawnFailed {
        /// Which one.
        bundle: BundleRef,
        /// Why, without a final period.
        error: String,
    },
    /// Its carrier takes tasks.
    Running(BundleRef),
    /// No process of it is left, and its journal says so.
    Over(BundleRef),
    /// Its directory is gone.
    Removed(BundleRef),
    /// It could not be removed.
    RemoveFailed {
        /// Which one.
        bundle: BundleRef,
        /// Why, without a final period.
        error: String,
    },
}

/// A request about a bundle. Desired bundles are without the specification, but for [`BundleEffect::Accept`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BundleEffect {
    /// Make its directory, durably. Answered with `Accepted` or `AcceptFailed`.
    Accept(Box<DesiredBundle>),
    /// Bring its snapshot. Answered with `FetchFinished` or `FetchFailed`.
    Fetch(BundleRef),
    /// Give the fetch up soon; it is answered all the same.
    CancelFetch(BundleRef),
    /// Start its one carrier with these tasks. Answered with `Running`, `Over` or `SpawnFailed`.
    Spawn(Box<DesiredBundle>),
    /// Say what is wanted now to whoever has its journal, and what is on record to whoever reports from it.
    Direct(Box<DesiredBundle>),
    /// It gets no carrier: give its tasks back in its journal. Answered with `Over`.
    End {
        /// What is wanted now.
        desired: Box<DesiredBundle>,
        /// What went wrong; empty if it was to be.
        message: String,
    },
    /// It is not here: report so, for each task that was not reported yet.
    Refuse {
        /// What is wanted now.
        desired: Box<DesiredBundle>,
        /// What went wrong; empty if it was to be.
        message: String,
        /// Whether its tasks may have run here; else they are given back.
        may_have_run: bool,
    },
    /// Forget what was reported of one that was refused.
    Drop(BundleRef),
    /// Delete its directory. Answered with `Removed` or `RemoveFailed`.
    Remove(BundleRef),
    /// For the operator's log.
    Note {
        /// Which one.
        bundle: BundleRef,
        /// What, in lower case and without a final period.
        text: String,
    },
}

/// A bundle that was found on disk when the agent started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredBundle {
    /// Which one.
    pub bundle: BundleRef,
    /// How its tasks are started.
    pub spec: MemberSpec,
    /// Where it is.
    pub state: RecoveredBundleState,
}

/// Where a recovered bundle is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoveredBundleState {
    /// No carrier was started.
    Accepted,
    /// One was; it may live.
    Carried,
    /// Its journal is complete.
    Over,
}

/// Where a bundle is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// An earlier agent process accepted it and did not come further. Goes on when it is wanted.
    Waiting,
    Accepting,
    Fetching {
        /// It was told to give up.
        cancelled: bool,
    },
    /// Its carrier was started and has not said anything.
    Starting,
    Running,
    /// It gets no carrier, and its tasks are being given back.
    Ending,
    /// Nothing of it is left but what is on disk.
    Over,
    Removing {
        /// A removal is under way.
        busy: bool,
    },
    /// Nothing of it is, or can be, on this node.
    Refused {
        message: String,
        may_have_run: bool,
    },
}

#[derive(Debug)]
struct Bundle {
    /// As first accepted.
    spec: Option<MemberSpec>,
    /// Without the specification.
    desired: DesiredBundle,
    stage: Stage,
    /// Of its removal.
    backoff: Backoff,
}

impl Bundle {
    fn is_live(&self) -> bool {
        match self.stage {
            Stage::Accepting
            | Stage::Fetching { .. }
            | Stage::Starting
            | Stage::Running
            | Stage::Ending => true,
            Stage::Waiting | Stage::Over | Stage::Removing { .. } | Stage::Refused { .. } => false,
        }
    }

    fn is_stopped(&self) -> bool {
        matches!(self.desired.phase, BundlePhase::Stop(_))
    }

    fn desired(&self) -> Box<DesiredBundle> {
        Box::new(self.desired.clone())
    }

    /// Takes what is wanted now; what is to be done goes forward only.
    fn wish(&mut self, desired: DesiredBundle) {
        let place = |phase: &BundlePhase| match phase {
            BundlePhase::Run => 0,
            BundlePhase::Close => 1,
            BundlePhase::Stop(_) => 2,
        };
        let phase = match place(&desired.phase) < place(&self.desired.phase) {
            true => self.desired.phase,
            false => desired.phase,
        };
        self.desired = DesiredBundle {
            phase,
            spec: None,
            ..desired
        };
    }
}

/// All bundles of this node.
#[derive(Debug, Default)]
pub(crate) struct Bundles {
    bundles: BTreeMap<BundleRef, Bundle>,
    forgotten: BTreeSet<BundleRef>,
    /// As for members.
    anew: bool,
    unaccounted: BTreeSet<BundleRef>,
}

/// Whether a bundle's slots fit beside the members that live: a sentence if not.
pub(crate) type Room<'a> = &'a dyn Fn(&Resources) -> Result<(), String>;

impl Bundles {
    pub(crate) fn begin_anew(&mut self) {
        self.anew = true;
    }

    pub(crate) fn is_history_settled(&self) -> bool {
        !self.anew && self.unaccounted.is_empty()
    }

    pub(crate) fn recover(&mut self, found: Vec<RecoveredBundle>) {
        for found in found {
            let desired = DesiredBundle {
                bundle: found.bundle,
                slots: 1,
                phase: BundlePhase::Run,
                tasks: Default::default(),
                recorded: 0,
                spec: None,
            };
            let stage = match found.state {
                RecoveredBundleState::Accepted => Stage::Waiting,
                RecoveredBundleState::Carried => Stage::Running,
                RecoveredBundleState::Over => Stage::Over,
            };
            let bundle = Bundle {
                spec: Some(found.spec),
                desired,
                stage,
                backoff: Backoff::default(),
            };
            self.bundles.insert(found.bundle, bundle);
        }
    }

    pub(crate) fn spec(&self, bundle: BundleRef) -> Option<&MemberSpec> {
        self.bundles.get(&bundle)?.spec.as_ref()
    }

    pub(crate) fn has_live(&self) -> bool {
        self.bundles.values().any(Bundle::is_live)
    }

    pub(crate) fn next_deadline(&self) -> Option<Timestamp> {
        let deadlines = self
            .bundles
            .values()
            .filter_map(|bundle| bundle.backoff.deadline());
        deadlines.min()
    }

    pub(crate) fn handle(
        &mut self,
        now: Timestamp,
        event: BundleEvent,
        room: Room<'_>,
        out: &mut Outbox,
    ) {
        match event {
            BundleEvent::AllDesired(all) => self.on_all(all, room, out),
            BundleEvent::Desired(desired) => self.desire(*desired, room, out),
            BundleEvent::ForgetRequested(bundle) => self.on_forget(bundle, out),
            BundleEvent::Accepted(bundle) => self.on_accepted(bundle, out),
            BundleEvent::AcceptFailed {
                bundle,
                exists,
                error,
            } => self.on_accept_failed(bundle, exists, error, out),
            BundleEvent::FetchFinished(bundle) => self.on_fetched(bundle, Ok(()), out),
            BundleEvent::FetchFailed { bundle, error } => self.on_fetched(bundle, Err(error), out),
            BundleEvent::SpawnFailed { bundle, error } => {
                if let Some(found) = self.at(bundle, |stage| *stage == Stage::Starting) {
                    end(found, error, out);
                }
            }
            BundleEvent::Running(bundle) => {
                if let Some(found) = self.at(bundle, |stage| *stage == Stage::Starting) {
                    found.stage = Stage::Running;
                }
            }
            BundleEvent::Over(bundle) => self.on_over(bundle),
            BundleEvent::Removed(bundle) => {
                if self
                    .at(bundle, |stage| matches!(stage, Stage::Removing { .. }))
                    .is_some()
                {
                    self.forget(bundle);
                }
            }
            BundleEvent::RemoveFailed { bundle, error } => {
                self.on_remove_failed(now, bundle, &error, out);
            }
        }
    }

    pub(crate) fn on_timer(&mut self, now: Timestamp, out: &mut Outbox) {
        for (bundle, found) in &mut self.bundles {
            if found
                .backoff
                .deadline()
                .is_some_and(|deadline| deadline <= now)
                && let Stage::Removing { busy } = &mut found.stage
            {
                *busy = true;
                found.backoff.begin();
                push(out, BundleEffect::Remove(*bundle));
            }
        }
    }

    fn at(&mut self, bundle: BundleRef, is: impl Fn(&Stage) -> bool) -> Option<&mut Bundle> {
        self.bundles
            .get_mut(&bundle)
            .filter(|found| is(&found.stage))
    }

    fn on_all(&mut self, all: Vec<DesiredBundle>, room: Room<'_>, out: &mut Outbox) {
        let named: BTreeSet<_> = all.iter().map(|desired| desired.bundle).collect();
        // Nothing of what was refused exists, so nothing is left when it is not wanted. All others are left alone.
        self.bundles.retain(|bundle, found| {
            let stays = named.contains(bundle) || !matches!(found.stage, Stage::Refused { .. });
            if !stays {
                push(out, BundleEffect::Drop(*bundle));
            }
            stays
        });
        self.unaccounted.retain(|bundle| named.contains(bundle));
        for desired in all {
            self.desire(desired, room, out);
        }
        self.anew = false;
    }

    fn desire(&mut self, desired: DesiredBundle, room: Room<'_>, out: &mut Outbox) {
        let bundle = desired.bundle;
        if desired.tasks.count() > MAX_TASKS_PER_JOB {
            let count = desired.tasks.count();
            return note(
                out,
                bundle,
                format!("was handed {count} tasks, more than a job has"),
            );
        }
        let Some(found) = self.bundles.get_mut(&bundle) else {
            return self.welcome(desired, room, out);
        };
        found.wish(desired);
        match &mut found.stage {
            Stage::Waiting => prepare(found, out),
            Stage::Fetching { cancelled } if !*cancelled => {
                if matches!(found.desired.phase, BundlePhase::Stop(_)) {
                    *cancelled = true;
                    push(out, BundleEffect::CancelFetch(bundle));
                }
            }
            // What is wanted then is looked at when they are done, or does not matter any more.
            Stage::Accepting | Stage::Fetching { .. } | Stage::Removing { .. } => {}
            Stage::Starting | Stage::Running | Stage::Ending | Stage::Over => {
                push(out, BundleEffect::Direct(found.desired()));
            }
            Stage::Refused { .. } => refuse(found, out),
        }
    }

    /// Accepts a bundle or refuses it.
    fn welcome(&mut self, desired: DesiredBundle, room: Room<'_>, out: &mut Outbox) {
        let bundle = desired.bundle;
        let refused = |message: String, may_have_run| Stage::Refused {
            message,
            may_have_run,
        };
        let forgotten = self.forgotten.contains(&bundle);
        let stage = if forgotten && !planted(Mutation::ForgottenBundleTaken) {
            let text = "it ended here before, and its record was deleted";
            refused(text.to_owned(), true)
        } else if self.anew {
            self.unaccounted.insert(bundle);
            let text =
                "the node's records were lost; which of its tasks were started there is not known";
            refused(text.to_owned(), true)
        } else if desired.spec.is_none() || desired.recorded > 0 {
            refused("it is not on this node any more".to_owned(), true)
        } else if matches!(desired.phase, BundlePhase::Stop(_)) {
            refused(String::new(), false)
        } else if self.accepted() >= MAX_BUNDLES_PER_NODE {
            let text = format!("this node has {MAX_BUNDLES_PER_NODE} bundles, as many as it may");
            refused(text, false)
        } else {
            match room(&wanted(&desired)) {
                Ok(()) => Stage::Accepting,
                Err(text) => refused(text, false),
            }
        };
        let is_refused = stage != Stage::Accepting;
        if is_refused && self.bundles.len() - self.accepted() >= MAX_REFUSED {
            return note(out, bundle, "is one too many to be refused".to_owned());
        }
        let mut found = Bundle {
            spec: desired.spec.as_deref().cloned(),
            desired: desired.clone(),
            stage,
            backoff: Backoff::default(),
        };
        found.desired.spec = None;
        if is_refused {
            refuse(&found, out);
        } else {
            push(out, BundleEffect::Accept(Box::new(desired)));
        }
        self.bundles.insert(bundle, found);
    }

    /// How many have a directory, or are about to.
    fn accepted(&self) -> usize {
        let stages = self.bundles.values().map(|found| &found.stage);
        stages
            .filter(|stage| !matches!(stage, Stage::Refused { .. }))
            .count()
    }

    fn on_forget(&mut self, bundle: BundleRef, out: &mut Outbox) {
        let Some(found) = self.bundles.get_mut(&bundle) else {
            return;
        };
        match found.stage {
            Stage::Over => {
                found.stage = Stage::Removing { busy: true };
                push(out, BundleEffect::Remove(bundle));
            }
            Stage::Refused { .. } => {
                push(out, BundleEffect::Drop(bundle));
                self.forget(bundle);
            }
            Stage::Removing { .. } => {}
            Stage::Waiting
            | Stage::Accepting
            | Stage::Fetching { .. }
            | Stage::Starting
            | Stage::Running
            | Stage::Ending => {
                let text = "was told to forget a bundle that has not ended; it stays";
                note(out, bundle, text.to_owned());
            }
        }
    }

    fn forget(&mut self, bundle: BundleRef) {
        self.bundles.remove(&bundle);
        self.unaccounted.remove(&bundle);
        self.forgotten.insert(bundle);
        if self.forgotten.len() > MAX_FORGOTTEN {
            self.forgotten.pop_first();
        }
    }

    fn on_accepted(&mut self, bundle: BundleRef, out: &mut Outbox) {
        if let Some(found) = self.at(bundle, |stage| *stage == Stage::Accepting) {
            prepare(found, out);
        }
    }

    fn on_accept_failed(
        &mut self,
        bundle: BundleRef,
        exists: bool,
        error: String,
        out: &mut Outbox,
    ) {
        let Some(found) = self.at(bundle, |stage| *stage == Stage::Accepting) else {
            return;
        };
        found.stage = Stage::Refused {
            message: error,
            may_have_run: exists,
        };
        refuse(found, out);
    }

    fn on_fetched(&mut self, bundle: BundleRef, result: Result<(), String>, out: &mut Outbox) {
        let Some(found) = self.at(bundle, |stage| matches!(stage, Stage::Fetching { .. })) else {
            return;
        };
        match result {
            _ if found.is_stopped() => end(found, String::new(), out),
            Ok(()) => spawn(found, out),
            Err(error) => end(found, error, out),
        }
    }

    fn on_over(&mut self, bundle: BundleRef) {
        let Some(found) = self.bundles.get_mut(&bundle) else {
            return;
        };
        match found.stage {
            Stage::Starting | Stage::Running | Stage::Ending => {
                found.stage = Stage::Over;
                if planted(Mutation::BundleRemovedUnrecorded) {
                    found.stage = Stage::Removing { busy: false };
                    found.backoff = Backoff::due(Timestamp(0));
                }
            }
            Stage::Waiting
            | Stage::Accepting
            | Stage::Fetching { .. }
            | Stage::Over
            | Stage::Removing { .. }
            | Stage::Refused { .. } => {}
        }
    }

    fn on_remove_failed(
        &mut self,
        now: Timestamp,
        bundle: BundleRef,
        error: &str,
        out: &mut Outbox,
    ) {
        if let Some(found) = self.bundles.get_mut(&bundle)
            && let Stage::Removing { busy } = &mut found.stage
        {
            *busy = false;
            found.backoff.fail(now);
            let text = format!("cannot remove a bundle, will try again: {error}");
            note(out, bundle, text);
        }
    }
}

/// What the bundle may use at once.
fn wanted(desired: &DesiredBundle) -> Resources {
    let Some(spec) = &desired.spec else {
        return Resources::default();
    };
    let times = desired.slots.min(desired.tasks.count().max(1));
    let one = &spec.resources;
    Resources {
        cpu_milli: one.cpu_milli.saturating_mul(times.into()),
        memory_bytes: one.memory_bytes.saturating_mul(times.into()),
        gpus: one.gpus.saturating_mul(times),
    }
}

/// The first step of what is on disk.
fn prepare(bundle: &mut Bundle, out: &mut Outbox) {
    if bundle.is_stopped() {
        end(bundle, String::new(), out);
    } else if bundle
        .spec
        .as_ref()
        .is_some_and(|spec| spec.snapshot.is_some())
    {
        bundle.stage = Stage::Fetching { cancelled: false };
        push(out, BundleEffect::Fetch(bundle.desired.bundle));
    } else {
        spawn(bundle, out);
    }
}

fn spawn(bundle: &mut Bundle, out: &mut Outbox) {
    bundle.stage = Stage::Starting;
    push(out, BundleEffect::Spawn(bundle.desired()));
}

fn end(bundle: &mut Bundle, message: String, out: &mut Outbox) {
    bundle.stage = Stage::Ending;
    if !message.is_empty() {
        let text = format!("cannot prepare a bundle: {message}");
        note(out, bundle.desired.bundle, text);
    }
    let desired = bundle.desired();
    push(out, BundleEffect::End { desired, message });
}

fn refuse(bundle: &Bundle, out: &mut Outbox) {
    let Stage::Refused {
        message,
        may_have_run,
    } = &bundle.stage
    else {
        return;
    };
    push(
        out,
        BundleEffect::Refuse {
            desired: bundle.desired(),
            message: message.clone(),
            may_have_run: *may_have_run,
        },
    );
}

fn push(out: &mut Outbox, effect: BundleEffect) {
    out.push(Effect::Bundle(effect));
}

fn note(out: &mut Outbox, bundle: BundleRef, text: String) {
    push(out, BundleEffect::Note { bundle, text });
}

#[cfg(test)]
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test names what it is about"
)]
mod tests;
