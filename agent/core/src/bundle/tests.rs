//! Each rule of bundles by example.

use trainyard_common::bundle::TaskRange;
use trainyard_common::ids::{Digest, TaskIndex};

use super::*;
use crate::tests::{config, spec, stop};
use crate::{Core, Event};

fn bundle() -> BundleRef {
    "j17.b3".parse().unwrap()
}

fn range(first: u32, last: u32) -> TaskRange {
    TaskRange {
        first: TaskIndex(first),
        last: TaskIndex(last),
    }
}

fn desired(tasks: &[TaskRange]) -> DesiredBundle {
    DesiredBundle {
        bundle: bundle(),
        slots: 2,
        phase: BundlePhase::Run,
        tasks: tasks.iter().copied().collect(),
        recorded: 0,
        spec: Some(Box::new(spec(&[]))),
    }
}

fn bare(desired: &DesiredBundle) -> Box<DesiredBundle> {
    Box::new(DesiredBundle {
        spec: None,
        ..desired.clone()
    })
}

struct Env(Core);

impl Env {
    fn new() -> Self {
        Self(Core::new(config(), Vec::new(), Timestamp(0)))
    }

    fn tell(&mut self, event: BundleEvent) -> Vec<BundleEffect> {
        self.tell_at(0, event)
    }

    fn tell_at(&mut self, now: u64, event: BundleEvent) -> Vec<BundleEffect> {
        let mut out = Outbox::new();
        self.0
            .handle(Timestamp(now), Event::Bundle(event), &mut out);
        drained(&mut out)
    }

    fn desire(&mut self, desired: &DesiredBundle) -> Vec<BundleEffect> {
        self.tell(BundleEvent::Desired(Box::new(desired.clone())))
    }
}

fn drained(out: &mut Outbox) -> Vec<BundleEffect> {
    let effects = out.drain().into_iter().map(|effect| match effect {
        Effect::Bundle(effect) => effect,
        other => panic!("{other:?}"),
    });
    effects.collect()
}

#[test]
fn a_bundles_life() {
    let mut env = Env::new();
    let mut wanted = desired(&[range(0, 3)]);
    wanted.spec.as_mut().unwrap().snapshot = Some(Digest([1; 32]));
    assert_eq!(
        env.desire(&wanted),
        [BundleEffect::Accept(Box::new(wanted.clone()))]
    );
    assert!(env.0.has_live_members());
    // Said again while it is being made: nothing twice.
    assert_eq!(env.desire(&wanted), []);
    assert_eq!(
        env.tell(BundleEvent::Accepted(bundle())),
        [BundleEffect::Fetch(bundle())]
    );
    assert_eq!(env.tell(BundleEvent::Accepted(bundle())), []);
    wanted.tasks.insert(range(4, 9));
    assert_eq!(env.desire(&wanted), []);
    let spawn = BundleEffect::Spawn(bare(&wanted));
    assert_eq!(env.tell(BundleEvent::FetchFinished(bundle())), [spawn]);
    wanted.recorded = 3;
    assert_eq!(env.desire(&wanted), [BundleEffect::Direct(bare(&wanted))]);
    assert_eq!(env.tell(BundleEvent::Running(bundle())), []);
    let effects = env.tell(BundleEvent::ForgetRequested(bundle()));
    assert!(
        matches!(effects[..], [BundleEffect::Note { .. }]),
        "{effects:?}"
    );
    wanted.phase = BundlePhase::Close;
    assert_eq!(env.desire(&wanted), [BundleEffect::Direct(bare(&wanted))]);
    // What is to be done never goes back.
    let mut back = wanted.clone();
    back.phase = BundlePhase::Run;
    assert_eq!(env.desire(&back), [BundleEffect::Direct(bare(&wanted))]);
    assert_eq!(env.tell(BundleEvent::Over(bundle())), []);
    assert!(!env.0.has_live_members());
    // What was on its way is given back by whoever has the journal.
    assert_eq!(env.desire(&wanted), [BundleEffect::Direct(bare(&wanted))]);
    let forget = BundleEvent::ForgetRequested(bundle());
    assert_eq!(env.tell(forget.clone()), [BundleEffect::Remove(bundle())]);
    assert_eq!(env.tell(forget.clone()), []);
    let failed = BundleEvent::RemoveFailed {
        bundle: bundle(),
        error: "busy".to_owned(),
    };
    assert!(matches!(
        env.tell_at(10, failed)[..],
        [BundleEffect::Note { .. }]
    ));
    let due = env.0.next_deadline().unwrap();
    let mut out = Outbox::new();
    env.0.handle(due, Event::TimerFired, &mut out);
    assert_eq!(drained(&mut out), [BundleEffect::Remove(bundle())]);
    assert_eq!(env.0.next_deadline(), None);
    assert_eq!(env.tell(BundleEvent::Removed(bundle())), []);
    // It is never started a second time.
    wanted.recorded = 0;
    wanted.phase = BundlePhase::Run;
    let effects = env.desire(&wanted);
    assert!(
        matches!(
            effects[..],
            [BundleEffect::Refuse {
                may_have_run: true,
                ..
            }]
        ),
        "{effects:?}"
    );
}

