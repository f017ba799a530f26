//! The course of a self test: one part without trouble, one for each fault, then everything is fetched and judged, and a
//! last look at what is left on the nodes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::time::{Instant, sleep};
use trainyard_common::ids::JobId;

use super::book::{Book, LOOK};
use super::check::{Case, Outcome};
use super::client::Client;
use super::fault::{Fault, What};
use super::gather;
use super::job::{self, Job};
use super::report::{Report, Row, Verdict};
use super::witness;
use crate::args::SelftestArgs;
use crate::failure::Failure;
use crate::{jobs, output};

/// Nodes that a gang of the self test spans at most. Beyond that a fault may hit a node without one of its ranks.
const MAX_GANG: usize = 64;
/// How long jobs may wait for a place.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long jobs may take beyond what their ranks do.
const END_TIMEOUT: Duration = Duration::from_secs(120);
/// What the longest of the jobs without a fault takes: two attempts of the longest short one.
const PLAIN_LENGTH: Duration = Duration::from_secs(10);
/// Jobs submitted while a fault is on.
const MAX_PROBES: usize = 20;
/// Pause between two of them.
const PROBE_PAUSE: Duration = Duration::from_millis(150);
/// How long the look at what is left may wait for its place on every node.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(30);

/// A self test under way.
pub(crate) struct Run<'a> {
    client: &'a Client,
    args: &'a SelftestArgs,
    faults: &'a [Fault],
    nodes: usize,
    /// Where what is fetched is written down.
    keep: &'a Path,
    bar: &'a ProgressBar,
    book: Book,
    outcomes: Vec<Outcome>,
    began: Instant,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        client: &'a Client,
        args: &'a SelftestArgs,
        faults: &'a [Fault],
        nodes: usize,
        keep: &'a Path,
        bar: &'a ProgressBar,
    ) -> Self {
        Self {
            client,
            args,
            faults,
            nodes,
            keep,
            bar,
            book: Book::default(),
            outcomes: Vec::new(),
            began: Instant::now(),
        }
    }

    /// Runs everything.
    pub(crate) async fn report(mut self) -> Result<Report, Failure> {
        self.tell(&format!(
            "self test {} on {}: jobs without trouble",
            self.client.id,
            output::count(self.nodes as u64, "node")
        ));
        self.plain().await?;
        for (index, fault) in self.faults.iter().enumerate() {
            self.tell(&format!("--{}: jobs through it", fault.name()));
            let outcome = self.fault(index + 1, fault).await?;
            self.outcomes.push(outcome);
        }
        self.tell("fetching and comparing what the jobs wrote");
        let rows = self.judge().await?;
        Ok(Report {
            id: self.client.id.clone(),
            nodes: self.nodes,
            jobs: self.book.entries.len(),
            faults: self.faults.iter().map(Fault::name).collect(),
            took: self.began.elapsed(),
            rows,
            kept_in: None,
        })
    }

    /// Says what goes on: once as a line, and where somebody looks in a line that moves.
    fn tell(&self, text: &str) {
        self.bar.suspend(|| output::note(text));
        self.bar.set_message(text.to_owned());
    }

    fn progress(&self, part: usize, doing: &str) {
        let of_part = self.book.part(part);
        let (mut all, mut over) = (0, 0);
        for entry in of_part {
            all += 1;
            over += usize::from(entry.end.is_some());
        }
        self.bar
            .set_message(format!("{doing}: {over} of {all} jobs are over"));
    }

    async fn submit(&mut self, part: usize, jobs: Vec<Job>) -> Result<(), Failure> {
        for job in jobs {
            self.book.submit(self.client, part, job).await?;
        }
        self.book.repeat(self.client, part).await
    }

    async fn plain(&mut self) -> Result<(), Failure> {
        let jobs = job::plain(self.args.jobs, self.gang());
        self.submit(0, jobs).await?;
        self.drain(0, "without trouble", PLAIN_LENGTH).await
    }

    fn gang(&self) -> u32 {
        u32::try_from(self.nodes.clamp(1, MAX_GANG)).unwrap_or(1)
    }

    /// Waits for the end of a part's jobs, and cancels those that are to be cancelled. What is not over in time is cancelled
    /// and remains in the book as it was.
    async fn drain(&mut self, part: usize, doing: &str, length: Duration) -> Result<(), Failure> {
        // Many jobs may have to wait for each other on a small cluster.
        let each = PLAIN_LENGTH / 4 * self.args.jobs;
        let deadline = Instant::now() + length + END_TIMEOUT + each;
        loop {
            self.book.look(self.client).await?;
            self.book.cancel(self.client, part).await?;
            self.progress(part, doing);
            let over = self.book.part(part).all(|entry| entry.end.is_some());
            if over || Instant::now() >= deadline {
                return Ok(());
            }
            sleep(LOOK).await;
        }
    }

    async fn fault(&mut self, part: usize, fault: &Fault) -> Result<Outcome, Failure> {
        let length = fault.through();
        let jobs = job::through(self.args.jobs, self.gang(), length);
        self.submit(part, jobs).await?;
        let client = self.client;
        let all_run = |book: &Book| {
            let mut through = book.part(part).filter(|entry| entry.job.through);
            through.all(|entry| entry.runs() || entry.end.is_some())
        };
        self.book.until(client, START_TIMEOUT, all_run).await?;
        let of_part = self.book.entries.iter_mut();
        for entry in of_part.filter(|entry| entry.part == part) {
            entry.at_fault = entry.runs();
        }
        let mut outcome = Outcome {
            part,
            name: fault.name(),
            node: fault.node.as_ref().map(|(id, _)| *id),
            node_text: fault.node_text(),
            beyond_lost: fault.beyond_lost,
            not_made: None,
            over_after: None,
            refused: Duration::ZERO,
        };
        match self.out_of_reach(fault, part).await? {
            Some(why) => outcome.not_made = Some(why),
            None => self.make(part, fault, &mut outcome).await?,
        }
        self.book.repeat(client, part).await?;
        self.drain(part, &format!("after --{}", fault.name()), length)
            .await?;
        Ok(outcome)
    }

    /// Why a fault would show nothing: none of our ranks runs where it happens.
    async fn out_of_reach(&self, fault: &Fault, part: usize) -> Result<Option<String>, Failure> {
        let running: Vec<JobId> = self
            .book
            .part(part)
            .filter(|entry| entry.at_fault && entry.job.through)
            .map(|entry| entry.id)
            .collect();
        let Some((node, _)) = &fault.node else {
            let why = "none of the jobs had found a place in time; it was not made";
            return Ok(running.is_empty().then(|| why.to_owned()));
        };
        for job in running {
            let detail = jobs::get(&self.client.connection, job).await?;
            let members = detail.attempts.iter().flat_map(|attempt| &attempt.members);
            if members.into_iter().any(|member| member.node == *node) {
                return Ok(None);
            }
        }
        Ok(Some(format!(
            "none of the jobs ran on {} (is it full?); it was not made",
            fault.node_text()
        )))
    }

    /// Makes the fault, and uses the cluster as a user would until it is over.
    async fn make(
        &mut self,
        part: usize,
        fault: &Fault,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        let client = self.client;
        let after = match fault.what {
            What::KillCoordinator | What::KillAgent => {
                Duration::from_millis(100 + u64::from(random_byte()) * 4)
            }
            What::Partition(_) => Duration::ZERO,
        };
        let before = fault.before(client).await?;
        client.take_longest_away();
        fault.make(client, after).await?;
        let made = Instant::now();
        self.tell(&format!("--{}: made, waiting for its end", fault.name()));
        let mut probes = 0;
        while made.elapsed() < fault.limit() {
            if probes < MAX_PROBES {
                self.book.submit(client, part, Job::new("probe", 3)).await?;
                probes += 1;
            }
            self.book.look(client).await?;
            self.book.cancel(client, part).await?;
            self.progress(part, &format!("--{}", fault.name()));
            if fault.is_over(client, before).await? {
                outcome.over_after = Some(made.elapsed().saturating_sub(after));
                break;
            }
            sleep(PROBE_PAUSE).await;
        }
        outcome.refused = client.take_longest_away();
        Ok(())
    }

    async fn judge(&mut self) -> Result<Vec<Row>, Failure> {
        let mut evidence = Vec::with_capacity(self.book.entries.len());
        for entry in &self.book.entries {
            evidence.push(gather::evidence(self.client, entry, self.keep).await?);
        }
        // Now also what was looked at is an end that must not have changed.
        self.book.look(self.client).await?;
        let oldest = self.book.entries.iter().map(|entry| entry.id).min();
        let census = self.client.census(oldest.unwrap_or(JobId(0))).await?;
        let case = Case {
            book: &self.book,
            evidence: &evidence,
            outcomes: &self.outcomes,
            census: &census,
        };
        let mut rows = case.judge();
        // Whatever does not end is looked for after it was cancelled.
        super::clean(self.client).await?;
        self.tell("looking for what is left on the nodes");
        rows.push(self.sweep().await?);
        Ok(rows)
    }

    /// Looks at every node for processes of the self test.
    async fn sweep(&self) -> Result<Row, Failure> {
        let mut row = Row {
            key: "nothing_left",
            number: "I23",
            words: "nothing is left running on the nodes".to_owned(),
            verdict: Verdict::NotTried,
            measured: String::new(),
            details: Vec::new(),
        };
        let nodes = self.gang();
        let request = format!("selftest-{}-sweep", self.client.id);
        let spec = job::sweep(&self.client.id, nodes);
        let id = self.client.submit(&request, &spec).await?;
        let deadline = Instant::now() + SWEEP_TIMEOUT;
        while self.client.live().await?.iter().any(|job| job.id == id) {
            if Instant::now() >= deadline {
                row.details.push(format!(
                    "{id}, which looks at {} at once, found no place in time",
                    output::count(nodes.into(), "node")
                ));
                return Ok(row);
            }
            sleep(LOOK).await;
        }
        let said = witness::output(&self.client.connection, id).await?;
        let by_rank: BTreeMap<u32, &str> = said
            .iter()
            .map(|((_, rank), output)| (*rank, output.text.as_str()))
            .collect();
        let swept = by_rank
            .values()
            .filter(|text| text.contains("swept"))
            .count();
        let detail = jobs::get(&self.client.connection, id).await?;
        let members = detail
            .attempts
            .last()
            .map(|it| it.members.as_slice())
            .unwrap_or_default();
        for (rank, text) in &by_rank {
            let node = usize::try_from(*rank)
                .ok()
                .and_then(|rank| members.get(rank));
            let node = node
                .map(|member| member.node.to_string())
                .unwrap_or_default();
            let left = text.lines().filter_map(|line| line.strip_prefix("left "));
            row.details
                .extend(left.map(|pid| format!("process {pid} on {node} is left")));
        }
        row.measured = format!(
            "{swept} of {} looked at",
            output::count(self.nodes as u64, "node")
        );
        row.verdict = match (row.details.is_empty(), swept) {
            (false, _) => Verdict::Broken,
            (true, 0) => Verdict::NotTried,
            (true, _) => Verdict::Kept,
        };
        if swept == 0 && row.details.is_empty() {
            row.details
                .push(format!("{id} saw nothing: {}", detail.job.reason.message));
        }
        Ok(row)
    }
}

/// For a moment that nobody chose.
fn random_byte() -> u8 {
    let mut byte = [0];
    // Without random numbers it is always the same moment, which is no reason to fail.
    let _ = getrandom::fill(&mut byte);
    byte[0]
}
