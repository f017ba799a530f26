//! Each rule of the core by example. Every step states all effects, so that nothing else happened.

use std::time::Duration;

use trainyard_common::ids::{AttemptRef, Digest, WorkspaceName};
use trainyard_common::member::{
    DesiredMember, DesiredPhase, EndCause, Ending, Go, MemberSpec, ObservedMember, ObservedPhase,
    Stop,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::Launcher;
use trainyard_common::state::ReasonCode;
use trainyard_common::time::Timestamp;

use crate::{
    Config, Core, Effect, Event, Fault, Outbox, RecoveredMember, RecoveredState, RuntimeState,
    Uploaded,
};

pub(crate) fn attempt(text: &str) -> AttemptRef {
    text.parse().unwrap()
}

pub(crate) fn config() -> Config {
    Config {
        capacity: Resources {
            cpu_milli: 4000,
            memory_bytes: 1 << 30,
            gpus: 2,
        },
        gpus: ["GPU-a", "GPU-b"].map(str::to_owned).into(),
    }
}

pub(crate) fn spec(gpus: &[&str]) -> MemberSpec {
    MemberSpec {
        job_name: "train".to_owned(),
        owner: "alice".parse().unwrap(),
        workspace: WorkspaceName::default_workspace(),
        node_rank: 0,
        nodes: 1,
        procs_per_node: 1,
        resources: Resources {
            cpu_milli: 1000,
            memory_bytes: 1 << 20,
            gpus: gpus.len() as u32,
        },
        gpu_uuids: gpus.iter().map(|&uuid| uuid.to_owned()).collect(),
        launcher: Launcher::None,
        command: vec!["true".to_owned()],
        env: [].into(),
        snapshot: None,
        resume_from: Vec::new(),
        time_limit: None,
        grace: Duration::from_secs(30),
        lease: None,
    }
}

pub(crate) fn go() -> Go {
    Go {
        master_addr: "10.0.0.1".to_owned(),
        master_port: 4000,
        node_addrs: vec!["10.0.0.1".to_owned()],
    }
}

pub(crate) fn stop() -> Stop {
    Stop {
        code: ReasonCode::CancelRequested,
        grace: Duration::from_secs(30),
    }
}

pub(crate) fn desired(id: AttemptRef, phase: DesiredPhase) -> DesiredMember {
    let spec = spec(&[]);
    DesiredMember {
        attempt: id,
        phase,
        spec,
    }
}

pub(crate) fn ending(cause: EndCause, started: bool) -> Ending {
    Ending {
        cause,
        message: "as the shim said".to_owned(),
        started,
        ranks: Vec::new(),
        ended_at: Timestamp(77),
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

struct Env {
    core: Core,
    now: Timestamp,
}

impl Env {
    fn new() -> Self {
        Self::recovered(Vec::new())
    }

    fn recovered(members: Vec<RecoveredMember>) -> Self {
        let now = Timestamp(1000);
        let core = Core::new(config(), members, now);
        Self { core, now }
    }

    fn tell(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Outbox::new();
        self.core.handle(self.now, event, &mut out);
        out.drain()
    }

    fn connect(&mut self, desired: Vec<DesiredMember>) -> Vec<Effect> {
        self.tell(Event::Connected { desired })
    }

    fn desire(&mut self, id: &str, phase: DesiredPhase) -> Vec<Effect> {
        self.tell(Event::DesiredChanged(Box::new(desired(attempt(id), phase))))
    }

    fn runtime(&mut self, id: &str, state: RuntimeState) -> Vec<Effect> {
        let attempt = attempt(id);
        self.tell(Event::RuntimeReported { attempt, state })
    }

    /// A member that waits to go.
    fn ready(&mut self, id: &str) {
        self.desire(id, DesiredPhase::Prepare);
        self.tell(Event::Accepted(attempt(id)));
        let effects = self.tell(Event::FetchFinished(attempt(id)));
        assert_eq!(effects, [Effect::SpawnShim(attempt(id))]);
        self.runtime(id, RuntimeState::Ready { port: 4000 });
    }

    fn running(&mut self, id: &str) {
        self.ready(id);
        self.desire(id, DesiredPhase::Run(go()));
        self.runtime(id, STARTED);
    }

    fn phase(&self, id: &str) -> ObservedPhase {
        let mut observed = self.core.observed().into_iter();
        observed
            .find(|member| member.attempt == attempt(id))
            .unwrap()
            .phase
    }
}

const STARTED: RuntimeState = RuntimeState::Running {
    started_at: Timestamp(5),
};

fn report(id: &str, phase: ObservedPhase) -> Effect {
    Effect::Report(ObservedMember {
        attempt: attempt(id),
        node_rank: 0,
        phase,
    })
}

fn accept(id: &str) -> Effect {
    Effect::Accept(Box::new(desired(attempt(id), DesiredPhase::Prepare)))
}

/// The causes and messages of the ends that are reported in `effects`, and whether anything was started.
fn ends(effects: &[Effect]) -> Vec<(EndCause, &str, bool)> {
    let ending = |effect| match effect {
        &Effect::Report(ObservedMember {
            phase: ObservedPhase::Ended(ref end),
            ..
        }) => Some((end.cause, end.message.as_str(), end.started)),
        _ => None,
    };
    effects.iter().filter_map(ending).collect()
}

#[test]
fn what_was_placed_before_the_records_were_lost_is_unaccounted_for() {
    let mut env = Env::new();
    env.core.begin_anew();
    assert!(!env.core.is_history_settled());
    let old = attempt("j1.0.1");
    let effects = env.connect(vec![desired(old, DesiredPhase::Start)]);
    let reported = effects.iter().find_map(|effect| match effect {
        Effect::Report(ObservedMember {
            phase: ObservedPhase::Ended(ending),
            ..
        }) => Some(ending.clone()),
        _ => None,
    });
    let ending = reported.expect("its end is told");
    assert_eq!(
        (ending.cause, ending.started),
        (EndCause::SupervisorLost, true)
    );
    assert!(
        !effects
            .iter()
            .any(|effect| matches!(effect, Effect::Accept(_)))
    );
    // What is placed now is not of before, and what was is settled when it is on record.
    env.tell(Event::Bundle(crate::BundleEvent::AllDesired(Vec::new())));
    let effects = env.desire("j2.0.1", DesiredPhase::Prepare);
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Accept(_)))
    );
    assert!(!env.core.is_history_settled());
    env.tell(Event::ForgetRequested(old));
    assert!(env.core.is_history_settled());
}