#[test]
fn a_bundle_that_cannot_be_prepared_gives_its_tasks_back() {
    type Fail = fn(BundleRef) -> BundleEvent;
    let fetch: Fail = |bundle| BundleEvent::FetchFailed {
        bundle,
        error: "no".to_owned(),
    };
    let spawn: Fail = |bundle| BundleEvent::SpawnFailed {
        bundle,
        error: "no".to_owned(),
    };
    for (snapshot, fail) in [(true, fetch), (false, spawn)] {
        let mut env = Env::new();
        let mut wanted = desired(&[range(0, 3)]);
        wanted.spec.as_mut().unwrap().snapshot = snapshot.then_some(Digest([1; 32]));
        env.desire(&wanted);
        env.tell(BundleEvent::Accepted(bundle()));
        let effects = env.tell(fail(bundle()));
        let end = BundleEffect::End {
            desired: bare(&wanted),
            message: "no".to_owned(),
        };
        assert_eq!(effects[1..], [end]);
        wanted.tasks.insert(range(4, 5));
        assert_eq!(env.desire(&wanted), [BundleEffect::Direct(bare(&wanted))]);
        assert_eq!(env.tell(BundleEvent::Over(bundle())), []);
        let forget = BundleEvent::ForgetRequested(bundle());
        assert_eq!(env.tell(forget), [BundleEffect::Remove(bundle())]);
    }
}

#[test]
fn a_stop_before_the_carrier_starts_nothing() {
    let mut wanted = desired(&[range(0, 3)]);
    wanted.spec.as_mut().unwrap().snapshot = Some(Digest([1; 32]));
    let mut stopped = wanted.clone();
    stopped.phase = BundlePhase::Stop(stop());
    let end = BundleEffect::End {
        desired: bare(&stopped),
        message: String::new(),
    };
    let mut env = Env::new();
    env.desire(&wanted);
    assert_eq!(env.desire(&stopped), []);
    let effects = env.tell(BundleEvent::Accepted(bundle()));
    assert_eq!(effects, std::slice::from_ref(&end));
    let mut env = Env::new();
    env.desire(&wanted);
    env.tell(BundleEvent::Accepted(bundle()));
    assert_eq!(env.desire(&stopped), [BundleEffect::CancelFetch(bundle())]);
    assert_eq!(env.desire(&stopped), []);
    assert_eq!(env.tell(BundleEvent::FetchFinished(bundle())), [end]);
    let mut env = Env::new();
    let refuse = BundleEffect::Refuse {
        desired: bare(&stopped),
        message: String::new(),
        may_have_run: false,
    };
    assert_eq!(env.desire(&stopped), [refuse]);
}

