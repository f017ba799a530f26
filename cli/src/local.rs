//! A cluster on this machine: a coordinator and agents as processes of this user, in one directory.

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use trainyard_common::ids::{Incarnation, JobId, NodeId, is_name};
use trainyard_common::limits::DEFAULT_TOKEN_TTL;
use trainyard_common::record::{Target, TokenGrant};
use trainyard_common::state::NodeAvailability;
use trainyard_proto::v1;
use trainyard_transport::credentials::Credentials;
use trainyard_transport::endpoint::{DEFAULT_PORT, Endpoint};
use trainyard_transport::identity::Identity;
use trainyard_transport::{enrol, files};

use crate::connection::{self, Connection};
use crate::context::{Context, LOCAL};
use crate::failure::{EXIT_INTERNAL, EXIT_IO, EXIT_REFUSED, EXIT_UNAVAILABLE, Failure};
use crate::follow;
use crate::jobs::{self, POLL};
use crate::nodes::NodeDetail;
use crate::output;
use crate::processes::{self, Process};
use crate::tokens;

/// How long a coordinator or an agent may take to come up. A large state is read in a second.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long cancelled jobs may take to end, beyond their own grace.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(90);

/// Agents of one cluster on this machine, as `yard up --nodes` takes them.
pub(crate) const MAX_AGENTS: u32 = 64;
/// Where an agent keeps its credentials, in its directory.
const CREDENTIALS: &str = "credentials";

/// The NVML stand-in, compiled from `tests/fake-nvml` when this binary was built.
const FAKE_NVML: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libnvidia-ml.so.1"));

/// What the cluster is to be.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    /// Agents; none means those that the cluster had, or one.
    pub(crate) nodes: Option<u32>,
    /// The unprivileged user that jobs run as, if not this one.
    pub(crate) run_as: Option<String>,
    /// Where to listen; by default on loopback, at the usual port if it is free.
    pub(crate) listen: Option<SocketAddr>,
    /// Endpoints for tokens, if not found out.
    pub(crate) advertise: Vec<String>,
    /// CPUs of each node, as written.
    pub(crate) cpus: Option<String>,
    /// Memory of each node, as written.
    pub(crate) memory: Option<String>,
    /// GPUs that are not there.
    pub(crate) fake_gpus: Option<String>,
    /// Leave after so long without anything to do.
    pub(crate) idle_exit: Option<Duration>,
}

/// A directory with a cluster in it, running or not.
#[derive(Debug, Clone)]
pub(crate) struct LocalCluster {
    dir: PathBuf,
}

/// What a running coordinator says of itself.
#[derive(Debug, Clone, Deserialize)]
struct Running {
    pid: i32,
    endpoints: Vec<Endpoint>,
}

/// The processes that were started, and where.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Processes {
    coordinator: Option<Process>,
    agents: Vec<Process>,
    listen: Option<SocketAddr>,
    /// It leaves by itself when idle.
    #[serde(default)]
    leaves: bool,
}

/// What a start came to.
#[derive(Debug)]
pub(crate) struct Started {
    /// How to speak to the cluster.
    pub(crate) context: Context,
    /// Processes that had to be started.
    pub(crate) processes: usize,
    /// Agents that run.
    pub(crate) nodes: usize,
    /// Agents that ran already, and so keep what they were started with.
    pub(crate) kept: usize,
}

/// An agent that was started and has not been heard of.
#[derive(Debug)]
struct Coming {
    place: u32,
    child: Child,
    node: NodeId,
    /// Its start counter before.
    before: Incarnation,
}

impl LocalCluster {
    /// The cluster in `dir`.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Where its coordinator keeps its state.
    pub(crate) fn coordinator_dir(&self) -> PathBuf {
        self.dir.join("coordinator")
    }

    fn node_dir(&self, place: u32) -> PathBuf {
        self.dir.join("nodes").join(place.to_string())
    }

    fn running(&self) -> Option<Running> {
        let text = fs::read(self.coordinator_dir().join("coordinator.json")).ok()?;
        let running: Running = serde_json::from_slice(&text).ok()?;
        processes::is_alive(running.pid).then_some(running)
    }

    /// Whether there is a cluster here, running or not.
    pub(crate) fn exists(&self) -> bool {
        self.coordinator_dir().join("cluster-id").exists()
    }

