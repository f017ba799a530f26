//! The files and messages that outlive a program: as they are written now and ever were, byte for byte, and damaged in
//! every way that one bit or one cut can.
//!
//! A golden file that is not there is written, and the test fails once; one that is there is never changed: a new format
//! gets a new version and a file of its own.

use serde::Serialize;
use serde::de::DeserializeOwned;
use trainyard_common::bundle::{BundlePhase, DesiredBundle, TaskRange, TaskSet};
use trainyard_common::ids::TaskIndex;
use trainyard_transport::sealed::{self, FileRecord};

use super::super::carrier::{BundleFile, Item, Record, TaskEnd, Told, items};
use super::super::wire::{Command, MemberFile, Settings, Status};
use super::*;

fn golden(name: &str, now: Option<&[u8]>) -> Vec<u8> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let path = dir.join(name);
    match (std::fs::read(&path), now) {
        (Ok(bytes), _) => bytes,
        (Err(_), Some(now)) => {
            std::fs::write(&path, now).unwrap();
            panic!("{} was not there and is written now", path.display());
        }
        (Err(error), None) => panic!("{}: {error}", path.display()),
    }
}

/// Version 1 is read, version 2 is what is written now, and of that no damage goes unseen.
fn check_file<T: FileRecord + PartialEq + std::fmt::Debug>(value: &T) {
    let kind = T::KIND;
    let plain = serde_json::to_vec(value).unwrap();
    let old = golden(&format!("{kind}-1.json"), Some(&plain));
    assert_eq!(sealed::open::<T>(&old).unwrap(), *value, "{kind}");
    for cut in 0..old.len() {
        assert!(
            sealed::open::<T>(&old[..cut]).is_err(),
            "{kind} cut at {cut}"
        );
    }
    for bit in 0..old.len() * 8 {
        let mut flipped = old.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        // It has no checksum: it must not panic, and that is all that can be asked of it.
        let _ = sealed::open::<T>(&flipped);
    }
    let now = sealed::seal(value).unwrap();
    let new = golden(&format!("{kind}-{}.json", T::VERSION), Some(&now));
    assert_eq!(String::from_utf8_lossy(&new), String::from_utf8_lossy(&now));
    assert_eq!(sealed::open::<T>(&new).unwrap(), *value, "{kind}");
    let (mut refused, temp) = (0, tempfile::tempdir().unwrap());
    let path = temp.path().join("file.json");
    let cuts = (0..new.len()).map(|cut| new[..cut].to_vec());
    let flips = (0..new.len() * 8).map(|bit| {
        let mut flipped = new.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        flipped
    });
    for damaged in cuts.chain(flips) {
        match sealed::open::<T>(&damaged) {
            Ok(read) => assert_eq!(read, *value, "{kind}"),
            Err(damage) => {
                refused += 1;
                assert!(damage.offset <= damaged.len() as u64);
                if refused % 100 == 1 {
                    // As everybody reads it: the file is named, and the place.
                    std::fs::write(&path, &damaged).unwrap();
                    let error = dir::read_json::<T>(&path).unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                    let text = error.to_string();
                    let said = format!("unreadable at byte {}", damage.offset);
                    assert!(text.contains("file.json") && text.contains(&said), "{text}");
                }
            }
        }
    }
    // But for the case of some hexadecimal digits.
    assert!(refused >= new.len() * 9 - 8, "{kind}: {refused}");
}

fn member_file() -> MemberFile {
    let mut spec = spec(&["python", "train.py", "--name", "a \"b\"\n\u{1f689}"]);
    spec.node_rank = 1;
    spec.nodes = 2;
    spec.procs_per_node = 2;
    spec.resources.gpus = 2;
    spec.gpu_uuids = vec!["GPU-0".to_owned(), "GPU-1".to_owned()];
    spec.launcher = Launcher::Torch;
    spec.env.insert("KEY".to_owned(), "value".to_owned());
    spec.snapshot = Some(trainyard_common::ids::Digest([0xab; 32]));
    spec.resume_from = vec![trainyard_common::ids::Digest([0xcd; 32])];
    spec.time_limit = Some(Duration::from_millis(1500));
    MemberFile {
        attempt: "j17.4.2".parse().unwrap(),
        spec,
        settings: Settings {
            boot_id: "5f2c6d0e-0000-4000-8000-000000000001".to_owned(),
            key: "0123456789abcdef0123456789abcdef".to_owned(),
            log_limit: 1 << 30,
            run_as: Some(RunAs {
                uid: 1000,
                gid: 1001,
                name: "ann".to_owned(),
                home: "/home/ann".into(),
            }),
        },
    }
}