#[test]
fn what_is_not_here_any_more_may_have_run() {
    let mut unknown = desired(&[range(0, 3)]);
    unknown.spec = None;
    let mut old = desired(&[range(0, 3)]);
    old.recorded = 1;
    for wanted in [unknown, old] {
        let effects = Env::new().desire(&wanted);
        assert!(
            matches!(
                effects[..],
                [BundleEffect::Refuse {
                    may_have_run: true,
                    ..
                }]
            ),
            "{effects:?}"
        );
    }
    let mut env = Env::new();
    env.desire(&desired(&[range(0, 3)]));
    let failed = |exists| BundleEvent::AcceptFailed {
        bundle: bundle(),
        exists,
        error: "it is there".to_owned(),
    };
    let effects = env.tell(failed(true));
    assert!(matches!(
        effects[..],
        [BundleEffect::Refuse {
            may_have_run: true,
            ..
        }]
    ));
    // Whoever asks again is answered again, and it goes with the coordinator's wish.
    assert_eq!(env.desire(&desired(&[range(0, 3)])), effects);
    assert_eq!(
        env.tell(BundleEvent::AllDesired(Vec::new())),
        [BundleEffect::Drop(bundle())]
    );
}

#[test]
fn slots_must_fit_beside_the_members() {
    let mut wanted = desired(&[range(0, 9)]);
    wanted.slots = 5;
    let effects = Env::new().desire(&wanted);
    let [
        BundleEffect::Refuse {
            message,
            may_have_run: false,
            ..
        },
    ] = &effects[..]
    else {
        panic!("{effects:?}");
    };
    assert_eq!(message, "5 CPUs are wanted, 0 of 4 are in use on this node");
    // As many as there are tasks.
    wanted.tasks = [range(0, 3)].into_iter().collect();
    assert!(matches!(
        Env::new().desire(&wanted)[..],
        [BundleEffect::Accept(_)]
    ));
}

#[test]
fn there_is_a_limit() {
    let mut env = Env::new();
    let mut wanted = desired(&[range(0, 0)]);
    let limit = u32::try_from(MAX_BUNDLES_PER_NODE + MAX_REFUSED).unwrap();
    let mut answers = BTreeMap::new();
    for number in 1..=limit + 1 {
        wanted.bundle.bundle = number;
        let effects = env.desire(&wanted);
        let kind = match effects[..] {
            [BundleEffect::Accept(_)] => "accepted",
            [
                BundleEffect::Refuse {
                    may_have_run: false,
                    ..
                },
            ] => "refused",
            [BundleEffect::Note { .. }] => "ignored",
            _ => panic!("{effects:?}"),
        };
        *answers.entry(kind).or_insert(0) += 1;
    }
    let expected = [
        ("accepted", MAX_BUNDLES_PER_NODE),
        ("ignored", 1),
        ("refused", MAX_REFUSED),
    ];
    assert!(answers.into_iter().eq(expected));
    wanted.bundle.bundle = 1;
    wanted.tasks = [range(0, u32::MAX)].into_iter().collect();
    assert!(matches!(
        env.desire(&wanted)[..],
        [BundleEffect::Note { .. }]
    ));
}

#[test]
fn what_an_earlier_agent_left_goes_on() {
    let found = |state| {
        let mut env = Env::new();
        let spec = spec(&[]);
        let bundle = bundle();
        env.0.recover_bundles(vec![RecoveredBundle {
            bundle,
            spec,
            state,
        }]);
        env
    };
    let mut wanted = desired(&[range(0, 3)]);
    wanted.spec = None;
    wanted.recorded = 2;
    let all = BundleEvent::AllDesired(vec![wanted.clone()]);
    let mut env = found(RecoveredBundleState::Accepted);
    assert_eq!(env.tell(BundleEvent::AllDesired(Vec::new())), []);
    assert_eq!(env.tell(all.clone()), [BundleEffect::Spawn(bare(&wanted))]);
    for state in [RecoveredBundleState::Carried, RecoveredBundleState::Over] {
        let mut env = found(state);
        assert_eq!(
            env.0.has_live_members(),
            state == RecoveredBundleState::Carried
        );
        assert_eq!(env.tell(all.clone()), [BundleEffect::Direct(bare(&wanted))]);
    }
}