#[test]
fn a_member_lives_from_prepare_to_forget() {
    let id = "j1.0.1";
    let it = attempt(id);
    let mut env = Env::new();
    assert_eq!(env.connect(Vec::new()), []);
    assert_eq!(
        env.desire(id, DesiredPhase::Prepare),
        [accept(id), report(id, ObservedPhase::Preparing)]
    );
    assert_eq!(env.tell(Event::Accepted(it)), [Effect::Fetch(it)]);
    assert_eq!(env.tell(Event::FetchFinished(it)), [Effect::SpawnShim(it)]);
    let port = 4000;
    assert_eq!(
        env.runtime(id, RuntimeState::Ready { port }),
        [report(id, ObservedPhase::Ready { port })]
    );
    assert_eq!(
        env.desire(id, DesiredPhase::Run(go())),
        [Effect::Go(it, go())]
    );
    let started_at = Timestamp(5);
    assert_eq!(
        env.runtime(id, STARTED),
        [report(id, ObservedPhase::Running { started_at })]
    );
    assert!(env.core.has_live_members());
    let mut end = ending(EndCause::Completed, true);
    end.warning = "output was dropped".to_owned();
    let started = true;
    assert_eq!(
        env.runtime(id, RuntimeState::Gone(end.clone())),
        [
            Effect::Upload {
                attempt: it,
                started
            },
            report(id, ObservedPhase::Uploading(end.clone()))
        ]
    );
    assert!(!env.core.has_live_members());
    let uploaded = Uploaded {
        outputs: Some(Digest([1; 32])),
        checkpoint: None,
        warning: Some("a socket was left out".to_owned()),
    };
    end.outputs = uploaded.outputs;
    end.warning = "output was dropped; a socket was left out".to_owned();
    let attempt = it;
    assert_eq!(
        env.tell(Event::UploadFinished { attempt, uploaded }),
        [report(id, ObservedPhase::Ended(end.clone()))]
    );
    assert_eq!(env.tell(Event::ForgetRequested(it)), [Effect::Remove(it)]);
    // A new session is told of it until its directory is gone.
    assert_eq!(env.phase(id), ObservedPhase::Ended(end));
    assert_eq!(env.tell(Event::Removed(it)), []);
    assert_eq!(env.core.observed(), []);
    assert_eq!(env.core.next_deadline(), None);
}

