//! What becomes of a bundle without a carrier: whatever it left alive is killed, and then each task's end is written into
//! the journal in its stead. An end is never made up: what may have run and has none is unknown, and what surely did not
//! run is given back. If the journal is damaged, nothing is sure of a task without an end.

use std::io;

use trainyard_common::bundle::{DesiredBundle, TaskRange, TaskSet};
use trainyard_common::ids::TaskIndex;
use trainyard_common::member::EndCause;
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;

use super::super::dir::{boot_id, read_json};
use super::super::failpoint::point;
use super::super::process::{Process, Signal};
use super::super::wire::ShimFile;
use super::journal::{Account, Gap, Journal, Record, TaskEnd, missing};
use super::processes::Marks;
use super::{BundleDir, BundleFile};

/// Bytes of the carrier's own log that are shown when it could not start.
const LOG_TAIL: usize = 400;

/// How far the books of a bundle are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// They are, with so many bytes of whole records.
    Over(u64),
    /// Not while a process of the bundle lives.
    NotYet,
    /// A carrier has it: one that an agent started just before its own end may be late.
    Carried,
}

/// Closes the books of a bundle whose carrier is dead or never was; `why` says what went wrong if that is known. May be
/// done again, for tasks that were handed out after it.
pub(super) fn settle(
    dir: &BundleDir,
    desired: &DesiredBundle,
    why: Option<&str>,
    now: Timestamp,
) -> io::Result<Settled> {
    let shim = dir.shim();
    // Also keeps a late carrier from starting meanwhile.
    let Some(_lock) = shim.try_lock()? else {
        return Ok(Settled::Carried);
    };
    let (mut journal, account) = Journal::open(&dir.journal())?;
    let damage = account.damage.map(|gap| gap.explain(&dir.journal()));
    let mut records = Vec::new();
    if account.over {
        match &damage {
            Some(damage) => unreadable(&account, desired, damage, now, &mut records),
            None => give_back(missing(&desired.tasks, &account.handed), &mut records),
        }
        if !records.is_empty() {
            journal.append(&records)?;
        }
        return Ok(Settled::Over(journal.length()));
    }
    let was_carried = shim.shim().exists();
    let (rebooted, damage) = match read_record(dir) {
        Ok(file) => {
            let rebooted = file.boot_id != boot_id()?;
            if !rebooted && was_carried && !kill_all(&file) {
                return Ok(Settled::NotYet);
            }
            (rebooted, damage)
        }
        // Without its key nothing of it can be told from strangers, and those are not touched.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            (false, damage.or(Some(error.to_string())))
        }
        Err(error) => return Err(error),
    };
    if rebooted && was_carried {
        after_reboot(&account, desired, now, &mut records);
    } else {
        skip_what_is_on_record(&account, desired, &mut records);
        match &damage {
            Some(damage) => unreadable(&account, desired, damage, now, &mut records),
            None => after_death(dir, &account, desired, now, &mut records),
        }
    }
    let message = match (why, damage) {
        (Some(why), _) => why.to_owned(),
        (None, _) if rebooted => "the node was rebooted".to_owned(),
        (None, Some(damage)) => damage,
        (None, None) => death(dir, &account),
    };
    records.push(Record::Over { message });
    journal.append(&records)?;
    point("settle.appended");
    journal.sync()?;
    if let Some(Gap { offset, bytes }) = account.torn {
        let path = dir.journal();
        tracing::warn!(bundle = %dir.bundle(), ?path, offset, bytes, "the torn end of a journal was cut off");
    }
    Ok(Settled::Over(journal.length()))
}

/// What was accepted, if need be as its carrier had read it.
pub(super) fn read_record(dir: &BundleDir) -> io::Result<BundleFile> {
    let error = match read_file(dir) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => error,
        result => return result,
    };
    match dir.shim().read_shim() {
        Ok(Some(ShimFile {
            bundle: Some(file), ..
        })) if file.bundle == dir.bundle() => {
            tracing::error!(bundle = %dir.bundle(), %error, "a bundle is known from its shim only");
            Ok(*file)
        }
        Ok(_) | Err(_) => Err(error),
    }
}

/// Reports that the end of the journal has lost are not told again, and their numbers not given to others.
fn skip_what_is_on_record(account: &Account, desired: &DesiredBundle, records: &mut Vec<Record>) {
    if account.reports < desired.recorded {
        records.push(Record::Skipped {
            to: desired.recorded,
        });
    }
}

/// Anything may be missing from the journal, and tasks without an end may have run.
fn unreadable(
    account: &Account,
    desired: &DesiredBundle,
    damage: &str,
    now: Timestamp,
    records: &mut Vec<Record>,
) {
    let open = desired.tasks.tasks();
    let open: Vec<TaskIndex> = open.filter(|task| !account.is_settled(*task)).collect();
    records.extend(open.into_iter().map(|task| {
        let end = unknown(task, EndCause::SupervisorLost, 0, now);
        Record::Ended(Box::new(TaskEnd {
            message: damage.to_owned(),
            ..end
        }))
    }));
}

