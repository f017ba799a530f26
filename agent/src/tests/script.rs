//! The scripted coordinator, and what an agent needs to find it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use trainyard_common::bundle::{DesiredBundle, ObservedBundle};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{AttemptRef, ClusterId, Digest, NodeId, TokenId};
use trainyard_common::logrecord::LogRecord;
use trainyard_common::member::{
    DesiredMember, DesiredPhase, Go, MemberSpec, ObservedMember, ObservedPhase, Stop,
};
use trainyard_common::resources::Resources;
use trainyard_common::spec::Launcher;
use trainyard_common::state::ReasonCode;
use trainyard_common::time::{Timestamp, millis};
use trainyard_proto::convert::pages::{Assembler, desired_pages, pages};
use trainyard_proto::status::to_status;
use trainyard_proto::v1::agent_message::Message as Theirs;
use trainyard_proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use trainyard_proto::v1::blob_service_server::{BlobService, BlobServiceServer};
use trainyard_proto::v1::coordinator_message::Message as Ours;
use trainyard_proto::v1::enroll_service_server::{EnrollService, EnrollServiceServer};
use trainyard_proto::v1::upload_request::Part;
use trainyard_proto::{PROTOCOL_VERSION, convert, v1};
use trainyard_transport::connections::Connections;
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::enrol::enrol;
use trainyard_transport::identity::Identity;
use trainyard_transport::pack::{PackOptions, pack};
use trainyard_transport::pki::{Authority, IssuedCertificate, LEAF_VALIDITY};
use trainyard_transport::server::{ServerLimits, ServerTls, incoming};
use trainyard_transport::token::{JoinToken, Secret, TokenKind};
use trainyard_transport::tree::{Tree, digest_of};

use crate::state::{ATTEMPTS, BUNDLES, CREDENTIALS};
use crate::{Config, Error, ExitReason};
use trainyard_transport::clock::wall_now;
use trainyard_transport::task::{AbortOnDrop, spawn};

/// Far more than anything here takes on a busy machine; reached only when something hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
pub(super) const NODE: NodeId = NodeId(7);
pub(super) const SECRET: [u8; 32] = [9; 32];

pub(super) type Sent<T> = ReceiverStream<Result<T, Status>>;

