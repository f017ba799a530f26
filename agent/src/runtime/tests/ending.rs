//! How members are ended, and that nothing of them stays.

use super::*;

#[tokio::test]
async fn a_failing_rank_ends_the_others() {
    let mut world = World::new();
    let mut two = sh("if [ $RANK = 1 ]; then exit 3; fi; exec sleep 100000");
    two.procs_per_node = 2;
    let (_, ending) = world.run(two).await;
    assert_eq!(ending.cause, EndCause::RankFailed);
    assert_eq!(ending.message, "rank 1 exited with code 3");
    let ends: Vec<RankEndView> = ending
        .ranks
        .iter()
        .map(|end| (end.exit, end.unprompted))
        .collect();
    assert_eq!(
        ends,
        [(ExitStatus::Signal(15), false), (ExitStatus::Code(3), true)]
    );
}

#[tokio::test]
async fn a_rank_that_ignores_sigterm_is_killed_after_the_grace() {
    for mut world in [World::new(), World::without_cgroup()] {
        let script = "trap '' TERM; echo on > on; while :; do sleep 100000; done";
        let attempt = world.running(sh(script)).await;
        world.appears(attempt, "on").await;
        world.stop(attempt, Duration::from_millis(300)).await;
        assert_eq!(world.next().await, ShimState::Stopping);
        let ending = world.gone().await;
        assert_eq!(ending.cause, EndCause::Stopped);
        assert_eq!(only_rank(&ending), (ExitStatus::Signal(9), false));
        assert!(world.survivors(attempt).is_empty());
    }
}

#[tokio::test]
async fn sigterm_gives_a_rank_time_to_finish() {
    let mut world = World::new();
    let script = "trap 'echo saved; kill $!; exit 9' TERM; sleep 100000 & echo on > on; wait";
    let attempt = world.running(sh(script)).await;
    world.appears(attempt, "on").await;
    world.stop(attempt, Duration::from_secs(60)).await;
    let ending = world.gone().await;
    assert_eq!(
        ending.message,
        "ended because its cancellation was asked for"
    );
    assert_eq!(only_rank(&ending), (ExitStatus::Code(9), false));
    assert_eq!(world.stdout(attempt, 0), "saved\n");
}

#[tokio::test]
async fn a_second_stop_can_hurry_the_first() {
    let mut world = World::new();
    let script = "trap '' TERM; echo on > on; while :; do sleep 100000; done";
    let attempt = world.running(sh(script)).await;
    world.appears(attempt, "on").await;
    world.stop(attempt, Duration::from_secs(3600)).await;
    assert_eq!(world.next().await, ShimState::Stopping);
    world.stop(attempt, Duration::ZERO).await;
    assert_eq!(world.gone().await.cause, EndCause::Stopped);
}

#[tokio::test]
async fn daemons_do_not_outlive_their_rank() {
    let daemon = "(setsid sh -c 'trap \"\" TERM; echo $$ > pid1; exec sleep 100000' &)
        (env -i /usr/bin/setsid /bin/sh -c 'echo $$ > pid2; exec /bin/sleep 100000' &)
        while [ ! -s pid1 ] || [ ! -s pid2 ]; do :; done";
    for mut world in [World::new(), World::without_cgroup()] {
        let mut short = sh(daemon);
        short.grace = Duration::from_millis(200);
        let (attempt, ending) = world.run(short).await;
        assert_eq!(ending.cause, EndCause::Completed);
        for name in ["pid1", "pid2"] {
            assert!(!is_alive(&world.appears(attempt, name).await), "{name}");
        }
    }
}

#[tokio::test]
async fn what_forks_all_the_time_is_ended_too() {
    for mut world in [World::new(), World::without_cgroup()] {
        let script = "trap '' TERM; echo on > on
            i=0; while [ $i -lt 3000 ]; do setsid sleep 100000 & i=$((i+1)); done; wait";
        let attempt = world.running(sh(script)).await;
        world.appears(attempt, "on").await;
        world.stop(attempt, Duration::ZERO).await;
        assert_eq!(world.gone().await.cause, EndCause::Stopped);
        assert!(world.survivors(attempt).is_empty());
    }
}

#[tokio::test]
async fn stopped_processes_are_ended_too() {
    let mut world = World::new();
    let attempt = world.running(sh("kill -STOP $$; exit 3")).await;
    let rank = || {
        let living = world.survivors(attempt);
        living.first().map(|process| process.pid)
    };
    until(|| {
        let stat = rank().and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        stat.is_some_and(|stat| stat.contains(") T "))
    })
    .await;
    world.stop(attempt, Duration::from_secs(3600)).await;
    let ending = world.gone().await;
    assert_eq!(only_rank(&ending), (ExitStatus::Signal(15), false));
}

#[tokio::test]
async fn a_stop_before_go_starts_nothing() {
    let mut world = World::new();
    let (attempt, port) = world.ready(sh("echo started > started")).await;
    world.stop(attempt, Duration::from_secs(1)).await;
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::Stopped);
    assert!(!ending.started && ending.ranks.is_empty());
    let refused = world.runtime.go(attempt, &go(port), None).await;
    assert!(matches!(refused, Err(RuntimeError::Ended(_))));
    assert!(!world.runtime.dir(attempt).go().exists());
    let refused = world.runtime.spawn_shim(attempt).await;
    assert!(matches!(refused, Err(RuntimeError::Ended(_))));
    assert!(!world.work(attempt, "started").exists());
}

#[tokio::test]
async fn a_stop_without_a_shim_is_an_ending_too() {
    let mut world = World::new();
    let attempt = world.accept(1, sh("exit 0")).await;
    world.stop(attempt, Duration::from_secs(1)).await;
    let ending = world.gone().await;
    assert_eq!((ending.cause, ending.started), (EndCause::Stopped, false));
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    assert_eq!(recovered[0].state, ShimState::Gone(ending));
}

#[tokio::test]
async fn the_time_limit_ends_a_member() {
    let mut world = World::new();
    let mut limited = spec(&["sleep", "100000"]);
    limited.time_limit = Some(Duration::from_millis(100));
    let (_, ending) = world.run(limited).await;
    assert_eq!(ending.cause, EndCause::TimeLimit);
    assert_eq!(only_rank(&ending), (ExitStatus::Signal(15), false));
}

#[tokio::test]
async fn sigterm_to_the_shim_ends_its_ranks() {
    let mut world = World::new();
    let attempt = world.running(spec(&["sleep", "100000"])).await;
    let shim = Pid::from_raw(world.shim(attempt).pid);
    // Neither the end of a terminal nor that of the agent is its business.
    kill(shim, Signal::SIGHUP).unwrap();
    kill(shim, Signal::SIGTERM).unwrap();
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::Stopped);
    assert_eq!(only_rank(&ending), (ExitStatus::Signal(15), false));
}

#[tokio::test]
async fn cgroups_are_not_left_behind() {
    let mut world = World::new();
    let attempt = world.running(spec(&["sleep", "100000"])).await;
    let Some(path) = world.shim(attempt).cgroup else {
        world.stop(attempt, Duration::ZERO).await;
        world.gone().await;
        return;
    };
    assert!(path.exists());
    assert_eq!(
        cgroup::Cgroup::existing(&path).unwrap().processes().len(),
        1
    );
    world.stop(attempt, Duration::from_secs(60)).await;
    world.gone().await;
    assert!(!path.exists());
}