    /// How to speak to it, if it runs.
    pub(crate) fn context(&self) -> Result<Option<Context>, Failure> {
        let Some(running) = self.running() else {
            return Ok(None);
        };
        let credentials = Credentials::load(&self.coordinator_dir().join("admin"))
            .map_err(|error| Failure::chain(EXIT_IO, "CREDENTIALS", &error))?;
        Ok(Some(Context {
            name: LOCAL.to_owned(),
            credentials,
            endpoints: running.endpoints,
        }))
    }

    /// Brings the cluster to what the plan says: what runs already is left alone.
    pub(crate) async fn start(&self, plan: &Plan) -> Result<Started, Failure> {
        files::create_private_dir(&self.dir)
            .map_err(|error| Failure::path("make", &self.dir, &error))?;
        let _guard = self.lock()?;
        let mut processes = self.processes();
        processes.agents.retain(Process::lives);
        if processes.leaves && plan.idle_exit.is_none() {
            // One that leaves by itself becomes one that stays. Its members live on meanwhile.
            self.end_processes(&processes).await?;
            processes.agents.clear();
        }
        let coordinator = self.running().is_none();
        if coordinator {
            self.start_coordinator(plan, &mut processes).await?;
        }
        let missing = || {
            Failure::new(
                EXIT_UNAVAILABLE,
                "LEFT",
                "the coordinator left as soon as it had started; look into its log",
            )
        };
        let context = self.context()?.ok_or_else(missing)?;
        let connection = connection::open(&context).await?;
        let known = crate::nodes::all(&connection).await?;
        let wanted = plan.nodes.unwrap_or_else(|| self.known_places().max(1));
        let kept = processes.agents.len();
        let mut coming = Vec::new();
        for place in 0..wanted {
            let role = agent_role(place);
            let stale = self.follow_coordinator(place, &context.endpoints, &known)?;
            if let Some(index) = processes.agents.iter().position(|agent| agent.role == role) {
                if !stale {
                    continue;
                }
                // It looks for the coordinator where that was before, or was removed. Its members live on meanwhile.
                processes.agents.remove(index).stop().await?;
            }
            let (process, child) = self.start_agent(plan, place, wanted, &connection).await?;
            processes.agents.push(process);
            self.save(&processes)?;
            let node = self.node_of(place)?;
            let before = known.iter().find(|detail| detail.node.id == node);
            let before = before.map_or(Incarnation(0), |detail| detail.node.incarnation);
            coming.push(Coming {
                place,
                child,
                node,
                before,
            });
        }
        let started = coming.len() + usize::from(coordinator);
        self.until_ready(&connection, coming).await?;
        Ok(Started {
            context,
            processes: started,
            nodes: processes.agents.len(),
            kept,
        })
    }

    /// How many agents the cluster ever had.
    fn known_places(&self) -> u32 {
        (0..MAX_AGENTS)
            .take_while(|place| self.node_dir(*place).join(CREDENTIALS).is_dir())
            .count() as u32
    }

    /// The node that the agent at this place is.
    fn node_of(&self, place: u32) -> Result<NodeId, Failure> {
        let credentials = Credentials::load(&self.node_dir(place).join(CREDENTIALS))
            .map_err(|error| Failure::chain(EXIT_IO, "CREDENTIALS", &error))?;
        match credentials.identity {
            Identity::Node(node) => Ok(node),
            Identity::User(_) | Identity::Coordinator => {
                let message = format!("the credentials of {} are not a node's", agent_role(place));
                Err(Failure::new(EXIT_INTERNAL, "CREDENTIALS", message))
            }
        }
    }

    async fn start_coordinator(
        &self,
        plan: &Plan,
        processes: &mut Processes,
    ) -> Result<(), Failure> {
        let dir = self.coordinator_dir();
        files::create_private_dir(&dir).map_err(|error| Failure::path("make", &dir, &error))?;
        let listen = plan
            .listen
            .or(processes.listen)
            .unwrap_or_else(usual_or_free);
        let mut arguments: Vec<OsString> = vec![
            "coordinator".into(),
            "run".into(),
            "--state-dir".into(),
            dir.clone().into(),
        ];
        arguments.extend(["--listen".into(), listen.to_string().into()]);
        for endpoint in &plan.advertise {
            arguments.extend(["--advertise".into(), endpoint.into()]);
        }
        if let Some(idle) = plan.idle_exit {
            arguments.extend([
                "--idle-exit".into(),
                format!("{}ms", idle.as_millis()).into(),
            ]);
        }
        let log = self.dir.join("coordinator.log");
        let (process, mut child) = processes::spawn("coordinator", &arguments, &log)?;
        let pid = process.pid;
        processes.coordinator = Some(process.clone());
        processes.leaves = plan.idle_exit.is_some();
        if let Err(failure) = self.save(processes) {
            // Nobody would know of it.
            process.stop().await?;
            return Err(failure);
        }
        let up = || self.running().filter(|running| running.pid == pid);
        until("the coordinator", &log, &mut child, || up().is_some()).await?;
        // The next start listens at the same place, so that agents find it again.
        let port = up().and_then(|running| running.endpoints.first().map(Endpoint::port));
        processes.listen = Some(SocketAddr::new(listen.ip(), port.unwrap_or(listen.port())));
        self.save(processes)
    }

