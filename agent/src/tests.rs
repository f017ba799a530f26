//! A whole agent against a scripted coordinator: real TLS, real shims, real processes. The script is what a test says; the
//! real coordinator is tested together with agents elsewhere.

mod bundles;
mod script;

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::timeout;
use trainyard_common::ids::{Digest, Incarnation};
use trainyard_common::member::{EndCause, ObservedPhase};
use trainyard_proto::v1;
use trainyard_proto::v1::coordinator_message::Message as Ours;
use trainyard_transport::connections::Peer;
use trainyard_transport::credentials::Credentials;
use trainyard_transport::enrol::{EnrolError, enrol};
use trainyard_transport::pki::LEAF_VALIDITY;
use trainyard_transport::token::{Secret, TokenKind};

use self::script::*;
use crate::chain::chain;
use crate::state::CREDENTIALS;
use crate::{Error, ExitReason};

#[tokio::test]
async fn a_member_brings_code_in_and_results_out() {
    let mut world = World::joined().await;
    let code = tempfile::tempdir().unwrap();
    std::fs::write(
        code.path().join("train.sh"),
        "echo learning $(cat $YARD_RESUME_FROM/step) on $NCCL_SOCKET_IFNAME",
    )
    .unwrap();
    let earlier = tempfile::tempdir().unwrap();
    std::fs::write(earlier.path().join("step"), "41").unwrap();
    let script = "sh train.sh; echo done > $YARD_OUTPUT_DIR/result; echo 42 > $YARD_CHECKPOINT_DIR/step; exit 3";
    let mut member = member("j1.0.1", script);
    member.spec.snapshot = Some(world.head.keep(code.path()));
    member.spec.resume_from = vec![world.head.keep(earlier.path())];

    let agent = world.start();
    let mut peer = world.session().await;
    assert_eq!(peer.hello.incarnation, 1);
    assert!(
        peer.hello
            .inventory
            .as_ref()
            .unwrap()
            .capacity
            .unwrap()
            .cpu_milli
            >= 1000
    );
    assert_eq!(peer.observed, []);
    peer.welcome(CALM, std::slice::from_ref(&member)).await;
    let phases = peer.until(is_ready).await;
    let [ObservedPhase::Preparing, ObservedPhase::Ready { port }] = phases[..] else {
        panic!("{phases:?}");
    };
    peer.desire(&with(&member, run(port))).await;
    let phases = peer.until(is_ended).await;
    assert!(
        matches!(phases[phases.len() - 2], ObservedPhase::Uploading(_)),
        "{phases:?}"
    );
    let Some(ObservedPhase::Ended(ending)) = phases.last() else {
        panic!("{phases:?}");
    };
    assert_eq!(
        (ending.cause, ending.started),
        (EndCause::RankFailed, true),
        "{ending:?}"
    );
    let outputs = ending.outputs.unwrap();
    assert_eq!(world.head.file(outputs, "result"), b"done\n");
    assert_eq!(world.head.file(ending.checkpoint.unwrap(), "step"), b"42\n");
    // The end is reported only when the output is there.
    assert_eq!(
        world.head.output(member.attempt),
        ("learning 41 on lo\n".to_owned(), true)
    );

    let dir = world.dir().join("attempts/j1.0.1");
    assert!(dir.exists());
    peer.say(Ours::Forget(member.attempt.into())).await;
    eventually("the directory to go", || !dir.exists()).await;
    agent.stop().await;
    assert!(peer.goodbye().await);
}

