//! The one row of `meta`: numbers that only grow, how many rows of each table there must be and what they add up to, and a
//! seal over all of it. So a row that vanished from its table is missed, although SQLite misses nothing.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, params};
use trainyard_common::ids::{ClusterId, Sequence, Term};
use trainyard_common::record::Record;
use trainyard_common::state::AttemptState;

use super::read::TABLES;
use super::write::id;
use super::{SCHEMA_VERSION, corrupt, failed, is_no_value};
use crate::store::StoreError;
use crate::store::mark::Mark;

/// Tables with rows; [`TABLES`] in its order.
pub(super) const TABLE_COUNT: usize = 7;
/// Bytes of all tallies as they are stored.
const TALLIES_BYTES: usize = TABLE_COUNT * 2 * 16;

/// How many rows there are, and the sum of their digests: the same in whatever order they come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) rows: u64,
    sum: u64,
}

impl Tally {
    pub(super) fn add(&mut self, row: &[u8]) {
        self.rows = self.rows.wrapping_add(1);
        self.sum = self.sum.wrapping_add(digest(row));
    }

    pub(super) fn remove(&mut self, row: &[u8]) {
        self.rows = self.rows.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(digest(row));
    }
}

/// A row holds its table and key, so its bytes alone say which row of which table it is.
fn digest(row: &[u8]) -> u64 {
    let hash = blake3::hash(row);
    u64::from_le_bytes(*hash.as_bytes().first_chunk().unwrap_or(&[0; 8]))
}

/// The tallies of all tables: rows that a start reads, and the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tallies {
    pub(super) live: [Tally; TABLE_COUNT],
    pub(super) rest: [Tally; TABLE_COUNT],
}

impl Tallies {
    /// The tally that a row of the table belongs to.
    pub(super) fn of(&mut self, table: usize, live: bool) -> &mut Tally {
        let tallies = if live { &mut self.live } else { &mut self.rest };
        &mut tallies[table]
    }

    fn encode(&self) -> Vec<u8> {
        let all = self.live.iter().chain(&self.rest);
        all.flat_map(|tally| [tally.rows, tally.sum])
            .flat_map(u64::to_le_bytes)
            .collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != TALLIES_BYTES {
            return None;
        }
        let mut words = bytes
            .chunks_exact(8)
            .filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?)));
        let mut tallies = Self::default();
        for tally in tallies.live.iter_mut().chain(&mut tallies.rest) {
            *tally = Tally {
                rows: words.next()?,
                sum: words.next()?,
            };
        }
        Some(tallies)
    }
}

/// Which of [`TABLES`] a record's row is in.
pub(super) fn table_of(record: &Record) -> usize {
    match record {
        Record::Job(_) => 0,
        Record::Task(_) => 1,
        Record::Attempt(_) => 2,
        Record::Bundle(_) | Record::BundleRemoved(_) => 3,
        Record::Node(_) | Record::NodeRemoved(_) => 4,
        Record::Token(_) => 5,
        Record::User(_) => 6,
    }
}

/// The column that says whether a start reads a row; where it reads all, there is none.
pub(super) fn flag_of(table: &str) -> &'static str {
    match table {
        "jobs" | "tasks" => "live",
        "attempts" => "open",
        "tokens" => "usable",
        _ => "1",
    }
}

/// What that column should say.
pub(super) fn is_live(record: &Record) -> bool {
    match record {
        Record::Job(job) => !job.state.is_terminal(),
        Record::Task(task) => !task.state.is_terminal(),
        Record::Attempt(attempt) => attempt.state != AttemptState::Ended,
        Record::Token(token) => !token.revoked && token.uses_left > 0,
        Record::Bundle(_)
        | Record::BundleRemoved(_)
        | Record::Node(_)
        | Record::NodeRemoved(_)
        | Record::User(_) => true,
    }
}

/// The row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) cluster: ClusterId,
    pub(super) created_at: i64,
    pub(super) term: Term,
    pub(super) sequence: u64,
    pub(super) chain: u32,
    pub(super) next_job: u64,
    pub(super) next_node: u32,
    pub(super) next_token: u64,
    /// Commits of any kind.
    pub(super) commits: u64,
    /// Whether the nodes have not been heard of since the state was restored or cut.
    pub(super) awaiting: bool,
    /// The authority that belongs to the state, once it is known.
    pub(super) authority: Option<[u8; 32]>,
    pub(super) tallies: Tallies,
}

impl Meta {
    pub(super) fn new(cluster: ClusterId, created_at: i64) -> Self {
        Self {
            cluster,
            created_at,
            term: Term(0),
            sequence: 0,
            chain: 0,
            next_job: 1,
            next_node: 1,
            next_token: 1,
            commits: 0,
            awaiting: false,
            authority: None,
            tallies: Tallies::default(),
        }
    }

    pub(super) fn mark(&self) -> Mark {
        Mark {
            cluster: self.cluster,
            commits: self.commits,
            sequence: self.sequence,
            term: self.term.0,
            chain: self.chain,
        }
    }

    pub(super) fn last(&self) -> Sequence {
        Sequence(self.sequence)
    }

    fn seal(&self) -> i64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"trainyard meta");
        hasher.update(&SCHEMA_VERSION.to_le_bytes());
        hasher.update(&self.cluster.0);
        for number in [
            self.created_at.cast_unsigned(),
            self.term.0,
            self.sequence,
            u64::from(self.chain),
            self.next_job,
            u64::from(self.next_node),
            self.next_token,
            self.commits,
            u64::from(self.awaiting),
            u64::from(self.authority.is_some()),
        ] {
            hasher.update(&number.to_le_bytes());
        }
        hasher.update(&self.authority.unwrap_or_default());
        hasher.update(&self.tallies.encode());
        let hash = hasher.finalize();
        i64::from_le_bytes(*hash.as_bytes().first_chunk().unwrap_or(&[0; 8]))
    }
}

