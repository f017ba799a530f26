//! Fetches everything about the jobs of a self test, and writes it down where a person can look at it. What is not there is
//! evidence, too; only a coordinator that is away is a failure.

use std::path::Path;

use trainyard_common::ids::AttemptRef;

use super::book::Entry;
use super::check::Evidence;
use super::client::Client;
use super::witness::{self, Witness};
use crate::failure::{EXIT_NOT_FOUND, EXIT_UNAVAILABLE, Failure};
use crate::jobs::{self, JobDetail};

/// Everything about one job.
pub(crate) async fn evidence(
    client: &Client,
    entry: &Entry,
    keep: &Path,
) -> Result<Evidence, Failure> {
    let mut evidence = Evidence::default();
    let detail = match jobs::get(&client.connection, entry.id).await {
        Ok(detail) => detail,
        Err(failure) if failure.exit == EXIT_NOT_FOUND => return Ok(evidence),
        Err(failure) => return Err(failure),
    };
    let name = format!("{}.json", entry.id);
    witness::keep(
        keep,
        &name,
        crate::json::job_detail(&detail).to_string().as_bytes(),
    )?;
    outputs(client, &detail, &mut evidence, keep).await?;
    // The output of a job that never ends has no end either.
    if detail.job.state.is_terminal() {
        match witness::output(&client.connection, entry.id).await {
            Ok(output) => evidence.output = output,
            Err(failure) if is_away(&failure) => return Err(failure),
            Err(failure) => {
                let text = format!("output of {}: {}", entry.id, failure.message);
                evidence.bad_log.push(text);
            }
        }
    }
    for ((attempt, rank), output) in &evidence.output {
        let name = format!("{attempt}/log-{rank}");
        witness::keep(keep, &name, output.text.as_bytes())?;
    }
    evidence.detail = Some(detail);
    Ok(evidence)
}

fn is_away(failure: &Failure) -> bool {
    failure.exit == EXIT_UNAVAILABLE && failure.reason != "LOG_TIMEOUT"
}

async fn outputs(
    client: &Client,
    detail: &JobDetail,
    evidence: &mut Evidence,
    keep: &Path,
) -> Result<(), Failure> {
    for attempt in &detail.attempts {
        for tree in attempt.members.iter().filter_map(|member| member.outputs) {
            match witness::files(&client.connection, tree).await {
                Ok(files) => {
                    for (path, bytes) in files {
                        witness::keep(keep, &format!("{}/{path}", attempt.id), &bytes)?;
                        take(
                            evidence,
                            attempt.id,
                            &path,
                            &String::from_utf8_lossy(&bytes),
                        );
                    }
                }
                Err(failure) if is_away(&failure) => return Err(failure),
                Err(failure) => {
                    let text = format!("outputs of {}: {}", attempt.id, failure.message);
                    evidence.bad_outputs.push(text);
                }
            }
        }
    }
    Ok(())
}

/// Takes in one file of an attempt's outputs.
fn take(evidence: &mut Evidence, attempt: AttemptRef, path: &str, text: &str) {
    let rank = |prefix: &str| path.strip_prefix(prefix)?.parse::<u32>().ok();
    if let Some(rank) = rank("witness-") {
        match Witness::parse(text) {
            Some(witness) => drop(evidence.witnesses.insert((attempt, rank), witness)),
            None => evidence
                .bad_outputs
                .push(format!("{path} of {attempt} is not what a rank writes")),
        }
    } else if let Some(rank) = rank("result-") {
        evidence.results.insert((attempt, rank), text.to_owned());
    } else {
        evidence
            .bad_outputs
            .push(format!("{path} of {attempt} was written by nobody"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_taken_for_what_they_are() {
        let attempt: AttemptRef = "j1.0.1".parse().unwrap();
        let mut evidence = Evidence::default();
        take(&mut evidence, attempt, "witness-3", "start 1.0\n");
        take(&mut evidence, attempt, "result-3", "j1 0 1 3\n");
        assert_eq!(evidence.witnesses[&(attempt, 3)].starts, 1);
        assert_eq!(evidence.results[&(attempt, 3)], "j1 0 1 3\n");
        assert!(evidence.bad_outputs.is_empty());
        take(&mut evidence, attempt, "witness-4", "nonsense");
        take(&mut evidence, attempt, "core", "");
        assert_eq!(evidence.bad_outputs.len(), 2);
    }
}
