//! Putting a coordinator together, and taking it apart in an order that loses nothing that was answered.
//!
//! Start: lock, state, lead, authority, files, driver, local admin, port, presence. End: no new calls, streams end, the
//! driver carries out what it took in, presence goes, the lock goes.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{ClusterId, NodeId, Sequence, Term, UserName};
use trainyard_common::record::{Role, Target};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::Config as CoreConfig;
use trainyard_coordinator_core::effect::Answer;
use trainyard_coordinator_core::event::Event;
use trainyard_transport::connections::Connections;
use trainyard_transport::credentials::{Credentials, CredentialsError};
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::files;
use trainyard_transport::identity::Identity;
use trainyard_transport::pki::{KeyPairPem, PkiError};
use trainyard_transport::restart::Restart;
use trainyard_transport::server::{ServerLimits, ServerTls, incoming};

use crate::auth::{Activity, AuthLayer, Gate};
use crate::authority::{self, AuthorityError, Certificates};
use crate::backup::{self, BackupError};
use crate::blobs::BlobStore;
use crate::config::{Config, ConfigError};
use crate::disk::DiskGuard;
use crate::driver::{self, Driver, FatalError, Parts};
use crate::grpc::{FailureLimit, FaultLines, MAX_FOLLOWERS, Shared};
use crate::logs::LogStore;
use crate::presence::{self, Presence};
use crate::read_model::ReadModel;
use crate::server;
use crate::store::{self, Loaded, SqliteStore, StateLock, Store, StoreError};
use trainyard_transport::clock::Clock;
use trainyard_transport::task::{AbortOnDrop, blocking, spawn};

/// How often the coordinator's own certificate, which lives for a year, is issued anew while it runs.
const RENEWAL: Duration = Duration::from_secs(30 * 86_400);
/// How long open calls get to end; hyper may wait for ever for a peer that says nothing.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the driver gets for what it took in: some commits on a slow disk.
const DRIVER_DRAIN: Duration = Duration::from_secs(10);

