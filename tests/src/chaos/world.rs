//! The cluster of a run: hosts, disks, the coordinator, its agents and the directory that it all lies in. All of it is
//! taken down when this is dropped, also after a panic.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::Options;
use super::daemon::Daemon;
use super::ledger::Ledger;
use super::net::{HEAD, Network, address};
use super::proxy::Proxy;
use super::script::Stage;
use super::{processes, rest, tell, timing};
use crate::{Ran, until, yard_binary};

/// Where the coordinator listens.
const PORT: u16 = 7443;
/// Where the slow line begins.
const SLOW_PORT: u16 = 7444;
/// Bytes of the small file systems. A flood is about 4 MiB.
const AGENT_DISK: &str = "64m";
const COORDINATOR_DISK: &str = "256m";

/// Whose commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum As {
    /// The admin's, on the coordinator's host.
    Admin,
    /// A user's, on a host of its own.
    User,
}

/// Everything of a run.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) stage: Stage,
    pub(crate) ledger: Ledger,
    pub(crate) coordinator: Daemon,
    pub(crate) agents: Vec<Daemon>,
    pub(crate) proxy: Option<Proxy>,
    pub(crate) net: std::sync::Arc<Network>,
    mounts: Vec<PathBuf>,
    dir: Option<TempDir>,
    base: PathBuf,
}

impl World {
    /// Makes hosts and disks and starts the coordinator.
    pub(crate) fn new(options: &Options, stage: Stage) -> Self {
        let missing = "a directory can be made";
        let dir = tempfile::Builder::new()
            .prefix("yard-chaos-")
            .tempdir()
            .expect(missing);
        let base = dir.path().to_owned();
        open_to_all(&base);
        for name in [
            "bin",
            "logs",
            "state",
            "head/config/contexts",
            "user/config",
            "details",
        ] {
            std::fs::create_dir_all(base.join(name)).expect(missing);
        }
        // Copies, so that a build meanwhile does not change what runs.
        for (from, name) in [(yard_binary(), "yard"), (&*options.witness, "witness")] {
            std::fs::copy(from, base.join("bin").join(name)).expect("a program can be copied");
        }
        let hosts = u32::try_from(stage.agents).unwrap_or(u32::MAX) + 2;
        let prefix = format!("yc{:x}x", std::process::id());
        let net = std::sync::Arc::new(Network::new(&prefix, hosts));
        let mut world = Self {
            ledger: Ledger::create(&base.join("ledger")).expect("a ledger can be made"),
            coordinator: coordinator(&net, &base),
            agents: (0..stage.agents)
                .map(|agent| self::agent(&net, &base, agent))
                .collect(),
            proxy: None,
            mounts: Vec::new(),
            dir: Some(dir),
            net,
            base,
            stage,
        };
        for agent in 0..stage.agents {
            let place = world.agent_dir(agent);
            std::fs::create_dir_all(&place).expect(missing);
            if agent == stage.small_disk {
                world.mount(place, AGENT_DISK);
            }
        }
        if stage.coordinator_disk {
            world.mount(world.base.join("state"), COORDINATOR_DISK);
        }
        world.net.detour(host_of(stage.slow_line), PORT, SLOW_PORT);
        world.proxy = Some(Proxy::start(&world.net, SLOW_PORT, PORT).expect("a proxy can listen"));
        world.configure();
        world.coordinator.start().expect("yard can be started");
        world
    }

