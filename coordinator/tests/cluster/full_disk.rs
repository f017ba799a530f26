//! A coordinator whose disk is full to the last byte: what is new is refused, what there is goes on, also after a restart.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use trainyard_common::error::ErrorCode;
use trainyard_proto::v1;

use crate::harness::{Head, refusal, submission, submit};

const JOBS: usize = 300;

/// A small file system in memory; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=160m", "none"])
            .arg(&at)
            .output();
        if mounted.is_ok_and(|mounted| mounted.status.success()) {
            return Some(Self(at));
        }
        None
    }

    /// Writes until not one more byte has a place.
    fn fill(&self) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(self.0.join("filler"))
            .unwrap();
        for size in [1 << 20, 4096, 1] {
            let chunk = vec![1; size];
            let full = loop {
                if let Err(error) = file.write_all(&chunk) {
                    break error;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
        }
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }

    fn reserve(&self) -> u64 {
        fs::metadata(self.0.join("state.reserve")).unwrap().len()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

async fn cancel(head: &Head, job: u64) {
    let mut jobs = head.jobs().await;
    jobs.cancel(v1::CancelJobRequest { job }).await.unwrap();
}

/// Each refusal names the place and says that it is full.
async fn expect_refusals(head: &Head, place: &Path) {
    let mut jobs = head.jobs().await;
    let mut admin = head.admin().await;
    let submitted = refusal(jobs.submit(submission("late")).await);
    let token = v1::CreateTokenRequest::default();
    let asked = refusal(admin.create_token(token).await);
    for refused in [submitted, asked] {
        assert_eq!(refused.code, ErrorCode::Exhausted, "{refused}");
        assert!(refused.message.contains(place.to_str().unwrap()));
        assert!(refused.message.contains("are free at"), "{refused}");
    }
}

#[tokio::test]
async fn ends_go_on_from_the_reserve_and_everything_does_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(dir.path().join("head")) else {
        eprintln!("skipped: a file system can only be mounted by root");
        return;
    };
    let mut head = Head::in_dir(dir).await;
    let whole = disk.reserve();
    let mut waiting = Vec::new();
    for id in 0..JOBS {
        waiting.push(submit(&head, &format!("r{id}")).await);
    }
    // An orderly end gives the write-ahead log back, so that the next start needs room for one.
    let Head {
        dir, coordinator, ..
    } = head;
    coordinator.shutdown().await;
    disk.fill();
    head = Head::in_dir(dir).await;
    for (count, job) in waiting.iter().enumerate() {
        if count % 100 == 0 {
            disk.fill();
            expect_refusals(&head, &disk.0).await;
        }
        cancel(&head, *job).await;
    }
    assert!(disk.reserve() < whole, "nothing was written from it");
    let listed = head
        .jobs()
        .await
        .get(v1::GetJobRequest { job: waiting[299] })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(listed.job.unwrap().state(), v1::JobState::Cancelled);

    disk.empty();
    let accepted = async {
        // It is looked once a second whether there is room again.
        while let Err(refused) = head.jobs().await.submit(submission("late")).await {
            assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
        }
    };
    tokio::time::timeout(Duration::from_secs(60), accepted)
        .await
        .expect("it recovers by itself");
    head = head.restart().await;
    assert_eq!(disk.reserve(), whole);
    assert_eq!(submit(&head, "late").await, JOBS as u64 + 1);
}
