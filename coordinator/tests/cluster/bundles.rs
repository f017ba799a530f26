//! Bundles over the wire: both sets at the start of a session, changes both ways, output of tasks that have no rows
//! yet.

use trainyard_common::bundle::{ObservedBundle, ObservedBundlePhase, TaskRange, TaskReport};
use trainyard_common::error::ErrorCode;
use trainyard_common::ids::{AttemptNumber, AttemptRef, JobId, TaskIndex};
use trainyard_common::spec::{Array, JobSpec};
use trainyard_common::time::Timestamp;
use trainyard_proto::v1;
use trainyard_proto::v1::agent_message::Message as Said;
use trainyard_proto::v1::coordinator_message::Message as Say;
use trainyard_proto::v1::desired_bundle::Phase;

use crate::harness::{Head, ended, record, refusal, soon};

/// Submits an array; the nodes of these tests run four tasks at a time.
async fn submit_array(head: &Head, tasks: u32) -> u64 {
    let mut spec = JobSpec::new("train", vec!["true".to_owned()]);
    spec.array = Some(Array {
        first: 0,
        last: tasks - 1,
        max_running: None,
    });
    let request = v1::SubmitRequest {
        request_id: "r".to_owned(),
        spec: Some((&spec).into()),
        allow_infeasible: false,
    };
    let mut jobs = head.jobs().await;
    jobs.submit(request).await.unwrap().into_inner().job
}

fn observed(
    job: u64,
    phase: ObservedBundlePhase,
    first: u64,
    reports: Vec<TaskReport>,
) -> ObservedBundle {
    ObservedBundle {
        bundle: format!("j{job}.b1").parse().unwrap(),
        phase,
        first,
        reports,
    }
}

fn task_ended(task: u32) -> TaskReport {
    TaskReport::Ended {
        task: TaskIndex(task),
        started_at: Some(Timestamp(1)),
        ending: Box::new(ended(0)),
    }
}

fn range(first: u32, last: u32) -> v1::TaskRange {
    v1::TaskRange { first, last }
}

#[tokio::test]
async fn an_array_runs_in_a_bundle_and_its_output_is_followed() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let (mut session, members, bundles) = agent.open_with(&[], &[]).await;
    assert!(members.is_empty() && bundles.is_empty());
    let job = submit_array(&head, 5).await;
    let desired = session.desired_bundle().await;
    assert_eq!(desired.tasks, [range(0, 3)]);
    assert_eq!((desired.slots, desired.recorded), (4, 0));
    assert!(matches!(desired.phase, Some(Phase::Run(_))), "{desired:?}");
    assert_eq!(desired.spec.as_ref().unwrap().command, ["true"]);
    let node = v1::GetNodeRequest {
        node: agent.node().0,
    };
    let status = head.nodes().await.get(node).await.unwrap().into_inner();
    assert_eq!(status.node.unwrap().free.unwrap().cpu_milli, 0);

    // Somebody follows a task that has no rows, another node may not speak for it, ours may.
    let request = v1::ReadLogsRequest {
        job,
        task: Some(1),
        follow: true,
        ..Default::default()
    };
    let mut logs = head.logs().await;
    let mut follower = logs.read(request).await.unwrap().into_inner();
    let attempt = AttemptRef {
        job: JobId(job),
        task: TaskIndex(1),
        attempt: AttemptNumber(1),
    };
    let chunk = |rank, end| v1::PushLogsRequest {
        attempt: Some(attempt.into()),
        rank,
        offset: 0,
        data: record("hello\n"),
        end,
    };
    let other = head.node("o").await;
    for (from, rank) in [(&other, 0), (&agent, 1)] {
        let refused = refusal(from.push(vec![chunk(rank, false)]).await);
        assert_eq!(refused.code, ErrorCode::PermissionDenied);
    }
    let stored = agent.push(vec![chunk(0, true)]).await.unwrap();
    assert!(stored[0].end);
    let seen = soon("output", follower.message()).await.unwrap().unwrap();
    assert_eq!(seen.entries[0].data, b"hello\n");

    let running = ObservedBundlePhase::Running;
    session
        .report_bundle(&observed(job, running.clone(), 0, vec![task_ended(1)]))
        .await;
    let desired = session.desired_bundle().await;
    assert_eq!(desired.tasks, [range(0, 0), range(2, 4)]);
    assert!(
        matches!(desired.phase, Some(Phase::Close(_))),
        "{desired:?}"
    );
    assert_eq!((desired.recorded, desired.spec), (1, None));
    // Its bundle holds it no more, and what was not acknowledged may come again.
    let again = agent.push(vec![chunk(0, true)]).await.unwrap();
    assert!(again[0].end);

    // Another session: the first reports are told again and count once.
    drop(session);
    let reports = vec![task_ended(1), task_ended(0)];
    let (mut session, _, bundles) = agent
        .open_with(&[], &[observed(job, running, 0, reports)])
        .await;
    assert_eq!(bundles.len(), 1);
    assert_eq!(
        (bundles[0].recorded, &bundles[0].tasks),
        (2, &vec![range(2, 4)])
    );
    let reports = vec![task_ended(2), task_ended(3), task_ended(4)];
    let end = ObservedBundlePhase::Ended {
        total: 5,
        message: String::new(),
    };
    session.report_bundle(&observed(job, end, 2, reports)).await;
    let over = head.job_in(job, v1::JobState::Succeeded).await;
    assert_eq!(over.job.unwrap().tasks.unwrap().succeeded, 5);
    let forget = session.next().await;
    assert!(matches!(forget, Say::ForgetBundle(_)), "{forget:?}");
    assert!(
        soon("the end", follower.message()).await.unwrap().is_none(),
        "the follower ends with the job"
    );
}

#[tokio::test]
async fn bundles_follow_members_and_a_gap_asks_for_a_new_session() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let session = agent.dial().await;
    session.say(Said::Hello(agent.hello())).await;
    let page = v1::ObservedBundlePage::default();
    session.say(Said::ObservedBundlePage(page)).await;
    let mut session = session;
    assert_eq!(session.end().await.reason, "PROTOCOL");

    let (mut session, _, _) = agent.open_with(&[], &[]).await;
    let job = submit_array(&head, 2).await;
    session.desired_bundle().await;
    let back = TaskReport::Returned(TaskRange {
        first: TaskIndex(0),
        last: TaskIndex(0),
    });
    session
        .report_bundle(&observed(job, ObservedBundlePhase::Running, 3, vec![back]))
        .await;
    let resync = session.next().await;
    assert!(matches!(resync, Say::Resync(_)), "{resync:?}");
}