/// Why a coordinator did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are no certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A state of an earlier version could not be backed up before its migration.
    #[error("the state is of an earlier version and could not be backed up before its migration")]
    Backup(#[from] BackupError),
    /// The port cannot be opened.
    #[error("cannot listen at {listen} (is another coordinator running there?)")]
    Listen {
        /// Where.
        listen: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A directory or file of the state directory cannot be used.
    #[error("cannot use {}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server's certificate cannot be used: an own bug.
    #[error("cannot set up TLS")]
    Tls(#[source] PkiError),
    /// The local admin could not be put on record.
    #[error("cannot put the local admin on record: {0}")]
    Admin(Refusal),
}

/// Why a local node was not added.
#[derive(Debug, thiserror::Error)]
pub enum LocalNodeError {
    /// The core refused it.
    #[error("{0}")]
    Refused(Refusal),
    /// Its credentials could not be made.
    #[error("cannot make the credentials of a local node")]
    Pki(#[source] PkiError),
    /// Its credentials could not be written.
    #[error("cannot write the credentials of a local node")]
    Credentials(#[source] CredentialsError),
}

/// A running coordinator. Dropping it ends it at once, as a crash would; [`shutdown`](Self::shutdown) is the orderly way.
pub struct Coordinator {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    local_endpoints: Vec<Endpoint>,
    data_dir: PathBuf,
    admin_dir: PathBuf,
    admin: UserName,
    idle_exit: Option<Duration>,
    activity: Arc<Activity>,
    driver: AbortOnDrop<Result<(), FatalError>>,
    server: AbortOnDrop<Result<(), FatalError>>,
    stop_driver: CancellationToken,
    _renewal: AbortOnDrop<()>,
    ended: bool,
    _lock: StateLock,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator")
            .field("cluster", &self.shared.cluster)
            .field("local_addr", &self.local_addr)
            .finish_non_exhaustive()
    }
}

/// The state directory, opened and led.
struct Opened {
    lock: StateLock,
    store: Arc<dyn Store>,
    term: Term,
    loaded: Loaded,
    certificates: Certificates,
    logs: LogStore,
    blobs: BlobStore,
}

/// Starts a coordinator on the state directory of `config`. It answers when this returns.
///
/// # Errors
/// Whatever is wrong with the configuration, the state or the port; nothing runs then.
pub async fn start(config: Config) -> Result<Coordinator, StartError> {
    config.validate()?;
    let clock = Clock::start();
    let opened = {
        let (data_dir, accept) = (config.data_dir.clone(), config.accept_loss);
        let retention = CoreConfig::default().request_id_retention;
        blocking(move || open(&data_dir, accept, clock.now(), retention)).await?
    };
    let listen = config.listen;
    let listener = TcpListener::bind(listen)
        .await
        .map_err(|source| StartError::Listen { listen, source })?;
    let local_addr = listener
        .local_addr()
        .map_err(|source| StartError::Listen { listen, source })?;
    // Boxed, so that whoever awaits a start does not carry what is on its way.
    Box::pin(assemble(config, clock, opened, listener, local_addr)).await
}

fn open(
    data_dir: &Path,
    accept: bool,
    now: Timestamp,
    retention: Duration,
) -> Result<Opened, StartError> {
    files::create_private_dir(data_dir).map_err(file_error(data_dir))?;
    let lock = StateLock::acquire(data_dir, now)?;
    backup::before_migration(data_dir, now)?;
    let since = Timestamp(now.0.saturating_sub(retention.as_millis() as u64));
    let (store, term, loaded) = match open_state(data_dir, now, since) {
        Err(error) if accept && error.is_damage() => {
            give_up(data_dir, &error, now)?;
            open_state(data_dir, now, since)?
        }
        other => other?,
    };
    let new = loaded.sequence == Sequence(0);
    let certificates = Certificates::open(data_dir, store.cluster(), new, now)?;
    store.pin_authority(certificates.digest())?;
    let logs_dir = data_dir.join("logs");
    let logs = LogStore::open(logs_dir.clone()).map_err(file_error(&logs_dir))?;
    let blobs_dir = data_dir.join("blobs");
    let blobs = BlobStore::open(blobs_dir.clone()).map_err(file_error(&blobs_dir))?;
    Ok(Opened {
        lock,
        store,
        term,
        loaded,
        certificates,
        logs,
        blobs,
    })
}

/// Nothing is written before everything that a start needs was read and found whole.
fn open_state(
    data_dir: &Path,
    now: Timestamp,
    since: Timestamp,
) -> Result<(Arc<dyn Store>, Term, Loaded), StoreError> {
    let open = || -> Result<_, StoreError> {
        let store = SqliteStore::open(data_dir, &authority::directory(data_dir), now)?;
        let loaded = store.load(now, since)?;
        let term = store.lead()?;
        Ok((Arc::new(store) as Arc<dyn Store>, term, loaded))
    };
    open().map_err(|error| store::explain(data_dir, error))
}

/// Gives up what is damaged, because the operator has said so, and says what that is.
fn give_up(data_dir: &Path, error: &StoreError, now: Timestamp) -> Result<(), StoreError> {
    let accepted = store::accept_loss(data_dir, error, now)?;
    // Errors, so that they are seen and kept whatever is left out of the log otherwise.
    for told in &accepted.told {
        tracing::error!(accepted = told, "a loss was accepted");
    }
    tracing::error!(
        kept = %accepted.kept.display(),
        "the damaged files are kept; nothing is placed until the nodes have said what they run"
    );
    Ok(())
}

fn file_error<E: std::error::Error + Send + Sync + 'static>(
    path: &Path,
) -> impl FnOnce(E) -> StartError {
    let path = path.to_owned();
    move |source| StartError::File {
        path,
        source: Box::new(source),
    }
}

fn core_config(config: &Config) -> CoreConfig {
    let timing = config.timing;
    CoreConfig {
        unreachable_after: timing.unreachable_after,
        lost_after: timing.lost_after,
        lost_after_gang: timing.lost_after_gang,
        lease_margin: timing.lease_margin,
        prepare_timeout: timing.prepare_timeout,
        crash_pause: timing.crash_pause,
        ..CoreConfig::default()
    }
}

async fn assemble(
    config: Config,
    clock: Clock,
    opened: Opened,
    listener: TcpListener,
    local_addr: SocketAddr,
) -> Result<Coordinator, StartError> {
    let Opened {
        lock,
        store,
        term,
        loaded,
        certificates,
        logs,
        blobs,
    } = opened;
    let cluster = store.cluster();
    let endpoints = if config.advertise.is_empty() {
        presence::reachable(local_addr)
    } else {
        config.advertise.clone()
    };
    let local_endpoints = presence::reachable_here(local_addr, &endpoints);
    let names = server_names(&local_endpoints);
    let certificate = certificates.server(&names, clock.now())?;
    let tls = ServerTls::new(certificates.ca_pem(), &certificate).map_err(StartError::Tls)?;

    let read = Arc::new(ReadModel::new(&loaded));
    let stop_driver = CancellationToken::new();
    let (driver, driver_task) = driver::start(Parts {
        store: store.clone(),
        term,
        loaded,
        read: read.clone(),
        clock,
        core: core_config(&config),
        stop: stop_driver.clone(),
    });
    let admin = local_admin(&config);
    let admin_dir = config.data_dir.join("admin");
    add_admin(&driver, &read, &admin).await?;
    certificates.write_admin(&admin_dir, &admin, &local_endpoints, clock.now())?;

    let activity = Activity::new(clock);
    let connections = Connections::new();
    let shared = Arc::new(Shared {
        driver,
        read: read.clone(),
        store,
        logs: Arc::new(logs),
        blobs: Arc::new(blobs),
        certificates,
        connections: connections.clone(),
        cluster,
        term,
        endpoints,
        timing: config.timing,
        disk: DiskGuard::new(&config.data_dir),
        stop: CancellationToken::new(),
        followers: Arc::new(Semaphore::new(MAX_FOLLOWERS)),
        failures: FailureLimit::default(),
        restart: restart_at(&config, local_addr),
        faults: FaultLines::default(),
    });
    let gate = AuthLayer::new(Gate::new(read, clock, activity.clone()));
    let renewal = AbortOnDrop(spawn("renewal", renew(shared.clone(), tls.clone(), names)));
    let accepted = incoming(listener, tls, ServerLimits::default(), connections);
    let server = server::start(shared.clone(), gate, accepted, shared.stop.clone());

    let presence = Presence {
        pid: std::process::id(),
        endpoints: local_endpoints.clone(),
        started_at: clock.now(),
        cluster,
        admin_credentials: admin_dir.clone(),
    };
    presence
        .write(&config.data_dir)
        .map_err(file_error(&config.data_dir.join(presence::FILE_NAME)))?;
    tracing::info!(%cluster, %term, listen = %local_addr, data_dir = %config.data_dir.display(), "coordinator leads");
    Ok(Coordinator {
        shared,
        local_addr,
        local_endpoints,
        data_dir: config.data_dir,
        admin_dir,
        admin,
        idle_exit: config.idle_exit,
        activity,
        driver: driver_task,
        server,
        stop_driver,
        _renewal: renewal,
        ended: false,
        _lock: lock,
    })
}

/// Who starts it again. At a free port that was found it must listen again: agents and users look for it there.
fn restart_at(config: &Config, local_addr: SocketAddr) -> Restart {
    match config.restart.clone() {
        Restart::Helper(mut command) if config.listen.port() == 0 => {
            command.extend(["--listen".into(), local_addr.to_string().into()]);
            Restart::Helper(command)
        }
        other => other,
    }
}

fn server_names(endpoints: &[Endpoint]) -> Vec<String> {
    let mut names: Vec<String> = endpoints
        .iter()
        .map(|endpoint| endpoint.host().to_owned())
        .collect();
    names.push("localhost".to_owned());
    names.push("127.0.0.1".to_owned());
    names.extend(presence::hostname());
    names.sort_unstable();
    names.dedup();
    names
}

/// Issues the coordinator's own certificate anew from time to time. Open connections live on.
async fn renew(shared: Arc<Shared>, tls: ServerTls, names: Vec<String>) {
    loop {
        tokio::time::sleep(RENEWAL).await;
        let issued = shared.certificates.server(&names, shared.driver.now());
        let replaced = issued.map(|certificate| tls.replace(&certificate));
        match replaced {
            Ok(Ok(())) => tracing::info!("own certificate renewed"),
            // There are eleven more tries before the old one ends.
            Ok(Err(error)) => tracing::error!(%error, "own certificate could not be replaced"),
            Err(error) => tracing::error!(%error, "own certificate could not be issued"),
        }
    }
}

/// The configured local admin, else the user of this process, else `admin`.
fn local_admin(config: &Config) -> UserName {
    let of_process = || {
        std::env::var("USER")
            .ok()
            .and_then(|name| name.parse().ok())
    };
    config
        .admin
        .clone()
        .or_else(of_process)
        .unwrap_or_else(|| "admin".parse().expect("`admin` is a valid user name"))
}

async fn add_admin(driver: &Driver, read: &ReadModel, name: &UserName) -> Result<(), StartError> {
    let known = read
        .tables()
        .users
        .get(name)
        .is_some_and(|user| user.role == Role::Admin);
    if known {
        return Ok(());
    }
    let name = name.clone();
    let added = driver.request(|key| Event::LocalUserAdded {
        key,
        name,
        role: Role::Admin,
    });
    added.await.map(drop).map_err(StartError::Admin)
}

impl Coordinator {
    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where it can be reached from this machine, in the order to try.
    #[must_use]
    pub fn local_endpoints(&self) -> &[Endpoint] {
        &self.local_endpoints
    }

    /// Its cluster.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.shared.cluster
    }

    /// Its leadership counter.
    #[must_use]
    pub fn term(&self) -> Term {
        self.shared.term
    }

    /// The directory with the local admin's credentials, in the form of `trainyard_transport::credentials`.
    #[must_use]
    pub fn admin_credentials(&self) -> &Path {
        &self.admin_dir
    }

    /// Puts a node of this machine on record (the same one again for the same name) and writes credentials for its
    /// agent to `dir`: what an embedded agent does instead of enrolling with a token.
    ///
    /// # Errors
    /// If the core refuses, or the credentials cannot be made or written.
    pub async fn add_local_node(&self, name: &str, dir: &Path) -> Result<NodeId, LocalNodeError> {
        let (name, owner) = (name.to_owned(), self.admin.clone());
        let target = Target::Local;
        let answer = self
            .shared
            .driver
            .request(|key| Event::LocalNodeAdded {
                key,
                name,
                target,
                owner,
            })
            .await
            .map_err(LocalNodeError::Refused)?;
        let Answer::NodeEnrolled(node) = answer else {
            let message = "the core gave an answer that it should not give";
            let refusal = Refusal::new(ErrorCode::Internal, "UNEXPECTED_ANSWER", message);
            return Err(LocalNodeError::Refused(refusal));
        };
        let key = KeyPairPem::generate().map_err(LocalNodeError::Pki)?;
        let request = key.csr().map_err(LocalNodeError::Pki)?;
        let certificates = &self.shared.certificates;
        let issued = certificates
            .issue(&request, &Identity::Node(node.id), self.shared.driver.now())
            .map_err(LocalNodeError::Refused)?;
        let ca = certificates.ca_pem().to_owned();
        let endpoints = self.local_endpoints.clone();
        Credentials::new(self.cluster(), endpoints, ca, issued.pem, key)
            .map_err(LocalNodeError::Pki)?
            .save(dir)
            .map_err(LocalNodeError::Credentials)?;
        Ok(node.id)
    }

    /// Waits until it has to end: `Ok` when it was idle for as long as configured, an error when it cannot go on. The
    /// caller ends it then with [`shutdown`](Self::shutdown) or by dropping it.
    ///
    /// # Errors
    /// [`FatalError`]; running jobs are not affected, and the next start goes on from what is durable.
    pub async fn finished(&mut self) -> Result<(), FatalError> {
        if self.ended {
            return Ok(());
        }
        let idle = wait_idle(
            self.shared.read.clone(),
            self.activity.clone(),
            self.idle_exit,
        );
        let (driver, server) = (&mut self.driver.0, &mut self.server.0);
        let outcome = tokio::select! {
            biased;
            // Cancel-safe: a join handle can be asked again unless it was ready, and then `ended` is set.
            ended = driver => ended.unwrap_or(Err(FatalError::Panicked { task: "driver" })),
            ended = server => ended.unwrap_or(Err(FatalError::Panicked { task: "server" })),
            // Cancel-safe: it only looks.
            () = idle => return Ok(()),
        };
        self.ended = true;
        // Nobody may be left waiting for a driver that is gone.
        self.shared.stop.cancel();
        if let Err(error) = &outcome {
            tracing::error!(
                error = error as &dyn std::error::Error,
                "coordinator cannot go on"
            );
        }
        outcome
    }

    /// Ends it in order: no new calls, streams are told, what was taken in is carried out and answered.
    pub async fn shutdown(mut self) {
        self.shared.stop.cancel();
        if !self.ended {
            // A second look is not needed: whatever the result, the end is the same.
            let _ = timeout(DRAIN, &mut self.server.0).await;
            self.stop_driver.cancel();
            match timeout(DRIVER_DRAIN, &mut self.driver.0).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the driver failed at the end"
                    );
                }
                Ok(Err(_)) => tracing::error!("the driver panicked at the end"),
                Err(_) => tracing::warn!("the driver did not end in time"),
            }
        }
        Presence::remove(&self.data_dir);
        tracing::info!(cluster = %self.shared.cluster, "coordinator ended");
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.stop_driver.cancel();
        self.shared.connections.close_where(|_| true);
    }
}

/// Ends when there was no live job and no request of a user for this long; never if it is not configured.
async fn wait_idle(read: Arc<ReadModel>, activity: Arc<Activity>, after: Option<Duration>) {
    let Some(after) = after else {
        return std::future::pending().await;
    };
    let mut changes = read.watch();
    let mut since_job = tokio::time::Instant::now();
    loop {
        changes.borrow_and_update();
        let busy = !read.tables().jobs.is_empty();
        if busy {
            since_job = tokio::time::Instant::now();
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
            continue;
        }
        let idle = activity.idle().min(since_job.elapsed());
        if idle >= after {
            return;
        }
        // Cancel-safe: nothing is taken; a timeout only means to look again.
        let _ = timeout(after - idle, changes.changed()).await;
    }
}