#[test]
fn everything_again_changes_nothing() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.running(id);
    for event in [
        Event::DesiredChanged(Box::new(desired(attempt(id), DesiredPhase::Prepare))),
        Event::DesiredChanged(Box::new(desired(attempt(id), DesiredPhase::Run(go())))),
        Event::Accepted(attempt(id)),
        Event::FetchFinished(attempt(id)),
        Event::RuntimeReported {
            attempt: attempt(id),
            state: RuntimeState::Ready { port: 1 },
        },
        Event::Removed(attempt(id)),
        Event::Disconnected,
        Event::TimerFired,
    ] {
        assert_eq!(env.tell(event.clone()), [], "{event:?}");
    }
    let again = vec![desired(attempt(id), DesiredPhase::Run(go()))];
    assert_eq!(env.connect(again), []);
}

#[test]
fn run_before_ready_is_remembered() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.desire(id, DesiredPhase::Prepare);
    assert_eq!(env.desire(id, DesiredPhase::Run(go())), []);
    env.tell(Event::Accepted(attempt(id)));
    env.tell(Event::FetchFinished(attempt(id)));
    let port = 4000;
    assert_eq!(
        env.runtime(id, RuntimeState::Ready { port }),
        [
            Effect::Go(attempt(id), go()),
            report(id, ObservedPhase::Ready { port })
        ]
    );
}

#[test]
fn the_only_member_goes_when_it_is_ready() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.desire(id, DesiredPhase::Start);
    env.tell(Event::Accepted(attempt(id)));
    env.tell(Event::FetchFinished(attempt(id)));
    let port = 4000;
    assert_eq!(
        env.runtime(id, RuntimeState::Ready { port }),
        [
            Effect::Go(attempt(id), Go::alone(port)),
            report(id, ObservedPhase::Ready { port })
        ]
    );
    // What the coordinator says once it heard of that is no second start, and a stop is still one.
    assert_eq!(env.desire(id, DesiredPhase::Run(go())), []);
    assert_eq!(env.desire(id, DesiredPhase::Start), []);
    assert_eq!(
        env.desire(id, DesiredPhase::Stop(stop())),
        [
            Effect::StopRanks(attempt(id), stop()),
            report(id, ObservedPhase::Stopping)
        ]
    );
}

#[test]
fn a_start_that_a_stop_overtook_starts_nothing() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.desire(id, DesiredPhase::Start);
    env.tell(Event::Accepted(attempt(id)));
    env.tell(Event::FetchFinished(attempt(id)));
    env.desire(id, DesiredPhase::Stop(stop()));
    assert_eq!(env.desire(id, DesiredPhase::Start), []);
    assert_eq!(env.runtime(id, RuntimeState::Ready { port: 4000 }), []);
}

