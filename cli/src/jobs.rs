//! `yard jobs`, `job`, `wait` and `cancel`.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use trainyard_common::ids::JobId;
use trainyard_common::record::{AttemptRecord, JobRecord, MemberRecord, TaskRecord};
use trainyard_common::time::Timestamp;
use trainyard_common::units::{format_bytes, format_duration};
use trainyard_proto::convert::InvalidField;
use trainyard_proto::v1;

use crate::absences::{self, Absence};
use crate::args::{CancelArgs, Global, JobArgs, JobsArgs};
use crate::connection::{self, Connection, patiently};
use crate::failure::{EXIT_INTERNAL, Failure};
use crate::follow::{self, Follow};
use crate::logs::local_time;
use crate::output::{self, printable};

/// Rows of one page of `jobs`.
const PAGE: u32 = 200;

/// A job with what belongs to it.
#[derive(Debug, Clone)]
pub(crate) struct JobDetail {
    pub(crate) job: JobRecord,
    pub(crate) tasks: Vec<TaskRecord>,
    pub(crate) attempts: Vec<AttemptRecord>,
}

impl JobDetail {
    /// What of the job's logs, outputs and checkpoints is not kept, a sentence for each member.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let members = self.attempts.iter().flat_map(|attempt| {
            attempt
                .members
                .iter()
                .map(move |member| (attempt.id, member))
        });
        members
            .filter(|(_, member)| !member.warning.is_empty())
            .map(|(attempt, member)| format!("{attempt} on {}: {}", member.node, member.warning))
            .collect()
    }
}

