//! Processes that outlive SIGKILL. One in a frozen version 1 freezer cgroup is as good as one that hangs in the kernel:
//! it shows state D, and a signal that kills waits until it is thawed.

use trainyard_common::member::Cleanup;

use super::*;

/// A freezer with one process in it.
struct Frozen(PathBuf);

impl Frozen {
    /// Nothing where this user may not freeze.
    fn freeze(pid: &str) -> Option<Self> {
        let dir = Path::new("/sys/fs/cgroup/freezer");
        let name = format!("trainyard-test-{}-{}", std::process::id(), pid.trim());
        let dir = dir.join(name);
        std::fs::create_dir(&dir).ok()?;
        let frozen = Self(dir);
        std::fs::write(frozen.0.join("cgroup.procs"), pid.trim()).ok()?;
        std::fs::write(frozen.0.join("freezer.state"), "FROZEN").ok()?;
        Some(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("freezer.state"), "THAWED");
        while std::fs::read_to_string(self.0.join("cgroup.procs"))
            .is_ok_and(|text| !text.is_empty())
        {
            std::thread::yield_now();
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

impl World {
    /// A member with one rank that cannot be killed; nothing where this user may not freeze.
    async fn frozen(&mut self) -> Option<(AttemptRef, String, Frozen)> {
        let attempt = self
            .running(sh("trap '' TERM; echo $$ > pid; exec sleep 100000"))
            .await;
        let pid = self.appears(attempt, "pid").await;
        until(|| name_of(&pid) == "sleep").await;
        let Some(frozen) = Frozen::freeze(&pid) else {
            self.stop(attempt, Duration::ZERO).await;
            self.gone().await;
            return None;
        };
        Some((attempt, pid.trim().to_owned(), frozen))
    }

    async fn cleanup(&mut self) -> Cleanup {
        loop {
            match self.next().await {
                ShimState::CleanupPending(cleanup) => return cleanup,
                ShimState::Gone(ending) => panic!("gone: {ending:?}"),
                _ => {}
            }
        }
    }
}

fn name_of(pid: &str) -> String {
    let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.trim()));
    name.unwrap_or_default().trim().to_owned()
}

#[tokio::test]
async fn what_outlives_sigkill_is_told_and_waited_for_over_a_restart_of_the_agent() {
    for mut world in [World::new(), World::without_cgroup()] {
        let Some((attempt, pid, frozen)) = world.frozen().await else {
            return;
        };
        world.stop(attempt, Duration::ZERO).await;
        assert_eq!(world.next().await, ShimState::Stopping);
        let cleanup = world.cleanup().await;
        assert_eq!(cleanup.told(), format!("pid {pid} (sleep), state D"));
        assert_eq!(cleanup.ending.cause, EndCause::Stopped);
        assert_eq!(only_rank(&cleanup.ending), (ExitStatus::Unknown, false));
        world.restart();
        let recovered = world.runtime.recover().await.unwrap();
        assert!(
            matches!(&recovered[0].state, ShimState::CleanupPending(again) if *again == cleanup),
            "{recovered:?}"
        );
        assert_eq!(world.cleanup().await, cleanup, "told again by the shim");
        assert!(world.runtime.remove(attempt).await.is_err());
        drop(frozen);
        let ending = world.gone().await;
        assert_eq!(ending.cause, EndCause::Stopped);
        assert_eq!(only_rank(&ending), (ExitStatus::Signal(9), false));
        assert!(world.survivors(attempt).is_empty());
    }
}

#[tokio::test]
async fn what_a_killed_shim_leaves_is_told_when_it_outlives_sigkill() {
    for mut world in [World::new(), World::without_cgroup()] {
        let Some((attempt, pid, frozen)) = world.frozen().await else {
            return;
        };
        let shim = Pid::from_raw(world.shim(attempt).pid);
        kill(shim, Signal::SIGKILL).unwrap();
        let cleanup = world.cleanup().await;
        assert_eq!(cleanup.told(), format!("pid {pid} (sleep), state D"));
        assert_eq!(cleanup.ending.cause, EndCause::SupervisorLost);
        drop(frozen);
        let ending = world.gone().await;
        assert_eq!(ending.cause, EndCause::SupervisorLost);
        assert_eq!(
            ending.message,
            "the supervisor was killed before the exit status was recorded"
        );
        assert_eq!(only_rank(&ending), (ExitStatus::Unknown, false));
        assert!(world.survivors(attempt).is_empty());
    }
}