#[tokio::test]
async fn members_outlive_their_agent() {
    let mut world = World::joined().await;
    let gate = world.scratch.path().join("gate");
    let script = format!(
        "echo one; while [ ! -e {} ]; do sleep 0.05; done; echo two",
        gate.display()
    );
    let member = member("j2.0.1", &script);
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome(CALM, std::slice::from_ref(&member)).await;
    peer.until(is_ready).await;
    peer.desire(&with(&member, run(1))).await;
    peer.until(is_running).await;
    // A second agent on the same directory is refused while the first one lives.
    let second = timeout(PATIENCE, world.start().task)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(second, Err(Error::State(_))), "{second:?}");
    agent.stop().await;
    assert!(peer.goodbye().await);

    std::fs::write(&gate, "").unwrap();
    let agent = world.start();
    let mut peer = world.session().await;
    assert_eq!(peer.hello.incarnation, Incarnation(2).0);
    assert_eq!(peer.observed.len(), 1);
    // It may have ended before the agent was back; then that is what is found.
    let known = peer.observed[0].phase.clone();
    assert!(!matches!(known, ObservedPhase::Preparing), "{known:?}");
    peer.welcome(CALM, &[with(&member, run(1))]).await;
    let phases = peer.until(is_ended).await;
    let Some(ObservedPhase::Ended(ending)) = phases.last() else {
        panic!("{phases:?}");
    };
    assert_eq!(ending.cause, EndCause::Completed, "{ending:?}");
    assert_eq!(
        world.head.output(member.attempt),
        ("one\ntwo\n".to_owned(), true)
    );
    agent.stop().await;
}

#[tokio::test]
async fn a_stop_ends_a_running_member() {
    let mut world = World::joined().await;
    let member = member("j3.0.1", "sleep 1000");
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome(CALM, std::slice::from_ref(&member)).await;
    peer.until(is_ready).await;
    peer.desire(&with(&member, run(1))).await;
    peer.until(is_running).await;
    peer.desire(&with(&member, stop())).await;
    let phases = peer.until(is_ended).await;
    let Some(ObservedPhase::Ended(ending)) = phases.last() else {
        panic!("{phases:?}");
    };
    assert_eq!(
        (ending.cause, ending.started),
        (EndCause::Stopped, true),
        "{ending:?}"
    );
    agent.stop().await;
}

#[tokio::test]
async fn what_cannot_be_fetched_is_said_and_starts_nothing() {
    let mut world = World::joined().await;
    let mut member = member("j4.0.1", "true");
    member.spec.snapshot = Some(Digest([1; 32]));
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome(CALM, std::slice::from_ref(&member)).await;
    let phases = peer.until(is_ended).await;
    let Some(ObservedPhase::Ended(ending)) = phases.last() else {
        panic!("{phases:?}");
    };
    assert_eq!(
        (ending.cause, ending.started),
        (EndCause::PrepareFailed, false),
        "{ending:?}"
    );
    assert!(
        ending.message.contains("there is no such blob"),
        "{ending:?}"
    );
    agent.stop().await;
}

#[tokio::test]
async fn an_end_is_told_even_if_nothing_can_be_written_down() {
    let mut world = World::joined().await;
    // Something else has the name, so neither the directory nor anything in it can be made.
    let attempts = world.dir().join("attempts");
    std::fs::create_dir_all(&attempts).unwrap();
    std::fs::write(attempts.join("j8.0.1"), b"in the way").unwrap();
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome(CALM, &[member("j8.0.1", "true")]).await;
    let phases = peer.until(is_ended).await;
    let Some(ObservedPhase::Ended(ending)) = phases.last() else {
        panic!("{phases:?}");
    };
    // It may have run here once, and nobody knows how it ended.
    assert_eq!(
        (ending.cause, ending.started, ending.outputs),
        (EndCause::SupervisorLost, true, None),
        "{ending:?}"
    );
    agent.stop().await;
}

#[tokio::test]
async fn what_was_placed_before_the_records_were_lost_is_never_started_again() {
    let mut world = World::joined().await;
    let dir = world.dir();
    for lost in ["attempts", "bundles"] {
        std::fs::remove_dir(dir.join(lost)).unwrap();
    }
    let placed = member("j9.0.1", "true");
    // A restart before the coordinator has it on record changes nothing.
    for _ in 0..2 {
        let agent = world.start();
        let mut peer = world.session().await;
        assert!(peer.observed.is_empty());
        peer.welcome(CALM, std::slice::from_ref(&placed)).await;
        let phases = peer.until(is_ended).await;
        let Some(ObservedPhase::Ended(ending)) = phases.last() else {
            panic!("{phases:?}");
        };
        assert_eq!(
            (ending.cause, ending.started),
            (EndCause::SupervisorLost, true)
        );
        assert!(ending.message.contains("records were lost"), "{ending:?}");
        assert!(!dir.join("attempts/j9.0.1").exists());
        agent.stop().await;
    }
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome(CALM, std::slice::from_ref(&placed)).await;
    peer.until(is_ended).await;
    // What is placed now is new.
    let new = member("j10.0.1", "true");
    peer.desire(&new).await;
    peer.until(is_ready).await;
    peer.say(Ours::Forget(placed.attempt.into())).await;
    let mark = dir.join("bundles/.history");
    eventually("all is accounted for", || mark.exists()).await;
    agent.stop().await;
    // The next one takes what its first session names as usual.
    let agent = world.start();
    let mut peer = world.session().await;
    let later = member("j11.0.1", "true");
    peer.welcome(CALM, &[with(&new, stop()), later.clone()])
        .await;
    peer.until(is_ready).await;
    peer.desire(&with(&later, stop())).await;
    peer.until(is_ended).await;
    agent.stop().await;
}

