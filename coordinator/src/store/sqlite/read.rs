//! What is read back: rows about live work for the core, single jobs and pages of them for users, and the check of all
//! checksums.

use std::collections::BTreeSet;
use std::str::FromStr;

use rusqlite::types::Value;
use rusqlite::{OptionalExtension, params_from_iter};
use trainyard_common::ids::{
    AttemptNumber, AttemptRef, Digest, JobId, NodeId, Sequence, TaskIndex, TokenId,
};
use trainyard_common::record::{AttemptRecord, JobRecord, Record, TaskRecord};
use trainyard_common::state::{JobState, NodeAvailability};
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::{RememberedRequest, Snapshot};

use super::write::{id, time};
use super::{Meta, Reader, chain, decode, read_meta};
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
        read_meta(&self.transaction).map_err(|source| self.failed(source))
    }

    pub(super) fn load(
        &self,
        now: Timestamp,
        requests_since: Timestamp,
    ) -> Result<Loaded, StoreError> {
        let meta = self.meta()?;
        let mut snapshot = Snapshot {
            jobs: self.job_records("WHERE live = 1 ORDER BY id", &[])?,
            tasks: self.task_records(
                "WHERE live = 1 AND job IN (SELECT id FROM jobs WHERE live = 1) ORDER BY job, task",
                &[],
            )?,
            attempts: self.attempt_records("WHERE open = 1 ORDER BY job, task, attempt", &[])?,
            requests: self.requests(requests_since)?,
            next_job: JobId(meta.next_job),
            next_node: NodeId(meta.next_node),
            next_token: TokenId(meta.next_token),
            ..Snapshot::default()
        };
        let mut others = self.records(&NODES, "ORDER BY id", &[])?;
        others.extend(self.records(&BUNDLES, "ORDER BY job, bundle", &[])?);
        others.extend(self.records(
            &TOKENS,
            "WHERE usable = 1 AND expires_at > ?1 ORDER BY id",
            &[time(now)],
        )?);
        others.extend(self.records(&USERS, "ORDER BY name", &[])?);
        for record in others {
            match record {
                Record::Node(node) => snapshot.nodes.push(*node),
                Record::Token(token) => snapshot.tokens.push(*token),
                Record::User(user) => snapshot.users.push(*user),
                Record::Bundle(bundle) => snapshot.bundles.push(*bundle),
                // `decode` has checked that each row is of its table's kind.
                Record::Job(_)
                | Record::Task(_)
                | Record::Attempt(_)
                | Record::BundleRemoved(_)
                | Record::NodeRemoved(_) => {}
            }
        }
        snapshot.awaited = self.awaited(&snapshot)?;
        Ok(Loaded {
            snapshot,
            sequence: Sequence(meta.sequence),
        })
    }

    /// After a restored backup the nodes of it that may run something, until they were heard of.
    fn awaited(&self, snapshot: &Snapshot) -> Result<BTreeSet<NodeId>, StoreError> {
        let query = "SELECT COUNT(*) FROM restores WHERE reconciled = 0";
        let restored: u64 = self
            .transaction
            .query_row(query, [], |row| row.get(0))
            .map_err(|source| self.failed(source))?;
        if restored == 0 {
            return Ok(BTreeSet::new());
        }
        let there = snapshot
            .nodes
            .iter()
            .filter(|node| node.incarnation.0 > 0 && node.availability != NodeAvailability::Lost);
        Ok(there.map(|node| node.id).collect())
    }

    fn requests(&self, since: Timestamp) -> Result<Vec<RememberedRequest>, StoreError> {
        let error = |source| self.failed(source);
        let query = "SELECT id, user, request_id, request_digest, submitted_at FROM jobs WHERE submitted_at >= ?1";
        let mut statement = self.transaction.prepare_cached(query).map_err(error)?;
        let mut rows = statement.query([time(since)]).map_err(error)?;
        let mut requests = Vec::new();
        while let Some(row) = rows.next().map_err(error)? {
            let job = JobId(row.get(0).map_err(error)?);
            let digest: Vec<u8> = row.get(3).map_err(error)?;
            requests.push(RememberedRequest {
                owner: self.parsed(job, &row.get::<_, String>(1).map_err(error)?)?,
                request_id: self.parsed(job, &row.get::<_, String>(2).map_err(error)?)?,
                digest: Digest::try_from(digest.as_slice())
                    .map_err(|bad| self.corrupt("jobs", job, bad))?,
                job,
                at: Timestamp(row.get(4).map_err(error)?),
            });
        }
        Ok(requests)
    }

    fn parsed<T: FromStr<Err: std::fmt::Display>>(
        &self,
        job: JobId,
        text: &str,
    ) -> Result<T, StoreError> {
        text.parse().map_err(|bad| self.corrupt("jobs", job, bad))
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

    pub(super) fn check(&self) -> Result<CheckReport, StoreError> {
        let verdict: String = self
            .transaction
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|source| self.failed(source))?;
        if verdict != "ok" {
            return Err(self.corrupt("(any)", "(unknown)", verdict));
        }
        let meta = self.meta()?;
        let mut rows = 0;
        for table in &TABLES {
            rows += self.check_table(table)?;
        }
        let transitions = self.check_chain(&meta, Sequence(0))?;
        Ok(CheckReport {
            rows,
            transitions,
            sequence: Sequence(meta.sequence),
        })
    }

    /// Decodes every row of a table, without keeping them.
    fn check_table(&self, table: &Table) -> Result<u64, StoreError> {
        let error = |source| self.failed(source);
        let query = format!("SELECT {}, row FROM {}", table.key, table.name);
        let mut statement = self.transaction.prepare_cached(&query).map_err(error)?;
        let mut rows = statement.query([]).map_err(error)?;
        let mut count = 0;
        while let Some(row) = rows.next().map_err(error)? {
            let key: String = row.get(0).map_err(error)?;
            let bytes = row.get_ref(1).map_err(error)?.as_blob();
            let bytes = bytes.map_err(|bad| self.corrupt(table.name, &key, bad))?;
            decode(self.file, table.name, &key, bytes)?;
            count += 1;
        }
        Ok(count)
    }
}

fn static_kind(kind: &str) -> Option<&'static str> {
    TABLES
        .into_iter()
        .find(|table| table.name == kind)
        .map(|table| table.name)
}
