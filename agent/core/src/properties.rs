//! What must hold whatever happens in whatever order: checked over random facts, and over a world that answers every
//! request but in its own time.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use trainyard_common::ids::AttemptRef;
use trainyard_common::limits::MAX_MEMBERS_PER_NODE;
use trainyard_common::member::{DesiredMember, DesiredPhase, EndCause, Ending, ObservedPhase};
use trainyard_common::time::Timestamp;

use crate::tests::{attempt, config, desired, ending, go, stop};
use crate::{Core, Effect, Event, Fault, Outbox, RuntimeState, Uploaded};

/// Keeps the account of one run of the core and fails at the first broken promise.
#[derive(Default)]
struct Checker {
    accepted: BTreeSet<AttemptRef>,
    spawned: BTreeSet<AttemptRef>,
    ready: BTreeSet<AttemptRef>,
    /// Those that the coordinator allowed to start.
    go_wanted: BTreeSet<AttemptRef>,
    stop_wanted: BTreeSet<AttemptRef>,
    gone: BTreeMap<AttemptRef, Ending>,
    forgettable: BTreeSet<AttemptRef>,
}

impl Checker {
    fn event(&mut self, event: &Event) {
        match event {
            Event::DesiredChanged(member) => self.wish(member),
            Event::Connected { desired } => desired.iter().for_each(|member| self.wish(member)),
            Event::RuntimeReported { attempt, state } if self.spawned.contains(attempt) => {
                match state {
                    RuntimeState::Ready { .. } => {
                        self.ready.insert(*attempt);
                    }
                    RuntimeState::Gone(ending) => {
                        self.gone.entry(*attempt).or_insert_with(|| ending.clone());
                    }
                    RuntimeState::Running { .. }
                    | RuntimeState::Stopping
                    | RuntimeState::CleanupPending(_) => {}
                }
            }
            Event::ForgetRequested(attempt) => {
                self.forgettable.insert(*attempt);
            }
            _ => {}
        }
    }

    fn wish(&mut self, member: &DesiredMember) {
        match member.phase {
            DesiredPhase::Prepare => {}
            DesiredPhase::Start | DesiredPhase::Run(_) => {
                self.go_wanted.insert(member.attempt);
            }
            DesiredPhase::Stop(_) => {
                self.stop_wanted.insert(member.attempt);
            }
        }
    }

    fn effect(&mut self, effect: &Effect) {
        match effect {
            Effect::Accept(member) => {
                let attempt = member.attempt;
                assert!(self.accepted.insert(attempt), "{attempt} accepted twice");
                let newer = self.accepted.iter().find(|other| {
                    (other.job, other.task) == (attempt.job, attempt.task) && **other > attempt
                });
                assert_eq!(newer, None, "accepted {attempt} after a newer one");
            }
            Effect::SpawnShim(attempt) => {
                assert!(self.accepted.contains(attempt));
                assert!(self.spawned.insert(*attempt), "{attempt} spawned twice");
            }
            Effect::Go(attempt, _) => {
                assert!(
                    self.ready.contains(attempt),
                    "{attempt} goes before it is ready"
                );
                assert!(
                    self.go_wanted.contains(attempt),
                    "{attempt} goes without a word"
                );
                assert!(
                    !self.stop_wanted.contains(attempt),
                    "{attempt} goes after a stop"
                );
                assert!(
                    !self.gone.contains_key(attempt),
                    "{attempt} goes after its end"
                );
            }
            Effect::StopRanks(attempt, _) => {
                assert!(
                    self.stop_wanted.contains(attempt),
                    "{attempt} stopped without a word"
                );
            }
            Effect::Remove(attempt) => {
                assert!(
                    self.forgettable.contains(attempt),
                    "{attempt} removed without a word"
                );
            }
            Effect::Report(member) => {
                if let ObservedPhase::Ended(end) | ObservedPhase::Uploading(end) = &member.phase
                    && let Some(said) = self.gone.get(&member.attempt)
                    && end.cause != EndCause::SupervisorLost
                {
                    let same = (said.cause, said.started, said.ended_at);
                    assert_eq!((end.cause, end.started, end.ended_at), same);
                }
            }
            Effect::Fetch(_)
            | Effect::CancelFetch(_)
            | Effect::Upload { .. }
            | Effect::Note { .. }
            | Effect::Bundle(_) => {}
        }
    }
}

fn any_attempt() -> impl Strategy<Value = AttemptRef> {
    (1..3_u64, 0..2_u32, 1..4_u32).prop_map(|(j, t, a)| attempt(&format!("j{j}.{t}.{a}")))
}