#[tokio::test]
async fn attack_a_stale_coordinator_is_not_obeyed() {
    let mut world = World::joined().await;
    let agent = world.start();
    let mut peer = world.session().await;
    peer.term = 5;
    peer.welcome(CALM, &[]).await;
    let running = member("j5.0.1", "sleep 1000");
    peer.desire(&running).await;
    peer.until(is_ready).await;
    // The leader of before comes back in a later session, and wants it gone.
    drop(peer);
    let mut peer = world.session().await;
    assert_eq!(peer.hello.term, 5);
    peer.term = 4;
    peer.welcome(CALM, &[with(&running, stop())]).await;
    assert!(!peer.goodbye().await, "the agent breaks off");
    // A refused coordinator is tried again seldom, so the agent is restarted; the term is on disk.
    agent.stop().await;
    let agent = world.start();
    let mut peer = world.session().await;
    assert_eq!(peer.hello.term, 5);
    assert!(is_ready(&peer.observed[0].phase), "{:?}", peer.observed);
    peer.term = 6;
    peer.welcome(CALM, &[with(&running, stop())]).await;
    peer.until(is_ended).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_silent_or_broken_session_is_opened_again() {
    let mut world = World::joined().await;
    let agent = world.start();
    let peer = world.session().await;
    // No heartbeat is ever answered.
    peer.welcome(Duration::from_millis(50), &[]).await;
    let second = world.session().await;
    assert!(!peer.goodbye().await);
    second.welcome(CALM, &[]).await;
    second
        .say(Ours::Resync(v1::Resync {
            reason: "doubt".to_owned(),
        }))
        .await;
    let third = world.session().await;
    third.welcome(CALM, &[]).await;
    // The network breaks under it.
    world.connections.close_where(|_| true);
    let fourth = world.session().await;
    fourth.welcome(CALM, &[]).await;
    agent.stop().await;
}

#[tokio::test]
async fn output_that_is_refused_does_not_hold_up_the_rest() {
    let mut world = World::joined().await;
    let foreign = member("j6.0.1", "echo foreign; echo x > $YARD_OUTPUT_DIR/x");
    let own = member("j7.0.1", "echo own");
    *world.head.unknown.lock().unwrap() = Some(foreign.attempt);
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome(CALM, &[foreign.clone(), own.clone()]).await;
    let mut ended = BTreeMap::new();
    while ended.len() < 2 {
        let report = peer.report().await;
        let of = if report.attempt == own.attempt {
            &own
        } else {
            &foreign
        };
        match report.phase {
            ObservedPhase::Ready { port } => peer.desire(&with(of, run(port))).await,
            ObservedPhase::Ended(ending) => drop(ended.insert(report.attempt, ending)),
            _ => {}
        }
    }
    assert!(
        ended
            .values()
            .all(|ending| ending.cause == EndCause::Completed),
        "{ended:?}"
    );
    assert!(ended[&foreign.attempt].outputs.is_some());
    assert_eq!(world.head.output(own.attempt), ("own\n".to_owned(), true));
    agent.stop().await;
}

#[tokio::test]
async fn an_orphan_leaves_when_nothing_lives_on_it() {
    let mut world = World::joined().await;
    let mut config = world.config();
    config.leave_when_orphaned = Some(Duration::from_millis(200));
    let agent = world.start_with(config);
    let mut peer = world.session().await;
    peer.welcome(CALM, &[]).await;
    let member = member("j8.0.1", "sleep 1000");
    peer.desire(&member).await;
    peer.until(is_ready).await;
    peer.desire(&with(&member, run(1))).await;
    peer.until(is_running).await;
    // The coordinator goes, and what runs keeps the agent here until it is ended in the next session.
    drop(peer);
    let mut peer = world.session().await;
    peer.welcome(CALM, &[with(&member, stop())]).await;
    peer.until(is_ended).await;
    drop(peer);
    // Nobody answers any more.
    drop(world._server);
    world.connections.close_where(|_| true);
    let ended = timeout(PATIENCE, agent.task).await.expect("the agent ends");
    assert_eq!(ended.unwrap().unwrap(), ExitReason::Orphaned);
}

#[tokio::test]
async fn a_certificate_past_its_half_is_renewed_and_used() {
    let mut world = World::new().await;
    *world.head.age.lock().unwrap() = LEAF_VALIDITY * 3 / 4;
    world.join().await;
    let load = |world: &World| Credentials::load(&world.dir().join(CREDENTIALS)).unwrap();
    let end = load(&world).certificate().unwrap().not_after;
    let agent = world.start();
    // One session may be open before the renewal; it is given up for one with the new certificate.
    let mut peers = Vec::new();
    let renewed = |world: &World| {
        let connections = world.connections.list();
        let new = |peer: &Peer| peer.not_after > Some(end);
        !connections.is_empty() && connections.iter().all(new)
    };
    let turnover = async {
        while peers.is_empty() || !renewed(&world) {
            let pause = Duration::from_millis(20);
            if let Ok(peer) = timeout(pause, world.sessions.recv()).await {
                let peer = peer.unwrap().greet().await;
                peer.welcome(CALM, &[]).await;
                peers.push(peer);
            }
        }
    };
    timeout(PATIENCE, turnover)
        .await
        .expect("the new certificate is used");
    assert!(load(&world).certificate().unwrap().not_after > end);
    agent.stop().await;
}

#[tokio::test]
async fn attack_a_token_enrols_only_with_its_secret_and_only_machines() {
    let world = World::new().await;
    let mut token = world.token.clone();
    token.secret = Secret::from_bytes([1; 32]);
    let error = enrol(&token, "gpu-1").await.unwrap_err();
    assert!(
        chain(&error).contains("the token is not valid"),
        "{error:?}"
    );
    let mut token = world.token.clone();
    token.kind = TokenKind::User;
    let error = enrol(&token, "gpu-1").await.unwrap_err();
    assert!(matches!(error, EnrolError::Certificate(_)), "{error:?}");
    // The secret never goes to a server of another authority.
    let mut token = world.token.clone();
    token.ca_hash = [0; 32];
    let error = enrol(&token, "gpu-1").await.unwrap_err();
    assert!(chain(&error).contains("CA hash mismatch"), "{error:?}");
    // Whoever has not enrolled is told so.
    assert!(!world.dir().join("credentials/cluster.json").exists());
    let task = world.start().task;
    let error = timeout(PATIENCE, task).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, Error::Credentials(_)), "{error:?}");
}

#[tokio::test]
async fn the_last_words_of_a_crash_are_told_until_a_coordinator_has_heard_them() {
    let mut world = World::joined().await;
    let dir = world.dir();
    let note = dir.join("last-words.txt");
    let credentials = dir.join(CREDENTIALS);
    let aside = dir.join("aside");
    std::fs::rename(&credentials, &aside).unwrap();
    let fatal = timeout(PATIENCE, world.start().task)
        .await
        .unwrap()
        .unwrap();
    let told = chain(&fatal.unwrap_err());
    assert_eq!(std::fs::read_to_string(&note).unwrap(), told);
    std::fs::rename(&aside, &credentials).unwrap();

    let agent = world.start();
    let peer = world.session().await;
    assert_eq!(peer.hello.last_words, told);
    assert!(note.exists(), "nobody answered yet");
    drop(peer);
    let peer = world.session().await;
    assert_eq!(peer.hello.last_words, told);
    peer.welcome(CALM, &[]).await;
    let gone = async {
        while note.exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
    agent.stop().await;
    drop(peer);
    let agent = world.start();
    let peer = world.session().await;
    assert_eq!(peer.hello.last_words, "");
    agent.stop().await;
}
