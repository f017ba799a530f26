//! `yard doctor`: what this machine and its connection are like, and what to do about what is not as it should be.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Value, json};
use trainyard_common::units::{format_bytes, format_cpus, format_duration};
use trainyard_proto::{PROTOCOL_VERSION, v1};

use trainyard_transport::clock::wall_now;
use trainyard_transport::skew::{self, TOLD_FROM};

use crate::args::{Global, JsonArgs};
use crate::context;
use crate::failure::Failure;
use crate::output;
use crate::paths::Paths;
use crate::{connection, nodes};

/// Below this a job's output or snapshot may not find room.
const LITTLE_DISK: u64 = 5 << 30;
/// A coordinator wants a descriptor for each agent and each follower.
const FEW_FILES: u64 = 4096;
/// Certificates and times on screen are wrong beyond this.
const CLOCK_SKEW: Duration = Duration::from_secs(60);
/// A certificate that ends sooner is worth a word.
const SOON: Duration = Duration::from_secs(14 * 86_400);

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Works, but somebody may miss something.
    Note,
    Bad,
}

/// One thing that was looked at.
#[derive(Debug)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    remedy: String,
}

fn good(name: &'static str, found: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Good,
        found: found.into(),
        remedy: String::new(),
    }
}

fn note(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Note,
        found: found.into(),
        remedy: remedy.into(),
    }
}

fn bad(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Bad,
        found: found.into(),
        remedy: remedy.into(),
    }
}

/// Checks everything; ends with 1 if something is bad.
pub(crate) async fn doctor(global: &Global, args: JsonArgs) -> Result<ExitCode, Failure> {
    let paths = Paths::new(global)?;
    let mut checks = vec![good(
        "version",
        format!(
            "yard {}, protocol {PROTOCOL_VERSION}",
            env!("CARGO_PKG_VERSION")
        ),
    )];
    checks.extend(machine(&paths));
    checks.extend(cluster(global, &paths).await);
    let any_bad = checks.iter().any(|check| check.verdict == Verdict::Bad);
    if args.json {
        output::line(
            &json!({ "ok": !any_bad, "checks": checks.iter().map(as_json).collect::<Value>() })
                .to_string(),
        );
    } else {
        checks.iter().for_each(show);
    }
    Ok(if any_bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn as_json(check: &Check) -> Value {
    let verdict = match check.verdict {
        Verdict::Good => "good",
        Verdict::Note => "note",
        Verdict::Bad => "bad",
    };
    json!({ "check": check.name, "verdict": verdict, "found": check.found, "remedy": check.remedy })
}

fn show(check: &Check) {
    let (mark, colour) = match check.verdict {
        Verdict::Good => ("ok  ", AnsiColor::Green),
        Verdict::Note => ("note", AnsiColor::Yellow),
        Verdict::Bad => ("BAD ", AnsiColor::Red),
    };
    let mark = output::styled(Style::new().fg_color(Some(colour.into())), mark);
    output::line(&format!(
        "{mark}  {:<12} {}",
        check.name,
        output::printable(&check.found)
    ));
    if !check.remedy.is_empty() {
        output::line(&format!(
            "      {:<12} {}",
            "",
            output::printable(&check.remedy)
        ));
    }
}

fn machine(paths: &Paths) -> Vec<Check> {
    let dir = existing(&paths.data);
    let inventory = trainyard_agent::probe::host::read(dir);
    let mut checks = vec![
        good(
            "system",
            format!("{}, Linux {}", inventory.os, inventory.kernel),
        ),
        good(
            "processor",
            format!(
                "{} CPUs, {}",
                format_cpus(u64::from(inventory.cpu.threads) * 1000),
                inventory.cpu.model
            ),
        ),
        good("memory", format_bytes(inventory.memory_bytes)),
        gpus(),
        python(),
        disk(dir),
        private(&paths.data),
        open_files(),
    ];
    checks.push(match trainyard_agent::runtime::usable_cgroup() {
        Ok(at) => good("cgroups", format!("version 2 at {}", at.display())),
        Err(why) => note(
            "cgroups",
            format!("not usable: {why}"),
            "jobs are still ended as a whole (by descent and mark); limits on memory and who was killed for want of it are not seen",
        ),
    });
    checks
}

/// The directory itself, or the nearest above it that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|dir| dir.is_dir())
        .unwrap_or(Path::new("/"))
}

fn gpus() -> Check {
    let probe =
        trainyard_agent::probe::gpu::GpuReader::open(trainyard_agent::probe::gpu::DEFAULT_LIBRARY)
            .read();
    match (&probe.absent_reason, probe.gpus.len()) {
        (Some(reason), _) => note(
            "GPUs",
            reason.clone(),
            "fine without NVIDIA GPUs; else install the driver with its NVML library (`yard up --fake-gpus 8xH100` tries things out without)",
        ),
        (None, 0) => note("GPUs", "NVML is there and finds none", "look at nvidia-smi"),
        (None, count) => {
            let ill = probe.gpus.iter().filter(|gpu| !gpu.healthy).count();
            let found = format!("{count}, driver {}", probe.driver.unwrap_or_default());
            if ill == 0 {
                good("GPUs", found)
            } else {
                bad(
                    "GPUs",
                    format!("{found}; {ill} unhealthy"),
                    "look at nvidia-smi; jobs are not given these",
                )
            }
        }
    }
}

fn python() -> Check {
    let output = Command::new("python3")
        .arg("--version")
        .stderr(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            good("python3", String::from_utf8_lossy(&output.stdout).trim())
        }
        _ => note(
            "python3",
            "not in PATH",
            "the examples and the launcher torchrun want it",
        ),
    }
}