fn any_phase() -> impl Strategy<Value = DesiredPhase> {
    prop_oneof![
        3 => Just(DesiredPhase::Prepare),
        3 => Just(DesiredPhase::Start),
        4 => Just(DesiredPhase::Run(go())),
        1 => Just(DesiredPhase::Stop(stop())),
    ]
}

fn any_state() -> impl Strategy<Value = RuntimeState> {
    prop_oneof![
        4 => Just(RuntimeState::Ready { port: 4000 }),
        3 => Just(RuntimeState::Running { started_at: Timestamp(5) }),
        1 => Just(RuntimeState::Stopping),
        1 => Just(RuntimeState::Gone(ending(EndCause::RankFailed, true))),
        1 => Just(RuntimeState::Gone(ending(EndCause::PrepareFailed, false))),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    let error = || "broken".to_owned();
    prop_oneof![
        6 => (any_attempt(), any_phase())
            .prop_map(|(id, phase)| Event::DesiredChanged(Box::new(desired(id, phase)))),
        1 => prop::collection::btree_map(any_attempt(), any_phase(), 0..4).prop_map(|set| {
            // A stop is told in a change of its own here, so that the checker sees it.
            let kept = set.into_iter().filter(|(_, phase)| !matches!(phase, DesiredPhase::Stop(_)));
            let desired = kept.map(|(id, phase)| desired(id, phase)).collect();
            Event::Connected { desired }
        }),
        1 => Just(Event::Disconnected),
        2 => any_attempt().prop_map(Event::ForgetRequested),
        4 => any_attempt().prop_map(Event::Accepted),
        1 => (any_attempt(), any::<bool>()).prop_map(move |(attempt, exists)| {
            Event::AcceptFailed { attempt, exists, error: error() }
        }),
        4 => any_attempt().prop_map(Event::FetchFinished),
        1 => any_attempt().prop_map(move |attempt| {
            Event::FetchFailed { attempt, error: error(), fault: Fault::Infrastructure }
        }),
        1 => any_attempt().prop_map(move |attempt| Event::SpawnFailed { attempt, error: error() }),
        1 => any_attempt().prop_map(move |attempt| Event::GoFailed { attempt, error: error() }),
        1 => any_attempt().prop_map(move |attempt| Event::StopFailed { attempt, error: error() }),
        8 => (any_attempt(), any_state())
            .prop_map(|(attempt, state)| Event::RuntimeReported { attempt, state }),
        3 => any_attempt().prop_map(|attempt| {
            Event::UploadFinished { attempt, uploaded: Uploaded::default() }
        }),
        1 => any_attempt().prop_map(move |attempt| Event::UploadFailed { attempt, error: error() }),
        1 => any_attempt().prop_map(Event::Removed),
        1 => any_attempt().prop_map(move |attempt| Event::RemoveFailed { attempt, error: error() }),
        1 => Just(Event::TimerFired),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_order_of_facts_breaks_a_promise(events in prop::collection::vec(any_event(), 0..120)) {
        let mut core = Core::new(config(), Vec::new(), Timestamp(0));
        let mut checker = Checker::default();
        let mut out = Outbox::new();
        for (step, event) in events.into_iter().enumerate() {
            checker.event(&event);
            core.handle(Timestamp(step as u64 * 100), event, &mut out);
            out.drain().iter().for_each(|effect| checker.effect(effect));
        }
        prop_assert!(core.observed().len() <= MAX_MEMBERS_PER_NODE);
    }

    #[test]
    fn everything_ends_and_is_forgotten(
        wishes in prop::collection::vec((any_attempt(), any_phase()), 1..20),
        choices in prop::collection::vec(any::<(u8, u8)>(), 0..200),
    ) {
        let mut world = World::new();
        let mut wishes = wishes.into_iter();
        for (choice, luck) in choices {
            match (choice.is_multiple_of(4)).then(|| wishes.next()).flatten() {
                Some((id, phase)) => world.tell(Event::DesiredChanged(Box::new(desired(id, phase)))),
                None => world.answer(usize::from(choice), luck),
            }
        }
        world.wind_down();
        prop_assert_eq!(world.core.observed(), []);
        prop_assert!(!world.core.has_live_members());
        prop_assert_eq!(world.core.next_deadline(), None);
    }
}

/// Drivers that do what they are asked, in any order and with any luck. Of one attempt's shim at most one is alive, and
/// of one task's attempts at most one has a shim.
struct World {
    core: Core,
    now: Timestamp,
    checker: Checker,
    open: Vec<Effect>,
    shims: BTreeSet<AttemptRef>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            core: Core::new(config(), Vec::new(), Timestamp(0)),
            now: Timestamp(0),
            checker: Checker::default(),
            open: Vec::new(),
            shims: BTreeSet::new(),
        };
        world.tell(Event::Connected {
            desired: Vec::new(),
        });
        world
    }

    fn tell(&mut self, event: Event) {
        let mut out = Outbox::new();
        self.checker.event(&event);
        self.core.handle(self.now, event, &mut out);
        for effect in out.drain() {
            self.checker.effect(&effect);
            self.open.push(effect);
        }
    }

    /// Carries out one open request; requests about one attempt keep their order.
    fn answer(&mut self, choice: usize, luck: u8) {
        if let Some(deadline) = self.core.next_deadline() {
            self.now = self.now.max(deadline);
            self.tell(Event::TimerFired);
        }
        if self.open.is_empty() {
            return;
        }
        let chosen = subject(&self.open[choice % self.open.len()]);
        let first = self
            .open
            .iter()
            .position(|effect| subject(effect) == chosen)
            .unwrap();
        let effect = self.open.remove(first);
        let lucky = !luck.is_multiple_of(4);
        let error = || "bad luck".to_owned();
        match effect {
            Effect::Accept(member) if lucky => self.tell(Event::Accepted(member.attempt)),
            Effect::Accept(member) => self.tell(Event::AcceptFailed {
                attempt: member.attempt,
                exists: false,
                error: error(),
            }),
            Effect::Fetch(attempt) if lucky => self.tell(Event::FetchFinished(attempt)),
            Effect::Fetch(attempt) => self.tell(Event::FetchFailed {
                attempt,
                error: error(),
                fault: Fault::Job,
            }),
            Effect::SpawnShim(attempt) if lucky => {
                let sibling = self
                    .shims
                    .iter()
                    .find(|shim| (shim.job, shim.task) == (attempt.job, attempt.task));
                assert_eq!(sibling, None, "{attempt} has a shim beside another attempt");
                self.shims.insert(attempt);
                self.report(attempt, RuntimeState::Ready { port: 1 });
            }
            Effect::SpawnShim(attempt) => self.tell(Event::SpawnFailed {
                attempt,
                error: error(),
            }),
            Effect::Go(attempt, _) if lucky => {
                let started_at = self.now;
                self.report(attempt, RuntimeState::Running { started_at });
            }
            Effect::Go(attempt, _) => self.tell(Event::GoFailed {
                attempt,
                error: error(),
            }),
            Effect::StopRanks(attempt, _) if lucky => {
                self.report(attempt, RuntimeState::Stopping);
                self.report(attempt, RuntimeState::Gone(ending(EndCause::Stopped, true)));
            }
            Effect::StopRanks(attempt, _) => self.tell(Event::StopFailed {
                attempt,
                error: error(),
            }),
            Effect::Upload { attempt, .. } if lucky => self.tell(Event::UploadFinished {
                attempt,
                uploaded: Uploaded::default(),
            }),
            Effect::Upload { attempt, .. } => self.tell(Event::UploadFailed {
                attempt,
                error: error(),
            }),
            Effect::Remove(attempt) if lucky => self.tell(Event::Removed(attempt)),
            Effect::Remove(attempt) => self.tell(Event::RemoveFailed {
                attempt,
                error: error(),
            }),
            Effect::CancelFetch(_)
            | Effect::Report(_)
            | Effect::Note { .. }
            | Effect::Bundle(_) => {}
        }
    }

    fn report(&mut self, attempt: AttemptRef, state: RuntimeState) {
        if !self.shims.contains(&attempt) {
            return;
        }
        if matches!(state, RuntimeState::Gone(_)) {
            self.shims.remove(&attempt);
        }
        self.tell(Event::RuntimeReported { attempt, state });
    }

    /// The coordinator wants all of it to end and then forgets it.
    fn wind_down(&mut self) {
        for round in 0..2000 {
            let observed = self.core.observed();
            if observed.is_empty() && self.open.is_empty() {
                return;
            }
            for member in observed {
                match member.phase {
                    ObservedPhase::Ended(_) => self.tell(Event::ForgetRequested(member.attempt)),
                    _ => {
                        let phase = DesiredPhase::Stop(stop());
                        self.tell(Event::DesiredChanged(Box::new(desired(
                            member.attempt,
                            phase,
                        ))));
                    }
                }
            }
            self.answer(round, 1);
        }
    }
}

fn subject(effect: &Effect) -> AttemptRef {
    match effect {
        Effect::Accept(member) => member.attempt,
        Effect::Report(member) => member.attempt,
        Effect::Upload { attempt, .. } | Effect::Note { attempt, .. } => *attempt,
        Effect::Fetch(attempt)
        | Effect::CancelFetch(attempt)
        | Effect::SpawnShim(attempt)
        | Effect::Go(attempt, _)
        | Effect::StopRanks(attempt, _)
        | Effect::Remove(attempt) => *attempt,
        Effect::Bundle(effect) => panic!("nothing here is about bundles: {effect:?}"),
    }
}
