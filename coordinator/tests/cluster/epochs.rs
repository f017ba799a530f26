//! Epochs: what an agent says of an attempt that is over, was replaced, never was or is another node's changes nothing
//! but what is kept under that attempt.

use trainyard_common::ids::{AttemptRef, Digest};
use trainyard_common::member::{EndCause, Ending, ObservedPhase};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;
use trainyard_proto::v1;
use trainyard_proto::v1::coordinator_message::Message;

use crate::harness::{Agent, Head, Session, attempt_of, ended, record, soon, submit};

fn running() -> ObservedPhase {
    ObservedPhase::Running {
        started_at: Timestamp(1),
    }
}

fn supervisor_lost() -> Ending {
    let mut ending = ended(0);
    ending.cause = EndCause::SupervisorLost;
    for rank in &mut ending.ranks {
        rank.exit = ExitStatus::Unknown;
    }
    ending
}

/// A node whose agent is in session.
async fn node(head: &Head, name: &str) -> (Agent, Session) {
    let agent = head.node(name).await;
    let (session, _) = agent.open(&[]).await;
    (agent, session)
}

/// The next member that is to be started there.
async fn start(session: &mut Session) -> AttemptRef {
    loop {
        if let Message::Desired(member) = session.next().await {
            return attempt_of(&member);
        }
    }
}

/// The answer to what was said of an attempt that is over.
async fn forgotten(session: &mut Session) -> AttemptRef {
    loop {
        if let Message::Forget(attempt) = session.next().await {
            return attempt.try_into().unwrap();
        }
    }
}

async fn job(head: &Head, job: u64) -> v1::GetJobResponse {
    let request = v1::GetJobRequest { job };
    head.jobs().await.get(request).await.unwrap().into_inner()
}

async fn output(head: &Head, job: u64, attempt: u32) -> String {
    let request = v1::ReadLogsRequest {
        job,
        task: Some(0),
        rank: Some(0),
        attempt: Some(attempt),
        ..Default::default()
    };
    let mut answers = head.logs().await.read(request).await.unwrap().into_inner();
    let mut text = String::new();
    while let Some(answer) = soon("output", answers.message()).await.unwrap() {
        for entry in answer.entries {
            text.push_str(str::from_utf8(&entry.data).unwrap());
        }
    }
    text
}

fn chunk(attempt: AttemptRef, text: &str) -> v1::PushLogsRequest {
    v1::PushLogsRequest {
        attempt: Some(attempt.into()),
        rank: 0,
        offset: 0,
        data: record(text),
        end: false,
    }
}

#[tokio::test]
async fn what_comes_late_from_a_replaced_attempt_is_kept_under_it_and_changes_nothing_else() {
    let head = Head::start().await;
    let (agent, mut session) = node(&head, "n").await;
    let id = submit(&head, "r").await;
    let first = start(&mut session).await;
    session.report(first, running()).await;
    head.job_in(id, v1::JobState::Running).await;
    session
        .report(first, ObservedPhase::Ended(supervisor_lost()))
        .await;
    assert_eq!(forgotten(&mut session).await, first);
    let second = start(&mut session).await;
    assert_eq!(second.attempt.0, 2);
    session.report(second, running()).await;
    head.job_in(id, v1::JobState::Running).await;
    let before = job(&head, id).await;

    // A late success with results, and a late sign of life.
    let mut success = ended(0);
    success.outputs = Some(Digest([7; 32]));
    success.checkpoint = Some(Digest([8; 32]));
    session.report(first, ObservedPhase::Ended(success)).await;
    assert_eq!(forgotten(&mut session).await, first);
    session.report(first, running()).await;
    let Message::Desired(stop) = session.next().await else {
        panic!("what lives on is to be stopped");
    };
    assert_eq!(attempt_of(&stop), first);
    assert!(matches!(
        stop.phase,
        Some(v1::desired_member::Phase::Stop(_))
    ));
    assert_eq!(job(&head, id).await, before);

    let pushed = agent.push(vec![chunk(first, "late\n")]).await.unwrap();
    assert!(pushed[0].stored > 0);
    agent.push(vec![chunk(second, "new\n")]).await.unwrap();
    assert_eq!(output(&head, id, 1).await, "late\n");
    assert_eq!(output(&head, id, 2).await, "new\n");

    session.report(second, ObservedPhase::Ended(ended(0))).await;
    head.job_in(id, v1::JobState::Succeeded).await;
    let over = job(&head, id).await;
    // A finished job is not changed by anything either.
    session.report(second, ObservedPhase::Ended(ended(3))).await;
    session.report(first, ObservedPhase::Ended(ended(3))).await;
    let (mut again, _) = agent.open(&[]).await;
    again.report(second, ObservedPhase::Ended(ended(3))).await;
    assert_eq!(forgotten(&mut again).await, second);
    assert_eq!(job(&head, id).await, over);
}

#[tokio::test]
async fn only_the_node_of_a_member_speaks_for_it() {
    let head = Head::start().await;
    let (_agent, mut session) = node(&head, "n").await;
    let id = submit(&head, "r").await;
    let attempt = start(&mut session).await;
    session.report(attempt, running()).await;
    head.job_in(id, v1::JobState::Running).await;
    let before = job(&head, id).await;
    let (_stranger, other) = node(&head, "m").await;
    other.report(attempt, ObservedPhase::Ended(ended(0))).await;
    other
        .report(attempt, ObservedPhase::Ended(supervisor_lost()))
        .await;
    // Attempts, tasks and jobs that never were.
    for never in ["j1.0.2", "j1.7.1", "j99.0.1"] {
        let never: AttemptRef = never.parse().unwrap();
        other.report(never, ObservedPhase::Ended(ended(0))).await;
        session.report(never, ObservedPhase::Ended(ended(0))).await;
    }
    // What is said in a session is handled in its order, so this comes after all of it.
    for (session, sequence) in [(other, 1), (session, 1)] {
        let mut session = session;
        session
            .say(v1::agent_message::Message::Heartbeat(v1::Heartbeat {
                sequence,
            }))
            .await;
        loop {
            if let Message::HeartbeatAck(_) = session.next().await {
                break;
            }
        }
        assert_eq!(job(&head, id).await, before);
    }
}

#[tokio::test]
async fn a_session_that_was_replaced_says_nothing_any_more() {
    let head = Head::start().await;
    let (agent, mut old) = node(&head, "n").await;
    let id = submit(&head, "r").await;
    let attempt = start(&mut old).await;
    old.report(attempt, running()).await;
    head.job_in(id, v1::JobState::Running).await;
    let before = job(&head, id).await;
    let observed = trainyard_common::member::ObservedMember {
        attempt,
        node_rank: 0,
        phase: running(),
    };
    let (mut new, _) = agent.open(&[observed]).await;
    // Its words may still be on their way.
    let late = v1::ObservedMember::from(&trainyard_common::member::ObservedMember {
        attempt,
        node_rank: 0,
        phase: ObservedPhase::Ended(ended(0)),
    });
    let message = v1::AgentMessage {
        message: Some(v1::agent_message::Message::Observed(late)),
    };
    // The other side may have closed it already, which is as good.
    let _ = old.to.send(message).await;
    assert_eq!(old.end().await.reason, "SESSION_REPLACED");
    new.say(v1::agent_message::Message::Heartbeat(v1::Heartbeat {
        sequence: 1,
    }))
    .await;
    loop {
        if let Message::HeartbeatAck(_) = new.next().await {
            break;
        }
    }
    assert_eq!(job(&head, id).await, before);
}
