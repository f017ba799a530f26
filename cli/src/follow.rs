//! Following one job to its end: output as it comes, state changes on standard error, and the job's exit code.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use trainyard_common::ids::JobId;
use trainyard_common::record::JobRecord;
use trainyard_common::state::{JobState, ReasonCode};
use trainyard_proto::v1;

use crate::connection::{Connection, Patience, is_away, patiently};
use crate::failure::{EXIT_CANCELLED, EXIT_INFRASTRUCTURE, EXIT_TIME_LIMIT, Failure};
use crate::jobs;
use crate::logs::{self, Labels, Printer};
use crate::output;

/// A second Ctrl-C within this time means the job; a later one is a first one again.
const SECOND_CTRL_C: Duration = Duration::from_secs(5);

/// How to follow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Follow {
    /// Objects instead of text.
    pub(crate) json: bool,
    /// Neither output nor state changes, only the end.
    pub(crate) quiet: bool,
}

/// Follows a job and answers with its exit code.
pub(crate) async fn follow(
    connection: &Connection,
    job: JobId,
    how: Follow,
) -> Result<ExitCode, Failure> {
    let record = to_the_end(connection, job, how).await?;
    let code = exit_code(&record);
    if how.json {
        let result = json!({
            "type": "result",
            "source": "job",
            "exit_code": code,
            "job": record.id,
            "state": record.state,
            "reason": { "code": record.reason.code, "message": record.reason.message },
        });
        output::line(&result.to_string());
    } else if !how.quiet || record.state != JobState::Succeeded {
        output::note(&format!(
            "{job} {}: {}",
            record.state,
            output::printable(&record.reason.message)
        ));
    }
    if !how.json {
        for warning in jobs::get(connection, job).await?.warnings() {
            output::warning(&warning);
        }
    }
    Ok(ExitCode::from(code))
}

/// Follows a job and answers with its final record.
pub(crate) async fn to_the_end(
    connection: &Connection,
    job: JobId,
    how: Follow,
) -> Result<JobRecord, Failure> {
    let first = jobs::get(connection, job).await?.job;
    let output = async {
        if !how.quiet {
            let mut printer = Printer::new(how.json, Labels::of(&first.spec));
            let request = v1::ReadLogsRequest {
                job: job.0,
                follow: true,
                ..v1::ReadLogsRequest::default()
            };
            logs::read(connection, request, &mut printer, Patience::quiet()).await?;
            printer.finish()?;
        }
        Ok::<(), Failure>(())
    };
    let ended = async {
        let (record, ()) = tokio::try_join!(watch(connection, job, how), output)?;
        Ok::<JobRecord, Failure>(record)
    };
    tokio::pin!(ended);
    let mut interrupt = Interrupt::new()?;
    loop {
        tokio::select! {
            biased;
            // Both are safe to drop: what was shown is shown, and signals are counted by the runtime.
            record = &mut ended => return record,
            wish = interrupt.next() => match wish {
                Wish::Ask => output::note(&format!("{job} goes on; press Ctrl-C again to cancel it")),
                Wish::Cancel => {
                    output::note(&format!("cancelling {job}; press Ctrl-C again to leave without waiting"));
                    jobs::request_cancel(connection, job).await?;
                }
                Wish::Leave => {
                    return Err(Failure::new(EXIT_CANCELLED, "LEFT", format!("left {job}; `yard job {job}` shows it")));
                }
                Wish::Terminate => {
                    return Err(Failure::new(143, "TERMINATED", format!("ended by SIGTERM; {job} goes on: `yard logs -f {job}` follows it")));
                }
            },
        }
    }
}

/// Watches a job until it is over, telling of each change.
async fn watch(connection: &Connection, job: JobId, how: Follow) -> Result<JobRecord, Failure> {
    let mut patience = Patience::default();
    let mut told = None;
    loop {
        let request = v1::WatchJobRequest {
            job: job.0,
            after_revision: 0,
        };
        let status = match connection.jobs().watch(request).await {
            Ok(answer) => {
                let mut stream = answer.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(change)) => {
                            patience.reset();
                            let record = jobs::job_of(change.job)?;
                            if !how.quiet {
                                tell(&record, how.json, &mut told);
                            }
                            if record.state.is_terminal() {
                                return Ok(record);
                            }
                        }
                        // Ended early: ask again, as if it had broken.
                        Ok(None) => break tonic::Status::unavailable("the watch ended"),
                        Err(status) => break status,
                    }
                }
            }
            Err(status) => status,
        };
        if !is_away(&status) {
            return Err(status.into());
        }
        patience.wait().await;
    }
}

/// Tells of a change once: a sentence that only counts on (tasks of an array, say) is no news.
fn tell(record: &JobRecord, json: bool, told: &mut Option<(JobState, ReasonCode)>) {
    let news = (record.state, record.reason.code);
    if *told == Some(news) || record.state.is_terminal() {
        return;
    }
    *told = Some(news);
    if json {
        let change = json!({
            "type": "state",
            "job": record.id,
            "state": record.state,
            "reason": { "code": record.reason.code, "message": record.reason.message },
        });
        output::line(&change.to_string());
    } else {
        let reason = output::printable(&record.reason.message);
        output::note(&format!("{} {}: {reason}", record.id, record.state));
    }
}

