//! `yard coordinator check`, `backup` and `restore`: a coordinator's state directory, without asking a coordinator.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};
use trainyard_coordinator::store::{Damage, Inspection, StoreError};
use trainyard_coordinator::{Backup, BackupError};

use crate::args::{BackupArgs, CheckArgs, Global, RestoreArgs};
use crate::failure::{EXIT_INVALID, EXIT_IO, EXIT_NOT_FOUND, EXIT_REFUSED, Failure};
use crate::json::time;
use crate::local::LocalCluster;
use crate::output;
use crate::paths::Paths;

/// What a backup leaves out.
const NOT_IN_IT: &str =
    "not in it: snapshots, outputs and checkpoints (blobs/), output of ranks (logs/)";
/// Jobs that are named for one damage.
const JOBS_NAMED: usize = 8;

/// Reads everything and says what is damaged.
pub(crate) fn check(global: &Global, args: &CheckArgs) -> Result<ExitCode, Failure> {
    let dir = existing_state(global, args.state_dir.as_deref())?;
    let found = trainyard_coordinator::check(&dir).map_err(|error| failure(&error))?;
    if args.json {
        output::line(&report(&dir, &found).to_string());
    } else {
        print(&dir, &found);
    }
    Ok(if found.damage.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_INVALID)
    })
}

fn print(dir: &Path, found: &Inspection) {
    output::fields(&[
        ("STATE", output::printable(&dir.display().to_string())),
        ("CLUSTER", found.cluster.to_string()),
        ("TERM", found.term.to_string()),
        ("ROWS", found.rows.to_string()),
        ("TRANSITIONS", found.transitions.to_string()),
        ("SEQUENCE", found.sequence.to_string()),
    ]);
    if found.damage.is_empty() {
        return output::line("everything is whole");
    }
    let rows = found.damage.iter().map(|damage| {
        vec![
            output::printable(&damage.table),
            output::printable(&damage.key),
            damage
                .offset
                .map(|at| format!("{}:{at}", name(damage)))
                .unwrap_or_else(|| "-".to_owned()),
            jobs(damage),
            output::printable(&damage.reason),
        ]
    });
    output::line("");
    let headers = ["TABLE", "KEY", "OFFSET", "JOBS", "DAMAGE"];
    output::line(output::table(&headers, rows.collect()).trim_end());
    let more = if found.more { " and more" } else { "" };
    let places = output::count(found.damage.len() as u64, "damaged place");
    output::error(&format!(
        "{places}{more} in {}; restore a backup into a new directory with `yard coordinator restore`",
        dir.join("state.db").display()
    ));
}

/// The file that it is in.
fn name(damage: &Damage) -> String {
    let name = damage.file.file_name().unwrap_or_default();
    output::printable(&name.to_string_lossy())
}

fn jobs(damage: &Damage) -> String {
    if damage.jobs.is_empty() {
        return "-".to_owned();
    }
    let named: Vec<String> = damage
        .jobs
        .iter()
        .take(JOBS_NAMED)
        .map(ToString::to_string)
        .collect();
    let more = damage.jobs.len().saturating_sub(JOBS_NAMED);
    match more {
        0 => named.join(","),
        more => format!("{} and {more} more", named.join(",")),
    }
}

fn report(dir: &Path, found: &Inspection) -> Value {
    let damage = found.damage.iter().map(|damage| {
        let jobs: Vec<String> = damage.jobs.iter().map(ToString::to_string).collect();
        json!({
            "file": damage.file,
            "table": damage.table,
            "key": damage.key,
            "offset": damage.offset,
            "reason": damage.reason,
            "jobs": jobs,
        })
    });
    json!({
        "state": dir.join("state.db"),
        "cluster": found.cluster.to_string(),
        "schema": found.schema,
        "term": found.term.0,
        "rows": found.rows,
        "transitions": found.transitions,
        "sequence": found.sequence.0,
        "whole": found.damage.is_empty(),
        "damage": damage.collect::<Vec<_>>(),
        "more": found.more,
    })
}

