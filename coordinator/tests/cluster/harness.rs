//! A coordinator in a temporary directory, clients for it, and an agent that does what a test says.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use trainyard_common::bundle::ObservedBundle;
use trainyard_common::error::Refusal;
use trainyard_common::ids::{AttemptRef, ClusterId, NodeId, TokenId};
use trainyard_common::inventory::Inventory;
use trainyard_common::logrecord::{LogKind, LogRecord};
use trainyard_common::member::{EndCause, Ending, ObservedMember, ObservedPhase, RankEnd};
use trainyard_common::resources::Resources;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;
use trainyard_coordinator::{Config, Coordinator, start};
use trainyard_proto::convert::pages::{observed_pages, pages};
use trainyard_proto::status::from_status;
use trainyard_proto::v1::admin_service_client::AdminServiceClient;
use trainyard_proto::v1::agent_service_client::AgentServiceClient;
use trainyard_proto::v1::blob_service_client::BlobServiceClient;
use trainyard_proto::v1::enroll_service_client::EnrollServiceClient;
use trainyard_proto::v1::job_service_client::JobServiceClient;
use trainyard_proto::v1::log_service_client::LogServiceClient;
use trainyard_proto::v1::node_service_client::NodeServiceClient;
use trainyard_proto::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, v1};
use trainyard_transport::client::connect;
use trainyard_transport::credentials::Credentials;
use trainyard_transport::enrol::enrol;
use trainyard_transport::token::{JoinToken, Secret, TokenKind};

/// Fails the test instead of hanging it.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(Duration::from_secs(30), future).await {
        Ok(output) => output,
        Err(_) => panic!("waited 30 s for {what}"),
    }
}

pub(crate) fn config(dir: &Path) -> Config {
    Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        admin: Some("root".parse().unwrap()),
        ..Config::new(dir.join("head"))
    }
}

/// A coordinator and its admin.
pub(crate) struct Head {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) coordinator: Coordinator,
    pub(crate) admin: Credentials,
}

impl Head {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::in_dir(dir).await
    }

    pub(crate) async fn in_dir(dir: tempfile::TempDir) -> Self {
        let coordinator = soon("the start", start(config(dir.path()))).await.unwrap();
        let admin = Credentials::load(coordinator.admin_credentials()).unwrap();
        Self {
            dir,
            coordinator,
            admin,
        }
    }

    /// Ends it in order and starts another one on the same directory.
    pub(crate) async fn restart(self) -> Self {
        let Self {
            dir, coordinator, ..
        } = self;
        soon("the end", coordinator.shutdown()).await;
        Self::in_dir(dir).await
    }

    pub(crate) async fn channel(&self) -> Channel {
        channel(&self.admin).await
    }

    pub(crate) async fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel().await)
    }

    pub(crate) async fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel().await)
    }

    pub(crate) async fn logs(&self) -> LogServiceClient<Channel> {
        LogServiceClient::new(self.channel().await)
    }

    pub(crate) async fn blobs(&self) -> BlobServiceClient<Channel> {
        BlobServiceClient::new(self.channel().await)
    }

    pub(crate) async fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel().await)
    }

    /// A join token as an admin makes it.
    pub(crate) async fn token(&self, grant: v1::token_grant::Grant, uses: u32) -> JoinToken {
        let kind = match grant {
            v1::token_grant::Grant::Node(_) => TokenKind::Node,
            v1::token_grant::Grant::User(_) => TokenKind::User,
        };
        let request = v1::CreateTokenRequest {
            grant: Some(v1::TokenGrant { grant: Some(grant) }),
            uses,
            ttl: Some(prost_types::Duration {
                seconds: 600,
                nanos: 0,
            }),
        };
        let made = self
            .admin()
            .await
            .create_token(request)
            .await
            .unwrap()
            .into_inner();
        let token = made.token.unwrap();
        assert!(
            token.secret_hash.is_empty(),
            "the hash of the secret is told"
        );
        JoinToken {
            endpoints: made
                .endpoints
                .iter()
                .map(|endpoint| endpoint.parse().unwrap())
                .collect(),
            ca_hash: made.ca_hash.try_into().unwrap(),
            cluster: ClusterId::try_from(made.cluster.as_slice()).unwrap(),
            kind,
            id: TokenId(token.id),
            secret: Secret::from_bytes(made.secret.try_into().unwrap()),
            reusable: uses > 1,
        }
    }

    pub(crate) async fn node_token(&self, uses: u32) -> JoinToken {
        self.token(
            v1::token_grant::Grant::Node(v1::NodeGrant {
                target: v1::Target::Attached.into(),
            }),
            uses,
        )
        .await
    }

    pub(crate) async fn user(&self, name: &str, role: v1::Role) -> Credentials {
        let grant = v1::UserGrant {
            name: name.to_owned(),
            role: role.into(),
        };
        let token = self.token(v1::token_grant::Grant::User(grant), 1).await;
        enrol(&token, name).await.unwrap()
    }

    /// An enrolled node with nothing running.
    pub(crate) async fn node(&self, name: &str) -> Agent {
        let token = self.node_token(1).await;
        Agent::new(enrol(&token, name).await.unwrap()).await
    }

    /// Waits until a job satisfies a condition, by watching it.
    pub(crate) async fn job_when(
        &self,
        job: u64,
        what: &str,
        wanted: impl Fn(&v1::WatchJobResponse) -> bool,
    ) -> v1::WatchJobResponse {
        let request = v1::WatchJobRequest {
            job,
            after_revision: 0,
        };
        let mut watch = self.jobs().await.watch(request).await.unwrap().into_inner();
        loop {
            let seen = soon(what, watch.message()).await.unwrap();
            let seen = seen.unwrap_or_else(|| panic!("the job was over before: {what}"));
            if wanted(&seen) {
                return seen;
            }
        }
    }

    pub(crate) async fn job_in(&self, job: u64, state: v1::JobState) -> v1::WatchJobResponse {
        self.job_when(job, state.as_str_name(), |seen| {
            seen.job.as_ref().unwrap().state() == state
        })
        .await
    }
}