    async fn start_agent(
        &self,
        plan: &Plan,
        place: u32,
        nodes: u32,
        connection: &Connection,
    ) -> Result<(Process, Child), Failure> {
        let dir = self.node_dir(place);
        files::create_private_dir(&dir).map_err(|error| Failure::path("make", &dir, &error))?;
        let credentials = dir.join(CREDENTIALS);
        if !credentials.join("cluster.json").exists() {
            let grant = TokenGrant::Node {
                target: Target::Local,
            };
            let (_, token) = tokens::make(connection, &grant, 1, DEFAULT_TOKEN_TTL).await?;
            let enrolled = enrol::enrol(&token, &node_name(place, nodes))
                .await
                .map_err(|error| tokens::enrol_failure(&error))?;
            enrolled
                .save(&credentials)
                .map_err(|error| Failure::chain(EXIT_IO, "CREDENTIALS", &error))?;
        }
        let (cpus, memory) = share(plan, nodes, &dir);
        let mut arguments: Vec<OsString> = vec!["agent".into(), "run".into(), "--embedded".into()];
        arguments.extend(["--state-dir".into(), dir.clone().into()]);
        arguments.extend([
            "--cpus".into(),
            cpus.into(),
            "--memory".into(),
            memory.into(),
        ]);
        if let Some(spec) = &plan.fake_gpus {
            arguments.extend(["--nvml-library".into(), fake_nvml(&dir, spec)?.into()]);
        }
        if let Some(user) = &plan.run_as {
            arguments.extend(["--run-as".into(), user.into()]);
        }
        if let Some(idle) = plan.idle_exit {
            arguments.extend([
                "--leave-when-orphaned".into(),
                format!("{}ms", idle.as_millis()).into(),
            ]);
        }
        processes::spawn(&agent_role(place), &arguments, &dir.join("agent.log"))
    }

    /// Tells an enrolled node where the coordinator is now, and lets one that was removed enrol again; answers whether its
    /// agent, if it runs, has to start anew.
    fn follow_coordinator(
        &self,
        place: u32,
        endpoints: &[Endpoint],
        known: &[NodeDetail],
    ) -> Result<bool, Failure> {
        let dir = self.node_dir(place).join(CREDENTIALS);
        if !dir.join("cluster.json").exists() {
            return Ok(false);
        }
        let failed = |error| Failure::chain(EXIT_IO, "CREDENTIALS", &error);
        let mut credentials = Credentials::load(&dir).map_err(failed)?;
        if !known
            .iter()
            .any(|detail| Identity::Node(detail.node.id) == credentials.identity)
        {
            fs::remove_dir_all(&dir).map_err(|error| Failure::path("delete", &dir, &error))?;
            return Ok(true);
        }
        if credentials.endpoints == endpoints {
            return Ok(false);
        }
        credentials.endpoints = endpoints.to_vec();
        credentials.save(&dir).map_err(failed)?;
        Ok(true)
    }