    fn mount(&mut self, place: PathBuf, size: &str) {
        let made = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={size},mode=755"),
                "yard-chaos",
            ])
            .arg(&place)
            .status();
        assert!(
            made.is_ok_and(|status| status.success()),
            "a small file system can be mounted"
        );
        self.mounts.push(place);
    }

    fn configure(&self) {
        let time = |name: &str, value: Duration| format!("{name} = '{}s'\n", value.as_secs());
        let text = format!(
            "data_dir = '{}'\nlisten = '{head}:{PORT}'\nadvertise = ['{head}:{PORT}']\nadmin = 'chief'\n[timing]\n{}{}{}{}{}{}{}",
            self.state_dir().display(),
            time("heartbeat_interval", timing::HEARTBEAT),
            time("unreachable_after", timing::UNREACHABLE),
            time("lost_after", timing::LOST),
            time("lost_after_gang", timing::LOST_GANG),
            time("lease_margin", timing::LEASE_MARGIN),
            time("prepare_timeout", timing::PREPARE),
            time("crash_pause", timing::CRASH_PAUSE),
            head = address(HEAD),
        );
        self.note("coordinator.toml", &text);
    }

    /// Lets the admin, the user and the agents in, and waits until every node is ready.
    pub(crate) fn enrol(&self) {
        let admin = self.state_dir().join("admin");
        until("the coordinator runs", || {
            admin.join("cluster.json").exists().then_some(())
        });
        let config = self.base.join("head/config");
        std::os::unix::fs::symlink(&admin, config.join("contexts/admin"))
            .expect("a link can be made");
        std::fs::write(config.join("current"), "admin\n").expect("a file can be written");
        let token = |words: &[&str]| {
            let words: Vec<_> = ["token", "create"].iter().chain(words).copied().collect();
            until("there is a token", || {
                let ran = self.yard(As::Admin, &words, timing::UNREACHABLE);
                (ran.code == 0).then(|| ran.stdout.trim().to_owned())
            })
        };
        let login = self.yard(
            As::User,
            &["login", &token(&["--user", "anna"])],
            Duration::from_secs(60),
        );
        let _ = login.expect_code(0);
        for (index, agent) in self.agents.iter().enumerate() {
            let state = self.agent_dir(index);
            let token = token(&["--node"]);
            let words = [
                "join",
                &token,
                "--no-run",
                "--name",
                agent.name(),
                "--run-as",
                "nobody",
                "--state-dir",
            ];
            let mut command = self.net.command(host_of(index), &self.program());
            environment(&mut command, &self.base.join(agent.name()));
            command.args(words).arg(&state);
            let ran: Ran = command.output().expect("yard can be started").into();
            let _ = ran.expect_code(0);
            agent.start().expect("yard can be started");
        }
        until("every node is ready", || self.all_ready().then_some(()));
    }

    /// Whether every node is ready and nothing is taken.
    pub(crate) fn all_ready(&self) -> bool {
        let nodes = self.nodes();
        nodes.len() == self.agents.len()
            && nodes.iter().all(|node| {
                node["availability"] == "READY"
                    && node["policy"] == "ACTIVE"
                    && node["free"] == node["capacity"]
                    && node["attempts"].as_array().is_none_or(Vec::is_empty)
            })
    }

    /// The nodes as the cluster lists them; none if it does not answer.
    pub(crate) fn nodes(&self) -> Vec<Value> {
        let ran = self.yard(As::Admin, &["nodes", "--json"], Duration::from_secs(20));
        let listed = serde_json::from_str::<Value>(&ran.stdout).unwrap_or_default();
        listed["nodes"].as_array().cloned().unwrap_or_default()
    }

    /// Runs a command to its end or for so long; 137 says that it took longer.
    pub(crate) fn yard(
        &self,
        who: As,
        arguments: &[impl AsRef<std::ffi::OsStr>],
        most: Duration,
    ) -> Ran {
        let (host, home) = match who {
            As::Admin => (HEAD, "head"),
            As::User => (self.user_host(), "user"),
        };
        let inner = self.net.command(host, &self.program());
        let mut command = Command::new("timeout");
        command
            .args(["-s", "KILL", &most.as_secs_f64().to_string()])
            .arg(inner.get_program())
            .args(inner.get_args())
            .args(arguments);
        environment(&mut command, &self.base.join(home));
        command
            .output()
            .expect("timeout (of coreutils) can be started")
            .into()
    }

    /// The host that users' commands run on.
    pub(crate) fn user_host(&self) -> u32 {
        u32::try_from(self.agents.len()).unwrap_or(0) + 2
    }

    fn program(&self) -> PathBuf {
        self.base.join("bin/yard")
    }

    /// The program that jobs are.
    pub(crate) fn witness(&self) -> PathBuf {
        self.base.join("bin/witness")
    }

    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// The home directory of a host's commands.
    pub(crate) fn home(&self, name: &str) -> PathBuf {
        self.base.join(name)
    }

    fn state_dir(&self) -> PathBuf {
        self.base.join("state/coordinator")
    }

    /// The file that fills the disk of an agent, or of the coordinator.
    pub(crate) fn filler(&self, agent: Option<usize>) -> PathBuf {
        match agent {
            Some(agent) => self.agent_dir(agent).join("filler"),
            None => self.base.join("state/filler"),
        }
    }

    pub(crate) fn agent_dir(&self, agent: usize) -> PathBuf {
        agent_dir(&self.base, agent)
    }

    /// Coordinator and agents.
    pub(crate) fn daemons(&self) -> impl Iterator<Item = &Daemon> + Clone {
        std::iter::once(&self.coordinator).chain(&self.agents)
    }

    /// Keeps a text in the run's directory.
    pub(crate) fn note(&self, name: &str, text: &str) {
        std::fs::write(self.base.join(name), text).expect("a file can be written");
    }

    /// Processes of the run besides coordinator and agents.
    pub(crate) fn others(&self) -> Vec<processes::Found> {
        let known: Vec<_> = self
            .daemons()
            .filter_map(Daemon::pid)
            .map(u32::cast_signed)
            .collect();
        let mut found = processes::naming(&self.base);
        found.retain(|process| !known.contains(&process.pid));
        found
    }

    /// Ends everything but leaves the directory, with what lay on small file systems.
    pub(crate) fn keep(mut self) -> PathBuf {
        self.end_processes();
        for place in &self.mounts {
            let copy = place.with_extension("disk");
            let _ = std::fs::remove_file(place.join("filler"));
            let _ = Command::new("cp").arg("-a").arg(place).arg(copy).status();
        }
        self.dir.take().map_or_else(PathBuf::new, TempDir::keep)
    }

    /// Daemons first, as they would start more; then what they started, until nothing is left.
    fn end_processes(&self) {
        self.daemons().for_each(Daemon::end);
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let left = processes::naming(&self.base);
            if left.is_empty() {
                return;
            }
            for process in left {
                crate::end(process.pid, nix::sys::signal::Signal::SIGKILL);
            }
            rest(Duration::from_millis(50));
        }
        tell("some processes of the run could not be ended");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.end_processes();
        self.proxy = None;
        for place in &self.mounts {
            let _ = Command::new("umount").arg("-l").arg(place).status();
        }
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            tell(&format!(
                "the run's directory is kept: {}",
                dir.keep().display()
            ));
        }
    }
}

