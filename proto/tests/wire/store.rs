//! Stored rows: a row that an earlier build wrote can be read, and a damaged one never is.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;
use prost::Message;
use trainyard_common::ids::{Digest, JobId, NodeId, TaskIndex, WorkspaceName};
use trainyard_common::record::{CancelRequest, JobRecord, Record, TaskCounts};
use trainyard_common::resources::Resources;
use trainyard_common::spec::{Array, JobSpec, Launcher, OnDisconnect};
use trainyard_common::state::{ExitStatus, JobState, Reason, ReasonCode};
use trainyard_common::time::Timestamp;
use trainyard_proto::convert::InvalidField;
use trainyard_proto::convert::store::{self, CorruptRecord, SCHEMA_VERSION};
use trainyard_proto::v1;

use crate::descriptors::REGENERATE;
use crate::strategies;

/// A job with every field set. Do not change it: the row in `golden_row.hex` was written from it once.
fn golden() -> (Timestamp, Record) {
    let spec = JobSpec {
        name: "train".into(),
        workspace: WorkspaceName::default_workspace(),
        targets: vec!["lab".into(), "cloud".into()],
        nodes: 2,
        procs_per_node: 8,
        resources_per_node: Resources {
            cpu_milli: 64_500,
            memory_bytes: 512 << 30,
            gpus: 8,
        },
        gpu_type: Some("H100".into()),
        gpu_memory_bytes: Some(80 << 30),
        launcher: Launcher::Torchrun,
        command: vec!["python3".into(), "train.py".into(), "Grüße".into()],
        env: BTreeMap::from([("A".into(), "1".into()), ("B".into(), String::new())]),
        snapshot: Some(Digest([1; 32])),
        time_limit: Some(Duration::from_millis(86_400_001)),
        grace: Duration::from_secs(30),
        retries: 3,
        array: Some(Array {
            first: 1,
            last: 9,
            max_running: Some(4),
        }),
        on_disconnect: OnDisconnect::Wait,
        labels: BTreeMap::from([("team".into(), "vision".into())]),
    };
    let job = JobRecord {
        id: JobId(17),
        owner: "ada".parse().expect("is a name"),
        request_id: "r-1".parse().expect("is an id"),
        request_digest: Digest([2; 32]),
        spec,
        state: JobState::Stopping,
        reason: Reason::new(ReasonCode::CancelRequested, "ada asked for the end"),
        tasks: TaskCounts {
            pending: 1,
            active: 2,
            succeeded: 3,
            failed: 1,
            cancelled: 1,
            timed_out: 1,
        },
        next_fresh: TaskIndex(9),
        bundles: 0,
        submitted_at: Timestamp(1_700_000_000_001),
        started_at: Some(Timestamp(1_700_000_000_002)),
        ended_at: Some(Timestamp(1_700_000_000_003)),
        cancel: Some(CancelRequest {
            by: "ada".parse().expect("is a name"),
            at: Timestamp(1_700_000_000_004),
        }),
        exit: Some(ExitStatus::Signal(15)),
    };
    (Timestamp(1_700_000_000_005), Record::Job(Box::new(job)))
}

fn golden_row() -> Vec<u8> {
    let (at, record) = golden();
    store::encode(at, &record)
}

#[test]
fn a_row_of_schema_version_1_can_still_be_read() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden_row.hex");
    if !path.exists() && std::env::var_os(REGENERATE).is_some() {
        let hex: String = golden_row().iter().map(|b| format!("{b:02x}")).collect();
        fs::write(&path, hex + "\n").expect("the file can be written");
    }
    let text = fs::read_to_string(&path).expect("the golden row is there");
    let row: Vec<u8> = text
        .trim()
        .as_bytes()
        .chunks_exact(2)
        .map(|pair| std::str::from_utf8(pair).expect("is ASCII"))
        .map(|pair| u8::from_str_radix(pair, 16).expect("is hexadecimal"))
        .collect();
    assert_eq!(store::decode(&row), Ok(golden()));
}

#[test]
fn every_truncation_is_refused() {
    let row = golden_row();
    for length in 0..row.len() {
        let refused = store::decode(&row[..length]).expect_err("is cut off");
        match length {
            0..5 => assert_eq!(refused, CorruptRecord::Short { bytes: length }),
            _ => assert_eq!(refused, CorruptRecord::Checksum, "{length} bytes"),
        }
    }
    let mut longer = row;
    longer.push(0);
    assert_eq!(store::decode(&longer), Err(CorruptRecord::Checksum));
}

#[test]
fn every_flipped_bit_is_refused() {
    let row = golden_row();
    for bit in 0..row.len() * 8 {
        let mut damaged = row.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let expected = match bit {
            0..8 => CorruptRecord::Version { found: damaged[0] },
            _ => CorruptRecord::Checksum,
        };
        assert_eq!(store::decode(&damaged), Err(expected), "bit {bit}");
    }
}

/// A row with a good checksum over these bytes.
fn sealed(body: &[u8]) -> Vec<u8> {
    let mut row = vec![SCHEMA_VERSION];
    row.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    row.extend_from_slice(body);
    row
}

#[test]
fn bytes_that_were_written_but_mean_nothing_are_refused() {
    let refused = store::decode(&sealed(&[0xff; 16])).expect_err("is no message");
    assert!(matches!(refused, CorruptRecord::Message(_)), "{refused:?}");
    let empty = store::decode(&sealed(&[]));
    assert_eq!(
        empty,
        Err(CorruptRecord::Field(InvalidField::missing("at")))
    );
    let mut transition = v1::Transition::from((Timestamp(1), &Record::NodeRemoved(NodeId(7))));
    transition.row = None;
    let rowless = store::decode(&sealed(&transition.encode_to_vec()));
    assert_eq!(
        rowless,
        Err(CorruptRecord::Field(InvalidField::missing("row")))
    );
}

proptest! {
    #[test]
    fn every_record_is_read_as_it_was_written(ms: u64, record in strategies::record()) {
        let row = store::encode(Timestamp(ms), &record);
        prop_assert_eq!(store::decode(&row), Ok((Timestamp(ms), record)));
    }

    #[test]
    fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..64), seal: bool) {
        if seal {
            bytes = sealed(&bytes);
        }
        let _ = store::decode(&bytes);
    }
}