    /// Waits until the agents that were started are in session; one that ends meanwhile is a failure with its log.
    async fn until_ready(
        &self,
        connection: &Connection,
        mut coming: Vec<Coming>,
    ) -> Result<(), Failure> {
        let deadline = tokio::time::Instant::now() + START_TIMEOUT;
        while !coming.is_empty() {
            let all = crate::nodes::all(connection).await?;
            let is_there = |agent: &Coming| {
                all.iter().any(|detail| {
                    detail.node.id == agent.node
                        && detail.node.availability == NodeAvailability::Ready
                        && detail.node.incarnation > agent.before
                })
            };
            coming.retain(|agent| !is_there(agent));
            for agent in &mut coming {
                let log = self.node_dir(agent.place).join("agent.log");
                check(&agent_role(agent.place), &log, &mut agent.child)?;
            }
            if !coming.is_empty() && tokio::time::Instant::now() >= deadline {
                let message = format!(
                    "{} of the agents did not come up within {}s; look into {}",
                    coming.len(),
                    START_TIMEOUT.as_secs(),
                    self.dir.display()
                );
                return Err(Failure::new(EXIT_UNAVAILABLE, "START_TIMEOUT", message));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Ends the cluster's processes; answers whether there were any. Jobs that are not over are a refusal, or with
    /// `force` cancelled.
    pub(crate) async fn stop(&self, force: bool) -> Result<bool, Failure> {
        if !self.dir.exists() {
            return Ok(false);
        }
        let _guard = self.lock()?;
        if let Some(context) = self.context()? {
            end_jobs(&connection::open(&context).await?, force).await?;
        }
        let processes = self.processes();
        let any = self.end_processes(&processes).await?;
        self.save(&Processes {
            listen: processes.listen,
            ..Processes::default()
        })?;
        Ok(any)
    }

    /// Agents first, so that they can say goodbye; answers whether there was anything to end.
    async fn end_processes(&self, processes: &Processes) -> Result<bool, Failure> {
        let mut any = false;
        for process in processes
            .agents
            .iter()
            .chain(&processes.coordinator)
            .filter(|process| process.lives())
        {
            process.stop().await?;
            any = true;
        }
        Ok(any)
    }

    /// Deletes everything that the cluster kept. It must not run.
    pub(crate) fn delete(&self) -> Result<(), Failure> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::path("delete", &self.dir, &error))
            }
            _ => Ok(()),
        }
    }

    /// Puts a process on the list in the place of one that it took over from, known by id and start. Without such a one
    /// nothing is changed.
    pub(crate) fn replace(&self, before: (i32, u64), now: Process) -> Result<(), Failure> {
        if !self.processes_file().exists() {
            return Ok(());
        }
        // Not waited for: a command that holds it may wait for just this process. It then starts or ends what it finds.
        let _guard = self.lock_with(nix::fcntl::FlockArg::LockExclusiveNonblock)?;
        let mut processes = self.processes();
        let listed = processes
            .coordinator
            .iter_mut()
            .chain(&mut processes.agents);
        let Some(entry) = listed
            .into_iter()
            .find(|process| (process.pid, process.started) == before)
        else {
            return Ok(());
        };
        let role = std::mem::take(&mut entry.role);
        *entry = Process { role, ..now };
        self.save(&processes)
    }

    fn processes_file(&self) -> PathBuf {
        self.dir.join("processes.json")
    }

    fn processes(&self) -> Processes {
        fs::read(self.processes_file())
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    fn save(&self, processes: &Processes) -> Result<(), Failure> {
        let path = self.processes_file();
        let text = serde_json::to_vec(processes)
            .map_err(|error| Failure::chain(EXIT_INTERNAL, "JSON", &error))?;
        files::write_private(&path, &text).map_err(|error| Failure::path("write", &path, &error))
    }

    /// Only one command starts or stops a cluster at a time; another one waits.
    fn lock(&self) -> Result<nix::fcntl::Flock<fs::File>, Failure> {
        self.lock_with(nix::fcntl::FlockArg::LockExclusive)
    }

    fn lock_with(&self, how: nix::fcntl::FlockArg) -> Result<nix::fcntl::Flock<fs::File>, Failure> {
        let path = self.dir.join("lock");
        let file = fs::File::options()
            .create(true)
            .append(true)
            .mode(files::PRIVATE_FILE_MODE)
            .open(&path);
        let file = file.map_err(|error| Failure::path("open", &path, &error))?;
        nix::fcntl::Flock::lock(file, how)
            .map_err(|(_, error)| Failure::path("lock", &path, &error.into()))
    }
}

fn agent_role(place: u32) -> String {
    format!("agent {place}")
}