fn disk(dir: &Path) -> Check {
    match nix::sys::statvfs::statvfs(dir) {
        Ok(stat) => {
            let free = stat.blocks_available().saturating_mul(stat.fragment_size());
            let found = format!("{} free at {}", format_bytes(free), dir.display());
            if free < LITTLE_DISK {
                note(
                    "disk",
                    found,
                    "logs, snapshots and outputs lie there; make room, or move it with YARD_DATA_DIR",
                )
            } else {
                good("disk", found)
            }
        }
        Err(error) => bad(
            "disk",
            format!("cannot look at {}: {error}", dir.display()),
            "check that the directory can be read",
        ),
    }
}

fn private(dir: &Path) -> Check {
    match fs::metadata(dir.join("local")).or_else(|_| fs::metadata(dir.join("agent"))) {
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => bad(
            "privacy",
            format!("others can look into {}", dir.display()),
            format!("chmod -R go= {}", dir.display()),
        ),
        Ok(_) => good("privacy", format!("{} is yours alone", dir.display())),
        Err(_) => good(
            "privacy",
            format!("nothing is kept in {} yet", dir.display()),
        ),
    }
}

fn open_files() -> Check {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, _)) if soft < FEW_FILES => note(
            "open files",
            format!("at most {soft} per process"),
            "enough for small clusters; raise it with ulimit -n for more",
        ),
        Ok((soft, _)) => good("open files", format!("at most {soft} per process")),
        Err(error) => note("open files", format!("cannot tell: {error}"), ""),
    }
}