/// Lists jobs, newest first.
pub(crate) async fn list(global: &Global, args: JobsArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect(global).await?;
    let mut found: Vec<JobRecord> = Vec::new();
    let mut before = 0;
    while found.len() < args.limit as usize {
        let page_size = PAGE.min(args.limit - u32::try_from(found.len()).unwrap_or(u32::MAX));
        let request = v1::ListJobsRequest {
            all: args.all,
            page_size,
            before,
        };
        let page = connection.jobs().list(request).await?.into_inner();
        for job in page.jobs {
            found.push(job_of(Some(job))?);
        }
        before = page.next_before;
        if before == 0 {
            break;
        }
    }
    if args.json {
        output::line(
            &json!({ "jobs": found.iter().map(crate::json::job).collect::<Value>() }).to_string(),
        );
    } else if found.is_empty() {
        let hint = if args.all {
            "there are no jobs"
        } else {
            "no job is pending or running; -a also lists those that are over"
        };
        output::note(hint);
    } else {
        let rows = found.iter().map(row).collect();
        output::line(&output::table_within(
            output::terminal_width(),
            &[
                "ID", "NAME", "OWNER", "STATE", "TASKS", "NODES", "GPUS", "AGE", "RAN", "REASON",
            ],
            rows,
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn row(job: &JobRecord) -> Vec<String> {
    let now = now();
    let ran = job
        .started_at
        .map(|started| format_duration(job.ended_at.unwrap_or(now).since(started)));
    let reason = printable(&job.reason.message);
    vec![
        job.id.to_string(),
        job.spec.name.clone(),
        job.owner.to_string(),
        output::state(job.state.as_str()),
        tasks(job),
        job.spec.nodes.to_string(),
        (u64::from(job.spec.nodes) * u64::from(job.spec.resources_per_node.gpus)).to_string(),
        format_duration(now.since(job.submitted_at)),
        ran.unwrap_or_default(),
        reason.replace('\n', " "),
    ]
}

fn tasks(job: &JobRecord) -> String {
    match job.spec.task_count() {
        1 => "1".to_owned(),
        all => format!("{}/{all}", job.tasks.succeeded),
    }
}

fn now() -> Timestamp {
    Timestamp(u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0))
}

/// Shows one job.
pub(crate) async fn show(global: &Global, args: JobArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect(global).await?;
    let detail = get(&connection, args.job).await?;
    let absences = absences::of(&connection, &detail).await?;
    if args.json {
        let mut value = crate::json::job_detail(&detail);
        value["absent_nodes"] = absences.iter().flat_map(crate::json::absence).collect();
        output::line(&value.to_string());
    } else {
        show_job(&detail, &absences);
    }
    Ok(ExitCode::SUCCESS)
}

/// The state, and what it waits for or goes on without.
fn state_with(detail: &JobDetail, absences: &[Absence]) -> String {
    let state = output::state(detail.job.state.as_str());
    match absences {
        [] => state,
        [only] => format!("{state} ({})", only.text(now())),
        [first, more @ ..] => format!(
            "{state} ({}: {}; and {} more)",
            first.attempt,
            first.text(now()),
            output::count(more.len() as u64, "attempt")
        ),
    }
}

fn show_job(detail: &JobDetail, absences: &[Absence]) {
    let JobDetail {
        job,
        tasks: rows,
        attempts,
    } = detail;
    let spec = &job.spec;
    let each = &spec.resources_per_node;
    let mut amounts = vec![output::cpus(each.cpu_milli)];
    if each.memory_bytes > 0 {
        amounts.push(format!("{} memory", format_bytes(each.memory_bytes)));
    }
    if each.gpus > 0 {
        amounts.push(format!(
            "{}{}",
            output::count(u64::from(each.gpus), "GPU"),
            spec.gpu_type
                .as_ref()
                .map(|model| format!(" ({model})"))
                .unwrap_or_default()
        ));
    }
    let time = |at: Option<Timestamp>| at.map(local_time).unwrap_or_default();
    output::fields(&[
        (
            "job",
            format!(
                "{}  {}",
                output::styled(output::STRONG, &job.id.to_string()),
                spec.name
            ),
        ),
        ("state", state_with(detail, absences)),
        ("reason", printable(&job.reason.message)),
        (
            "owner",
            format!("{} (workspace {})", job.owner, spec.workspace),
        ),
        ("command", printable(&spec.command.join(" "))),
        (
            "gang",
            format!(
                "{}, {} on each, launcher {}",
                output::count(u64::from(spec.nodes), "node"),
                output::count(u64::from(spec.procs_per_node), "rank"),
                spec.launcher
            ),
        ),
        ("each node", amounts.join(", ")),
        (
            "time limit",
            spec.time_limit.map(format_duration).unwrap_or_default(),
        ),
        (
            "retries",
            if spec.retries == 0 {
                String::new()
            } else {
                spec.retries.to_string()
            },
        ),
        ("submitted", time(Some(job.submitted_at))),
        ("started", time(job.started_at)),
        ("ended", time(job.ended_at)),
    ]);
    if spec.array.is_some() {
        let counts = &job.tasks;
        output::line(&format!(
            "\n{} tasks: {} pending, {} active, {} succeeded, {} failed, {} cancelled, {} timed out",
            spec.task_count(),
            counts.pending,
            counts.active,
            counts.succeeded,
            counts.failed,
            counts.cancelled,
            counts.timed_out,
        ));
        if !rows.is_empty() {
            let rows = rows.iter().map(task_row).collect();
            output::line(&output::table(
                &["TASK", "STATE", "ATTEMPTS", "EXIT", "REASON"],
                rows,
            ));
        }
    }
    if !attempts.is_empty() {
        let rows = attempts.iter().flat_map(attempt_rows).collect();
        output::line("");
        output::line(&output::table(
            &[
                "ATTEMPT", "STATE", "OUTCOME", "NODE", "RANKS", "GPUS", "RAN", "REASON",
            ],
            rows,
        ));
    }
    for warning in detail.warnings() {
        output::line(&format!("not kept: {}", printable(&warning)));
    }
}

fn task_row(task: &TaskRecord) -> Vec<String> {
    vec![
        task.index.to_string(),
        output::state(task.state.as_str()),
        task.attempts.to_string(),
        task.exit.map(|exit| exit.to_string()).unwrap_or_default(),
        printable(&task.reason.message),
    ]
}

fn attempt_rows(attempt: &AttemptRecord) -> Vec<Vec<String>> {
    let ran = attempt
        .started_at
        .map(|started| format_duration(attempt.ended_at.unwrap_or_else(now).since(started)));
    let row = |(place, member): (usize, &MemberRecord)| {
        let first = place == 0;
        let ranks = match member.ranks.as_slice() {
            [] => member.phase.to_string(),
            ranks => ranks
                .iter()
                .map(|rank| format!("{}: {}", rank.rank, rank.exit))
                .collect::<Vec<_>>()
                .join(", "),
        };
        vec![
            if first {
                attempt.id.to_string()
            } else {
                String::new()
            },
            if first {
                output::state(attempt.state.as_str())
            } else {
                String::new()
            },
            if first {
                attempt
                    .outcome
                    .map(|outcome| output::state(outcome.as_str()))
                    .unwrap_or_default()
            } else {
                String::new()
            },
            member.node.to_string(),
            ranks,
            member.gpu_uuids.len().to_string(),
            if first {
                ran.clone().unwrap_or_default()
            } else {
                String::new()
            },
            if first {
                printable(&attempt.reason.message)
            } else {
                String::new()
            },
        ]
    };
    attempt.members.iter().enumerate().map(row).collect()
}

/// Waits for the end of a job.
pub(crate) async fn wait(global: &Global, args: JobArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect(global).await?;
    follow::follow(
        &connection,
        args.job,
        Follow {
            json: args.json,
            quiet: true,
        },
    )
    .await
}

/// Ends jobs, and waits until their processes are gone.
pub(crate) async fn cancel(global: &Global, args: CancelArgs) -> Result<ExitCode, Failure> {
    let connection = connection::connect(global).await?;
    let mut first_failure = None;
    let mut ended = Vec::new();
    for job in args.jobs {
        let result = async {
            let record = request_cancel(&connection, job).await?;
            if args.no_wait || record.state.is_terminal() {
                Ok(record)
            } else {
                tell_absences(&connection, job).await?;
                follow::quietly(&connection, job).await
            }
        };
        match result.await {
            Ok(record) => {
                if !args.json {
                    output::line(&format!("{job} {}", output::state(record.state.as_str())));
                }
                ended.push(record);
            }
            // The others are cancelled all the same; the exit code is the first failure's.
            Err(failure) => {
                output::error(&format!("{job}: {}", failure.message));
                first_failure.get_or_insert(failure.exit);
            }
        }
    }
    if args.json {
        output::line(
            &json!({ "jobs": ended.iter().map(crate::json::job).collect::<Value>() }).to_string(),
        );
    }
    Ok(first_failure.map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// Says which nodes an end waits for before it is waited for.
async fn tell_absences(connection: &Connection, job: JobId) -> Result<(), Failure> {
    let detail = get(connection, job).await?;
    for absence in absences::of(connection, &detail).await? {
        output::note(&format!("{}: {}", absence.attempt, absence.text(now())));
    }
    Ok(())
}

/// Asks for the end of a job; the answer is the job as it then is.
pub(crate) async fn request_cancel(
    connection: &Connection,
    job: JobId,
) -> Result<JobRecord, Failure> {
    let answer = patiently(|| {
        let mut jobs = connection.jobs();
        async move { jobs.cancel(v1::CancelJobRequest { job: job.0 }).await }
    })
    .await?;
    job_of(answer.into_inner().job)
}

/// One job with its tasks and attempts.
pub(crate) async fn get(connection: &Connection, job: JobId) -> Result<JobDetail, Failure> {
    let v1::GetJobResponse {
        job,
        tasks,
        attempts,
    } = follow::current(connection, job).await?;
    Ok(JobDetail {
        job: job_of(job)?,
        tasks: tasks
            .into_iter()
            .map(TaskRecord::try_from)
            .collect::<Result<_, _>>()
            .map_err(unreadable)?,
        attempts: attempts
            .into_iter()
            .map(AttemptRecord::try_from)
            .collect::<Result<_, _>>()
            .map_err(unreadable)?,
    })
}

/// The job in an answer.
pub(crate) fn job_of(job: Option<v1::Job>) -> Result<JobRecord, Failure> {
    let missing = || {
        Failure::new(
            EXIT_INTERNAL,
            "BAD_ANSWER",
            "the coordinator's answer holds no job; are both of the same version?",
        )
    };
    job.ok_or_else(missing)?.try_into().map_err(unreadable)
}

/// An answer that this version cannot read.
pub(crate) fn unreadable(error: InvalidField) -> Failure {
    Failure::new(
        EXIT_INTERNAL,
        "BAD_ANSWER",
        format!(
            "cannot read the coordinator's answer ({error}); use a yard of the coordinator's version"
        ),
    )
}

/// How long to wait between looks at something that has no watch.
pub(crate) const POLL: Duration = Duration::from_millis(50);
