//! `yard outputs`: what a job left in `YARD_OUTPUT_DIR` (or its checkpoint), fetched from wherever it ran.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;
use trainyard_common::ids::{Digest, JobId, TaskIndex};
use trainyard_common::record::{AttemptRecord, MemberRecord};
use trainyard_common::units::format_bytes;
use trainyard_transport::blobs;
use trainyard_transport::tree::{EntryKind, Tree, TreeEntry};
use trainyard_transport::unpack;

use crate::args::{Global, OutputsArgs};
use crate::connection::{self, Connection};
use crate::failure::{EXIT_INTERNAL, EXIT_IO, EXIT_NOT_FOUND, Failure};
use crate::jobs;
use crate::output;
use crate::submit::blob_failure;

/// What to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The checkpoint instead of the outputs.
    pub(crate) checkpoint: bool,
    /// Only of this attempt.
    pub(crate) attempt: Option<u32>,
}

/// What was fetched.
#[derive(Debug, Clone)]
pub(crate) struct Fetched {
    pub(crate) files: usize,
    pub(crate) bytes: u64,
    /// Whether nothing more can come: the job is over.
    pub(crate) complete: bool,
}

/// Fetches a job's outputs.
pub(crate) async fn outputs(global: &Global, args: OutputsArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect(global).await?;
    let wanted = Wanted {
        checkpoint: args.checkpoint,
        attempt: args.attempt,
    };
    let what = if args.checkpoint {
        "checkpoint"
    } else {
        "outputs"
    };
    let to = args
        .to
        .unwrap_or_else(|| PathBuf::from(format!("{}-{what}", args.job)));
    let fetched = fetch(&connection, args.job, wanted, &to).await?;
    if args.json {
        output::line(
            &json!({
                "job": args.job, "to": to, "files": fetched.files, "bytes": fetched.bytes,
                "complete": fetched.complete,
            })
            .to_string(),
        );
    } else {
        output::line(&format!(
            "{}, {} in {}",
            output::count(fetched.files as u64, "file"),
            format_bytes(fetched.bytes),
            to.display()
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Fetches into `to`, over what is there.
pub(crate) async fn fetch(
    connection: &Connection,
    job: JobId,
    wanted: Wanted,
    to: &Path,
) -> Result<Fetched, Failure> {
    let detail = jobs::get(connection, job).await?;
    let warnings = detail.warnings();
    warnings.iter().for_each(|warning| output::warning(warning));
    let chosen = choose(&detail.attempts, wanted);
    if chosen.is_empty() {
        let what = if wanted.checkpoint {
            "checkpoint"
        } else {
            "outputs"
        };
        let message = if detail.job.state.is_terminal() {
            format!(
                "{job} left no {what}: nothing {}was written to {}",
                if warnings.is_empty() {
                    ""
                } else {
                    "that could be kept "
                },
                if wanted.checkpoint {
                    "YARD_CHECKPOINT_DIR"
                } else {
                    "YARD_OUTPUT_DIR"
                }
            )
        } else {
            format!(
                "{job} is {} and has left no {what} yet; they are brought in when an attempt ends",
                detail.job.state
            )
        };
        return Err(Failure::new(EXIT_NOT_FOUND, "NO_OUTPUTS", message));
    }
    let mut entries = BTreeMap::new();
    for (task, digests) in &chosen {
        let prefix = if detail.job.spec.array.is_some() {
            format!("task-{task}/")
        } else {
            String::new()
        };
        for (node_rank, digest) in digests {
            let tree = blobs::fetch_tree(&connection.channel, *digest)
                .await
                .map_err(|error| blob_failure(&error))?;
            lay_over(&mut entries, &tree, &prefix, *node_rank);
        }
    }
    let tree = Tree::new(entries.into_values().collect())
        .map_err(|error| Failure::chain(EXIT_INTERNAL, "OUTPUTS", &error))?;
    write(connection, &tree, to).await?;
    let complete = detail.job.state.is_terminal();
    if !complete {
        let state = detail.job.state;
        output::warning(&format!(
            "{job} is {state}: this is what was brought in so far; fetch again when it has ended"
        ));
    }
    Ok(Fetched {
        files: tree.files().count(),
        bytes: tree.total_bytes(),
        complete,
    })
}

/// For each task the trees of its newest attempt that left any, by node rank.
fn choose(attempts: &[AttemptRecord], wanted: Wanted) -> BTreeMap<TaskIndex, Vec<(usize, Digest)>> {
    let digest = |member: &MemberRecord| {
        if wanted.checkpoint {
            member.checkpoint
        } else {
            member.outputs
        }
    };
    let mut chosen: BTreeMap<TaskIndex, (u32, Vec<(usize, Digest)>)> = BTreeMap::new();
    for attempt in attempts.iter().filter(|attempt| {
        wanted
            .attempt
            .is_none_or(|number| number == attempt.id.attempt.0)
    }) {
        let trees: Vec<_> = attempt
            .members
            .iter()
            .enumerate()
            .filter_map(|(rank, member)| Some((rank, digest(member)?)))
            .collect();
        let number = attempt.id.attempt.0;
        if !trees.is_empty()
            && chosen
                .get(&attempt.id.task)
                .is_none_or(|(known, _)| *known < number)
        {
            chosen.insert(attempt.id.task, (number, trees));
        }
    }
    chosen
        .into_iter()
        .map(|(task, (_, trees))| (task, trees))
        .collect()
}

/// Adds a member's tree. Where an earlier member has something else under the same path, this one's is kept beside it
/// as `PATH.node-RANK`.
fn lay_over(
    entries: &mut BTreeMap<String, TreeEntry>,
    tree: &Tree,
    prefix: &str,
    node_rank: usize,
) {
    for entry in tree.entries() {
        let mut entry = entry.clone();
        entry.path = format!("{prefix}{}", entry.path);
        let clashes = |known: &TreeEntry| {
            let both_directories = matches!(
                (&known.kind, &entry.kind),
                (EntryKind::Directory, EntryKind::Directory)
            );
            !both_directories && known.kind != entry.kind
        };
        if entries.get(&entry.path).is_some_and(clashes) {
            entry.path = format!("{}.node-{node_rank}", entry.path);
        }
        entries.insert(entry.path.clone(), entry);
    }
}

async fn write(connection: &Connection, tree: &Tree, to: &Path) -> Result<(), Failure> {
    let cache = tempfile::Builder::new()
        .prefix(".yard-fetch-")
        .tempdir_in(existing_parent(to))
        .map_err(|error| Failure::path("make a directory beside", to, &error))?;
    let bar = output::bytes_bar("fetching", tree.total_bytes());
    let shown = bar.clone();
    blobs::fetch_blobs(&connection.channel, tree, cache.path(), move |progress| {
        shown.set_length(progress.total_bytes);
        shown.set_position(progress.bytes);
    })
    .await
    .map_err(|error| blob_failure(&error))?;
    bar.finish_and_clear();
    unpack::unpack_over(tree, to, |digest| {
        std::fs::File::open(blobs::blob_path(cache.path(), digest))
    })
    .map_err(|error| Failure::chain(EXIT_IO, "OUTPUTS", &error))
}

/// The nearest directory above `to` that exists, so that the transfer lands on the same file system.
fn existing_parent(to: &Path) -> PathBuf {
    let absolute = std::path::absolute(to).unwrap_or_else(|_| to.to_path_buf());
    let parent = absolute.ancestors().skip(1).find(|dir| dir.is_dir());
    parent.unwrap_or(Path::new(".")).to_path_buf()
}