#[test]
fn one_member_of_several_waits_for_the_go() {
    let id = "j1.0.1";
    let mut env = Env::new();
    let mut member = desired(attempt(id), DesiredPhase::Start);
    member.spec.nodes = 2;
    env.tell(Event::DesiredChanged(Box::new(member)));
    env.tell(Event::Accepted(attempt(id)));
    env.tell(Event::FetchFinished(attempt(id)));
    let port = 4000;
    assert_eq!(
        env.runtime(id, RuntimeState::Ready { port }),
        [report(id, ObservedPhase::Ready { port })]
    );
    assert_eq!(
        env.desire(id, DesiredPhase::Run(go())),
        [Effect::Go(attempt(id), go())]
    );
}

#[test]
fn a_stop_before_the_start_starts_nothing() {
    let id = "j1.0.1";
    let stopped = [(
        EndCause::Stopped,
        "stopped before anything was started",
        false,
    )];
    // Nothing known of it.
    let mut env = Env::new();
    let effects = env.desire(id, DesiredPhase::Stop(stop()));
    assert_eq!(ends(&effects), stopped);
    assert_eq!(effects.len(), 1);
    assert_eq!(env.desire(id, DesiredPhase::Prepare), []);
    assert_eq!(env.desire(id, DesiredPhase::Run(go())), []);
    assert_eq!(env.tell(Event::ForgetRequested(attempt(id))), []);
    assert_eq!(env.core.observed(), []);

    // While it fetches.
    let mut env = Env::new();
    env.connect(Vec::new());
    env.desire(id, DesiredPhase::Prepare);
    env.tell(Event::Accepted(attempt(id)));
    assert_eq!(
        env.desire(id, DesiredPhase::Stop(stop())),
        [
            Effect::CancelFetch(attempt(id)),
            report(id, ObservedPhase::Stopping)
        ]
    );
    let failed = Event::FetchFailed {
        attempt: attempt(id),
        error: "cancelled".to_owned(),
        fault: Fault::Infrastructure,
    };
    let effects = env.tell(failed);
    let started = false;
    assert_eq!(
        effects[0],
        Effect::Upload {
            attempt: attempt(id),
            started
        }
    );
    let effects = env.tell(Event::UploadFinished {
        attempt: attempt(id),
        uploaded: Uploaded::default(),
    });
    assert_eq!(ends(&effects), stopped);
}

#[test]
fn a_stop_beats_a_run_and_is_never_taken_back() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.ready(id);
    let effects = env.desire(id, DesiredPhase::Stop(stop()));
    assert_eq!(
        effects,
        [
            Effect::StopRanks(attempt(id), stop()),
            report(id, ObservedPhase::Stopping)
        ]
    );
    assert_eq!(env.desire(id, DesiredPhase::Run(go())), []);
    let run = vec![desired(attempt(id), DesiredPhase::Run(go()))];
    assert_eq!(env.connect(run), []);
    // A shorter grace is passed on.
    let grace = Duration::from_secs(1);
    let hurry = Stop { grace, ..stop() };
    let effects = env.desire(id, DesiredPhase::Stop(hurry));
    assert_eq!(effects, [Effect::StopRanks(attempt(id), hurry)]);
}

#[test]
fn an_older_attempt_is_refused() {
    let mut env = Env::new();
    env.ready("j1.0.2");
    let effects = env.desire("j1.0.1", DesiredPhase::Prepare);
    assert_eq!(
        ends(&effects),
        [(
            EndCause::Stopped,
            "a newer attempt of the task is known on this node",
            false
        )]
    );
    assert!(
        !effects.iter().any(|e| matches!(e, Effect::Accept(_))),
        "{effects:?}"
    );
    // Also in one whole set, and when the newer one is over and forgotten.
    let mut env = Env::new();
    let both = ["j2.0.1", "j2.0.2"].map(|id| desired(attempt(id), DesiredPhase::Prepare));
    let effects = env.connect(both.into());
    assert_eq!(ends(&effects).len(), 1);
    assert!(effects.contains(&accept("j2.0.2")));
    env.desire("j3.0.5", DesiredPhase::Stop(stop()));
    env.tell(Event::ForgetRequested(attempt("j3.0.5")));
    let effects = env.desire("j3.0.4", DesiredPhase::Prepare);
    assert_eq!(ends(&effects).len(), 1);
    // Other tasks are not concerned.
    assert!(
        env.desire("j3.1.4", DesiredPhase::Prepare)
            .contains(&accept("j3.1.4"))
    );
}

