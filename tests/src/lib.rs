//! What end-to-end tests share: the real `yard` binary, a cluster of it in a directory of its own, and waiting for
//! conditions. Nothing here reaches into a component; everything goes through the command line, as a user would.

pub mod bench;
pub mod chaos;
pub mod sim;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// With this variable set a test that cannot run here fails instead of being skipped.
pub const REQUIRE_ALL: &str = "TRAINYARD_TEST_REQUIRE_ALL";
/// Longest wait for a condition; far above what any takes, as the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Says that a test does not run here and why; with [`REQUIRE_ALL`] that is a failure.
pub fn skip(why: &str) {
    assert!(
        std::env::var_os(REQUIRE_ALL).is_none(),
        "may not be skipped here, but {why}"
    );
    // Written past the capture of a passing test's output, which nobody would see.
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {why}");
}

/// The repository's root.
#[must_use]
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("the tests lie in a folder of the repository")
        .to_path_buf()
}

/// The `yard` binary of this tree, built if need be.
pub fn yard_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build(&[]))
}

/// Builds `yard` with these flags of cargo; where it is.
fn build(flags: &[&str]) -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--locked", "--package", "trainyard"])
        .args(["--message-format", "json-render-diagnostics"])
        .args(flags)
        .current_dir(repository())
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo can be started");
    assert!(built.status.success(), "yard does not build");
    let lines = String::from_utf8(built.stdout).expect("cargo speaks UTF-8");
    let executable = lines.lines().rev().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        message.get("executable")?.as_str().map(PathBuf::from)
    });
    executable.expect("cargo says where it put yard")
}

/// A user's machine: directories of its own, so that nothing of the real user is read or written.
#[derive(Debug)]
pub struct Machine {
    home: TempDir,
    /// A program and its arguments that commands of this machine are started through.
    inside: Vec<String>,
    /// Another `yard` than that of this tree.
    program: Option<PathBuf>,
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; 128+N for signal N.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ran {
    /// The same, if the exit code is the wanted one.
    #[must_use]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "unexpected exit code\nstdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self
    }

    /// Standard output as one JSON value.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error} in {:?}\n{}", self.stdout, self.stderr))
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let signal = || output.status.signal().map_or(-1, |signal| 128 + signal);
        Self {
            code: output.status.code().unwrap_or_else(signal),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A fresh one.
    #[must_use]
    pub fn new() -> Self {
        let home = tempfile::Builder::new()
            .prefix("yard-test-")
            .tempdir()
            .expect("a temporary directory can be made");
        std::fs::create_dir(home.path().join("work")).expect("a directory can be made");
        // The user that a root agent's jobs run as must be able to reach them.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(home.path(), open).expect("its permissions can be set");
        Self {
            home,
            inside: Vec::new(),
            program: None,
        }
    }

    /// From now on commands of this machine are those of this `yard`.
    pub fn install(&mut self, program: &Path) {
        self.program = Some(program.to_owned());
    }

    /// The `yard` of this machine.
    #[must_use]
    pub fn program(&self) -> &Path {
        self.program.as_deref().unwrap_or_else(|| yard_binary())
    }

    /// A fresh one whose commands run in a network namespace.
    #[must_use]
    pub fn in_namespace(name: &str) -> Self {
        // Not `ip netns exec`, which would hide the cgroup file systems.
        let inside = vec!["nsenter".to_owned(), format!("--net=/run/netns/{name}")];
        Self {
            inside,
            ..Self::new()
        }
    }

    /// Where commands run.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.home.path().join("work")
    }

    /// Where the local cluster lies.
    #[must_use]
    pub fn local(&self) -> PathBuf {
        self.home.path().join("data").join("local")
    }

    /// Another directory of this machine.
    #[must_use]
    pub fn dir(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// A `yard` command, not yet started.
    pub fn command(&self, arguments: &[impl AsRef<OsStr>]) -> Command {
        let mut words = self
            .inside
            .iter()
            .map(OsStr::new)
            .chain([self.program().as_os_str()]);
        let mut command = Command::new(words.next().expect("there is the binary at least"));
        command
            .args(words)
            .args(arguments)
            .current_dir(self.work())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.home.path())
            .env("YARD_DATA_DIR", self.home.path().join("data"))
            .env("YARD_CONFIG_DIR", self.home.path().join("config"))
            .stdin(Stdio::null());
        command
    }

    /// Runs a `yard` command to its end; one that hangs is ended and fails.
    pub fn yard(&self, arguments: &[impl AsRef<OsStr>]) -> Ran {
        let command = self.command(arguments);
        let mut bounded = Command::new("timeout");
        bounded.args(["--kill-after=5", &(2 * PATIENCE).as_secs().to_string()]);
        bounded
            .arg(command.get_program())
            .args(command.get_args())
            .current_dir(self.work())
            .env_clear();
        bounded
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(Stdio::null());
        bounded
            .output()
            .expect("timeout (of coreutils) can be started")
            .into()
    }