/// What was accepted.
pub(super) fn read_file(dir: &BundleDir) -> io::Result<BundleFile> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let file: BundleFile = read_json(&dir.file())?.ok_or_else(missing)?;
    if file.bundle != dir.bundle() {
        let message = format!("the directory holds bundle {}", file.bundle);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(file)
}

fn give_back(ranges: Vec<TaskRange>, records: &mut Vec<Record>) {
    for range in ranges {
        records.extend([Record::Handed(range), Record::Returned(range)]);
    }
}

fn after_death(
    dir: &BundleDir,
    account: &Account,
    desired: &DesiredBundle,
    now: Timestamp,
    records: &mut Vec<Record>,
) {
    let mut unbegun = account.open.clone();
    for task in &account.begun {
        unbegun.remove(*task);
        if account.reports < desired.recorded && !desired.tasks.contains(*task) {
            // Its end is on record, and was lost from here.
            continue;
        }
        let log = dir
            .log(*task)
            .metadata()
            .map_or(0, |metadata| metadata.len());
        let end = unknown(*task, EndCause::SupervisorLost, log, now);
        records.push(Record::Ended(Box::new(end)));
    }
    records.extend(unbegun.ranges().iter().copied().map(Record::Returned));
    give_back(missing(&desired.tasks, &account.handed), records);
}

/// The journal's end may be lost, and what it told with it. What the coordinator has on record is not open for it; all
/// the rest may have run.
fn after_reboot(
    account: &Account,
    desired: &DesiredBundle,
    now: Timestamp,
    records: &mut Vec<Record>,
) {
    records.push(Record::Skipped {
        to: desired.recorded,
    });
    let new = missing(&desired.tasks, &account.handed);
    records.extend(new.iter().copied().map(Record::Handed));
    let new: TaskSet = new.into_iter().collect();
    let open = desired.tasks.tasks();
    let open = open.filter(|task| new.contains(*task) || account.open.contains(*task));
    records.extend(
        open.map(|task| Record::Ended(Box::new(unknown(task, EndCause::NodeRebooted, 0, now)))),
    );
}

fn unknown(task: TaskIndex, cause: EndCause, log: u64, now: Timestamp) -> TaskEnd {
    let what = match cause {
        EndCause::NodeRebooted => "the node was rebooted",
        _ => "the shim was killed",
    };
    TaskEnd {
        task,
        started_at: None,
        started: true,
        exit: Some(ExitStatus::Unknown),
        unprompted: false,
        exited_at: now,
        ended_at: now,
        cause,
        message: format!("{what} before the exit status was recorded"),
        log,
        outputs: false,
        warning: String::new(),
    }
}

/// Why a carrier is dead.
fn death(dir: &BundleDir, account: &Account) -> String {
    if !account.handed.is_empty() {
        return "the shim was killed".to_owned();
    }
    let log = std::fs::read(dir.shim().shim_log()).unwrap_or_default();
    let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_TAIL)..]);
    match tail.trim() {
        "" => "the shim ended before it was ready".to_owned(),
        tail => format!("the shim ended before it was ready: {tail}"),
    }
}

/// Kills what a dead carrier left. Whether nothing is left.
fn kill_all(file: &BundleFile) -> bool {
    let marks = Marks::new(&file.key);
    // Looked at twice: a process that is just being replaced by another program shows no environment.
    for _ in 0..2 {
        let living = marks.all();
        if !living.is_empty() {
            living.iter().for_each(kill);
            return false;
        }
    }
    true
}

fn kill(process: &Process) {
    process.signal(Signal::SIGSTOP);
    process.signal(Signal::SIGKILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, last: u32) -> TaskRange {
        TaskRange {
            first: TaskIndex(first),
            last: TaskIndex(last),
        }
    }

    #[test]
    fn after_a_reboot_what_is_not_on_record_is_unknown() {
        let mut account = Account::default();
        account.take(&Record::Handed(range(0, 9)));
        for task in [0, 5] {
            let end = unknown(TaskIndex(task), EndCause::Completed, 0, Timestamp(1));
            account.take(&Record::Ended(Box::new(end)));
        }
        // The coordinator recorded five reports, of which the journal lost three, and handed out more.
        let desired = DesiredBundle {
            bundle: "j1.b1".parse().unwrap(),
            slots: 2,
            phase: trainyard_common::bundle::BundlePhase::Run,
            tasks: [range(4, 6), range(9, 11)].into_iter().collect(),
            recorded: 5,
            spec: None,
        };
        let mut records = Vec::new();
        after_reboot(&account, &desired, Timestamp(2), &mut records);
        assert_eq!(records[0], Record::Skipped { to: 5 });
        assert_eq!(records[1], Record::Handed(range(10, 11)));
        let ended: Vec<u32> = records[2..]
            .iter()
            .map(|record| match record {
                Record::Ended(end) if end.cause == EndCause::NodeRebooted && end.started => {
                    end.task.0
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ended, [4, 6, 9, 10, 11]);
        records.iter().for_each(|record| account.take(record));
        assert_eq!(account.reports, 5 + 5);
    }
}
