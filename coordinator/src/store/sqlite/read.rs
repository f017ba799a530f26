//! What is read back: rows about live work for the core, single jobs and pages of them for users, and the check of all
//! checksums.

use std::collections::BTreeSet;

use rusqlite::types::Value;
use rusqlite::{OptionalExtension, params_from_iter};
use trainyard_common::ids::{
    AttemptNumber, AttemptRef, JobId, NodeId, Sequence, TaskIndex, TokenId,
};
use trainyard_common::record::{AttemptRecord, JobRecord, Record, TaskRecord};
use trainyard_common::state::{JobState, NodeAvailability};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::{RememberedRequest, Snapshot};

use super::meta::{self, Meta, Tally};
use super::write::{id, time};
use super::{Reader, chain, decode};
use crate::store::{CheckReport, JobHistory, Loaded, MAX_ROWS_OF_JOB, StoreError, Transition};

/// How rows of a table are found and what their keys look like.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// Columns of the key, as the text of [`super::kind_and_key`].
    pub(super) key: &'static str,
}

pub(super) const TABLES: [Table; 7] = [JOBS, TASKS, ATTEMPTS, BUNDLES, NODES, TOKENS, USERS];

const JOBS: Table = Table {
    name: "jobs",
    key: "'j' || id",
};
const TASKS: Table = Table {
    name: "tasks",
    key: "'j' || job || '.' || task",
};
const ATTEMPTS: Table = Table {
    name: "attempts",
    key: "'j' || job || '.' || task || '.' || attempt",
};
const BUNDLES: Table = Table {
    name: "bundles",
    key: "'j' || job || '.b' || bundle",
};
const NODES: Table = Table {
    name: "nodes",
    key: "'n' || id",
};
const TOKENS: Table = Table {
    name: "tokens",
    key: "'t' || id",
};
const USERS: Table = Table {
    name: "users",
    key: "name",
};