/// Cancels what is not over, or refuses.
async fn end_jobs(connection: &Connection, force: bool) -> Result<(), Failure> {
    let request = v1::ListJobsRequest {
        all: false,
        page_size: 1000,
        before: 0,
    };
    let live: Vec<JobId> = connection
        .jobs()
        .list(request)
        .await?
        .into_inner()
        .jobs
        .iter()
        .map(|job| JobId(job.id))
        .collect();
    if live.is_empty() {
        return Ok(());
    }
    if !force {
        let some: Vec<_> = live.iter().take(5).map(ToString::to_string).collect();
        let message = format!(
            "not over: {} ({}{}); wait for them, cancel them, or use --force, which cancels them",
            output::count(live.len() as u64, "job"),
            some.join(", "),
            if live.len() > some.len() { ", …" } else { "" },
        );
        return Err(Failure::new(EXIT_REFUSED, "JOBS_NOT_OVER", message));
    }
    for job in &live {
        jobs::request_cancel(connection, *job).await?;
    }
    let ends = async {
        for job in &live {
            follow::quietly(connection, *job).await?;
        }
        Ok(())
    };
    let late = || {
        Failure::new(
            EXIT_UNAVAILABLE,
            "STOP_TIMEOUT",
            "cancelled jobs have not ended yet; try again in a while",
        )
    };
    tokio::time::timeout(CANCEL_TIMEOUT, ends)
        .await
        .map_err(|_| late())?
}

/// The usual port on loopback, or a free one if somebody has it.
fn usual_or_free() -> SocketAddr {
    let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT));
    match TcpListener::bind(usual) {
        Ok(_) => usual,
        Err(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
    }
}

/// The host's name; several nodes get a number.
fn node_name(place: u32, nodes: u32) -> String {
    let host = trainyard_transport::host::name()
        .filter(|name| is_name(name) && name.len() < 50)
        .unwrap_or_else(|| LOCAL.to_owned());
    if nodes == 1 {
        host
    } else {
        format!("{host}-{}", place + 1)
    }
}

/// CPUs and memory of each node: what the plan says, or this machine's divided by the nodes. A node always has a CPU.
fn share(plan: &Plan, nodes: u32, dir: &Path) -> (String, String) {
    let inventory = trainyard_agent::probe::host::read(dir);
    let nodes = u64::from(nodes.max(1));
    let cpus = (u64::from(inventory.cpu.threads) / nodes).max(1);
    let memory = inventory.memory_bytes / nodes;
    (
        plan.cpus.clone().unwrap_or_else(|| cpus.to_string()),
        plan.memory.clone().unwrap_or_else(|| format!("{memory}B")),
    )
}

/// Writes the NVML stand-in with its scenario beside it, each node its own.
fn fake_nvml(dir: &Path, spec: &str) -> Result<PathBuf, Failure> {
    let scenario = trainyard_fake_nvml::scenario(spec, &dir.to_string_lossy())
        .map_err(|error| Failure::usage("--fake-gpus", error))?;
    let library = dir.join("fake-nvml").join("libnvidia-ml.so.1");
    let write = |path: &Path, bytes: &[u8]| {
        files::write_private(path, bytes).map_err(|error| Failure::path("write", path, &error))
    };
    files::create_private_dir(&dir.join("fake-nvml"))
        .map_err(|error| Failure::path("make", dir, &error))?;
    write(&library, FAKE_NVML)?;
    write(
        &trainyard_fake_nvml::scenario_path(&library),
        scenario.as_bytes(),
    )?;
    Ok(library)
}

/// Waits for a condition while a child process should live.
async fn until(
    what: &str,
    log: &Path,
    child: &mut Child,
    mut done: impl FnMut() -> bool,
) -> Result<(), Failure> {
    let deadline = tokio::time::Instant::now() + START_TIMEOUT;
    while !done() {
        check(what, log, child)?;
        if tokio::time::Instant::now() >= deadline {
            let message = format!(
                "{what} did not come up within {}s; its log ends with:\n{}",
                START_TIMEOUT.as_secs(),
                processes::tail(log)
            );
            return Err(Failure::new(EXIT_UNAVAILABLE, "START_TIMEOUT", message));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// A child that has ended is a failure with the end of its log.
fn check(what: &str, log: &Path, child: &mut Child) -> Result<(), Failure> {
    match child.try_wait() {
        Ok(None) => Ok(()),
        Ok(Some(status)) => Err(Failure::new(
            EXIT_UNAVAILABLE,
            "START_FAILED",
            format!(
                "{what} could not start ({status}); its log {} ends with:\n{}",
                log.display(),
                processes::tail(log)
            ),
        )),
        Err(error) => Err(Failure::io(&format!("look after {what}"), &error)),
    }
}
