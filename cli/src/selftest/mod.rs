//! `yard selftest`: the promises tried on the user's own cluster. It submits small jobs as a user would, makes trouble if
//! asked to, and holds what comes out of the cluster against what it was told and what the ranks themselves wrote.

mod book;
mod check;
mod client;
mod fault;
mod gather;
mod job;
mod report;
mod run;
mod witness;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

use self::book::LOOK;
use self::client::Client;
use self::fault::Fault;
use self::run::Run;
use crate::args::{Global, SelftestArgs};
use crate::connection;
use crate::failure::{EXIT_CANCELLED, EXIT_REFUSED, Failure};
use crate::output;

/// How long the jobs that are left over may take to end once they are cancelled, before nobody waits for them any more.
const CLEAN_TIMEOUT: Duration = Duration::from_secs(30);
/// What a shell calls the end by SIGTERM.
const EXIT_TERMINATED: u8 = 143;

/// Runs it; ends with 1 if a promise was broken.
pub(crate) async fn selftest(global: &Global, args: SelftestArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect_or_start(global).await?;
    let client = Client::new(connection, new_id()?);
    let nodes = client.nodes().await?;
    let usable = nodes.iter().filter(|node| fault::takes_work(node)).count();
    if usable == 0 {
        return Err(fault::no_node());
    }
    let faults = fault::prepare(&client, &args, &nodes).await?;
    if !agreed(&faults, &args)? {
        output::note("nothing was done");
        return Ok(ExitCode::from(EXIT_CANCELLED));
    }
    let scratch = tempfile::Builder::new()
        .prefix("yard-selftest-")
        .tempdir()
        .map_err(|error| Failure::io("make a temporary directory", &error))?;
    let bar = output::spinner();
    let result = {
        let run = Run::new(&client, &args, &faults, usable, scratch.path(), &bar);
        tokio::select! {
            biased;
            // Both are safe to drop: what a signal interrupts is cleaned away below.
            failure = interrupted()? => Err(failure),
            report = Box::pin(run.report()) => report,
        }
    };
    bar.finish_and_clear();
    let left = clean(&client).await;
    let mut report = match result {
        Ok(report) => report,
        Err(failure) => {
            left?;
            return Err(failure);
        }
    };
    if args.keep || !report.ok() {
        report.kept_in = Some(keep(scratch.path(), &client.id)?);
    }
    report.show(args.json);
    left?;
    Ok(match report.ok() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn new_id() -> Result<String, Failure> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(|error| {
        let message = format!("cannot draw a name for the self test: {error}");
        Failure::new(crate::failure::EXIT_INTERNAL, "RANDOM", message)
    })?;
    Ok(format!("{:08x}", u32::from_ne_bytes(bytes)))
}

/// Whether the user agrees to the faults: said before with `--yes`, or now.
fn agreed(faults: &[Fault], args: &SelftestArgs) -> Result<bool, Failure> {
    for fault in faults {
        output::note(&format!("--{} {}", fault.name(), fault.warning()));
    }
    if faults.is_empty() || args.yes {
        return Ok(true);
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        let message = "trouble is made only if somebody agrees, and there is no terminal to ask on; add --yes";
        return Err(Failure::new(EXIT_REFUSED, "NOT_AGREED", message));
    }
    output::write_stderr(b"go on? [y/N] ");
    let mut line = String::new();
    io::stdin()
        .read_line(&mut line)
        .map_err(|error| Failure::io("read the answer", &error))?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

/// Resolves at Ctrl-C or SIGTERM.
fn interrupted() -> Result<impl Future<Output = Failure>, Failure> {
    let open = |kind| signal(kind).map_err(|error| Failure::io("listen for signals", &error));
    let (mut interrupt, mut terminate) = (
        open(SignalKind::interrupt())?,
        open(SignalKind::terminate())?,
    );
    Ok(async move {
        tokio::select! {
            biased;
            // Both are cancel-safe; whichever comes first ends the self test.
            _ = terminate.recv() => {
                Failure::new(EXIT_TERMINATED, "TERMINATED", "ended by SIGTERM; its jobs were cancelled")
            }
            _ = interrupt.recv() => {
                Failure::new(EXIT_CANCELLED, "LEFT", "interrupted; its jobs were cancelled")
            }
        }
    })
}

/// Cancels whatever is not over, and waits a while for its end.
async fn clean(client: &Client) -> Result<(), Failure> {
    let cleaned = async {
        let live = client.live().await?;
        for job in &live {
            client.cancel(job.id).await?;
        }
        let deadline = Instant::now() + CLEAN_TIMEOUT;
        while Instant::now() < deadline && !client.live().await?.is_empty() {
            sleep(LOOK).await;
        }
        Ok(())
    };
    timeout(2 * CLEAN_TIMEOUT, cleaned).await.unwrap_or_else(|_| {
        output::warning("the coordinator is away, so jobs of this self test may be left; `yard jobs` lists them");
        Ok(())
    })
}

/// Moves what was fetched to where the user finds it.
fn keep(scratch: &Path, id: &str) -> Result<PathBuf, Failure> {
    let to = PathBuf::from(format!("yard-selftest-{id}"));
    copy(scratch, &to)?;
    Ok(to)
}

fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    let failed = |path: &Path, error: &io::Error| Failure::path("copy", path, error);
    std::fs::create_dir_all(to).map_err(|error| failed(to, &error))?;
    for entry in std::fs::read_dir(from).map_err(|error| failed(from, &error))? {
        let entry = entry.map_err(|error| failed(from, &error))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target)?;
        } else {
            std::fs::copy(&path, &target).map_err(|error| failed(&path, &error))?;
        }
    }
    Ok(())
}