async fn cluster(global: &Global, paths: &Paths) -> Vec<Check> {
    let context = match context::find(global, paths) {
        Ok(Some(context)) => context,
        Ok(None) => {
            return vec![note(
                "cluster",
                "none is running or configured",
                "`yard up` starts one here, `yard login TOKEN` enrols you in another",
            )];
        }
        Err(failure) => {
            return vec![bad(
                "context",
                failure.message,
                "choose another with --context, or enrol again",
            )];
        }
    };
    let endpoints: Vec<_> = context.endpoints.iter().map(ToString::to_string).collect();
    let mut checks = vec![good(
        "context",
        format!("{} at {}", context.name, endpoints.join(", ")),
    )];
    checks.extend(certificate(&context));
    let began = Instant::now();
    let connection = match connection::open(&context).await {
        Ok(connection) => connection,
        Err(failure) => {
            checks.push(bad(
                "connection",
                failure.message,
                "check that the coordinator runs and that its port is open from here",
            ));
            return checks;
        }
    };
    let dialled = began.elapsed();
    match connection.admin().who_am_i(v1::WhoAmIRequest {}).await {
        Ok(answer) => checks.extend(answered(answer.into_inner(), dialled)),
        Err(status) => {
            let info = context.credentials.client_cert().map(|cert| cert.info());
            let skew = info
                .ok()
                .and_then(|info| skew::refused(&info, &status, wall_now()));
            let remedy = "your certificate may have expired or been revoked; enrol again";
            checks.push(match skew {
                Some(skew) => bad("clock", skew, ""),
                None => bad("connection", Failure::from(status).message, remedy),
            });
            return checks;
        }
    }
    checks.push(match nodes::all(&connection).await {
        Ok(all) if all.is_empty() => note(
            "nodes",
            "there are none",
            "`yard token create --node` makes a token for `yard join` on a machine",
        ),
        Ok(all) => {
            let away: Vec<_> = all
                .iter()
                .filter(|one| one.node.availability.as_str() != "READY")
                .map(|one| one.node.name.clone())
                .collect();
            let found = format!("{} of {} ready", all.len() - away.len(), all.len());
            if away.is_empty() {
                good("nodes", found)
            } else {
                note("nodes", found, format!("not heard of: {}", away.join(", ")))
            }
        }
        Err(failure) => bad("nodes", failure.message, ""),
    });
    checks
}

fn certificate(context: &context::Context) -> Option<Check> {
    let certificate = context.credentials.client_cert().ok()?;
    let now = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0);
    let left = Duration::from_millis(certificate.not_after().0.saturating_sub(now));
    Some(match left {
        Duration::ZERO => bad(
            "certificate",
            "expired",
            "enrol again with `yard login TOKEN`",
        ),
        left if left < SOON => note(
            "certificate",
            format!("ends in {}", format_duration(left)),
            "enrol again with `yard login TOKEN` before that",
        ),
        left => good("certificate", format!("good for {}", format_duration(left))),
    })
}

fn clock(skew: Duration) -> Check {
    let found = format!(
        "clock skew: {} apart from the coordinator's",
        format_duration(skew)
    );
    let remedy = "set the time on both machines (chrony or systemd-timesyncd)";
    match skew {
        // Certificates are refused for it.
        skew if skew > TOLD_FROM => bad("clock", found, remedy),
        skew if skew > CLOCK_SKEW => note("clock", found, remedy),
        _ => good("clock", "agrees with the coordinator's"),
    }
}

fn answered(answer: v1::WhoAmIResponse, dialled: Duration) -> Vec<Check> {
    let who = match answer.identity {
        Some(v1::who_am_i_response::Identity::User(user)) => {
            let role = user
                .role()
                .as_str_name()
                .trim_start_matches("ROLE_")
                .to_lowercase();
            format!("{} ({role})", user.name)
        }
        Some(v1::who_am_i_response::Identity::Node(node)) => format!("node n{node}"),
        None => "nobody".to_owned(),
    };
    let mut checks = vec![good(
        "connection",
        format!("in {} ms; you are {who}", dialled.as_millis()),
    )];
    if answer.protocol_version != PROTOCOL_VERSION {
        let found = format!(
            "the coordinator speaks {} ({}), this yard {PROTOCOL_VERSION}",
            answer.protocol_version, answer.coordinator_version
        );
        checks.push(note(
            "protocol",
            found,
            "use the same version on both sides",
        ));
    }
    if let Some(theirs) = answer
        .now
        .and_then(|now| jiff::Timestamp::new(now.seconds, now.nanos).ok())
    {
        let skew = jiff::Timestamp::now().duration_since(theirs).unsigned_abs();
        checks.push(clock(skew));
    }
    checks
}
