//! Leases: a member with one lives only as long as its shim has word of the coordinator, whatever becomes of the agent.

use super::*;

/// Long enough for a shim to start on a busy machine, so that the test sees the member run.
const LEASE: Duration = Duration::from_secs(2);

fn leased(script: &str, lease: Duration) -> MemberSpec {
    MemberSpec {
        lease: Some(lease),
        grace: Duration::from_millis(300),
        ..sh(script)
    }
}

#[tokio::test]
async fn a_lease_that_is_not_renewed_ends_the_ranks_with_grace_and_then_with_force() {
    let mut world = World::new();
    let began = BootTime::now();
    world.runtime.renew(began);
    let script = "trap '' TERM; echo on > on; while :; do sleep 100000; done";
    let attempt = world.running(leased(script, LEASE)).await;
    let ending = world.gone().await;
    assert!(began.until(BootTime::now()) >= LEASE + Duration::from_millis(300));
    assert_eq!(ending.cause, EndCause::LeaseExpired);
    assert_eq!(ending.message, "the coordinator was out of reach for 2s");
    assert_eq!(only_rank(&ending), (ExitStatus::Signal(9), false));
    assert!(world.survivors(attempt).is_empty());
}

#[tokio::test]
async fn renewals_keep_a_member_and_only_forward() {
    let mut world = World::new();
    let began = BootTime::now();
    world.runtime.renew(began);
    let attempt = world.running(leased("exec sleep 100000", LEASE)).await;
    let later = began.after(Duration::from_secs(1));
    world.runtime.renew(later);
    // Older news that comes late shortens nothing.
    world.runtime.renew(began);
    let ending = world.gone().await;
    assert!(later.until(BootTime::now()) >= LEASE);
    assert_eq!(ending.cause, EndCause::LeaseExpired);
    assert!(world.survivors(attempt).is_empty());
}

#[tokio::test]
async fn the_shim_ends_the_ranks_without_an_agent() {
    let mut world = World::new();
    world.runtime.renew(BootTime::now());
    let attempt = world.running(leased("exec sleep 100000", LEASE)).await;
    // The agent is gone, and none comes.
    let (sender, events) = mpsc::channel(64);
    let old = std::mem::replace(
        &mut world.runtime,
        Runtime::new(world.config.clone(), sender),
    );
    world.events = events;
    drop(old);
    let dir = world.runtime.dir(attempt);
    until(|| matches!(dir.read_status(), Ok(Some(ShimState::Gone(_))))).await;
    let Ok(Some(ShimState::Gone(ending))) = dir.read_status() else {
        panic!("it was gone");
    };
    assert_eq!(ending.cause, EndCause::LeaseExpired);
    assert!(world.survivors(attempt).is_empty());
}

#[tokio::test]
async fn an_agent_that_is_back_renews_for_members_of_its_predecessor() {
    let mut world = World::new();
    world.runtime.renew(BootTime::now());
    let attempt = world
        .running(leased("while [ ! -e end ]; do sleep 0.01; done", LEASE))
        .await;
    world.restart();
    world.runtime.recover().await.unwrap();
    let renewed = BootTime::now().after(Duration::from_secs(3600));
    world.runtime.renew(renewed);
    let end = BootTime::now().after(LEASE + Duration::from_millis(500));
    until(|| end <= BootTime::now()).await;
    assert!(!world.survivors(attempt).is_empty());
    std::fs::write(world.work(attempt, "end"), "").unwrap();
    assert_eq!(world.gone().await.cause, EndCause::Completed);
}

#[tokio::test]
async fn nothing_starts_on_a_lease_that_is_over_or_was_never_given() {
    for heard in [Some(BootTime::since_boot(Duration::ZERO)), None] {
        let mut world = World::new();
        if let Some(heard) = heard {
            world.runtime.renew(heard);
        }
        let attempt = world.accept(1, leased("echo ran > ran", LEASE)).await;
        world.runtime.spawn_shim(attempt).await.unwrap();
        let _ = world.runtime.go(attempt, &go(1), None).await;
        let ending = world.gone().await;
        assert_eq!(ending.cause, EndCause::LeaseExpired, "{ending:?}");
        assert!(!ending.started);
        assert!(!world.work(attempt, "ran").exists());
    }
}

#[tokio::test]
async fn a_lease_that_is_over_is_not_renewed_by_a_shim_that_slept_through_its_end() {
    let mut world = World::new();
    let began = BootTime::now();
    world.runtime.renew(began);
    let attempt = world.running(leased("exec sleep 100000", LEASE)).await;
    let shim = nix::unistd::Pid::from_raw(world.shim(attempt).pid);
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let end = began.after(LEASE + Duration::from_millis(50));
    until(|| end <= BootTime::now()).await;
    // It is in the socket before the shim looks at the time.
    world
        .runtime
        .renew(BootTime::now().after(Duration::from_secs(3600)));
    tokio::task::yield_now().await;
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGCONT).unwrap();
    assert_eq!(world.gone().await.cause, EndCause::LeaseExpired);
    assert!(world.survivors(attempt).is_empty());
}
