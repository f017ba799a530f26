//! `yard run` and `yard submit`.

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;
use trainyard_common::ids::{Digest, JobId, RequestId};
use trainyard_common::spec::JobSpec;
use trainyard_common::units::format_bytes;
use trainyard_proto::v1;
use trainyard_transport::{blobs, pack};

use crate::args::{Global, JobFlags, RunArgs, SubmitArgs};
use crate::connection::{self, Connection, patiently};
use crate::failure::{EXIT_INVALID, EXIT_NOT_FOUND, EXIT_UNAVAILABLE, Failure};
use crate::follow::{self, Follow};
use crate::{jobfile, output, spec};

/// Submits, follows, and ends with the job's exit code.
pub(crate) async fn run(global: &Global, args: RunArgs) -> Result<ExitCode, Failure> {
    let default_dir = args.job.file.is_none().then(|| Path::new("."));
    let given = args.job.clone();
    let (flags, spec) = prepare(args.job)?;
    let connection = connection::connect_or_start(global).await?;
    let job = send(&connection, &flags, spec, default_dir)
        .await
        .map_err(|failure| jobfile::blame(failure, &given))?;
    if flags.json {
        output::line(&json!({ "type": "submitted", "job": job }).to_string());
    }
    follow::follow(
        &connection,
        job,
        Follow {
            json: flags.json,
            quiet: false,
        },
    )
    .await
}

/// Submits and prints the id.
pub(crate) async fn submit(global: &Global, args: SubmitArgs) -> Result<ExitCode, Failure> {
    let given = args.job.clone();
    let (flags, spec) = prepare(args.job)?;
    let connection = connection::connect_or_start(global).await?;
    let totals = totals(&spec);
    let job = send(&connection, &flags, spec, None)
        .await
        .map_err(|failure| jobfile::blame(failure, &given))?;
    if flags.json {
        output::line(&json!({ "type": "submitted", "job": job }).to_string());
    } else {
        output::note(&totals);
        output::line(&job.to_string());
    }
    Ok(ExitCode::SUCCESS)
}

fn prepare(flags: JobFlags) -> Result<(JobFlags, JobSpec), Failure> {
    let given = flags.clone();
    let flags = jobfile::merge(flags)?;
    let spec = spec::spec(&flags)
        .and_then(|spec| {
            check_dir(&flags)?;
            Ok(spec)
        })
        .map_err(|failure| jobfile::blame(failure, &given))?;
    // Before anything is started or sent.
    request_id(&flags)?;
    Ok((flags, spec))
}

/// Refuses a directory that is none, before anything is started or sent.
fn check_dir(flags: &JobFlags) -> Result<(), Failure> {
    match &flags.dir {
        Some(dir) if !dir.is_dir() => {
            let message = format!(
                "there is no directory {}; name one, or use --no-dir",
                dir.display()
            );
            let mut failure = Failure::invalid("dir", message);
            failure.exit = EXIT_NOT_FOUND;
            Err(failure)
        }
        Some(_) | None => Ok(()),
    }
}

/// Sends the directory and the specification; the answer comes after the job is on the coordinator's disk.
pub(crate) async fn send(
    connection: &Connection,
    flags: &JobFlags,
    mut spec: JobSpec,
    default_dir: Option<&Path>,
) -> Result<JobId, Failure> {
    let request_id = request_id(flags)?;
    if let Some(dir) = spec::directory(flags, default_dir) {
        spec.snapshot = Some(snapshot(connection, &dir).await?);
    }
    let request = v1::SubmitRequest {
        request_id: request_id.to_string(),
        spec: Some(v1::JobSpec::from(&spec)),
        allow_infeasible: flags.allow_infeasible,
    };
    let answer = patiently(|| {
        let (mut jobs, request) = (connection.jobs(), request.clone());
        async move { jobs.submit(request).await }
    })
    .await?;
    Ok(JobId(answer.into_inner().job))
}

fn request_id(flags: &JobFlags) -> Result<RequestId, Failure> {
    let text = match &flags.request_id {
        Some(text) => text.clone(),
        None => {
            let mut bytes = [0; 16];
            getrandom::fill(&mut bytes).map_err(|error| {
                Failure::new(
                    crate::failure::EXIT_INTERNAL,
                    "RANDOM",
                    format!("cannot draw a request id: {error}"),
                )
            })?;
            trainyard_common::ids::ClusterId(bytes).to_string()
        }
    };
    text.parse()
        .map_err(|error| Failure::usage("--request-id", error))
}

/// Packs a directory and sends what the coordinator lacks of it.
async fn snapshot(connection: &Connection, dir: &Path) -> Result<Digest, Failure> {
    let packed = pack::pack(dir, &pack::PackOptions::snapshot())
        .map_err(|error| Failure::chain(EXIT_INVALID, "SNAPSHOT", &error))?;
    let bar = output::bytes_bar("sending", packed.total_bytes);
    let shown = bar.clone();
    let digest = blobs::upload_tree(&connection.channel, &packed, move |progress| {
        shown.set_length(progress.total_bytes);
        shown.set_position(progress.bytes);
    })
    .await
    .map_err(|error| blob_failure(&error))?;
    bar.finish_and_clear();
    Ok(digest)
}

/// A transfer that failed, with the coordinator's own refusal where there is one.
pub(crate) fn blob_failure(error: &blobs::BlobError) -> Failure {
    match error.status() {
        Some(status) => status.clone().into(),
        None => Failure::chain(EXIT_UNAVAILABLE, "TRANSFER", error),
    }
}

/// What a job asks for in all, as flags count per node.
fn totals(spec: &JobSpec) -> String {
    let nodes = u64::from(spec.nodes);
    let each = &spec.resources_per_node;
    let mut parts = vec![output::cpus(each.cpu_milli.saturating_mul(nodes))];
    if each.memory_bytes > 0 {
        parts.push(format!(
            "{} memory",
            format_bytes(each.memory_bytes.saturating_mul(nodes))
        ));
    }
    if each.gpus > 0 {
        parts.push(output::count(u64::from(each.gpus) * nodes, "GPU"));
    }
    let tasks = match spec.task_count() {
        1 => String::new(),
        tasks => format!("{}, each with ", output::count(u64::from(tasks), "task")),
    };
    let ranks = output::count(u64::from(spec.world_size()), "rank");
    format!(
        "{tasks}{ranks} on {}: {} in all",
        output::count(nodes, "node"),
        parts.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_told_over_all_nodes() {
        let mut spec = JobSpec::new("x", vec!["true".into()]);
        spec.nodes = 4;
        spec.procs_per_node = 8;
        spec.resources_per_node.gpus = 8;
        assert_eq!(totals(&spec), "32 ranks on 4 nodes: 4 CPUs, 32 GPUs in all");
    }
}
