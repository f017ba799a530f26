//! The store of output: idempotent by offset, bounded, read from anywhere.

use proptest::prelude::*;
use trainyard_common::logrecord::{LogKind, LogRecord};
use trainyard_common::time::Timestamp;

use super::*;

fn key(rank: u32) -> LogKey {
    LogKey {
        attempt: "j1.0.1".parse().unwrap(),
        rank,
    }
}

fn records(texts: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        LogRecord {
            kind: LogKind::Stdout,
            at: Timestamp(at as u64),
            data: text.as_bytes(),
        }
        .encode(&mut bytes);
    }
    bytes
}

fn store() -> (tempfile::TempDir, LogStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = LogStore::open(dir.path().join("logs")).unwrap();
    (dir, store)
}

fn text(store: &LogStore, key: LogKey, start: Start) -> String {
    let mut reader = store.reader(key);
    reader.start(start).unwrap();
    let mut text = String::new();
    loop {
        let batch = reader.next_batch().unwrap();
        if batch.is_empty() {
            return text;
        }
        for entry in batch {
            text.push_str(str::from_utf8(&entry.data).unwrap());
        }
    }
}

#[test]
fn appends_are_idempotent_by_offset_and_a_gap_stores_nothing() {
    let (_dir, store) = store();
    let one = records(&["one\n"]);
    let both = records(&["one\n", "two\n"]);
    let stored = one.len() as u64;
    assert_eq!(
        store.append(key(0), 0, &one, false).unwrap(),
        Appended { stored, end: false }
    );
    assert_eq!(
        store.append(key(0), 0, &one, false).unwrap(),
        Appended { stored, end: false }
    );
    let gap = store.append(key(0), stored + 1, &one, true).unwrap();
    assert_eq!(gap, Appended { stored, end: false }, "a gap was stored");
    let stored = both.len() as u64;
    assert_eq!(
        store.append(key(0), 0, &both, true).unwrap(),
        Appended { stored, end: true }
    );
    assert_eq!(text(&store, key(0), Start::default()), "one\ntwo\n");
    // Nothing comes after the end.
    assert_eq!(
        store.append(key(0), stored, &one, false).unwrap(),
        Appended { stored, end: true }
    );
    assert_eq!(text(&store, key(0), Start::default()), "one\ntwo\n");
}

#[test]
fn only_whole_records_at_record_boundaries_are_taken() {
    let (_dir, store) = store();
    let bytes = records(&["one\n", "two\n"]);
    assert!(matches!(
        store.append(key(0), 0, &bytes[..20], false),
        Err(LogError::Records(_))
    ));
    assert!(matches!(
        store.append(key(0), 0, b"plain text", false),
        Err(LogError::Records(_))
    ));
    store.append(key(0), 0, &records(&["x\n"]), false).unwrap();
    // An offset in the middle of what is stored that does not meet a boundary of the new data.
    assert!(matches!(
        store.append(key(0), 3, &bytes, false),
        Err(LogError::Records(_))
    ));
    assert_eq!(text(&store, key(0), Start::default()), "x\n");
}

#[test]
fn a_torn_end_is_cut_off_after_a_crash() {
    let (dir, store) = store();
    let bytes = records(&["one\n", "two\n"]);
    store.append(key(0), 0, &bytes, false).unwrap();
    let path = dir.path().join("logs/j1/0.1.0.log");
    let first = records(&["one\n"]).len() as u64;
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(first + 5)
        .unwrap();
    let store = LogStore::open(dir.path().join("logs")).unwrap();
    assert_eq!(text(&store, key(0), Start::default()), "one\n");
    let answer = store
        .append(key(0), bytes.len() as u64, &[], false)
        .unwrap();
    assert_eq!(
        answer,
        Appended {
            stored: first,
            end: false
        }
    );
    store.append(key(0), 0, &bytes, false).unwrap();
    assert_eq!(text(&store, key(0), Start::default()), "one\ntwo\n");
}

#[test]
fn reading_starts_at_lines_times_and_offsets() {
    let (_dir, store) = store();
    let bytes = records(&["a\nb", "b\n", "c\nd\n"]);
    store.append(key(0), 0, &bytes, false).unwrap();
    let tail = |lines| {
        text(
            &store,
            key(0),
            Start {
                tail: Some(lines),
                ..Start::default()
            },
        )
    };
    assert_eq!(tail(0), "");
    assert_eq!(tail(1), "d\n");
    assert_eq!(tail(3), "bb\nc\nd\n");
    assert_eq!(tail(99), "a\nbb\nc\nd\n");
    let since = Start {
        since: Some(Timestamp(1)),
        ..Start::default()
    };
    assert_eq!(text(&store, key(0), since), "b\nc\nd\n");
    let offset = records(&["a\nb"]).len() as u64;
    assert_eq!(
        text(
            &store,
            key(0),
            Start {
                offset,
                ..Start::default()
            }
        ),
        "b\nc\nd\n"
    );
    assert_eq!(
        text(
            &store,
            key(0),
            Start {
                offset: offset + 1,
                ..Start::default()
            }
        ),
        "c\nd\n"
    );
    assert_eq!(
        text(
            &store,
            key(0),
            Start {
                offset: u64::MAX,
                ..Start::default()
            }
        ),
        ""
    );
}

#[test]
fn followers_are_told_and_outputs_are_listed() {
    let (_dir, store) = store();
    assert_eq!(store.list(JobId(1)).unwrap(), []);
    let mut follower = store.follow(JobId(1));
    let other = store.follow(JobId(2));
    for rank in [10, 2] {
        store.append(key(rank), 0, &records(&["x"]), true).unwrap();
    }
    assert_eq!(store.list(JobId(1)).unwrap(), [key(2), key(10)]);
    assert!(follower.has_changed().unwrap());
    follower.mark_unchanged();
    assert!(!other.has_changed().unwrap());
    drop((follower, other));
    let _third = store.follow(JobId(3));
    assert_eq!(
        store.followed.lock().unwrap().len(),
        1,
        "left followers are kept"
    );
}

#[test]
fn output_above_the_limit_is_refused() {
    let (dir, store) = store();
    store.append(key(0), 0, &records(&["x"]), false).unwrap();
    let length = MAX_LOG_BYTES_PER_RANK + SLACK;
    store.shard(key(0)).insert(key(0), length);
    let refused = store.append(key(0), length, &records(&["x"]), false);
    assert!(matches!(refused, Err(LogError::TooLong)));
    drop(dir);
}

proptest! {
    #[test]
    fn any_way_of_cutting_and_repeating_gives_the_same_file(
        texts in proptest::collection::vec("[a-z\n]{0,8}", 1..12),
        sends in proptest::collection::vec((0..12_usize, 0..12_usize), 0..12),
    ) {
        let (_dir, store) = store();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let ends: Vec<usize> = (0..=texts.len()).map(|n| records(&texts[..n]).len()).collect();
        let bytes = records(&texts);
        let place = |n: usize| ends[n % ends.len()];
        for (from, to) in sends.into_iter().chain([(0, ends.len() - 1)]) {
            let (from, to) = (place(from).min(place(to)), place(from).max(place(to)));
            let answer = store.append(key(0), from as u64, &bytes[from..to], false).unwrap();
            prop_assert!(answer.stored as usize >= to || (answer.stored as usize) < from || from == to);
        }
        prop_assert_eq!(text(&store, key(0), Start::default()), texts.concat());
    }
}