#[test]
fn a_newer_attempt_waits_until_the_older_one_is_gone() {
    let mut env = Env::new();
    env.running("j1.0.1");
    assert_eq!(
        env.desire("j1.0.2", DesiredPhase::Prepare),
        [report("j1.0.2", ObservedPhase::Preparing)]
    );
    let effects = env.desire("j1.0.1", DesiredPhase::Stop(stop()));
    assert_eq!(effects[0], Effect::StopRanks(attempt("j1.0.1"), stop()));
    assert_eq!(env.runtime("j1.0.1", RuntimeState::Stopping), []);
    let end = ending(EndCause::Stopped, true);
    let effects = env.runtime("j1.0.1", RuntimeState::Gone(end.clone()));
    assert_eq!(
        effects,
        [
            report("j1.0.1", ObservedPhase::Uploading(end)),
            accept("j1.0.2")
        ]
    );
}

#[test]
fn an_older_attempt_that_is_ready_is_not_started_beside_a_newer_one() {
    let mut env = Env::new();
    env.ready("j1.0.1");
    env.desire("j1.0.2", DesiredPhase::Prepare);
    assert_eq!(env.desire("j1.0.1", DesiredPhase::Run(go())), []);
}

#[test]
fn what_is_in_use_is_not_given_twice() {
    let mut env = Env::new();
    let with = |id, gpus: &[&str], cpu_milli| {
        let mut spec = spec(gpus);
        spec.resources.cpu_milli = cpu_milli;
        let phase = DesiredPhase::Prepare;
        Event::DesiredChanged(Box::new(DesiredMember {
            attempt: attempt(id),
            phase,
            spec,
        }))
    };
    env.tell(with("j1.0.1", &["GPU-a"], 3000));
    let cases = [
        (
            with("j2.0.1", &["GPU-a"], 1000),
            "GPU GPU-a is in use by j1.0.1",
        ),
        (
            with("j3.0.1", &["GPU-x"], 1000),
            "GPU GPU-x is not on this node",
        ),
        (
            with("j4.0.1", &[], 1001),
            "1.001 CPUs are wanted, 3 of 4 are in use on this node",
        ),
    ];
    for (event, text) in cases {
        let effects = env.tell(event);
        assert_eq!(ends(&effects), [(EndCause::PrepareFailed, text, false)]);
    }
    let effects = env.tell(with("j5.0.1", &["GPU-b"], 1000));
    assert!(matches!(effects[0], Effect::Accept(_)));
}

#[test]
fn what_is_not_wanted_is_left_alone_and_reported() {
    let mut env = Env::new();
    env.running("j1.0.1");
    assert_eq!(env.connect(Vec::new()), []);
    let started_at = Timestamp(5);
    assert_eq!(env.phase("j1.0.1"), ObservedPhase::Running { started_at });
    // It ends by itself and stays until it is forgotten.
    env.runtime(
        "j1.0.1",
        RuntimeState::Gone(ending(EndCause::Completed, true)),
    );
    let (attempt, uploaded) = (attempt("j1.0.1"), Uploaded::default());
    env.tell(Event::UploadFinished { attempt, uploaded });
    assert_eq!(env.connect(Vec::new()), []);
    assert!(matches!(env.phase("j1.0.1"), ObservedPhase::Ended(_)));

    // A run that was remembered is not carried out once it is not wanted any more.
    let mut env = Env::new();
    env.desire("j2.0.1", DesiredPhase::Prepare);
    env.desire("j2.0.1", DesiredPhase::Run(go()));
    env.connect(Vec::new());
    env.tell(Event::Accepted(super::tests::attempt("j2.0.1")));
    env.tell(Event::FetchFinished(super::tests::attempt("j2.0.1")));
    let port = 4000;
    let effects = env.runtime("j2.0.1", RuntimeState::Ready { port });
    assert_eq!(effects, [report("j2.0.1", ObservedPhase::Ready { port })]);
}