/// Reads the row and checks its seal.
pub(super) fn read(connection: &Connection, file: &Path) -> Result<Meta, StoreError> {
    let error = |source| failed("read", file, source);
    let query = "SELECT cluster, created_at, term, sequence, chain, next_job, next_node, next_token, commits, awaiting, \
                 authority, tallies, seal FROM meta WHERE one = 1";
    let mut statement = connection.prepare_cached(query).map_err(error)?;
    let found = statement.query_row([], |row| {
        let cluster: Vec<u8> = row.get(0)?;
        let authority: Vec<u8> = row.get(10)?;
        let tallies: Vec<u8> = row.get(11)?;
        let (Ok(cluster), Some(tallies)) = (
            ClusterId::try_from(cluster.as_slice()),
            Tallies::decode(&tallies),
        ) else {
            return Ok(None);
        };
        let awaiting: i64 = row.get(9)?;
        let meta = Meta {
            cluster,
            created_at: row.get(1)?,
            term: Term(row.get(2)?),
            sequence: row.get(3)?,
            chain: row.get(4)?,
            next_job: row.get(5)?,
            next_node: row.get(6)?,
            next_token: row.get(7)?,
            commits: row.get(8)?,
            awaiting: awaiting == 1,
            authority: authority.try_into().ok(),
            tallies,
        };
        let whole = matches!(awaiting, 0 | 1) && meta.seal() == row.get::<_, i64>(12)?;
        Ok(whole.then_some(meta))
    });
    match found {
        Ok(Some(meta)) => Ok(meta),
        Ok(None) => Err(corrupt(
            file,
            "meta",
            "1",
            "its numbers do not match their seal",
        )),
        // A number that is none is damage, too.
        Err(source) if is_no_value(&source) => Err(corrupt(file, "meta", "1", source)),
        Err(rusqlite::Error::QueryReturnedNoRows) => {
            Err(corrupt(file, "meta", "1", "the row is missing"))
        }
        Err(source) => Err(error(source)),
    }
}

/// Writes everything of the row that changes.
pub(super) fn write(connection: &Connection, meta: &Meta) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE meta SET term = ?1, sequence = ?2, chain = ?3, next_job = ?4, next_node = ?5, next_token = ?6, \
             commits = ?7, awaiting = ?8, authority = ?9, tallies = ?10, seal = ?11",
        )?
        .execute(params![
            id(meta.term.0),
            id(meta.sequence),
            meta.chain,
            id(meta.next_job),
            meta.next_node,
            id(meta.next_token),
            id(meta.commits),
            meta.awaiting,
            authority(meta),
            meta.tallies.encode(),
            meta.seal(),
        ])
        .map(drop)
}

/// Writes the row of a new table.
pub(super) fn insert(connection: &Connection, meta: &Meta) -> rusqlite::Result<()> {
    connection
        .execute(
            "INSERT INTO meta VALUES (1, ?1, ?2, ?3, 0, 0, 0, 1, 1, 1, 0, 0, x'', x'', 0)",
            params![SCHEMA_VERSION, meta.cluster.0, meta.created_at],
        )
        .map(drop)?;
    write(connection, meta)
}

fn authority(meta: &Meta) -> &[u8] {
    meta.authority.as_ref().map_or(&[], |digest| digest)
}

/// Changes the row in a transaction of its own; gives it as it became.
pub(super) fn change(
    connection: &Connection,
    file: &Path,
    operation: &'static str,
    change: impl FnOnce(&mut Meta),
) -> Result<Meta, StoreError> {
    let error = |source| failed(operation, file, source);
    let transaction =
        rusqlite::Transaction::new_unchecked(connection, rusqlite::TransactionBehavior::Immediate)
            .map_err(error)?;
    let mut meta = read(&transaction, file)?;
    change(&mut meta);
    meta.commits += 1;
    write(&transaction, &meta).map_err(error)?;
    transaction.commit().map_err(error)?;
    Ok(meta)
}

/// The cluster and schema version of a state of any version.
pub(super) fn version(connection: &Connection, file: &Path) -> Result<i64, StoreError> {
    connection
        .query_row("SELECT schema_version FROM meta", [], |row| row.get(0))
        .optional()
        .map_err(|source| failed("read", file, source))?
        .ok_or_else(|| corrupt(file, "meta", "1", "the row is missing"))
}

/// Counts what is there, by the rows' own word; a row that cannot be decoded counts as what its column says.
pub(super) fn tallies(connection: &Connection, file: &Path) -> Result<Tallies, StoreError> {
    let error = |source| failed("count the rows of", file, source);
    let mut tallies = Tallies::default();
    for (index, table) in TABLES.iter().enumerate() {
        let flag = flag_of(table.name);
        let query = format!("SELECT {flag}, row FROM {}", table.name);
        let mut statement = connection.prepare(&query).map_err(error)?;
        let mut rows = statement.query([]).map_err(error)?;
        while let Some(row) = rows.next().map_err(error)? {
            let live: bool = row.get(0).map_err(error)?;
            let bytes: Vec<u8> = row.get(1).map_err(error)?;
            tallies.of(index, live).add(&bytes);
        }
    }
    Ok(tallies)
}