/// What the scripted coordinator holds, and the sessions that it hands to the test.
#[derive(Clone)]
pub(super) struct Head {
    pub(super) authority: Arc<Authority>,
    pub(super) sessions: mpsc::Sender<Peer>,
    pub(super) blobs: Arc<Mutex<HashMap<Digest, Vec<u8>>>>,
    pub(super) logs: Arc<Mutex<BTreeMap<(AttemptRef, u32), Log>>>,
    /// An attempt that it does not want to know.
    pub(super) unknown: Arc<Mutex<Option<AttemptRef>>>,
    /// How long ago certificates count as issued when a machine enrols.
    pub(super) age: Arc<Mutex<Duration>>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Log {
    pub(super) bytes: Vec<u8>,
    pub(super) end: bool,
}

/// One session, as the coordinator sees it.
pub(super) struct Peer {
    pub(super) from_agent: Streaming<v1::AgentMessage>,
    pub(super) to_agent: mpsc::Sender<Result<v1::CoordinatorMessage, Status>>,
    pub(super) term: u64,
    pub(super) hello: v1::Hello,
    pub(super) observed: Vec<ObservedMember>,
    pub(super) observed_bundles: Vec<ObservedBundle>,
}

#[tonic::async_trait]
impl AgentService for Head {
    type SessionStream = Sent<v1::CoordinatorMessage>;
    type PushLogsStream = Sent<v1::PushLogsResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (to_agent, stream) = mpsc::channel(64);
        let peer = Peer {
            from_agent: request.into_inner(),
            to_agent,
            term: 1,
            hello: v1::Hello::default(),
            observed: Vec::new(),
            observed_bundles: Vec::new(),
        };
        let _ = self.sessions.send(peer).await;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn push_logs(
        &self,
        request: Request<Streaming<v1::PushLogsRequest>>,
    ) -> Result<Response<Self::PushLogsStream>, Status> {
        let (answers, stream) = mpsc::channel(64);
        let head = self.clone();
        let mut requests = request.into_inner();
        drop(spawn("push logs", async move {
            while let Ok(Some(request)) = requests.message().await {
                let answer = head.store(request);
                if answers.send(answer).await.is_err() {
                    return;
                }
            }
        }));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Head {
    pub(super) fn store(
        &self,
        request: v1::PushLogsRequest,
    ) -> Result<v1::PushLogsResponse, Status> {
        let attempt: AttemptRef = request.attempt.unwrap().try_into().unwrap();
        if *self.unknown.lock().unwrap() == Some(attempt) {
            let refusal = Refusal::new(ErrorCode::PermissionDenied, "NOT_PLACED_HERE", "no");
            return Err(to_status(&refusal));
        }
        let mut logs = self.logs.lock().unwrap();
        let log = logs.entry((attempt, request.rank)).or_default();
        let stored = log.bytes.len() as u64;
        if let Some(skip) = stored.checked_sub(request.offset) {
            let new = request.data.get(skip as usize..).unwrap_or_default();
            log.bytes.extend_from_slice(new);
            log.end |= request.end;
        }
        Ok(v1::PushLogsResponse {
            attempt: Some(attempt.into()),
            rank: request.rank,
            stored: log.bytes.len() as u64,
            end: log.end,
        })
    }
}

#[tonic::async_trait]
impl BlobService for Head {
    type DownloadStream = Sent<v1::DownloadResponse>;

    async fn missing(
        &self,
        request: Request<v1::MissingRequest>,
    ) -> Result<Response<v1::MissingResponse>, Status> {
        let blobs = self.blobs.lock().unwrap();
        let mut digests = request.into_inner().digests;
        digests.retain(|bytes| !blobs.contains_key(&Digest::try_from(bytes.as_slice()).unwrap()));
        Ok(Response::new(v1::MissingResponse { digests }))
    }

    async fn upload(
        &self,
        request: Request<Streaming<v1::UploadRequest>>,
    ) -> Result<Response<v1::UploadResponse>, Status> {
        let mut parts = request.into_inner();
        let mut current: Option<(Digest, Vec<u8>)> = None;
        while let Some(part) = parts.message().await? {
            match part.part.unwrap() {
                Part::Header(header) => {
                    self.put(current.take());
                    let digest = Digest::try_from(header.digest.as_slice()).unwrap();
                    current = Some((digest, Vec::new()));
                }
                Part::Data(data) => current.as_mut().unwrap().1.extend(data),
            }
        }
        self.put(current);
        Ok(Response::new(v1::UploadResponse { stored: 1 }))
    }

    async fn download(
        &self,
        request: Request<v1::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let request = request.into_inner();
        let digest = Digest::try_from(request.digest.as_slice()).unwrap();
        let found = self.blobs.lock().unwrap().get(&digest).cloned();
        let bytes = found.ok_or_else(|| {
            to_status(&Refusal::new(
                ErrorCode::NotFound,
                "NO_BLOB",
                "there is no such blob",
            ))
        })?;
        let (sender, stream) = mpsc::channel(1);
        let _ = sender
            .send(Ok(v1::DownloadResponse {
                size: bytes.len() as u64,
                data: bytes[request.offset as usize..].to_vec(),
            }))
            .await;
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Head {
    pub(super) fn put(&self, blob: Option<(Digest, Vec<u8>)>) {
        if let Some((digest, bytes)) = blob {
            assert_eq!(digest, digest_of(&bytes));
            self.blobs.lock().unwrap().insert(digest, bytes);
        }
    }

    /// Keeps a directory as a tree and gives its name.
    pub(super) fn keep(&self, dir: &Path) -> Digest {
        let packed = pack(dir, &PackOptions::output()).unwrap();
        for file in &packed.files {
            self.put(Some((file.digest, std::fs::read(&file.path).unwrap())));
        }
        self.put(Some((packed.tree.id(), packed.tree.encode())));
        packed.tree.id()
    }

    /// The content of a file in a tree that was uploaded.
    pub(super) fn file(&self, tree: Digest, path: &str) -> Vec<u8> {
        let blobs = self.blobs.lock().unwrap();
        let tree = Tree::decode(&blobs[&tree]).unwrap();
        let digest = tree
            .files()
            .find(|(name, _)| *name == path)
            .unwrap()
            .1
            .digest;
        blobs[&digest].clone()
    }

    pub(super) fn output(&self, attempt: AttemptRef) -> (String, bool) {
        let log = self
            .logs
            .lock()
            .unwrap()
            .get(&(attempt, 0))
            .cloned()
            .unwrap_or_default();
        let mut text = String::new();
        let mut rest = &log.bytes[..];
        while let Some((record, length)) = LogRecord::decode(rest).unwrap() {
            text.push_str(&String::from_utf8_lossy(record.data));
            rest = &rest[length..];
        }
        (text, log.end)
    }
}

#[tonic::async_trait]
impl EnrollService for Head {
    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        let request = request.into_inner();
        if request.secret != SECRET || request.token != 3 {
            let refusal = Refusal::new(
                ErrorCode::PermissionDenied,
                "TOKEN",
                "the token is not valid",
            );
            return Err(to_status(&refusal));
        }
        let age = millis(*self.age.lock().unwrap());
        let issued = self.sign(&request.certificate_request, Timestamp(wall_now().0 - age));
        Ok(Response::new(v1::EnrollResponse {
            certificate: issued.pem,
            ca: self.authority.cert_pem().to_owned(),
            cluster: self.authority.cluster().0.to_vec(),
            not_after: Some(convert::timestamp(issued.not_after)),
            identity: Some(v1::enroll_response::Identity::Node(NODE.0)),
        }))
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewResponse>, Status> {
        let issued = self.sign(&request.into_inner().certificate_request, wall_now());
        Ok(Response::new(v1::RenewResponse {
            certificate: issued.pem,
            ca: self.authority.cert_pem().to_owned(),
            not_after: Some(convert::timestamp(issued.not_after)),
        }))
    }
}

impl Head {
    fn sign(&self, csr: &str, at: Timestamp) -> IssuedCertificate {
        let identity = Identity::Node(NODE);
        let issued = self.authority.sign_csr(csr, &identity, LEAF_VALIDITY, at);
        issued.unwrap()
    }
}

impl Peer {
    /// Reads the agent's greeting.
    pub(super) async fn greet(mut self) -> Self {
        let Theirs::Hello(hello) = self.next().await else {
            panic!("the agent speaks first");
        };
        self.hello = hello;
        let mut observed = Assembler::<ObservedMember>::new();
        loop {
            let Theirs::ObservedPage(page) = self.next().await else {
                panic!("pages follow the hello");
            };
            if let Some(members) = observed.push(page).unwrap() {
                self.observed = members;
                break;
            }
        }
        let mut observed = Assembler::<ObservedBundle>::new();
        loop {
            let Theirs::ObservedBundlePage(page) = self.next().await else {
                panic!("pages of bundles follow those of members");
            };
            if let Some(bundles) = observed.push(page).unwrap() {
                self.observed_bundles = bundles;
                return self;
            }
        }
    }

    /// Answers it.
    pub(super) async fn welcome(&self, heartbeat: Duration, desired: &[DesiredMember]) {
        self.welcome_with(heartbeat, desired, &[]).await;
    }

    /// Answers it, wanting bundles too.
    pub(super) async fn welcome_with(
        &self,
        heartbeat: Duration,
        desired: &[DesiredMember],
        bundles: &[DesiredBundle],
    ) {
        self.say(Ours::Welcome(v1::Welcome {
            protocol_version: PROTOCOL_VERSION,
            capabilities: Vec::new(),
            cluster: vec![5; 16],
            node: NODE.0,
            heartbeat_interval: Some(convert::duration(heartbeat)),
            lease: Some(convert::duration(heartbeat * 6)),
            now: None,
        }))
        .await;
        for page in desired_pages(desired) {
            self.say(Ours::DesiredPage(page)).await;
        }
        for page in pages(bundles) {
            self.say(Ours::DesiredBundlePage(page)).await;
        }
    }

    pub(super) async fn desire(&self, member: &DesiredMember) {
        self.say(Ours::Desired(member.into())).await;
    }

    pub(super) async fn say(&self, message: Ours) {
        let message = v1::CoordinatorMessage {
            term: self.term,
            message: Some(message),
        };
        let _ = self.to_agent.send(Ok(message)).await;
    }

    pub(super) async fn next(&mut self) -> Theirs {
        let message = timeout(PATIENCE, self.from_agent.message())
            .await
            .expect("a message");
        message
            .unwrap()
            .expect("the session goes on")
            .message
            .unwrap()
    }

    /// The next report; heartbeats are answered meanwhile.
    pub(super) async fn report(&mut self) -> ObservedMember {
        loop {
            match self.next().await {
                Theirs::Observed(member) => return member.try_into().unwrap(),
                Theirs::Heartbeat(v1::Heartbeat { sequence }) => {
                    self.say(Ours::HeartbeatAck(v1::HeartbeatAck { sequence }))
                        .await;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next report about a bundle; heartbeats are answered meanwhile.
    pub(super) async fn bundle_report(&mut self) -> ObservedBundle {
        loop {
            match self.next().await {
                Theirs::ObservedBundle(bundle) => return bundle.try_into().unwrap(),
                Theirs::Heartbeat(v1::Heartbeat { sequence }) => {
                    self.say(Ours::HeartbeatAck(v1::HeartbeatAck { sequence }))
                        .await;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reports until one is as wanted; gives all of them.
    pub(super) async fn until(
        &mut self,
        wanted: impl Fn(&ObservedPhase) -> bool,
    ) -> Vec<ObservedPhase> {
        let mut phases = Vec::new();
        loop {
            let phase = self.report().await.phase;
            phases.push(phase);
            if phases.last().is_some_and(&wanted) {
                return phases;
            }
        }
    }

    /// Answers heartbeats until the agent says goodbye or breaks off.
    pub(super) async fn goodbye(mut self) -> bool {
        while let Ok(Some(message)) = self.from_agent.message().await {
            if let Some(Theirs::GoingAway(_)) = message.message {
                return true;
            }
        }
        false
    }
}

/// A coordinator that is scripted, and what an agent needs to find it.
pub(super) struct World {
    pub(super) head: Head,
    pub(super) sessions: mpsc::Receiver<Peer>,
    pub(super) scratch: TempDir,
    pub(super) token: JoinToken,
    pub(super) connections: Connections,
    pub(super) _server: AbortOnDrop<()>,
}

impl World {
    pub(super) async fn new() -> Self {
        let authority = Arc::new(Authority::create(ClusterId([5; 16]), wall_now()).unwrap());
        let cert = authority
            .issue_server(&[], LEAF_VALIDITY, wall_now())
            .unwrap();
        let tls = ServerTls::new(authority.cert_pem(), &cert).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint: Endpoint = listener.local_addr().unwrap().to_string().parse().unwrap();
        let (sender, sessions) = mpsc::channel(16);
        let head = Head {
            authority: authority.clone(),
            sessions: sender,
            blobs: Arc::default(),
            logs: Arc::default(),
            unknown: Arc::default(),
            age: Arc::default(),
        };
        let connections = Connections::new();
        let incoming = incoming(listener, tls, ServerLimits::default(), connections.clone());
        let server = tonic::transport::Server::builder()
            .add_service(AgentServiceServer::new(head.clone()))
            .add_service(BlobServiceServer::new(head.clone()))
            .add_service(EnrollServiceServer::new(head.clone()));
        let server = spawn("server", async move {
            server.serve_with_incoming(incoming).await.unwrap();
        });
        let token = JoinToken {
            endpoints: vec![endpoint],
            ca_hash: authority.hash(),
            cluster: authority.cluster(),
            kind: TokenKind::Node,
            id: TokenId(3),
            secret: Secret::from_bytes(SECRET),
            reusable: false,
        };
        Self {
            head,
            sessions,
            scratch: tempfile::tempdir().unwrap(),
            token,
            connections,
            _server: AbortOnDrop(server),
        }
    }

    /// With a machine that has joined.
    pub(super) async fn joined() -> Self {
        let world = Self::new().await;
        world.join().await;
        world
    }

    pub(super) async fn join(&self) {
        let credentials = enrol(&self.token, "gpu-1").await.unwrap();
        assert_eq!(credentials.identity, Identity::Node(NODE));
        credentials.save(&self.dir().join(CREDENTIALS)).unwrap();
        // As if it had run before, in the form of before: what the first session names is new to it.
        for place in [ATTEMPTS, BUNDLES] {
            std::fs::create_dir_all(self.dir().join(place)).unwrap();
        }
        let state = "{\"incarnation\":0,\"term\":0}";
        std::fs::write(self.dir().join("agent.json"), state).unwrap();
    }

    pub(super) fn dir(&self) -> PathBuf {
        self.scratch.path().join("agent")
    }

    pub(super) fn config(&self) -> Config {
        let mut config = Config::new(self.dir()).unwrap();
        config.embedded = true;
        // The same test program, called so that it is a shim; see the runtime's own tests.
        let shim = [
            "--exact",
            "runtime::tests::shim_entry",
            "--nocapture",
            "--test-threads=1",
        ];
        config.shim_command = std::iter::once(std::env::current_exe().unwrap().into())
            .chain(shim.map(OsString::from))
            .collect();
        config
    }

    pub(super) fn start(&self) -> Agent {
        self.start_with(self.config())
    }

    pub(super) fn start_with(&self, config: Config) -> Agent {
        let (stop, stopped) = oneshot::channel::<()>();
        let task = spawn(
            "agent",
            crate::run(config, async move { drop(stopped.await) }),
        );
        Agent { stop, task }
    }

    pub(super) async fn session(&mut self) -> Peer {
        let peer = timeout(PATIENCE, self.sessions.recv())
            .await
            .expect("a session")
            .unwrap();
        peer.greet().await
    }
}

pub(super) struct Agent {
    pub(super) stop: oneshot::Sender<()>,
    pub(super) task: tokio::task::JoinHandle<Result<ExitReason, Error>>,
}

impl Agent {
    pub(super) async fn stop(self) {
        drop(self.stop);
        let ended = timeout(PATIENCE, self.task).await.expect("the agent ends");
        assert_eq!(ended.unwrap().unwrap(), ExitReason::Shutdown);
    }
}

pub(super) fn member(id: &str, script: &str) -> DesiredMember {
    DesiredMember {
        attempt: id.parse().unwrap(),
        phase: DesiredPhase::Prepare,
        spec: MemberSpec {
            job_name: "train".to_owned(),
            owner: "ann".parse().unwrap(),
            workspace: "default".parse().unwrap(),
            node_rank: 0,
            nodes: 1,
            procs_per_node: 1,
            resources: Resources {
                cpu_milli: 100,
                memory_bytes: 1 << 20,
                gpus: 0,
            },
            gpu_uuids: Vec::new(),
            launcher: Launcher::None,
            command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            env: BTreeMap::new(),
            snapshot: None,
            resume_from: Vec::new(),
            time_limit: None,
            grace: Duration::from_secs(10),
            lease: None,
        },
    }
}

pub(super) fn with(member: &DesiredMember, phase: DesiredPhase) -> DesiredMember {
    DesiredMember {
        phase,
        ..member.clone()
    }
}

pub(super) fn run(port: u16) -> DesiredPhase {
    DesiredPhase::Run(Go {
        master_addr: "127.0.0.1".to_owned(),
        master_port: port,
        node_addrs: vec!["127.0.0.1".to_owned()],
    })
}

pub(super) fn stop() -> DesiredPhase {
    DesiredPhase::Stop(Stop {
        code: ReasonCode::CancelRequested,
        grace: Duration::from_secs(10),
    })
}

pub(super) fn is_ready(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Ready { .. })
}

pub(super) fn is_running(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Running { .. })
}

pub(super) fn is_ended(phase: &ObservedPhase) -> bool {
    matches!(phase, ObservedPhase::Ended(_))
}

/// Waits for something that is told to nobody.
pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("waited for {what}"));
}

/// A heartbeat that no test waits for.
pub(super) const CALM: Duration = Duration::from_secs(30);