    /// Starts a cluster with `yard up`.
    pub fn up(&self, flags: &[&str]) -> Cluster<'_> {
        let usual: &[&str] = if flags.contains(&"--listen") {
            &[]
        } else {
            &["--listen", "127.0.0.1:0"]
        };
        let arguments: Vec<_> = ["up"].iter().chain(usual).chain(flags).collect();
        let ran = self.yard(&arguments);
        let cluster = Cluster { machine: self };
        let _ = ran.expect_code(0);
        cluster
    }
}

/// A running cluster, which is stopped at the end.
#[derive(Debug)]
pub struct Cluster<'a> {
    machine: &'a Machine,
}

impl Cluster<'_> {
    /// Runs a `yard` command to its end.
    pub fn yard(&self, arguments: &[impl AsRef<OsStr>]) -> Ran {
        self.machine.yard(arguments)
    }

    /// Submits a job and gives its id.
    pub fn submit(&self, arguments: &[&str]) -> String {
        let arguments: Vec<_> = std::iter::once("submit")
            .chain(arguments.iter().copied())
            .collect();
        self.yard(&arguments)
            .expect_code(0)
            .stdout
            .trim()
            .to_owned()
    }

    /// A job as `yard job --json` shows it.
    pub fn job(&self, id: &str) -> Value {
        self.yard(&["job", id, "--json"]).expect_code(0).json()
    }

    /// Waits until a job's state is the wanted one.
    pub fn until_state(&self, id: &str, state: &str) -> Value {
        until(&format!("{id} is {state}"), || {
            let job = self.job(id);
            (job["state"] == state).then_some(job)
        })
    }

    /// Process ids of this cluster's coordinator and agents, by role.
    #[must_use]
    pub fn processes(&self) -> Vec<(String, i32)> {
        let text = std::fs::read(self.machine.local().join("processes.json"))
            .expect("up has written its processes");
        let value: Value = serde_json::from_slice(&text).expect("they are JSON");
        let agents = value["agents"].as_array().into_iter().flatten();
        std::iter::once(&value["coordinator"])
            .chain(agents)
            .filter_map(|process| {
                let pid = i32::try_from(process["pid"].as_i64()?).ok()?;
                Some((process["role"].as_str()?.to_owned(), pid))
            })
            .collect()
    }

    /// The process id of one role.
    #[must_use]
    pub fn pid(&self, role: &str) -> i32 {
        let processes = self.processes();
        processes
            .iter()
            .find(|(name, _)| name == role)
            .map(|(_, pid)| *pid)
            .expect("the role runs")
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        let stopped = self.machine.yard(&["down", "--force"]);
        if stopped.code != 0 && !std::thread::panicking() {
            panic!("the cluster could not be stopped: {}", stopped.stderr);
        }
        // After a failed test nothing may go on running either.
        for (_, pid) in self.processes() {
            end(pid, Signal::SIGKILL);
        }
    }
}

/// Sends a signal to a process, if it is there.
pub fn end(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Waits for a condition.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, condition)
}

/// Waits for a condition, at most so long.
pub fn until_within<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            Instant::now() < deadline,
            "waited {limit:?} in vain until {what}"
        );
        pause();
    }
}

fn pause() {
    pass(Duration::from_millis(30));
}

/// Lets time pass, for tests of what happens after a random time; all others wait for a condition.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place where time passes"
)]
pub fn pass(time: Duration) {
    std::thread::sleep(time);
}

/// A `yard` command that runs beside the test and whose output can be read as it comes.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Running {
    /// Starts it.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("yard can be started");
        let (sender, lines) = std::sync::mpsc::sync_channel(100_000);
        for stream in [
            Box::new(child.stdout.take().expect("standard output is a pipe"))
                as Box<dyn std::io::Read + Send>,
            Box::new(child.stderr.take().expect("standard error is a pipe")),
        ] {
            let sender = sender.clone();
            std::thread::spawn(move || {
                BufReader::new(stream)
                    .lines()
                    .map_while(Result::ok)
                    .try_for_each(|line| sender.send(line))
            });
        }
        Self { child, lines }
    }

    /// Waits for a line that contains `text`.
    pub fn until_line(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("waited in vain for {text:?}; seen:\n{}", seen.join("\n")),
            }
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        end(self.child.id().cast_signed(), signal);
    }

    /// Waits for its end; the exit code.
    pub fn wait(mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let status = until("the command ends", || {
            self.child
                .try_wait()
                .expect("the command can be waited for")
        });
        status
            .code()
            .unwrap_or_else(|| status.signal().map_or(-1, |signal| 128 + signal))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a process lives and is no zombie.
#[must_use]
pub fn lives(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}