#[test]
fn nothing_is_forgotten_before_its_end_is_told() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.running(id);
    let forget = Event::ForgetRequested(attempt(id));
    let effects = env.tell(forget.clone());
    assert!(matches!(effects[..], [Effect::Note { .. }]), "{effects:?}");
    // Nor while its results are on their way.
    env.runtime(id, RuntimeState::Gone(ending(EndCause::Completed, true)));
    let effects = env.tell(forget);
    assert!(matches!(effects[..], [Effect::Note { .. }]), "{effects:?}");
    assert!(matches!(env.phase(id), ObservedPhase::Uploading(_)));
}

#[test]
fn a_go_is_given_once_and_a_retry_that_is_not_wanted_any_more_is_dropped() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.ready(id);
    let run = || DesiredPhase::Run(go());
    let effects = env.desire(id, run());
    assert_eq!(effects, [Effect::Go(attempt(id), go())]);
    assert_eq!(env.desire(id, run()), []);
    assert_eq!(env.tell(Event::TimerFired), []);
    env.tell(Event::GoFailed {
        attempt: attempt(id),
        error: "disk full".to_owned(),
    });
    assert_eq!(env.connect(Vec::new()), []);
    env.now = env.core.next_deadline().unwrap();
    assert_eq!(env.tell(Event::TimerFired), []);
    assert_eq!(
        env.core.next_deadline(),
        None,
        "the timer must come to rest"
    );
}

#[test]
fn what_was_here_is_never_prepared_again() {
    let id = "j1.0.1";
    let lost =
        |effects: &[Effect]| ends(effects)[0].0 == EndCause::SupervisorLost && ends(effects)[0].2;
    // Its directory is there, but could not be read when the agent started.
    let mut env = Env::new();
    env.connect(Vec::new());
    env.desire(id, DesiredPhase::Prepare);
    env.tell(Event::AcceptFailed {
        attempt: attempt(id),
        exists: true,
        error: "its directory exists".to_owned(),
    });
    let (it, uploaded) = (attempt(id), Uploaded::default());
    let effects = env.tell(Event::UploadFinished {
        attempt: it,
        uploaded,
    });
    assert!(lost(&effects), "{effects:?}");
    // It was forgotten.
    env.tell(Event::ForgetRequested(it));
    env.tell(Event::Removed(it));
    for phase in [DesiredPhase::Prepare, DesiredPhase::Run(go())] {
        let effects = env.desire(id, phase);
        assert!(lost(&effects), "{effects:?}");
        assert!(matches!(
            effects[..],
            [Effect::Note { .. }, Effect::Report(_)]
        ));
    }
    // It is to run and is not here.
    let effects = env.desire("j2.0.1", DesiredPhase::Run(go()));
    assert!(lost(&effects), "{effects:?}");
}

#[test]
fn late_news_of_a_step_that_is_behind_ends_nothing() {
    let id = "j1.0.1";
    let it = attempt(id);
    let mut env = Env::new();
    env.desire(id, DesiredPhase::Prepare);
    env.tell(Event::Accepted(it));
    env.tell(Event::FetchFinished(it));
    let late = [
        Event::AcceptFailed {
            attempt: it,
            exists: true,
            error: "late".to_owned(),
        },
        Event::FetchFailed {
            attempt: it,
            error: "late".to_owned(),
            fault: Fault::Infrastructure,
        },
    ];
    for event in late {
        assert_eq!(env.tell(event), []);
    }
    assert_eq!(env.phase(id), ObservedPhase::Preparing);
}