pub(crate) async fn channel(credentials: &Credentials) -> Channel {
    let cert = credentials.client_cert().unwrap();
    soon(
        "a connection",
        connect(&credentials.endpoints, &credentials.trust(), Some(&cert)),
    )
    .await
    .unwrap()
}

pub(crate) async fn enroll_client(head: &Head) -> EnrollServiceClient<Channel> {
    EnrollServiceClient::new(anonymous(head).await)
}

/// A connection without a certificate.
pub(crate) async fn anonymous(head: &Head) -> Channel {
    soon(
        "a connection",
        connect(&head.admin.endpoints, &head.admin.trust(), None),
    )
    .await
    .unwrap()
}

pub(crate) fn submission(request_id: &str) -> v1::SubmitRequest {
    let spec = JobSpec::new("train", vec!["train.py".to_owned()]);
    v1::SubmitRequest {
        request_id: request_id.to_owned(),
        spec: Some((&spec).into()),
        allow_infeasible: true,
    }
}

pub(crate) async fn submit(head: &Head, request_id: &str) -> u64 {
    head.jobs()
        .await
        .submit(submission(request_id))
        .await
        .unwrap()
        .into_inner()
        .job
}

pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, tonic::Status>) -> Refusal {
    from_status(&result.unwrap_err())
}

pub(crate) fn record(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    LogRecord {
        kind: LogKind::Stdout,
        at: Timestamp(1),
        data: text.as_bytes(),
    }
    .encode(&mut bytes);
    bytes
}

/// An agent that does what a test says.
pub(crate) struct Agent {
    pub(crate) credentials: Credentials,
    pub(crate) client: AgentServiceClient<Channel>,
    pub(crate) channel: Channel,
}

/// An open session.
pub(crate) struct Session {
    pub(crate) to: mpsc::Sender<v1::AgentMessage>,
    pub(crate) from: Streaming<v1::CoordinatorMessage>,
}

impl Agent {
    pub(crate) async fn new(credentials: Credentials) -> Self {
        let channel = channel(&credentials).await;
        Self {
            credentials,
            client: AgentServiceClient::new(channel.clone()),
            channel,
        }
    }

    pub(crate) fn node(&self) -> NodeId {
        match self.credentials.identity {
            trainyard_transport::identity::Identity::Node(node) => node,
            ref other => panic!("{other}"),
        }
    }

