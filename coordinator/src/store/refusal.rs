//! What a refusal to start says: where the damage is, which jobs it is about, and what can be done. Found out by reading the
//! whole state once a start has met damage, so that nobody has to run another command to learn it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use trainyard_common::ids::JobId;

use super::sqlite::inspect;
use super::{Damage, FILE_NAME, StoreError};

/// Damaged places that a refusal names; `yard coordinator check` tells all.
const PLACES_NAMED: usize = 5;
/// Jobs that a refusal names.
const JOBS_NAMED: usize = 20;
/// Where backups are put before a migration, in the state directory.
pub(crate) const BACKUPS: &str = "backups";

/// What a start met, with everything that can be found out about it.
pub(crate) fn explain(dir: &Path, error: StoreError) -> StoreError {
    let StoreError::Corrupt {
        file,
        table,
        key,
        reason,
    } = error
    else {
        return error;
    };
    let database = dir.join(FILE_NAME);
    let met = Damage {
        offset: key.strip_prefix("offset ").and_then(|at| at.parse().ok()),
        jobs: job_of(table, &key).into_iter().collect(),
        table: table.to_owned(),
        file,
        key,
        reason,
    };
    let (mut places, mut more) = (Vec::new(), false);
    if let Ok(found) = inspect::inspect(&database) {
        (places, more) = (found.damage, found.more);
    }
    let known = places
        .iter()
        .any(|place| place.table == met.table && (place.key == met.key || met.key == "(unknown)"));
    if !known {
        places.insert(0, met);
    }
    StoreError::Damaged {
        file: database,
        places,
        more,
    }
}

fn job_of(table: &str, key: &str) -> Option<JobId> {
    if !matches!(table, "jobs" | "tasks" | "attempts" | "bundles") {
        return None;
    }
    key.split('.').next()?.parse().ok()
}

/// The sentence of [`StoreError::Damaged`].
pub(super) fn damaged(file: &Path, places: &[Damage], more: bool) -> String {
    let dir = file.parent().unwrap_or(file).display();
    let named: Vec<String> = places.iter().take(PLACES_NAMED).map(place).collect();
    let left = places.len().saturating_sub(PLACES_NAMED);
    let left = match (left, more) {
        (0, false) => String::new(),
        (0, true) => "; and more".to_owned(),
        (left, _) => format!("; and {left} more places"),
    };
    format!(
        "the state in {dir} is damaged: {}{left}; {}; running jobs are not affected; `yard coordinator check --state-dir {dir}` \
         tells everything; restore a backup with `yard coordinator restore`, or give up what is lost with `yard coordinator \
         run --state-dir {dir} --accept-loss`",
        named.join("; "),
        jobs(places.iter().flat_map(|place| place.jobs.iter().copied()))
    )
}

fn place(damage: &Damage) -> String {
    let at = damage
        .offset
        .map_or(String::new(), |offset| format!(" at offset {offset}"));
    let name = damage
        .file
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    format!(
        "{name}{at}, table {}, key {}: {}",
        damage.table, damage.key, damage.reason
    )
}

/// Names the jobs, as many as fit.
pub(super) fn jobs(jobs: impl IntoIterator<Item = JobId>) -> String {
    let jobs: BTreeSet<JobId> = jobs.into_iter().collect();
    if jobs.is_empty() {
        return "it cannot be told which jobs that is about".to_owned();
    }
    let named: Vec<String> = jobs
        .iter()
        .take(JOBS_NAMED)
        .map(ToString::to_string)
        .collect();
    let more = match jobs.len().saturating_sub(JOBS_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("affected jobs: {}{more}", named.join(", "))
}

/// What to do with a state that a later version wrote.
pub(super) fn downgrade(database: &Path, known: i64) -> String {
    let dir = database.parent().unwrap_or(database);
    match backup_for(dir, known) {
        Some(backup) => format!(
            "restore the backup that was made before the upgrade into a new directory: `yard coordinator restore --from {} \
             --state-dir {}.restored`",
            backup.display(),
            dir.display()
        ),
        None => format!(
            "restore a backup that was made before the upgrade (there is none in {})",
            dir.join(BACKUPS).display()
        ),
    }
}

/// The newest backup in `dir` of a schema version that this one reads.
fn backup_for(dir: &Path, known: i64) -> Option<PathBuf> {
    let found = fs::read_dir(dir.join(BACKUPS)).ok()?;
    let backups = found.filter_map(|entry| {
        let path = entry.ok()?.path();
        let (schema, at) = migration_backup(&path)?;
        (schema <= known).then_some((at, path))
    });
    backups.max().map(|(_, path)| path)
}

/// The schema version and time of a backup that was made before a migration, from its name.
pub(crate) fn migration_backup(path: &Path) -> Option<(i64, u64)> {
    let name = path.file_name()?.to_str()?.strip_prefix("schema-")?;
    let (schema, at) = name.split_once('-')?;
    Some((schema.parse().ok()?, at.parse().ok()?))
}
