//! Members with real shims and real processes. The shim program is this test binary itself, called so that it runs
//! nothing but [`shim_entry`].

mod damage;
mod dying;
mod ending;
mod golden;
mod lease;
mod recovery;
mod starting;
mod unkillable;

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::kill;
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::time::timeout;
use trainyard_common::limits::MAX_LOG_BYTES_PER_RANK;
use trainyard_common::logrecord::{LogKind, LogRecord, dropped_data};
use trainyard_common::member::MemberSpec;
use trainyard_common::resources::Resources;
use trainyard_common::spec::Launcher;
use trainyard_common::state::{ExitStatus, ReasonCode};

use super::process::{Process, Signal};
use super::start::SPARE;
use super::wire::ShimFile;
use super::*;

/// Far more than anything here takes on a busy machine; reached only when something hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// Makes the shim do without a cgroup. It is an option of the test program that changes nothing otherwise.
const NO_CGROUP: &str = "no-cgroup";
/// Makes the shim wait before it does anything, in the same way.
const SLOW_SHIM: &str = "slow-shim";

/// Returns at once in an ordinary test run, and is the shim when it is called as one.
#[test]
fn shim_entry() {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let is_shim = arguments
        .iter()
        .any(|argument| argument == "runtime::tests::shim_entry");
    let dir = Path::new(arguments.last().unwrap());
    if is_shim
        && (dir == Path::new(SPARE)
            || ["member.json", "bundle.json"]
                .iter()
                .any(|file| dir.join(file).exists()))
    {
        if arguments.iter().any(|argument| argument == SLOW_SHIM) {
            let _ = nix::poll::poll(&mut [], nix::poll::PollTimeout::from(300_u16));
        }
        let cgroup = !arguments.iter().any(|argument| argument == NO_CGROUP);
        let _ = shim::supervise(dir, cgroup);
        std::process::exit(0);
    }
}

pub(super) fn shim_command(cgroup: bool) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec![std::env::current_exe().unwrap().into()];
    command.extend(
        [
            "--exact",
            "runtime::tests::shim_entry",
            "--nocapture",
            "--test-threads=1",
        ]
        .map(Into::into),
    );
    if !cgroup {
        command.extend(["--skip", NO_CGROUP].map(Into::into));
    }
    command
}

pub(super) fn spec(command: &[&str]) -> MemberSpec {
    MemberSpec {
        job_name: "job".to_owned(),
        owner: "ann".parse().unwrap(),
        workspace: "default".parse().unwrap(),
        node_rank: 0,
        nodes: 1,
        procs_per_node: 1,
        resources: Resources {
            cpu_milli: 1000,
            memory_bytes: 1 << 30,
            gpus: 0,
        },
        gpu_uuids: Vec::new(),
        launcher: Launcher::None,
        command: command
            .iter()
            .map(|&argument| argument.to_owned())
            .collect(),
        env: BTreeMap::new(),
        snapshot: None,
        resume_from: Vec::new(),
        time_limit: None,
        grace: Duration::from_secs(60),
        lease: None,
    }
}

pub(super) fn sh(script: &str) -> MemberSpec {
    spec(&["/bin/sh", "-c", script])
}

/// A small file system in memory, for as long as this lives.
#[derive(Debug)]
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    /// Nothing where this user may not mount.
    pub(crate) fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "none"])
            .arg(dir.path())
            .stderr(std::process::Stdio::null())
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Self(dir))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves no byte of space.
    pub(crate) fn fill(&self) {
        let mut file = std::fs::File::create(self.path().join("filler")).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
    }
}

/// One agent's runtime with its events.
struct World {
    scratch: TempDir,
    runtime: Runtime,
    events: mpsc::Receiver<RuntimeEvent>,
    config: RuntimeConfig,
}

