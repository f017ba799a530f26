//! What a self test was told of its jobs: each answer to a submit, each end that was shown. The cluster is held against
//! this later on.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use trainyard_common::ids::JobId;
use trainyard_common::record::JobRecord;
use trainyard_common::spec::JobSpec;
use trainyard_common::state::JobState;

use super::client::Client;
use super::job::Job;
use crate::failure::{EXIT_UNAVAILABLE, Failure};

/// Pause between two looks at all jobs.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

/// One job and what was told of it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) job: Job,
    /// Which part of the self test it belongs to.
    pub(crate) part: usize,
    pub(crate) request_id: String,
    pub(crate) spec: JobSpec,
    pub(crate) id: JobId,
    /// As it was last shown.
    pub(crate) last: Option<JobRecord>,
    /// The first end that was shown.
    pub(crate) end: Option<JobRecord>,
    /// What was shown after its end and is another one.
    pub(crate) changed: Option<String>,
    /// When its end was asked for.
    pub(crate) cancelled: Option<Instant>,
    /// How long it then took.
    pub(crate) cancel_took: Option<Duration>,
    /// It ran when the fault of its part happened.
    pub(crate) at_fault: bool,
}

impl Entry {
    /// Whether it was shown as running and not over.
    pub(crate) fn runs(&self) -> bool {
        self.last
            .as_ref()
            .is_some_and(|job| job.state == JobState::Running)
    }

    fn shown(&mut self, job: &JobRecord) {
        self.last = Some(job.clone());
        match &self.end {
            None if job.state.is_terminal() => {
                self.end = Some(job.clone());
                self.cancel_took = self.cancelled.map(|at| at.elapsed());
            }
            None => {}
            Some(end) => {
                let same =
                    (end.state, end.exit, end.ended_at) == (job.state, job.exit, job.ended_at);
                if !same {
                    let text = format!("{} was {} and then {}", self.id, end.state, job.state);
                    self.changed.get_or_insert(text);
                }
            }
        }
    }
}

/// All jobs of a self test.
#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) entries: Vec<Entry>,
    /// How often a request was made again under its id.
    pub(crate) repeated: u32,
    /// Answers to these that were wrong.
    pub(crate) wrong_answers: Vec<String>,
}

impl Book {
    /// Submits a job and notes the answer.
    pub(crate) async fn submit(
        &mut self,
        client: &Client,
        part: usize,
        job: Job,
    ) -> Result<(), Failure> {
        let request_id = format!("selftest-{}-{}", client.id, self.entries.len());
        let spec = job.spec(&client.id);
        let id = client.submit(&request_id, &spec).await?;
        self.entries.push(Entry {
            job,
            part,
            request_id,
            spec,
            id,
            last: None,
            end: None,
            changed: None,
            cancelled: None,
            cancel_took: None,
            at_fault: false,
        });
        Ok(())
    }

    /// Makes every third request of a part again, and one of them with another body.
    pub(crate) async fn repeat(&mut self, client: &Client, part: usize) -> Result<(), Failure> {
        let chosen: Vec<usize> = (0..self.entries.len())
            .filter(|index| self.entries[*index].part == part)
            .step_by(3)
            .collect();
        for index in &chosen {
            let entry = &self.entries[*index];
            let again = client.submit(&entry.request_id, &entry.spec).await?;
            self.repeated += 1;
            if again != entry.id {
                let text = format!(
                    "request {} gave {} and, made again, {again}",
                    entry.request_id, entry.id
                );
                self.wrong_answers.push(text);
            }
        }
        if let Some(index) = chosen.first() {
            self.other_body(client, *index).await?;
        }
        Ok(())
    }

    async fn other_body(&mut self, client: &Client, index: usize) -> Result<(), Failure> {
        let entry = &self.entries[index];
        let mut spec = entry.spec.clone();
        spec.name.push_str("-other");
        self.repeated += 1;
        match client.submit(&entry.request_id, &spec).await {
            Ok(answer) => {
                let text = format!(
                    "request {} of {} gave {answer} for another job's specification, and should have been refused",
                    entry.request_id, entry.id
                );
                self.wrong_answers.push(text);
                Ok(())
            }
            Err(failure) if failure.exit == EXIT_UNAVAILABLE => Err(failure),
            Err(_) => Ok(()),
        }
    }

    /// Looks at all jobs.
    pub(crate) async fn look(&mut self, client: &Client) -> Result<(), Failure> {
        let Some(oldest) = self.entries.iter().map(|entry| entry.id).min() else {
            return Ok(());
        };
        let shown = client.census(oldest).await?;
        for job in &shown {
            let entries = self.entries.iter_mut();
            entries
                .filter(|entry| entry.id == job.id)
                .for_each(|entry| entry.shown(job));
        }
        Ok(())
    }

    /// The jobs of one part.
    pub(crate) fn part(&self, part: usize) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.part == part)
    }

    /// Looks until a condition holds; whether it did in time.
    pub(crate) async fn until(
        &mut self,
        client: &Client,
        limit: Duration,
        mut condition: impl FnMut(&Self) -> bool,
    ) -> Result<bool, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            self.look(client).await?;
            if condition(self) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            sleep(LOOK).await;
        }
    }

    /// Cancels the jobs of a part that are to be cancelled and run.
    pub(crate) async fn cancel(&mut self, client: &Client, part: usize) -> Result<(), Failure> {
        for entry in self.entries.iter_mut().filter(|entry| {
            entry.part == part && entry.job.cancelled && entry.cancelled.is_none() && entry.runs()
        }) {
            let asked = Instant::now();
            let record = client.cancel(entry.id).await?;
            entry.cancelled = Some(asked);
            entry.shown(&record);
        }
        Ok(())
    }
}
