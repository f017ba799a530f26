//! The life of a job as users and an agent see it.

use trainyard_common::error::ErrorCode;
use trainyard_common::member::ObservedPhase;
use trainyard_common::time::Timestamp;
use trainyard_proto::v1;
use trainyard_proto::v1::desired_member::Phase;

use crate::harness::{Head, attempt_of, ended, refusal, soon, submission, submit};

#[tokio::test]
async fn a_submit_with_the_same_request_id_makes_one_job() {
    let head = Head::start().await;
    let mut jobs = head.jobs().await;
    let first = jobs.submit(submission("r1")).await.unwrap().into_inner();
    assert_eq!((first.job, first.repeated_request), (1, false));
    let again = jobs.submit(submission("r1")).await.unwrap().into_inner();
    assert_eq!((again.job, again.repeated_request), (1, true));
    let mut other = submission("r1");
    other.spec.as_mut().unwrap().nodes = 2;
    assert_eq!(
        refusal(jobs.submit(other).await).code,
        ErrorCode::AlreadyExists
    );
    // Also after a restart, and after the job is over.
    jobs.cancel(v1::CancelJobRequest { job: 1 }).await.unwrap();
    let head = head.restart().await;
    let again = head
        .jobs()
        .await
        .submit(submission("r1"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((again.job, again.repeated_request), (1, true));
    assert_eq!(submit(&head, "r2").await, 2);
}

#[tokio::test]
async fn bad_submissions_name_the_field_and_leave_no_job() {
    let head = Head::start().await;
    let mut jobs = head.jobs().await;
    let missing = refusal(
        jobs.submit(v1::SubmitRequest {
            spec: None,
            ..submission("r")
        })
        .await,
    );
    assert_eq!(
        (missing.code, missing.field.as_deref()),
        (ErrorCode::Invalid, Some("spec"))
    );
    let no_id = refusal(jobs.submit(submission("")).await);
    assert_eq!(
        (no_id.code, no_id.field.as_deref()),
        (ErrorCode::Invalid, Some("request_id"))
    );
    let mut snapshot = submission("r");
    snapshot.spec.as_mut().unwrap().snapshot = vec![1; 32];
    let snapshot = refusal(jobs.submit(snapshot).await);
    assert_eq!(snapshot.code, ErrorCode::FailedPrecondition);
    assert_eq!(snapshot.field.as_deref(), Some("spec.snapshot"));
    // With a node present it can be told what could never fit.
    let agent = head.node("n").await;
    let (_session, _) = agent.open(&[]).await;
    let mut infeasible = submission("r");
    infeasible.allow_infeasible = false;
    infeasible.spec.as_mut().unwrap().nodes = 2;
    assert_eq!(
        refusal(jobs.submit(infeasible).await).code,
        ErrorCode::FailedPrecondition
    );
    let list = jobs
        .list(v1::ListJobsRequest {
            all: true,
            ..Default::default()
        })
        .await
        .unwrap();
    assert_eq!(list.into_inner().jobs, []);
}

#[tokio::test]
async fn a_job_is_prepared_run_and_succeeds() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let (mut session, desired) = agent.open(&[]).await;
    assert_eq!(desired, []);
    let job = submit(&head, "r").await;
    let prepare = session.desired().await;
    assert!(
        matches!(prepare.phase, Some(Phase::Prepare(_))),
        "{prepare:?}"
    );
    let attempt = attempt_of(&prepare);
    // Whoever is told of an attempt finds it on record: reads come from the disk.
    let stored = head
        .jobs()
        .await
        .get(v1::GetJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stored.attempts.len(), 1);
    assert_eq!(stored.attempts[0].id, prepare.attempt);
    let node = head
        .nodes()
        .await
        .get(v1::GetNodeRequest {
            node: agent.node().0,
        })
        .await
        .unwrap();
    let status = node.into_inner().node.unwrap();
    assert_eq!(status.free.unwrap().cpu_milli, 3000);
    assert_eq!(status.attempts, [prepare.attempt.unwrap()]);
    assert_eq!(
        status.node.unwrap().address,
        "127.0.0.1",
        "an empty address is the one of the connection"
    );

    session.report(attempt, ObservedPhase::Preparing).await;
    session
        .report(attempt, ObservedPhase::Ready { port: 4000 })
        .await;
    let run = session.desired().await;
    let Some(Phase::Run(go)) = run.phase else {
        panic!("{run:?}")
    };
    assert_eq!(
        (go.master_addr.as_str(), go.master_port),
        ("127.0.0.1", 4000)
    );
    session
        .report(
            attempt,
            ObservedPhase::Running {
                started_at: Timestamp(1),
            },
        )
        .await;
    head.job_in(job, v1::JobState::Running).await;
    session
        .report(attempt, ObservedPhase::Uploading(ended(0)))
        .await;
    session
        .report(attempt, ObservedPhase::Ended(ended(0)))
        .await;
    let over = head.job_in(job, v1::JobState::Succeeded).await;
    assert_eq!(over.attempts[0].outcome(), v1::Outcome::Succeeded);
    let forget = session.next().await;
    assert_eq!(
        forget,
        v1::coordinator_message::Message::Forget(prepare.attempt.unwrap())
    );

    // A finished job is history: gone from the live list, still there to get, list and cancel in vain.
    let mut jobs = head.jobs().await;
    let live = jobs
        .list(v1::ListJobsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((live.jobs.len(), live.next_before), (0, 0));
    let all = jobs
        .list(v1::ListJobsRequest {
            all: true,
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(all.jobs.len(), 1);
    let cancelled = jobs
        .cancel(v1::CancelJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(cancelled.job.unwrap().state(), v1::JobState::Succeeded);
    let unknown = refusal(jobs.cancel(v1::CancelJobRequest { job: 99 }).await);
    assert_eq!(unknown.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn cancelling_a_running_job_stops_it_on_its_node() {
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
    let mut jobs = head.jobs().await;
    let first = jobs
        .cancel(v1::CancelJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        first.job.as_ref().unwrap().cancel.as_ref().unwrap().by,
        "root"
    );
    let again = jobs
        .cancel(v1::CancelJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again.job.unwrap().cancel, first.job.unwrap().cancel);
    let stop = session.desired().await;
    assert!(matches!(stop.phase, Some(Phase::Stop(_))), "{stop:?}");
    session
        .report(attempt, ObservedPhase::Ended(ended(143)))
        .await;
    head.job_in(job, v1::JobState::Cancelled).await;
}

#[tokio::test]
async fn a_watch_goes_on_from_its_revision_and_says_when_it_cannot() {
    let head = Head::start().await;
    let job = submit(&head, "r").await;
    let mut jobs = head.jobs().await;
    let request = |after_revision| v1::WatchJobRequest {
        job,
        after_revision,
    };
    let mut watch = jobs.watch(request(0)).await.unwrap().into_inner();
    let first = soon("the job", watch.message()).await.unwrap().unwrap();
    assert!(first.revision > 0);
    let mut resumed = jobs
        .watch(request(first.revision))
        .await
        .unwrap()
        .into_inner();
    jobs.cancel(v1::CancelJobRequest { job }).await.unwrap();
    for watch in [&mut watch, &mut resumed] {
        let (mut revision, mut state) = (first.revision, None);
        while let Some(seen) = soon("the end", watch.message()).await.unwrap() {
            assert!(seen.revision > revision, "a state was told twice");
            revision = seen.revision;
            state = seen.job.map(|job| job.state());
        }
        assert_eq!(state, Some(v1::JobState::Cancelled));
    }
    let ahead = refusal(jobs.watch(request(1_000_000)).await);
    assert_eq!(ahead.code, ErrorCode::Compacted);
    assert_eq!(
        refusal(
            jobs.watch(v1::WatchJobRequest {
                job: 99,
                after_revision: 0
            })
            .await
        )
        .code,
        ErrorCode::NotFound
    );
}

#[tokio::test]
async fn lists_come_in_pages_newest_first() {
    let head = Head::start().await;
    for number in 1..=5 {
        assert_eq!(submit(&head, &format!("r{number}")).await, number);
    }
    let mut jobs = head.jobs().await;
    jobs.cancel(v1::CancelJobRequest { job: 4 }).await.unwrap();
    for (all, expected) in [(true, vec![5, 4, 3, 2, 1]), (false, vec![5, 3, 2, 1])] {
        let (mut seen, mut before) = (Vec::new(), 0);
        loop {
            let page = jobs
                .list(v1::ListJobsRequest {
                    all,
                    page_size: 2,
                    before,
                })
                .await
                .unwrap()
                .into_inner();
            assert!(page.jobs.len() <= 2);
            seen.extend(page.jobs.iter().map(|job| job.id));
            before = page.next_before;
            if before == 0 {
                break;
            }
        }
        assert_eq!(seen, expected);
    }
    let refused = refusal(
        jobs.list(v1::ListJobsRequest {
            page_size: 1001,
            ..Default::default()
        })
        .await,
    );
    assert_eq!(
        (refused.code, refused.field.as_deref()),
        (ErrorCode::Invalid, Some("page_size"))
    );
}
