//! How tasks are ended, and that nothing of them stays.

use super::*;

#[tokio::test]
async fn a_stop_ends_what_runs_and_gives_back_what_waits() {
    let mut world = World::new();
    let script = format!(
        "trap '' TERM; echo on > {}/on$YARD_TASK_INDEX; while :; do sleep 100000; done",
        world.scratch.path().display()
    );
    world.start(sh(&script), &[range(0, 9)]).await;
    world.appears("on0").await;
    world.appears("on1").await;
    world.stop(Duration::from_millis(200));
    let records = world.over().await;
    assert_eq!(returned(&records).ranges(), [range(2, 9)]);
    let ends = ends(&records);
    assert_eq!(ends.len(), 2);
    for end in ends.values() {
        assert_eq!(
            (end.cause, end.exit),
            (EndCause::Stopped, Some(ExitStatus::Signal(9)))
        );
        assert_eq!(end.message, "ended because its cancellation was asked for");
        assert!(end.started && !end.unprompted);
    }
    assert!(world.survivors().is_empty());
    // What was on its way meanwhile comes back, too.
    world.told.1 = false;
    world.hand(range(10, 12));
    let records = world.over().await;
    assert_eq!(returned(&records).ranges(), [range(2, 12)]);
}

#[tokio::test]
async fn sigterm_gives_a_task_time_to_finish() {
    let mut world = World::new();
    let script = format!(
        "trap 'echo saved; exit 9' TERM; echo on > {}/on; while :; do :; done",
        world.scratch.path().display()
    );
    world.start(sh(&script), &[range(0, 0)]).await;
    world.appears("on").await;
    world.stop(Duration::from_secs(60));
    let records = world.over().await;
    assert_eq!(ends(&records)[&0].exit, Some(ExitStatus::Code(9)));
    assert_eq!(world.stdout(0), "saved\n");
}

#[tokio::test]
async fn the_time_limit_ends_a_task() {
    let mut world = World::new();
    let mut limited = sh("[ $YARD_TASK_INDEX = 0 ] && exec sleep 100000; exit 0");
    limited.time_limit = Some(Duration::from_millis(200));
    let records = world.run(limited, &[range(0, 1)]).await;
    let ends = ends(&records);
    assert_eq!(
        (ends[&0].cause, ends[&0].exit),
        (EndCause::TimeLimit, Some(ExitStatus::Signal(15)))
    );
    assert_eq!(ends[&1].cause, EndCause::Completed);
}

#[tokio::test]
async fn daemons_do_not_outlive_their_task() {
    let mut world = World::new();
    let at = world.scratch.path().display().to_string();
    // One keeps its environment, one has neither environment nor session, one lost its parent's parent.
    let script = format!(
        "n=$YARD_TASK_INDEX
        [ $n = 0 ] && {{ echo $$ > {at}/long; exec sleep 100000; }}
        (setsid sh -c 'trap \"\" TERM; echo $$ > {at}/a'$n'; exec sleep 100000' &)
        (env -i /usr/bin/setsid /bin/sh -c 'echo $$ > {at}/b'$n'; exec /bin/sleep 100000' &)
        while [ ! -s {at}/a$n ] || [ ! -s {at}/b$n ]; do :; done"
    );
    let mut short = sh(&script);
    short.grace = Duration::from_millis(100);
    world.start(short, &[range(0, 3)]).await;
    let mut gone = 0;
    while gone < 3 {
        // What is recorded as ended has nothing alive, while others live on.
        let records = world.recorded(|records| ends(records).len() > gone).await;
        let ends = ends(&records);
        gone = ends.len();
        for (task, end) in &ends {
            assert_eq!(end.cause, EndCause::Completed);
            for name in ["a", "b"] {
                let pid = world.appears(&format!("{name}{task}")).await;
                assert!(!is_alive(&pid), "{name} of task {task}");
            }
        }
    }
    assert!(is_alive(&world.appears("long").await));
    world.stop(Duration::ZERO);
    world.over().await;
    assert!(!is_alive(&world.appears("long").await));
    assert!(world.survivors().is_empty());
}

#[tokio::test]
async fn a_daemon_of_a_living_task_is_left_alone() {
    let mut world = World::new();
    let at = world.scratch.path().display().to_string();
    let script = format!(
        "[ $YARD_TASK_INDEX = 0 ] || exit 0
        (env -i /usr/bin/setsid /bin/sh -c 'echo $$ > {at}/daemon; exec /bin/sleep 100000' &)
        while [ ! -e {at}/gate ]; do sleep 0.02; done"
    );
    let mut short = sh(&script);
    short.grace = Duration::from_millis(100);
    world.start(short, &[range(0, 0)]).await;
    let daemon = world.appears("daemon").await;
    world.hand(range(1, 50));
    world.recorded(|records| ends(records).len() == 50).await;
    assert!(is_alive(&daemon));
    std::fs::write(world.file("gate"), "").unwrap();
    world.recorded(|records| ends(records).len() == 51).await;
    assert!(!is_alive(&daemon));
    world.close();
    world.over().await;
}

#[tokio::test]
async fn sigterm_to_the_carrier_ends_its_tasks() {
    let mut world = World::new();
    world
        .start(spec(&["sleep", "100000"]), &[range(0, 5)])
        .await;
    world.recorded(has_begun(1)).await;
    let carrier = world.dir().shim().read_shim().unwrap().unwrap();
    let carrier = nix::unistd::Pid::from_raw(carrier.pid);
    nix::sys::signal::kill(carrier, Signal::SIGHUP).unwrap();
    nix::sys::signal::kill(carrier, Signal::SIGTERM).unwrap();
    let records = world.over().await;
    assert_eq!(returned(&records).ranges(), [range(2, 5)]);
    let ends = ends(&records);
    assert!(
        ends.values()
            .all(|end| end.message == "the shim was asked to end by SIGTERM")
    );
    assert_eq!(ends.len(), 2);
}

#[tokio::test]
async fn signals_that_end_tasks_are_told() {
    let mut world = World::new();
    let records = world
        .run(
            sh("kill -$((YARD_TASK_INDEX + 1)) $$"),
            &[range(8, 8), range(33, 33)],
        )
        .await;
    let ends = ends(&records);
    assert_eq!(ends[&8].exit, Some(ExitStatus::Signal(9)));
    assert_eq!(ends[&8].message, "rank 0 was ended by signal 9 (SIGKILL)");
    // A real-time signal, which has no name.
    assert_eq!(ends[&33].exit, Some(ExitStatus::Signal(34)));
}