/// The host of an agent.
pub(crate) fn host_of(agent: usize) -> u32 {
    u32::try_from(agent).unwrap_or(u32::MAX - HEAD - 1) + HEAD + 1
}

/// Memory of this machine, which is every node's.
pub(crate) fn memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|total| total.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.expect("/proc/meminfo says how much memory there is") / 1024
}

fn agent_dir(base: &Path, agent: usize) -> PathBuf {
    base.join(format!("disk-{agent}"))
}

fn open_to_all(dir: &Path) {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir, mode).expect("its permissions can be set");
}

fn environment(command: &mut Command, home: &Path) {
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .env("YARD_DATA_DIR", home.join("data"))
        .env("YARD_CONFIG_DIR", home.join("config"))
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null());
    if let Some(filter) = std::env::var_os("YARD_LOG") {
        command.env("YARD_LOG", filter);
    }
}

fn coordinator(net: &std::sync::Arc<Network>, base: &Path) -> Daemon {
    let (net, base, log) = (
        net.clone(),
        base.to_owned(),
        base.join("logs/coordinator.log"),
    );
    Daemon::new("coordinator", log, move || {
        let mut command = net.command(HEAD, &base.join("bin/yard"));
        command
            .args(["coordinator", "run", "--config"])
            .arg(base.join("coordinator.toml"));
        environment(&mut command, &base.join("head"));
        command
    })
}

fn agent(net: &std::sync::Arc<Network>, base: &Path, agent: usize) -> Daemon {
    let name = format!("node-{agent}");
    let log = base.join(format!("logs/{name}.log"));
    let (net, base, home) = (net.clone(), base.to_owned(), base.join(&name));
    Daemon::new(&name, log, move || {
        let mut command = net.command(host_of(agent), &base.join("bin/yard"));
        command
            .args([
                "agent",
                "run",
                "--run-as",
                "nobody",
                "--advertise-address",
                &address(host_of(agent)),
                "--state-dir",
            ])
            .arg(agent_dir(&base, agent));
        environment(&mut command, &home);
        command
    })
}
