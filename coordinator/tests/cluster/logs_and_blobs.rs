//! Output of ranks and blobs over the wire.

use std::collections::BTreeSet;

use tokio_stream::iter;
use tonic::Streaming;
use trainyard_common::error::ErrorCode;
use trainyard_common::ids::AttemptRef;
use trainyard_common::member::ObservedPhase;
use trainyard_common::time::Timestamp;
use trainyard_proto::v1;
use trainyard_proto::v1::upload_request::Part;

use crate::harness::{Agent, Head, Session, attempt_of, ended, record, refusal, soon, submit};

/// A job that runs on a scripted agent.
async fn running(head: &Head) -> (u64, AttemptRef, Agent, Session) {
    let agent = head.node("n").await;
    let (mut session, _) = agent.open(&[]).await;
    let job = submit(head, "r").await;
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
    (job, attempt, agent, session)
}

fn chunk(attempt: AttemptRef, offset: u64, data: Vec<u8>, end: bool) -> v1::PushLogsRequest {
    v1::PushLogsRequest {
        attempt: Some(attempt.into()),
        rank: 0,
        offset,
        data,
        end,
    }
}

async fn read_to_end(mut answers: Streaming<v1::ReadLogsResponse>) -> String {
    let mut text = String::new();
    while let Some(answer) = soon("output", answers.message()).await.unwrap() {
        for entry in answer.entries {
            text.push_str(str::from_utf8(&entry.data).unwrap());
        }
    }
    text
}

#[tokio::test]
async fn output_is_stored_once_followed_and_ends_with_the_job() {
    let head = Head::start().await;
    let (job, attempt, agent, session) = running(&head).await;
    let one = record("one\n");
    let length = one.len() as u64;
    let mut logs = head.logs().await;
    let request = v1::ReadLogsRequest {
        job,
        follow: true,
        ..Default::default()
    };
    let mut follower = logs.read(request).await.unwrap().into_inner();
    let sent = vec![
        chunk(attempt, 0, one.clone(), false),
        chunk(attempt, 0, one.clone(), false),
        chunk(attempt, 99, one.clone(), false),
    ];
    let stored: Vec<_> = agent
        .push(sent)
        .await
        .unwrap()
        .iter()
        .map(|answer| answer.stored)
        .collect();
    assert_eq!(
        stored,
        [length, length, length],
        "a repetition or a gap was stored"
    );
    let first = soon("output", follower.message()).await.unwrap().unwrap();
    assert_eq!(first.entries.len(), 1);
    assert_eq!(
        (
            first.entries[0].data.as_slice(),
            first.entries[0].next_offset
        ),
        (&b"one\n"[..], length)
    );
    assert_eq!(first.entries[0].attempt, Some(attempt.into()));

    let answers = agent
        .push(vec![chunk(attempt, length, record("two\n"), true)])
        .await
        .unwrap();
    assert!(answers[0].end);
    session
        .report(attempt, ObservedPhase::Ended(ended(0)))
        .await;
    assert_eq!(
        read_to_end(follower).await,
        "two\n",
        "the follower ends by itself"
    );
    assert_eq!(
        read_to_end(logs.read(request).await.unwrap().into_inner()).await,
        "one\ntwo\n"
    );
    let tail = v1::ReadLogsRequest {
        tail: Some(1),
        ..request
    };
    assert_eq!(
        read_to_end(logs.read(tail).await.unwrap().into_inner()).await,
        "two\n"
    );
    let at = v1::ReadLogsRequest {
        offset: length,
        task: Some(0),
        rank: Some(0),
        attempt: Some(1),
        ..request
    };
    assert_eq!(
        read_to_end(logs.read(at).await.unwrap().into_inner()).await,
        "two\n"
    );
    let other_rank = v1::ReadLogsRequest {
        rank: Some(1),
        ..request
    };
    assert_eq!(
        read_to_end(logs.read(other_rank).await.unwrap().into_inner()).await,
        ""
    );

    let refused = refusal(
        logs.read(v1::ReadLogsRequest {
            offset: 1,
            ..request
        })
        .await,
    );
    assert_eq!(
        (refused.code, refused.field.as_deref()),
        (ErrorCode::Invalid, Some("offset"))
    );
    let refused = refusal(logs.read(v1::ReadLogsRequest { job: 99, ..request }).await);
    assert_eq!(refused.code, ErrorCode::NotFound);
    // What is late from an attempt that is over is still taken, if only by the node that had it.
    assert!(
        agent
            .push(vec![chunk(attempt, 0, one, false)])
            .await
            .unwrap()[0]
            .end
    );
}