impl World {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut RuntimeConfig)) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let mut config = RuntimeConfig {
            // Longer than an address of a socket may be.
            attempts_dir: scratch.path().join("d".repeat(120)).join("attempts"),
            shim_command: shim_command(true),
            run_as: None,
            log_limit: MAX_LOG_BYTES_PER_RANK,
        };
        change(&mut config);
        let (sender, events) = mpsc::channel(64);
        let runtime = Runtime::new(config.clone(), sender);
        Self {
            scratch,
            runtime,
            events,
            config,
        }
    }

    fn without_cgroup() -> Self {
        Self::with(|config| config.shim_command = shim_command(false))
    }

    /// The agent process ends and another one takes its place.
    fn restart(&mut self) {
        let (sender, events) = mpsc::channel(64);
        self.runtime = Runtime::new(self.config.clone(), sender);
        self.events = events;
    }

    async fn accept(&self, number: u32, spec: MemberSpec) -> AttemptRef {
        let attempt: AttemptRef = format!("j17.0.{number}").parse().unwrap();
        let member = DesiredMember {
            attempt,
            phase: DesiredPhase::Prepare,
            spec,
        };
        let dir = self.runtime.accept(&member).await.unwrap();
        assert_eq!(dir, self.runtime.dir(attempt));
        attempt
    }

    async fn ready(&mut self, spec: MemberSpec) -> (AttemptRef, u16) {
        let attempt = self.accept(1, spec).await;
        self.runtime.spawn_shim(attempt).await.unwrap();
        match self.next().await {
            ShimState::Ready { port } => (attempt, port),
            other => panic!("not ready but {other:?}"),
        }
    }

    async fn running(&mut self, spec: MemberSpec) -> AttemptRef {
        let (attempt, port) = self.ready(spec).await;
        self.runtime.go(attempt, &go(port), None).await.unwrap();
        match self.next().await {
            ShimState::Running { .. } => attempt,
            other => panic!("not running but {other:?}"),
        }
    }

    async fn next(&mut self) -> ShimState {
        let event = timeout(PATIENCE, self.events.recv()).await;
        event.expect("an event").expect("the channel is open").state
    }

    async fn gone(&mut self) -> Ending {
        loop {
            if let ShimState::Gone(ending) = self.next().await {
                return ending;
            }
        }
    }

    /// Runs a member from its start to its end.
    async fn run(&mut self, spec: MemberSpec) -> (AttemptRef, Ending) {
        let (attempt, port) = self.ready(spec).await;
        self.runtime.go(attempt, &go(port), None).await.unwrap();
        (attempt, self.gone().await)
    }

    async fn stop(&self, attempt: AttemptRef, grace: Duration) {
        let code = ReasonCode::CancelRequested;
        let stop = Stop { code, grace };
        self.runtime.stop(attempt, &stop).await.unwrap();
    }

    fn work(&self, attempt: AttemptRef, name: &str) -> PathBuf {
        self.runtime.dir(attempt).work().join(name)
    }

    /// Waits for a file in the working directory to hold something, and returns it.
    async fn appears(&self, attempt: AttemptRef, name: &str) -> String {
        let path = self.work(attempt, name);
        until(|| std::fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n'))).await;
        std::fs::read_to_string(path).unwrap()
    }

    fn output(&self, attempt: AttemptRef, rank: u32, kind: LogKind) -> Vec<u8> {
        let bytes = std::fs::read(self.runtime.dir(attempt).log(rank)).unwrap();
        let mut output = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (record, length) = LogRecord::decode(rest).unwrap().expect("a whole record");
            if record.kind == kind {
                output.extend_from_slice(record.data);
            }
            rest = &rest[length..];
        }
        output
    }

    fn stdout(&self, attempt: AttemptRef, rank: u32) -> String {
        String::from_utf8(self.output(attempt, rank, LogKind::Stdout)).unwrap()
    }

    fn shim(&self, attempt: AttemptRef) -> ShimFile {
        self.runtime.dir(attempt).read_shim().unwrap().unwrap()
    }

    /// Everything that carries the attempt's mark.
    fn survivors(&self, attempt: AttemptRef) -> Vec<Process> {
        let member = client::read_member(&self.runtime.dir(attempt)).unwrap();
        let entry = format!("{}={}", tree::KEY_VARIABLE, member.settings.key);
        let mut all = Process::all();
        all.retain(|process| !process.is_zombie && process.environment_has(entry.as_bytes()));
        all
    }
}

fn go(port: u16) -> Go {
    Go {
        master_addr: "127.0.0.1".to_owned(),
        master_port: port,
        node_addrs: vec!["127.0.0.1".to_owned()],
    }
}

/// Waits for a condition that no event announces.
pub(super) async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .expect("the condition to come true");
}

fn is_alive(pid: &str) -> bool {
    Process::find(pid.trim().parse().unwrap()).is_some_and(|process| !process.is_zombie)
}

fn only_rank(ending: &Ending) -> RankEndView {
    let [end] = ending.ranks[..] else {
        panic!("not one rank: {ending:?}");
    };
    (end.exit, end.unprompted)
}

type RankEndView = (ExitStatus, bool);
