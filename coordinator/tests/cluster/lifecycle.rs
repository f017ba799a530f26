//! Starting, ending, and refusing to start.

use std::fs;
use std::time::Duration;

use trainyard_common::error::ErrorCode;
use trainyard_common::time::Timestamp;
use trainyard_coordinator::store::{SqliteStore, Store, StoreError};
use trainyard_coordinator::{Config, FatalError, Presence, StartError, check, start};
use trainyard_proto::v1;
use trainyard_transport::credentials::Credentials;

use crate::harness::{Agent, Head, config, refusal, soon, submission, submit};

#[tokio::test]
async fn a_second_coordinator_on_the_same_directory_is_refused() {
    let head = Head::start().await;
    let error = start(config(head.dir.path())).await.unwrap_err();
    assert!(
        matches!(error, StartError::Store(StoreError::Held { .. })),
        "{error:?}"
    );
    assert!(
        error
            .to_string()
            .contains(&format!("pid {}", std::process::id())),
        "{error}"
    );
    submit(&head, "r").await;
}

#[tokio::test]
async fn a_crash_loses_nothing_that_was_acknowledged() {
    let head = Head::start().await;
    let job = submit(&head, "r").await;
    let Head {
        dir, coordinator, ..
    } = head;
    let data_dir = dir.path().join("head");
    let under_it = check(&data_dir).unwrap();
    drop(coordinator);
    let report = check(&data_dir).unwrap();
    assert!(report.transitions >= 2 && report.rows >= 2, "{report:?}");
    assert!(report.damage.is_empty(), "{report:?}");
    assert_eq!(report, under_it, "a check needs no end of the coordinator");
    let head = Head::in_dir(dir).await;
    let kept = head
        .jobs()
        .await
        .get(v1::GetJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(kept.job.unwrap().request_id, "r");
}

#[tokio::test]
async fn it_says_where_it_is_while_it_runs() {
    let head = Head::start().await;
    let data_dir = head.dir.path().join("head");
    let presence = Presence::read(&data_dir).unwrap().unwrap();
    assert_eq!(presence.endpoints, head.coordinator.local_endpoints());
    assert_eq!(
        presence.endpoints[0].port(),
        head.coordinator.local_addr().port()
    );
    assert_eq!(presence.cluster, head.coordinator.cluster());
    assert_eq!(presence.pid, std::process::id());
    assert_eq!(
        Credentials::load(&presence.admin_credentials)
            .unwrap()
            .identity
            .to_string(),
        "user/root"
    );
    let Head {
        dir, coordinator, ..
    } = head;
    coordinator.shutdown().await;
    assert_eq!(Presence::read(&data_dir).unwrap(), None);
    drop(dir);
}

#[tokio::test]
async fn an_orderly_end_tells_open_streams_and_does_not_hang_on_them() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let (mut session, _) = agent.open(&[]).await;
    let job = submit(&head, "r").await;
    let request = v1::WatchJobRequest {
        job,
        after_revision: 0,
    };
    let mut watch = head.jobs().await.watch(request).await.unwrap().into_inner();
    let begun = std::time::Instant::now();
    let Head {
        dir, coordinator, ..
    } = head;
    soon("the end", coordinator.shutdown()).await;
    assert_eq!(session.end().await.code, ErrorCode::Unavailable);
    let told = loop {
        match watch.message().await {
            Ok(Some(_)) => {}
            other => break refusal(other),
        }
    };
    assert_eq!(told.code, ErrorCode::Unavailable);
    assert!(
        begun.elapsed() < Duration::from_secs(16),
        "{:?}",
        begun.elapsed()
    );
    drop(dir);
}

#[tokio::test]
async fn whoever_leads_no_more_stops_and_confirms_nothing() {
    let head = Head::start().await;
    let data_dir = head.dir.path().join("head");
    let other = SqliteStore::open(&data_dir, &data_dir.join("ca"), Timestamp(1)).unwrap();
    other.lead().unwrap();
    let mut jobs = head.jobs().await;
    let Head {
        mut coordinator, ..
    } = head;
    let (fatal, refused) = tokio::join!(
        soon("the fatal error", coordinator.finished()),
        soon("the answer", jobs.submit(submission("r")))
    );
    assert!(
        matches!(fatal, Err(FatalError::Store(StoreError::Fenced { .. }))),
        "{fatal:?}"
    );
    assert_eq!(refusal(refused).code, ErrorCode::Unavailable);
    soon("the end", coordinator.shutdown()).await;
}

#[tokio::test]
async fn an_idle_coordinator_leaves_and_a_busy_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let idle = Config {
        idle_exit: Some(Duration::from_millis(300)),
        ..config(dir.path())
    };
    let mut coordinator = start(idle).await.unwrap();
    let admin = Credentials::load(coordinator.admin_credentials()).unwrap();
    let mut jobs =
        v1::job_service_client::JobServiceClient::new(crate::harness::channel(&admin).await);
    let job = jobs.submit(submission("r")).await.unwrap().into_inner().job;
    let early = tokio::time::timeout(Duration::from_secs(1), coordinator.finished()).await;
    assert!(early.is_err(), "it left although a job is live");
    jobs.cancel(v1::CancelJobRequest { job }).await.unwrap();
    soon("the idle exit", coordinator.finished()).await.unwrap();
    coordinator.shutdown().await;
}

#[tokio::test]
async fn local_nodes_need_no_token_and_keep_their_number() {
    let head = Head::start().await;
    let dir = head.dir.path().join("agent");
    let node = head.coordinator.add_local_node("here", &dir).await.unwrap();
    let again = head.coordinator.add_local_node("here", &dir).await.unwrap();
    assert_eq!(node, again);
    let agent = Agent::new(Credentials::load(&dir).unwrap()).await;
    assert_eq!(agent.node(), node);
    agent.open(&[]).await;
    let list = head
        .nodes()
        .await
        .list(v1::ListNodesRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(list.nodes.len(), 1);
    assert_eq!(
        list.nodes[0].node.as_ref().unwrap().target(),
        v1::Target::Local
    );
}

#[tokio::test]
async fn a_directory_that_lost_its_state_is_not_started_anew() {
    let head = Head::start().await;
    submit(&head, "r").await;
    let Head {
        dir, coordinator, ..
    } = head;
    coordinator.shutdown().await;
    let data_dir = dir.path().join("head");
    for file in ["state.db", "state.db-wal", "state.db-shm", "cluster-id"] {
        let _ = fs::remove_file(data_dir.join(file));
    }
    let error = start(config(dir.path())).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("this cluster has existed; state not found"),
        "{error}"
    );
    let other = tempfile::tempdir().unwrap();
    let port_taken = Head::start().await;
    let taken = Config {
        listen: port_taken.coordinator.local_addr(),
        ..config(other.path())
    };
    assert!(matches!(
        start(taken).await.unwrap_err(),
        StartError::Listen { .. }
    ));
}