#[test]
fn requests_that_fail_are_made_again_later() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.ready(id);
    env.desire(id, DesiredPhase::Run(go()));
    let failed = Event::GoFailed {
        attempt: attempt(id),
        error: "disk full".to_owned(),
    };
    let effects = env.tell(failed);
    assert!(matches!(effects[..], [Effect::Note { .. }]), "{effects:?}");
    assert_eq!(env.desire(id, DesiredPhase::Run(go())), []);
    env.now = env.core.next_deadline().unwrap();
    assert_eq!(env.now, Timestamp(2000));
    assert_eq!(env.tell(Event::TimerFired), [Effect::Go(attempt(id), go())]);
    assert_eq!(env.core.next_deadline(), None);
}

#[test]
fn uploads_wait_for_a_session_and_are_retried() {
    let id = "j1.0.1";
    let mut env = Env::new();
    env.running(id);
    let end = ending(EndCause::RankFailed, true);
    let effects = env.runtime(id, RuntimeState::Gone(end.clone()));
    assert_eq!(effects, [report(id, ObservedPhase::Uploading(end))]);
    let upload = Effect::Upload {
        attempt: attempt(id),
        started: true,
    };
    assert_eq!(env.connect(Vec::new()), vec![upload.clone()]);
    let failed = Event::UploadFailed {
        attempt: attempt(id),
        error: "connection lost".to_owned(),
    };
    env.tell(failed.clone());
    env.tell(Event::Disconnected);
    assert_eq!(
        env.connect(Vec::new()),
        vec![upload.clone()],
        "a session ends the pause"
    );
    env.tell(failed);
    env.now = env.core.next_deadline().unwrap();
    assert_eq!(env.tell(Event::TimerFired), [upload]);
}

#[test]
fn members_are_found_again_after_a_restart() {
    let found = |id, state, uploaded| RecoveredMember {
        member: desired(attempt(id), DesiredPhase::Prepare),
        state,
        uploaded,
    };
    let gone = RuntimeState::Gone(ending(EndCause::NodeRebooted, true));
    let shim = RecoveredState::Shim;
    let done = Some(Uploaded::default());
    let mut env = Env::recovered(vec![
        found("j1.0.1", RecoveredState::Accepted, None),
        found("j2.0.1", shim(STARTED), None),
        found("j3.0.1", shim(gone.clone()), None),
        found("j4.0.1", shim(gone), done),
        found("j5.0.1", shim(RuntimeState::Ready { port: 1 }), None),
    ]);
    let phases: Vec<_> = (1..=5)
        .map(|job| env.phase(&format!("j{job}.0.1")))
        .collect();
    assert!(matches!(phases[0], ObservedPhase::Stopping));
    assert!(matches!(phases[1], ObservedPhase::Running { .. }));
    assert!(matches!(phases[2], ObservedPhase::Uploading(_)));
    assert!(matches!(phases[3], ObservedPhase::Ended(_)));
    assert!(matches!(phases[4], ObservedPhase::Ready { port: 1 }));

    // What was half prepared is ended, and that is not the coordinator's doing.
    assert_eq!(env.core.next_deadline(), Some(env.now));
    let effects = env.tell(Event::TimerFired);
    assert!(
        matches!(&effects[..], [Effect::StopRanks(id, _)] if *id == attempt("j1.0.1")),
        "{effects:?}"
    );
    let all = (1..=5).map(|job| desired(attempt(&format!("j{job}.0.1")), DesiredPhase::Prepare));
    let upload = |id, started| Effect::Upload {
        attempt: attempt(id),
        started,
    };
    assert_eq!(env.connect(all.collect()), [upload("j3.0.1", true)]);
    let end = ending(EndCause::Stopped, false);
    let effects = env.runtime("j1.0.1", RuntimeState::Gone(end));
    assert_eq!(effects[0], upload("j1.0.1", false));
    let ObservedPhase::Uploading(end) = env.phase("j1.0.1") else {
        panic!("{effects:?}");
    };
    assert_eq!((end.cause, end.started), (EndCause::PrepareFailed, false));
}