/// What `run` and `wait` end with: the job's own code, or one that says why there is none.
pub(crate) fn exit_code(record: &JobRecord) -> u8 {
    match record.state {
        JobState::Succeeded => 0,
        JobState::Cancelled => EXIT_CANCELLED,
        JobState::TimedOut => EXIT_TIME_LIMIT,
        JobState::Failed if record.reason.code == ReasonCode::InfrastructureGaveUp => {
            EXIT_INFRASTRUCTURE
        }
        // A failed job never ends with 0, whatever its last rank said.
        JobState::Failed => record.exit.map_or(1, |exit| exit.exit_code().max(1)),
        JobState::Pending
        | JobState::Provisioning
        | JobState::Preparing
        | JobState::Running
        | JobState::Stopping => EXIT_INFRASTRUCTURE,
    }
}

/// What the user wants when a signal comes.
enum Wish {
    Ask,
    Cancel,
    Leave,
    Terminate,
}

/// Counts Ctrl-C: the first asks, the second cancels, the third leaves.
struct Interrupt {
    interrupt: Signal,
    terminate: Signal,
    last: Option<tokio::time::Instant>,
    cancelled: bool,
}

impl Interrupt {
    fn new() -> Result<Self, Failure> {
        let open = |kind| signal(kind).map_err(|error| Failure::io("listen for signals", &error));
        Ok(Self {
            interrupt: open(SignalKind::interrupt())?,
            terminate: open(SignalKind::terminate())?,
            last: None,
            cancelled: false,
        })
    }

    async fn next(&mut self) -> Wish {
        tokio::select! {
            biased;
            // Both are cancel-safe: a signal that is not taken is taken at the next call.
            _ = self.terminate.recv() => return Wish::Terminate,
            _ = self.interrupt.recv() => {}
        }
        let now = tokio::time::Instant::now();
        let again = self
            .last
            .replace(now)
            .is_some_and(|last| now - last <= SECOND_CTRL_C);
        match (self.cancelled, again) {
            (true, _) => Wish::Leave,
            (false, true) => {
                self.cancelled = true;
                Wish::Cancel
            }
            (false, false) => Wish::Ask,
        }
    }
}

/// Waits until a job is over, without its output.
pub(crate) async fn quietly(connection: &Connection, job: JobId) -> Result<JobRecord, Failure> {
    watch(
        connection,
        job,
        Follow {
            json: false,
            quiet: true,
        },
    )
    .await
}

/// Asks once more for a job, as a repeated request.
pub(crate) async fn current(
    connection: &Connection,
    job: JobId,
) -> Result<v1::GetJobResponse, Failure> {
    let answer = patiently(|| {
        let mut jobs = connection.jobs();
        async move { jobs.get(v1::GetJobRequest { job: job.0 }).await }
    })
    .await?;
    Ok(answer.into_inner())
}

#[cfg(test)]
mod tests {
    use trainyard_common::ids::{Digest, TaskIndex};
    use trainyard_common::record::TaskCounts;
    use trainyard_common::spec::JobSpec;
    use trainyard_common::state::{ExitStatus, Reason};
    use trainyard_common::time::Timestamp;

    use super::*;

    fn job(state: JobState, code: ReasonCode, exit: Option<ExitStatus>) -> JobRecord {
        JobRecord {
            id: JobId(1),
            owner: "ann".parse().unwrap(),
            request_id: "r".parse().unwrap(),
            request_digest: Digest([0; 32]),
            spec: JobSpec::new("x", vec!["true".into()]),
            state,
            reason: Reason::new(code, ""),
            tasks: TaskCounts::default(),
            next_fresh: TaskIndex(0),
            submitted_at: Timestamp(0),
            started_at: None,
            ended_at: None,
            cancel: None,
            exit,
            bundles: 0,
        }
    }

    #[test]
    fn exit_codes_follow_the_table() {
        let code = |state, reason, exit| exit_code(&job(state, reason, exit));
        assert_eq!(
            code(
                JobState::Succeeded,
                ReasonCode::Completed,
                Some(ExitStatus::Code(0))
            ),
            0
        );
        assert_eq!(
            code(
                JobState::Failed,
                ReasonCode::RankExited,
                Some(ExitStatus::Code(3))
            ),
            3
        );
        assert_eq!(
            code(
                JobState::Failed,
                ReasonCode::RankSignalled,
                Some(ExitStatus::Signal(9))
            ),
            137
        );
        assert_eq!(
            code(
                JobState::Failed,
                ReasonCode::RankExited,
                Some(ExitStatus::Code(0))
            ),
            1
        );
        assert_eq!(
            code(
                JobState::Failed,
                ReasonCode::CannotExecute,
                Some(ExitStatus::NotStarted)
            ),
            127
        );
        assert_eq!(
            code(
                JobState::Failed,
                ReasonCode::InfrastructureGaveUp,
                Some(ExitStatus::Unknown)
            ),
            75
        );
        assert_eq!(code(JobState::Failed, ReasonCode::TasksFailed, None), 1);
        assert_eq!(
            code(JobState::Cancelled, ReasonCode::CancelRequested, None),
            130
        );
        assert_eq!(
            code(
                JobState::TimedOut,
                ReasonCode::TimeLimit,
                Some(ExitStatus::Signal(15))
            ),
            124
        );
    }
}