fn bundle_file() -> BundleFile {
    let MemberFile { spec, settings, .. } = member_file();
    BundleFile {
        bundle: "j17.b3".parse().unwrap(),
        spec,
        boot_id: settings.boot_id,
        key: settings.key,
        log_limit: settings.log_limit,
        run_as: None,
        return_after: Duration::from_secs(5),
    }
}

fn ending() -> Ending {
    Ending {
        cause: EndCause::RankFailed,
        message: "rank 3 exited with code 7".to_owned(),
        started: true,
        ranks: [
            ExitStatus::Code(7),
            ExitStatus::Signal(15),
            ExitStatus::Unknown,
        ]
        .into_iter()
        .zip(2..)
        .map(|(exit, rank)| trainyard_common::member::RankEnd {
            rank,
            exit,
            at: Timestamp(1_760_000_000_123),
            unprompted: rank == 2,
            oom_killed: false,
        })
        .collect(),
        ended_at: Timestamp(1_760_000_000_456),
        outputs: None,
        checkpoint: None,
        warning: "5 bytes of output of rank 2 were dropped: log disk full".to_owned(),
    }
}

fn stop_order() -> Stop {
    Stop {
        code: ReasonCode::CancelRequested,
        grace: Duration::from_secs(30),
    }
}

fn gang_go() -> Go {
    Go {
        master_addr: "10.0.0.1".to_owned(),
        master_port: 29_500,
        node_addrs: vec!["10.0.0.1".to_owned(), "fd00::2".to_owned()],
    }
}

#[test]
fn files_of_every_version_are_read_and_no_damage_goes_unseen() {
    check_file(&member_file());
    check_file(&bundle_file());
    check_file(&ShimFile {
        pid: 4711,
        start_time: 123_456,
        pid_namespace: "pid:[4026531836]".to_owned(),
        cgroup: Some("/sys/fs/cgroup/trainyard-j17.4.2-0badc0de".into()),
        member: None,
        bundle: None,
    });
    check_file(&Command {
        go: Some(gang_go()),
        interface: Some("eth0".to_owned()),
        ..Command::default()
    });
    check_file(&Status::new(ShimState::Gone(ending())));
}

#[test]
fn a_shims_own_copy_of_the_record_is_whole() {
    let shim = ShimFile {
        pid: 1,
        start_time: 2,
        pid_namespace: String::new(),
        cgroup: None,
        member: Some(Box::new(member_file())),
        bundle: Some(Box::new(bundle_file())),
    };
    let bytes = sealed::seal(&shim).unwrap();
    assert_eq!(sealed::open::<ShimFile>(&bytes).unwrap(), shim);
}

/// Each line as it was ever said, and what it means.
fn check_lines<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    name: &str,
    values: &[T],
) {
    let mut now = Vec::new();
    for value in values {
        now.extend(wire::line(value).unwrap());
    }
    let said = golden(name, Some(&now));
    let mut lines = said.split_inclusive(|byte| *byte == b'\n');
    for value in values {
        let line = lines
            .next()
            .unwrap_or_else(|| panic!("{name} is too short"));
        let read: T = serde_json::from_slice(line).unwrap();
        assert_eq!(read, *value, "{name}");
        // What is said now is understood by those who understood that.
        assert_eq!(
            String::from_utf8_lossy(&wire::line(value).unwrap()),
            String::from_utf8_lossy(line)
        );
        let mut later: serde_json::Value = serde_json::from_slice(line).unwrap();
        later["of_a_later_version"] = serde_json::json!({"x": [1]});
        assert_eq!(
            serde_json::from_value::<T>(later).unwrap(),
            *value,
            "{name}"
        );
    }
    assert_eq!(lines.next(), None, "{name} is too long");
}

