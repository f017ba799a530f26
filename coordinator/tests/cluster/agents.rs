//! Sessions of agents: how they begin, what ends them, and what each side knows after.

use trainyard_common::error::ErrorCode;
use trainyard_common::member::{ObservedMember, ObservedPhase};
use trainyard_common::time::Timestamp;
use trainyard_proto::v1;
use trainyard_proto::v1::agent_message::Message as Said;
use trainyard_proto::v1::coordinator_message::Message as Say;
use trainyard_proto::v1::desired_member::Phase;

use crate::harness::{Head, attempt_of, ended, submit};

#[tokio::test]
async fn a_session_begins_with_a_hello_that_fits() {
    let head = Head::start().await;
    let agent = head.node("n").await;

    let mut session = agent.dial().await;
    session
        .say(Said::Heartbeat(v1::Heartbeat { sequence: 1 }))
        .await;
    assert_eq!(session.end().await.reason, "PROTOCOL");

    let cases = [
        (
            v1::Hello {
                protocol_version: 9,
                oldest_protocol_version: 8,
                ..agent.hello()
            },
            "PROTOCOL_VERSION",
        ),
        (
            v1::Hello {
                cluster: vec![0; 16],
                ..agent.hello()
            },
            "OTHER_CLUSTER",
        ),
        (
            v1::Hello {
                term: head.coordinator.term().0 + 1,
                ..agent.hello()
            },
            "STALE_TERM",
        ),
        (
            v1::Hello {
                inventory: None,
                ..agent.hello()
            },
            "INVALID_FIELD",
        ),
        (
            v1::Hello {
                boot_id: "b".repeat(1000),
                ..agent.hello()
            },
            "INVALID_FIELD",
        ),
    ];
    for (hello, reason) in cases {
        let mut session = agent.dial().await;
        session.greet(hello, &[]).await;
        let refused = session.end().await;
        assert_eq!(refused.reason, reason, "{refused}");
    }
    let mut session = agent.dial().await;
    session.say(Said::Hello(agent.hello())).await;
    session
        .say(Said::ObservedPage(v1::ObservedPage {
            members: Vec::new(),
            end: Some(v1::SetEnd {
                count: 3,
                digest: 0,
            }),
        }))
        .await;
    assert_eq!(
        session.end().await.reason,
        "PROTOCOL",
        "a set that is not whole was taken"
    );
    // None of that made the node known as present.
    let node = head
        .nodes()
        .await
        .get(v1::GetNodeRequest {
            node: agent.node().0,
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(node.node.unwrap().node.unwrap().incarnation, 0);
}

#[tokio::test]
async fn heartbeats_are_acknowledged_and_messages_carry_the_term() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let (mut session, _) = agent.open(&[]).await;
    session
        .say(Said::Heartbeat(v1::Heartbeat { sequence: 7 }))
        .await;
    let message = session.from.message().await.unwrap().unwrap();
    assert_eq!(message.term, head.coordinator.term().0);
    assert_eq!(
        message.message,
        Some(Say::HeartbeatAck(v1::HeartbeatAck { sequence: 7 }))
    );
}

#[tokio::test]
async fn a_newer_session_of_the_same_agent_replaces_the_older() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let (mut old, _) = agent.open(&[]).await;
    let (mut new, _) = agent.open(&[]).await;
    let ended = old.end().await;
    assert_eq!(
        (ended.code, ended.reason.as_str()),
        (ErrorCode::Unavailable, "SESSION_REPLACED")
    );
    submit(&head, "r").await;
    assert!(matches!(new.desired().await.phase, Some(Phase::Prepare(_))));
}

#[tokio::test]
async fn a_restart_of_the_coordinator_touches_no_running_job() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let (mut session, _) = agent.open(&[]).await;
    let job = submit(&head, "r").await;
    let attempt = attempt_of(&session.desired().await);
    session
        .report(attempt, ObservedPhase::Ready { port: 4000 })
        .await;
    session.desired().await;
    session
        .report(
            attempt,
            ObservedPhase::Running {
                started_at: Timestamp(1),
            },
        )
        .await;
    head.job_in(job, v1::JobState::Running).await;
    let (term, cluster) = (head.coordinator.term(), head.coordinator.cluster());

    let head = head.restart().await;
    assert_eq!(session.end().await.code, ErrorCode::Unavailable);
    assert_eq!(head.coordinator.cluster(), cluster);
    assert!(head.coordinator.term() > term);
    let kept = head
        .jobs()
        .await
        .get(v1::GetJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(kept.job.unwrap().state(), v1::JobState::Running);

    // The agent comes back with its credentials at the new port, and is asked for nothing but what it does.
    let mut credentials = agent.credentials.clone();
    credentials.endpoints = head.admin.endpoints.clone();
    let agent = crate::harness::Agent::new(credentials).await;
    let running = ObservedPhase::Running {
        started_at: Timestamp(1),
    };
    let observed = [ObservedMember {
        attempt,
        node_rank: 0,
        phase: running,
    }];
    let (session, desired) = agent.open(&observed).await;
    assert_eq!(desired.len(), 1);
    assert!(
        matches!(desired[0].phase, Some(Phase::Run(_))),
        "{desired:?}"
    );
    session
        .report(attempt, ObservedPhase::Ended(ended(3)))
        .await;
    let over = head.job_in(job, v1::JobState::Failed).await;
    let exit = over.job.unwrap().exit.unwrap();
    assert_eq!(exit.status, Some(v1::exit_status::Status::Code(3)));
}