impl Reader<'_> {
    /// The rows of `table` that the rest of the query picks.
    fn records(
        &self,
        table: &Table,
        rest: &str,
        parameters: &[i64],
    ) -> Result<Vec<Record>, StoreError> {
        let query = format!("SELECT {}, row FROM {} {rest}", table.key, table.name);
        let parameters = parameters.iter().map(|number| Value::Integer(*number));
        let error = |source| self.failed(source);
        let mut statement = self.transaction.prepare_cached(&query).map_err(error)?;
        let mut rows = statement
            .query(params_from_iter(parameters))
            .map_err(error)?;
        let mut records = Vec::new();
        while let Some(row) = rows.next().map_err(error)? {
            let key: String = row.get(0).map_err(error)?;
            let bytes = row.get_ref(1).map_err(error)?.as_blob();
            let bytes = bytes.map_err(|bad| self.corrupt(table.name, &key, bad))?;
            records.push(decode(self.file, table.name, &key, bytes)?.1);
        }
        Ok(records)
    }

    fn job_records(&self, rest: &str, parameters: &[i64]) -> Result<Vec<JobRecord>, StoreError> {
        let records = self.records(&JOBS, rest, parameters)?;
        Ok(records
            .into_iter()
            .filter_map(|r| {
                if let Record::Job(job) = r {
                    Some(*job)
                } else {
                    None
                }
            })
            .collect())
    }

    fn task_records(&self, rest: &str, parameters: &[i64]) -> Result<Vec<TaskRecord>, StoreError> {
        let records = self.records(&TASKS, rest, parameters)?;
        Ok(records
            .into_iter()
            .filter_map(|r| {
                if let Record::Task(task) = r {
                    Some(*task)
                } else {
                    None
                }
            })
            .collect())
    }

    fn attempt_records(
        &self,
        rest: &str,
        parameters: &[i64],
    ) -> Result<Vec<AttemptRecord>, StoreError> {
        let records = self.records(&ATTEMPTS, rest, parameters)?;
        Ok(records
            .into_iter()
            .filter_map(|r| {
                if let Record::Attempt(attempt) = r {
                    Some(*attempt)
                } else {
                    None
                }
            })
            .collect())
    }

    fn meta(&self) -> Result<Meta, StoreError> {
        meta::read(&self.transaction, self.file)
    }

    /// All rows of a table that a start reads, if they are the ones that were written.
    fn live_records(&self, meta: &Meta, index: usize) -> Result<Vec<Record>, StoreError> {
        let table = &TABLES[index];
        let flag = match meta::flag_of(table.name) {
            "1" => String::new(),
            flag => format!("WHERE {flag} = 1"),
        };
        let query = format!("SELECT {}, row FROM {} {flag}", table.key, table.name);
        let error = |source| self.failed(source);
        let mut statement = self.transaction.prepare_cached(&query).map_err(error)?;
        let mut rows = statement.query([]).map_err(error)?;
        let (mut records, mut tally) = (Vec::new(), Tally::default());
        while let Some(row) = rows.next().map_err(error)? {
            let key: String = row.get(0).map_err(error)?;
            let bytes = row.get_ref(1).map_err(error)?.as_blob();
            let bytes = bytes.map_err(|bad| self.corrupt(table.name, &key, bad))?;
            records.push(decode(self.file, table.name, &key, bytes)?.1);
            tally.add(bytes);
        }
        self.compare(table, tally, meta.tallies.live[index])?;
        Ok(records)
    }

    fn compare(&self, table: &Table, found: Tally, written: Tally) -> Result<(), StoreError> {
        if found == written {
            return Ok(());
        }
        let reason = format!(
            "{} rows of those that a start reads are there and {} were written, or some are not the last ones",
            found.rows, written.rows
        );
        Err(self.corrupt(table.name, "(unknown)", reason))
    }

    pub(super) fn load(
        &self,
        now: Timestamp,
        requests_since: Timestamp,
    ) -> Result<Loaded, StoreError> {
        let meta = self.meta()?;
        let mut snapshot = Snapshot {
            next_job: JobId(meta.next_job),
            next_node: NodeId(meta.next_node),
            next_token: TokenId(meta.next_token),
            ..Snapshot::default()
        };
        for index in 0..TABLES.len() {
            for record in self.live_records(&meta, index)? {
                match record {
                    Record::Job(job) => snapshot.jobs.push(*job),
                    Record::Task(task) => snapshot.tasks.push(*task),
                    Record::Attempt(attempt) => snapshot.attempts.push(*attempt),
                    Record::Node(node) => snapshot.nodes.push(*node),
                    Record::Token(token) => snapshot.tokens.push(*token),
                    Record::User(user) => snapshot.users.push(*user),
                    Record::Bundle(bundle) => snapshot.bundles.push(*bundle),
                    // `decode` has checked that each row is of its table's kind.
                    Record::BundleRemoved(_) | Record::NodeRemoved(_) => {}
                }
            }
        }
        // By what the rows say, not by the order in which an index gave them.
        snapshot.jobs.sort_by_key(|job| job.id);
        snapshot.tasks.sort_by_key(|task| (task.job, task.index));
        snapshot.attempts.sort_by_key(|attempt| attempt.id);
        snapshot.nodes.sort_by_key(|node| node.id);
        snapshot.bundles.sort_by_key(|bundle| bundle.id);
        snapshot.tokens.sort_by_key(|token| token.id);
        snapshot
            .users
            .sort_by(|one, other| one.name.cmp(&other.name));
        snapshot.tokens.retain(|token| token.expires_at > now);
        let jobs = &snapshot.jobs;
        snapshot
            .tasks
            .retain(|task| jobs.binary_search_by_key(&task.job, |job| job.id).is_ok());
        snapshot.requests = self.requests(&meta, requests_since, &snapshot.jobs)?;
        snapshot.awaited = awaited(&meta, &snapshot);
        Ok(Loaded {
            snapshot,
            sequence: meta.last(),
        })
    }

    /// Every submission since a time. No job of that time may be missing: a retry would make a second one.
    fn requests(
        &self,
        meta: &Meta,
        since: Timestamp,
        live: &[JobRecord],
    ) -> Result<Vec<RememberedRequest>, StoreError> {
        let mut requests: Vec<RememberedRequest> = live
            .iter()
            .filter(|job| job.submitted_at >= since)
            .map(remembered)
            .collect();
        let over = self.job_records("WHERE live <> 1 AND submitted_at >= ?1", &[time(since)])?;
        requests.extend(over.iter().map(remembered));
        requests.sort_by_key(|request| request.job);
        // A column that was damaged makes a job live and over; its row says what it is.
        requests.dedup_by_key(|request| request.job);
        let mut known = BTreeSet::new();
        known.extend(live.iter().map(|job| job.id));
        known.extend(requests.iter().map(|request| request.job));
        // From the last job to the one before the first of that time.
        let first = requests.first().map_or(meta.next_job, |first| first.job.0);
        let mut next = meta.next_job;
        while next > 1 {
            next -= 1;
            if known.contains(&JobId(next)) {
                continue;
            }
            if let Some(gap) = self.gap_around(next)? {
                next = gap;
                continue;
            }
            let Some(job) = self.job_records("WHERE id = ?1", &[id(next)])?.pop() else {
                return Err(self.corrupt("jobs", JobId(next), "it is missing"));
            };
            if job.submitted_at >= since {
                let reason = "it is missing among the jobs of its time";
                return Err(self.corrupt("jobs", job.id, reason));
            }
            if next < first {
                break;
            }
        }
        Ok(requests)
    }

    /// The first of the ids around this one that were never given, if it is one.
    fn gap_around(&self, job: u64) -> Result<Option<u64>, StoreError> {
        let query = "SELECT first, last FROM gaps WHERE first <= ?1 ORDER BY first DESC LIMIT 1";
        let mut statement = self
            .transaction
            .prepare_cached(query)
            .map_err(|source| self.failed(source))?;
        let found: Option<(u64, u64)> = statement
            .query_row([id(job)], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(|source| self.failed(source))?;
        Ok(found
            .filter(|(_, last)| *last >= job)
            .map(|(first, _)| first))
    }

    pub(super) fn history(&self, job: JobId) -> Result<Option<JobHistory>, StoreError> {
        let limit = id(MAX_ROWS_OF_JOB as u64);
        let key = id(job.0);
        let Some(record) = self.job_records("WHERE id = ?1", &[key])?.pop() else {
            return Ok(None);
        };
        let tasks: u64 = self
            .transaction
            .query_row("SELECT COUNT(*) FROM tasks WHERE job = ?1", [key], |row| {
                row.get(0)
            })
            .map_err(|source| self.failed(source))?;
        let which = if tasks > MAX_ROWS_OF_JOB as u64 {
            format!(
                "WHERE job = ?1 AND state <> '{}' ORDER BY task LIMIT ?2",
                JobState::Succeeded
            )
        } else {
            "WHERE job = ?1 ORDER BY task LIMIT ?2".to_owned()
        };
        let mut attempts = self.attempt_records(
            "WHERE job = ?1 ORDER BY task DESC, attempt DESC LIMIT ?2",
            &[key, limit],
        )?;
        attempts.reverse();
        Ok(Some(JobHistory {
            job: record,
            tasks: self.task_records(&which, &[key, limit])?,
            attempts,
        }))
    }

    pub(super) fn attempt(&self, attempt: AttemptRef) -> Result<Option<AttemptRecord>, StoreError> {
        let AttemptRef {
            job,
            task: TaskIndex(task),
            attempt: AttemptNumber(number),
        } = attempt;
        let key = [id(job.0), i64::from(task), i64::from(number)];
        let found = self.attempt_records("WHERE job = ?1 AND task = ?2 AND attempt = ?3", &key)?;
        Ok(found.into_iter().next())
    }

    pub(super) fn jobs(&self, before: JobId, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        self.job_records(
            "WHERE id < ?1 ORDER BY id DESC LIMIT ?2",
            &[id(before.0), id(limit as u64)],
        )
    }

    pub(super) fn transitions(
        &self,
        after: Sequence,
        limit: usize,
    ) -> Result<Vec<Transition>, StoreError> {
        let mut found = Vec::new();
        self.each_transition(after, limit, |sequence, kind, key, row, _| {
            let kind = static_kind(kind)
                .ok_or_else(|| self.corrupt("transitions", sequence, "unknown kind"))?;
            let (at, record) = decode(self.file, kind, key, row)?;
            found.push(Transition {
                sequence: Sequence(sequence),
                at,
                record,
            });
            Ok(())
        })?;
        Ok(found)
    }

    pub(super) fn each_transition(
        &self,
        after: Sequence,
        limit: usize,
        mut each: impl FnMut(u64, &str, &str, &[u8], u32) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let error = |source| self.failed(source);
        let query = "SELECT sequence, kind, key, row, chain FROM transitions WHERE sequence > ?1 \
                     ORDER BY sequence LIMIT ?2";
        let mut statement = self.transaction.prepare_cached(query).map_err(error)?;
        let mut rows = statement
            .query([id(after.0), id(limit as u64)])
            .map_err(error)?;
        while let Some(row) = rows.next().map_err(error)? {
            let sequence: u64 = row.get(0).map_err(error)?;
            let (kind, key): (String, String) =
                (row.get(1).map_err(error)?, row.get(2).map_err(error)?);
            let chain: u32 = row.get(4).map_err(error)?;
            let bytes = row.get_ref(3).map_err(error)?.as_blob();
            let bytes = bytes.map_err(|bad| self.corrupt("transitions", sequence, bad))?;
            each(sequence, &kind, &key, bytes, chain)?;
        }
        Ok(())
    }

    /// Checks the chain from the transition after `after` up to the high-water mark; says how many it read.
    pub(super) fn check_chain(&self, meta: &Meta, after: Sequence) -> Result<u64, StoreError> {
        let bad = |sequence: u64, reason: &str| self.corrupt("transitions", sequence, reason);
        let mut last = after.0;
        let mut value = match after.0 {
            0 => 0,
            base => self
                .transaction
                .query_row(
                    "SELECT chain FROM transitions WHERE sequence = ?1",
                    [id(base)],
                    |row| row.get(0),
                )
                .optional()
                .map_err(|source| self.failed(source))?
                .ok_or_else(|| bad(base, "it is missing"))?,
        };
        self.each_transition(after, usize::MAX, |sequence, _, _, row, stored| {
            if sequence != last + 1 {
                return Err(bad(last + 1, "it is missing"));
            }
            value = chain(value, sequence, row);
            last = sequence;
            if value == stored {
                Ok(())
            } else {
                Err(bad(sequence, "its checksum does not continue the chain"))
            }
        })?;
        if (last, value) != (meta.sequence, meta.chain) {
            return Err(bad(
                meta.sequence,
                "the log does not end where the high-water mark says; its end was cut off or changed",
            ));
        }
        Ok(last - after.0)
    }

    /// Reads everything; with `tallied` also whether all rows are there.
    pub(super) fn check_all(&self, meta: &Meta, tallied: bool) -> Result<CheckReport, StoreError> {
        let verdict: String = self
            .transaction
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|source| self.failed(source))?;
        if verdict != "ok" {
            return Err(self.corrupt("(any)", "(unknown)", verdict));
        }
        let (mut rows, mut tallies) = (0, meta::Tallies::default());
        for (index, table) in TABLES.iter().enumerate() {
            rows += self.check_table(index, table, &mut tallies)?;
        }
        for (index, table) in TABLES.iter().enumerate().filter(|_| tallied) {
            self.compare(table, tallies.live[index], meta.tallies.live[index])?;
            self.compare(table, tallies.rest[index], meta.tallies.rest[index])?;
        }
        let transitions = self.check_chain(meta, Sequence(0))?;
        Ok(CheckReport {
            rows,
            transitions,
            sequence: meta.last(),
        })
    }

    pub(super) fn check(&self) -> Result<CheckReport, StoreError> {
        self.check_all(&self.meta()?, true)
    }

    /// Decodes every row of a table, without keeping them.
    fn check_table(
        &self,
        index: usize,
        table: &Table,
        tallies: &mut meta::Tallies,
    ) -> Result<u64, StoreError> {
        let error = |source| self.failed(source);
        let flag = meta::flag_of(table.name);
        let query = format!("SELECT {}, row, {flag} FROM {}", table.key, table.name);
        let mut statement = self.transaction.prepare_cached(&query).map_err(error)?;
        let mut rows = statement.query([]).map_err(error)?;
        let mut count = 0;
        while let Some(row) = rows.next().map_err(error)? {
            let key: String = row.get(0).map_err(error)?;
            let bytes = row.get_ref(1).map_err(error)?.as_blob();
            let bytes = bytes.map_err(|bad| self.corrupt(table.name, &key, bad))?;
            let (_, record) = decode(self.file, table.name, &key, bytes)?;
            let live: bool = row.get(2).map_err(error)?;
            if live != meta::is_live(&record) {
                let reason = "its columns do not say what its row says";
                return Err(self.corrupt(table.name, key, reason));
            }
            tallies.of(index, live).add(bytes);
            count += 1;
        }
        Ok(count)
    }
}

/// After a restored backup the nodes of it that may run something, until they were heard of.
fn awaited(meta: &Meta, snapshot: &Snapshot) -> BTreeSet<NodeId> {
    let there = snapshot.nodes.iter().filter(|node| {
        meta.awaiting && node.incarnation.0 > 0 && node.availability != NodeAvailability::Lost
    });
    there.map(|node| node.id).collect()
}

fn remembered(job: &JobRecord) -> RememberedRequest {
    RememberedRequest {
        owner: job.owner.clone(),
        request_id: job.request_id.clone(),
        digest: job.request_digest,
        job: job.id,
        at: job.submitted_at,
    }
}

fn static_kind(kind: &str) -> Option<&'static str> {
    TABLES
        .into_iter()
        .find(|table| table.name == kind)
        .map(|table| table.name)
}