/// Copies the state, also under a coordinator that runs on it.
pub(crate) fn backup(global: &Global, args: &BackupArgs) -> Result<ExitCode, Failure> {
    let dir = existing_state(global, args.state_dir.as_deref())?;
    let (place, made) =
        trainyard_coordinator::backup(&dir, &args.to).map_err(|error| failure(&error))?;
    if args.json {
        output::line(&backup_json(&place, &made).to_string());
    } else {
        output::line(&output::printable(&place.display().to_string()));
        output::note(&format!(
            "{}, {}, checked; {NOT_IN_IT}; it holds the cluster's secret key: keep it as you keep that",
            output::count(made.rows, "row"),
            output::count(made.transitions, "transition"),
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a state directory from a backup.
pub(crate) fn restore(global: &Global, args: &RestoreArgs) -> Result<ExitCode, Failure> {
    let dir = match &args.state_dir {
        Some(dir) => dir.clone(),
        None => LocalCluster::new(Paths::new(global)?.data).coordinator_dir(),
    };
    let dir = absolute(&dir)?;
    let made = trainyard_coordinator::restore(&args.from, &dir).map_err(|error| failure(&error))?;
    if args.json {
        output::line(&backup_json(&dir, &made).to_string());
    } else {
        output::line(&output::printable(&dir.display().to_string()));
        output::note(&format!(
            "the state of {}; ids go on far above those of the backup, and nothing is placed until its nodes were heard \
             of; {NOT_IN_IT}",
            time(made.taken_at)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn backup_json(place: &Path, made: &Backup) -> Value {
    json!({
        "path": place,
        "cluster": made.cluster.to_string(),
        "taken_at": time(made.taken_at),
        "version": made.version,
        "term": made.term.0,
        "rows": made.rows,
        "transitions": made.transitions,
        "sequence": made.sequence.0,
        "left_out": ["blobs", "logs"],
    })
}

/// The state that was named, else that of the cluster that commands here speak to: of `yard up`, or of a `yard
/// coordinator run` in the usual place.
fn existing_state(global: &Global, given: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(dir) = given {
        return absolute(dir);
    }
    let paths = Paths::new(global)?;
    let places = [paths.local(), paths.data].map(LocalCluster::new);
    if let Some(found) = places.iter().find(|cluster| cluster.exists()) {
        return absolute(&found.coordinator_dir());
    }
    let [up, run] = places.map(|cluster| cluster.coordinator_dir().display().to_string());
    let message = format!(
        "no coordinator keeps its state in {up} or {run}; name its directory with --state-dir"
    );
    Err(Failure::new(EXIT_NOT_FOUND, "NO_STATE", message))
}

fn absolute(dir: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(dir).map_err(|error| Failure::path("find", dir, &error))
}

fn failure(error: &BackupError) -> Failure {
    let missing = |source: &std::io::Error| source.kind() == std::io::ErrorKind::NotFound;
    let (exit, reason) = match error {
        BackupError::NotEmpty { .. } => (EXIT_REFUSED, "NOT_EMPTY"),
        BackupError::Store(StoreError::Held { .. }) => (EXIT_REFUSED, "STATE_HELD"),
        BackupError::Store(StoreError::Missing { .. }) => (EXIT_NOT_FOUND, "NO_STATE"),
        BackupError::Store(StoreError::File { source, .. }) if missing(source) => {
            (EXIT_NOT_FOUND, "NO_STATE")
        }
        BackupError::File { source, .. } if missing(source) => (EXIT_NOT_FOUND, "IO"),
        BackupError::NoBackup { .. } => (EXIT_INVALID, "NO_BACKUP"),
        BackupError::Damaged { .. }
        | BackupError::Changed { .. }
        | BackupError::Authority(_)
        | BackupError::Store(
            StoreError::Corrupt { .. }
            | StoreError::Damaged { .. }
            | StoreError::OtherAuthority { .. }
            | StoreError::Schema { .. }
            | StoreError::OtherCluster { .. },
        ) => (EXIT_INVALID, "DAMAGED"),
        BackupError::Store(_) | BackupError::File { .. } => (EXIT_IO, "IO"),
    };
    Failure::chain(exit, reason, error)
}