    pub(crate) fn hello(&self) -> v1::Hello {
        let capacity = Resources {
            cpu_milli: 4000,
            memory_bytes: 1 << 30,
            gpus: 0,
        };
        let inventory = Inventory {
            capacity,
            memory_bytes: 1 << 30,
            ..Inventory::default()
        };
        v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            oldest_protocol_version: OLDEST_PROTOCOL_VERSION,
            opening: 0,
            capabilities: Vec::new(),
            cluster: self.credentials.cluster.0.to_vec(),
            incarnation: 1,
            boot_id: "boot".to_owned(),
            agent_version: "0.1.0".to_owned(),
            address: String::new(),
            inventory: Some((&inventory).into()),
            term: 0,
            last_words: String::new(),
        }
    }

    /// Opens a session without saying anything.
    pub(crate) async fn dial(&self) -> Session {
        let (to, messages) = mpsc::channel(64);
        let from = self
            .client
            .clone()
            .session(ReceiverStream::new(messages))
            .await
            .unwrap()
            .into_inner();
        Session { to, from }
    }

    /// Opens a session, says hello with what the agent has, and gives what is desired of it.
    pub(crate) async fn open(
        &self,
        observed: &[ObservedMember],
    ) -> (Session, Vec<v1::DesiredMember>) {
        let (session, members, _) = self.open_with(observed, &[]).await;
        (session, members)
    }

    /// Opens a session with members and bundles, and gives what is desired of both.
    pub(crate) async fn open_with(
        &self,
        observed: &[ObservedMember],
        bundles: &[ObservedBundle],
    ) -> (Session, Vec<v1::DesiredMember>, Vec<v1::DesiredBundle>) {
        let mut session = self.dial().await;
        session.greet_with(self.hello(), observed, bundles).await;
        let welcome = session.next().await;
        assert!(
            matches!(welcome, v1::coordinator_message::Message::Welcome(_)),
            "{welcome:?}"
        );
        let (mut desired, mut bundles) = (Vec::new(), Vec::new());
        loop {
            match session.next().await {
                v1::coordinator_message::Message::DesiredPage(page) => {
                    desired.extend(page.members);
                }
                v1::coordinator_message::Message::DesiredBundlePage(page) => {
                    bundles.extend(page.bundles);
                    if page.end.is_some() {
                        return (session, desired, bundles);
                    }
                }
                other => panic!("expected a page, got {other:?}"),
            }
        }
    }

    /// Sends output of a rank and gives the answers.
    pub(crate) async fn push(
        &self,
        requests: Vec<v1::PushLogsRequest>,
    ) -> Result<Vec<v1::PushLogsResponse>, tonic::Status> {
        let mut answers = self
            .client
            .clone()
            .push_logs(tokio_stream::iter(requests))
            .await?
            .into_inner();
        let mut got = Vec::new();
        while let Some(answer) = soon("an acknowledgement", answers.message()).await? {
            got.push(answer);
        }
        Ok(got)
    }
}

impl Session {
    pub(crate) async fn say(&self, message: v1::agent_message::Message) {
        self.to
            .send(v1::AgentMessage {
                message: Some(message),
            })
            .await
            .unwrap();
    }

    pub(crate) async fn greet(&self, hello: v1::Hello, observed: &[ObservedMember]) {
        self.greet_with(hello, observed, &[]).await;
    }

    async fn greet_with(
        &self,
        hello: v1::Hello,
        observed: &[ObservedMember],
        bundles: &[ObservedBundle],
    ) {
        self.say(v1::agent_message::Message::Hello(hello)).await;
        for page in observed_pages(observed) {
            self.say(v1::agent_message::Message::ObservedPage(page))
                .await;
        }
        for page in pages(bundles) {
            self.say(v1::agent_message::Message::ObservedBundlePage(page))
                .await;
        }
    }

    pub(crate) async fn desired_bundle(&mut self) -> v1::DesiredBundle {
        match self.next().await {
            v1::coordinator_message::Message::DesiredBundle(bundle) => bundle,
            other => panic!("expected a desired bundle, got {other:?}"),
        }
    }

    pub(crate) async fn report_bundle(&self, bundle: &ObservedBundle) {
        self.say(v1::agent_message::Message::ObservedBundle(bundle.into()))
            .await;
    }

    pub(crate) async fn next(&mut self) -> v1::coordinator_message::Message {
        let message = soon("a message to the agent", self.from.message())
            .await
            .unwrap();
        message.expect("the session ended").message.unwrap()
    }

    /// The refusal that ends the session.
    pub(crate) async fn end(&mut self) -> Refusal {
        loop {
            match soon("the end of the session", self.from.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the session ended without a reason"),
                Err(status) => return from_status(&status),
            }
        }
    }

    pub(crate) async fn desired(&mut self) -> v1::DesiredMember {
        match self.next().await {
            v1::coordinator_message::Message::Desired(member) => member,
            other => panic!("expected a desired member, got {other:?}"),
        }
    }

    pub(crate) async fn report(&self, attempt: AttemptRef, phase: ObservedPhase) {
        let member = ObservedMember {
            attempt,
            node_rank: 0,
            phase,
        };
        self.say(v1::agent_message::Message::Observed((&member).into()))
            .await;
    }
}

pub(crate) fn attempt_of(member: &v1::DesiredMember) -> AttemptRef {
    member.attempt.unwrap().try_into().unwrap()
}

pub(crate) fn ended(code: u8) -> Ending {
    let cause = if code == 0 {
        EndCause::Completed
    } else {
        EndCause::RankFailed
    };
    Ending {
        cause,
        message: String::new(),
        started: true,
        ranks: vec![RankEnd {
            rank: 0,
            exit: ExitStatus::Code(code),
            at: Timestamp(2),
            unprompted: true,
            oom_killed: false,
        }],
        ended_at: Timestamp(3),
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}

/// Every RPC of the proto files, as paths.
pub(crate) fn every_rpc() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(trainyard_proto::DESCRIPTORS).unwrap();
    let mut paths = Vec::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                paths.push(format!(
                    "/{}.{}/{}",
                    file.package(),
                    service.name(),
                    method.name()
                ));
            }
        }
    }
    paths
}