#[tokio::test]
async fn output_is_taken_only_from_where_the_rank_is() {
    let head = Head::start().await;
    let (_, attempt, agent, _session) = running(&head).await;
    let stranger = head.node("m").await;
    let refused = refusal(
        stranger
            .push(vec![chunk(attempt, 0, record("x"), false)])
            .await,
    );
    assert_eq!(
        (refused.code, refused.reason.as_str()),
        (ErrorCode::PermissionDenied, "NOT_PLACED_HERE")
    );
    let mut other_rank = chunk(attempt, 0, record("x"), false);
    other_rank.rank = 1;
    assert_eq!(
        refusal(agent.push(vec![other_rank]).await).code,
        ErrorCode::PermissionDenied
    );
    let unknown: AttemptRef = "j77.0.1".parse().unwrap();
    let refused = refusal(
        agent
            .push(vec![chunk(unknown, 0, record("x"), false)])
            .await,
    );
    assert_eq!(refused.code, ErrorCode::PermissionDenied);
    let refused = refusal(
        agent
            .push(vec![chunk(attempt, 0, b"no records".to_vec(), false)])
            .await,
    );
    assert_eq!(refused.code, ErrorCode::Invalid);
}

fn digest(data: &[u8]) -> Vec<u8> {
    blake3::hash(data).as_bytes().to_vec()
}

fn blob(announced: Vec<u8>, size: usize, data: &[u8]) -> Vec<v1::UploadRequest> {
    let header = Part::Header(v1::BlobHeader {
        digest: announced,
        size: size as u64,
    });
    let parts = data.chunks(100_000).map(|part| Part::Data(part.to_vec()));
    [header]
        .into_iter()
        .chain(parts)
        .map(|part| v1::UploadRequest { part: Some(part) })
        .collect()
}

#[tokio::test]
async fn blobs_come_back_as_sent_and_lies_are_refused() {
    let head = Head::start().await;
    let mut blobs = head.blobs().await;
    let large: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let small = b"small".to_vec();
    let ask = || v1::MissingRequest {
        digests: vec![digest(&large), digest(&small)],
    };
    let missing = blobs.missing(ask()).await.unwrap().into_inner().digests;
    assert_eq!(missing.len(), 2);
    let both = [
        blob(digest(&large), large.len(), &large),
        blob(digest(&small), 5, &small),
    ]
    .concat();
    assert_eq!(
        blobs
            .upload(iter(both.clone()))
            .await
            .unwrap()
            .into_inner()
            .stored,
        2
    );
    assert_eq!(
        blobs.upload(iter(both)).await.unwrap().into_inner().stored,
        0
    );
    assert_eq!(
        blobs
            .missing(ask())
            .await
            .unwrap()
            .into_inner()
            .digests
            .len(),
        0
    );

    let request = v1::DownloadRequest {
        digest: digest(&large),
        offset: 10,
    };
    let mut answers = blobs.download(request).await.unwrap().into_inner();
    let (mut got, mut sizes) = (Vec::new(), BTreeSet::new());
    while let Some(answer) = soon("a chunk", answers.message()).await.unwrap() {
        got.extend(answer.data);
        sizes.insert(answer.size);
    }
    assert!(got == large[10..], "the bytes differ");
    assert!(sizes.contains(&1_000_000));

    let lie = refusal(
        blobs
            .upload(iter(blob(digest(b"truth"), 5, b"liars")))
            .await,
    );
    assert_eq!(
        (lie.code, lie.reason.as_str()),
        (ErrorCode::Invalid, "DIGEST_MISMATCH")
    );
    let short = refusal(
        blobs
            .upload(iter(blob(digest(b"truth"), 6, b"truth")))
            .await,
    );
    assert_eq!(short.reason, "SIZE_MISMATCH");
    let bare = vec![v1::UploadRequest {
        part: Some(Part::Data(vec![1])),
    }];
    assert_eq!(refusal(blobs.upload(iter(bare)).await).reason, "NO_HEADER");
    let none = v1::MissingRequest {
        digests: vec![digest(b"truth")],
    };
    assert_eq!(
        blobs
            .missing(none)
            .await
            .unwrap()
            .into_inner()
            .digests
            .len(),
        1
    );
    let unknown = v1::DownloadRequest {
        digest: digest(b"truth"),
        offset: 0,
    };
    assert_eq!(
        refusal(blobs.download(unknown).await).code,
        ErrorCode::NotFound
    );
    let beyond = v1::DownloadRequest {
        digest: digest(&small),
        offset: 6,
    };
    assert_eq!(
        refusal(blobs.download(beyond).await).code,
        ErrorCode::Invalid
    );
    let many = v1::MissingRequest {
        digests: vec![digest(&small); 1001],
    };
    assert_eq!(refusal(blobs.missing(many).await).code, ErrorCode::Invalid);
}