#[test]
fn what_agents_and_shims_say_to_each_other_stays_understood() {
    let command = Command::default;
    check_lines(
        "agent-to-shim.jsonl",
        &[
            Command {
                go: Some(gang_go()),
                interface: Some("eth0".to_owned()),
                ..command()
            },
            Command {
                go: Some(Go::alone(40_000)),
                ..command()
            },
            Command {
                stop: Some(stop_order()),
                ..command()
            },
        ],
    );
    let state = Status::new;
    check_lines(
        "shim-to-agent.jsonl",
        &[
            state(ShimState::Accepted),
            state(ShimState::Ready { port: 40_000 }),
            state(ShimState::Running {
                started_at: Timestamp(1_760_000_000_000),
            }),
            state(ShimState::Stopping),
            state(ShimState::Gone(ending())),
        ],
    );
    check_lines("carrier-to-agent.jsonl", &[Told { journal: 8192 }]);
    let desired = |phase| DesiredBundle {
        bundle: "j17.b3".parse().unwrap(),
        slots: 4,
        phase,
        tasks: TaskSet::from_iter([range(0, 9), range(12, 12)]),
        recorded: 3,
        spec: None,
    };
    check_lines(
        "agent-to-carrier.jsonl",
        &[
            desired(BundlePhase::Run),
            desired(BundlePhase::Close),
            desired(BundlePhase::Stop(stop_order())),
        ],
    );
}

fn range(first: u32, last: u32) -> TaskRange {
    TaskRange {
        first: TaskIndex(first),
        last: TaskIndex(last),
    }
}

fn records() -> Vec<Record> {
    let end = |task: u32| {
        Record::Ended(Box::new(TaskEnd {
            task: TaskIndex(task),
            started_at: Some(Timestamp(1_760_000_000_000)),
            started: true,
            exit: Some(ExitStatus::Code(7)),
            unprompted: true,
            exited_at: Timestamp(1_760_000_000_100),
            ended_at: Timestamp(1_760_000_000_101),
            cause: EndCause::RankFailed,
            message: "rank 0 exited with code 7".to_owned(),
            log: 20,
            outputs: false,
            warning: String::new(),
        }))
    };
    vec![
        Record::Handed(range(0, 3)),
        Record::Began(TaskIndex(0)),
        Record::Began(TaskIndex(1)),
        Record::Started {
            task: TaskIndex(0),
            at: Timestamp(1_760_000_000_000),
        },
        end(1),
        Record::Skipped { to: 2 },
        Record::Returned(range(2, 3)),
        end(0),
        Record::Over {
            message: String::new(),
        },
    ]
}

/// What is not read is the last of it, or told as a gap; nothing is read that was not written.
fn check_journal(damaged: &[u8], golden: &[Record], what: &str) {
    let (found, taken) = items(damaged, 0);
    let mut read = Vec::new();
    let mut gaps = 0;
    for item in &found {
        match item {
            Item::Record(record) => read.push(record.clone()),
            Item::Gap(gap) => {
                gaps += 1;
                assert!(
                    gap.bytes > 0 && gap.offset + gap.bytes <= taken as u64,
                    "{what}"
                );
            }
        }
    }
    let missing = golden.len() - read.len();
    let mut rest = golden.iter();
    let in_order = read.iter().all(|record| rest.any(|other| other == record));
    assert!(in_order, "{what}: {read:?}");
    // One flip damages two lines at most, and then it is told of.
    assert!(missing <= 2, "{what}: {missing} are missing");
    assert!(missing == 0 || gaps > 0 || taken < damaged.len(), "{what}");
}

#[test]
fn a_journal_of_before_is_read_and_no_damage_of_it_goes_unseen() {
    let records = records();
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("journal");
    std::fs::write(&path, "").unwrap();
    super::super::carrier::write_journal(&path, &records).unwrap();
    let now = std::fs::read(&path).unwrap();
    let bytes = golden("journal-1", Some(&now));
    assert_eq!(bytes, now);
    let (found, taken) = items(&bytes, 0);
    let golden: Vec<Item> = records.iter().cloned().map(Item::Record).collect();
    assert_eq!((found, taken), (golden, bytes.len()));
    for cut in 0..bytes.len() {
        let (found, taken) = items(&bytes[..cut], 0);
        let whole = bytes[..cut].iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(found.len(), whole);
        assert!(taken <= cut && !found.iter().any(|item| matches!(item, Item::Gap(_))));
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        check_journal(&flipped, &records, &format!("bit {bit}"));
    }
}
