//! What survives the death of agents and shims, what is told then, and what happens once only.

use super::*;

#[tokio::test]
async fn a_killed_shim_is_never_a_success_and_leaves_nothing() {
    for mut world in [World::new(), World::without_cgroup()] {
        let script =
            "setsid sh -c 'trap \"\" TERM; echo $$ > pid; exec sleep 100000' & exec sleep 100000";
        let attempt = world.running(sh(script)).await;
        let daemon = world.appears(attempt, "pid").await;
        kill(Pid::from_raw(world.shim(attempt).pid), Signal::SIGKILL).unwrap();
        let ending = world.gone().await;
        assert_eq!(ending.cause, EndCause::SupervisorLost);
        assert_eq!(only_rank(&ending), (ExitStatus::Unknown, false));
        assert!(ending.started);
        assert!(!is_alive(&daemon));
        assert!(world.survivors(attempt).is_empty());
        // The verdict stays.
        world.restart();
        let recovered = world.runtime.recover().await.unwrap();
        assert_eq!(recovered[0].state, ShimState::Gone(ending));
    }
}

#[tokio::test]
async fn a_shim_that_dies_while_no_agent_is_there_is_found() {
    let mut world = World::new();
    let attempt = world.running(spec(&["sleep", "100000"])).await;
    let pid = world.shim(attempt).pid;
    world.restart();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let dir = world.runtime.dir(attempt);
    until(|| dir.is_unlocked().unwrap()).await;
    let recovered = world.runtime.recover().await.unwrap();
    assert_eq!(recovered[0].state, ShimState::Stopping);
    assert_eq!(world.gone().await.cause, EndCause::SupervisorLost);
    assert!(world.survivors(attempt).is_empty());
}

#[tokio::test]
async fn a_shim_killed_before_go_has_started_nothing() {
    let mut world = World::new();
    let (attempt, _) = world.ready(sh("exit 0")).await;
    kill(Pid::from_raw(world.shim(attempt).pid), Signal::SIGKILL).unwrap();
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::SupervisorLost);
    assert!(!ending.started && ending.ranks.is_empty());
}

#[tokio::test]
async fn another_agent_process_takes_over() {
    let mut world = World::new();
    let script = "while [ ! -e end ]; do sleep 0.01; done; echo over; exit 5";
    let attempt = world.running(sh(script)).await;
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    let [one] = &recovered[..] else {
        panic!("not one: {recovered:?}");
    };
    assert!(matches!(one.state, ShimState::Running { .. }));
    assert_eq!(one.member.attempt, attempt);
    assert_eq!(one.member.spec, sh(script));
    assert_eq!(world.next().await, one.state);
    std::fs::write(world.work(attempt, "end"), "").unwrap();
    let ending = world.gone().await;
    assert_eq!(only_rank(&ending), (ExitStatus::Code(5), true));
    assert_eq!(world.stdout(attempt, 0), "over\n");
    // An end that nobody was there to hear is told as well.
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    assert_eq!(recovered[0].state, ShimState::Gone(ending));
}

#[tokio::test]
async fn orders_reach_a_shim_that_was_found() {
    let mut world = World::new();
    let (attempt, port) = world.ready(spec(&["sleep", "100000"])).await;
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    assert_eq!(recovered[0].state, ShimState::Ready { port });
    world.runtime.go(attempt, &go(port), None).await.unwrap();
    assert_eq!(world.next().await, ShimState::Ready { port });
    assert!(matches!(world.next().await, ShimState::Running { .. }));
    world.stop(attempt, Duration::from_secs(60)).await;
    assert_eq!(world.gone().await.cause, EndCause::Stopped);
    world.stop(attempt, Duration::from_secs(60)).await;
}

#[tokio::test]
async fn ranks_are_started_once_whatever_is_asked() {
    let mut world = World::new();
    let script = "echo started; while [ ! -e end ]; do sleep 0.01; done";
    let (attempt, port) = world.ready(sh(script)).await;
    for _ in 0..3 {
        world.runtime.go(attempt, &go(port), None).await.unwrap();
        world.runtime.spawn_shim(attempt).await.unwrap();
    }
    assert!(matches!(world.next().await, ShimState::Running { .. }));
    world.restart();
    world.runtime.recover().await.unwrap();
    world.runtime.go(attempt, &go(port), None).await.unwrap();
    assert!(matches!(world.next().await, ShimState::Running { .. }));
    let dir = world.runtime.dir(attempt);
    let second = || {
        let mut command = shim_command(true);
        command.push(dir.root().into());
        let status = std::process::Command::new(&command[0])
            .args(&command[1..])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
        status.unwrap();
    };
    // A second shim beside the first one, and one after it.
    second();
    std::fs::write(world.work(attempt, "end"), "").unwrap();
    assert_eq!(world.gone().await.cause, EndCause::Completed);
    second();
    assert_eq!(world.stdout(attempt, 0), "started\n");
}

#[tokio::test]
async fn a_second_accept_is_refused() {
    let world = World::new();
    let attempt = world.accept(1, sh("exit 0")).await;
    let member = DesiredMember {
        attempt,
        phase: DesiredPhase::Prepare,
        spec: sh("exit 1"),
    };
    let refused = world.runtime.accept(&member).await;
    assert!(matches!(refused, Err(RuntimeError::AlreadyAccepted(_))));
    let recovered = world.runtime.recover().await.unwrap();
    assert_eq!(recovered[0].state, ShimState::Accepted);
    assert_eq!(recovered[0].member.spec, sh("exit 0"));
    let unknown = "j1.0.1".parse().unwrap();
    let refused = world.runtime.spawn_shim(unknown).await;
    assert!(matches!(refused, Err(RuntimeError::NotAccepted(_))));
}

#[tokio::test]
async fn a_shim_program_that_fails_says_so() {
    let mut world = World::with(|config| {
        config.shim_command = ["/bin/sh", "-c", "echo no such role >&2; exit 1"]
            .map(Into::into)
            .into();
    });
    let attempt = world.accept(1, sh("exit 0")).await;
    world.runtime.spawn_shim(attempt).await.unwrap();
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::PrepareFailed);
    assert_eq!(
        ending.message,
        "the shim ended before it was ready: no such role"
    );
    let mut world = World::with(|config| config.shim_command = vec!["/no/such/yard".into()]);
    let attempt = world.accept(1, sh("exit 0")).await;
    let refused = world.runtime.spawn_shim(attempt).await;
    assert!(matches!(refused, Err(RuntimeError::SpawnShim { .. })));
    world.stop(attempt, Duration::ZERO).await;
    assert_eq!(world.gone().await.cause, EndCause::Stopped);
}

#[tokio::test]
async fn a_reboot_is_told_and_no_number_is_trusted() {
    let mut world = World::new();
    let attempt = world.running(spec(&["sleep", "100000"])).await;
    let dir = world.runtime.dir(attempt);
    kill(Pid::from_raw(world.shim(attempt).pid), Signal::SIGKILL).unwrap();
    world.gone().await;
    // As the disk would look after a power loss: another boot, no ending.
    std::fs::remove_file(dir.status()).unwrap();
    // What was not synced may be missing, too; that must not look as if nothing had been started.
    std::fs::remove_file(dir.go()).unwrap();
    let mut member = client::read_member(&dir).unwrap();
    member.settings.boot_id = "another".to_owned();
    dir::write_json(&dir.member(), &member).unwrap();
    // Whoever has the shim's number now is not to be touched.
    let mut bystander = std::process::Command::new("sleep")
        .arg("100000")
        .spawn()
        .unwrap();
    let mut shim = world.shim(attempt);
    shim.pid = bystander.id().try_into().unwrap();
    dir::write_json(&dir.shim(), &shim).unwrap();
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    let ShimState::Gone(ending) = &recovered[0].state else {
        panic!("not gone: {recovered:?}");
    };
    assert_eq!(ending.cause, EndCause::NodeRebooted);
    assert!(ending.started);
    assert_eq!(only_rank(ending), (ExitStatus::Unknown, false));
    assert!(bystander.try_wait().unwrap().is_none());
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[tokio::test]
async fn what_cannot_be_understood_is_left_alone() {
    let mut world = World::new();
    let attempt = world.accept(1, sh("exit 0")).await;
    let attempts = world.config.attempts_dir.clone();
    for name in [
        "lost+found",
        "j5.0.1",
        "j6.0.1",
        "j05.0.1",
        ".new-x",
        ".old-y",
    ] {
        std::fs::create_dir(attempts.join(name)).unwrap();
    }
    std::fs::write(attempts.join("j5.0.1/member.json"), "{ torn").unwrap();
    std::fs::write(attempts.join(".old-y/file"), "x").unwrap();
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    let found: Vec<AttemptRef> = recovered.iter().map(|one| one.member.attempt).collect();
    // The torn one was accepted once, and may have run.
    assert_eq!(found, ["j5.0.1".parse().unwrap(), attempt]);
    assert_eq!(recovered[0].state, ShimState::Stopping);
    assert_eq!(world.gone().await.cause, EndCause::SupervisorLost);
    let mut left: Vec<String> = std::fs::read_dir(&attempts)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(
        left,
        ["j05.0.1", "j17.0.1", "j5.0.1", "j6.0.1", "lost+found"]
    );
}

#[tokio::test]
async fn a_directory_is_removed_only_when_its_shim_is_gone() {
    let mut world = World::new();
    let script = "mkdir -p a/b; chmod 000 a; exec sleep 100000";
    let attempt = world.running(sh(script)).await;
    let refused = world.runtime.remove(attempt).await;
    assert!(matches!(refused, Err(RuntimeError::StillRunning(_))));
    world.stop(attempt, Duration::from_secs(60)).await;
    world.gone().await;
    world.runtime.remove(attempt).await.unwrap();
    world.runtime.remove(attempt).await.unwrap();
    assert_eq!(
        std::fs::read_dir(&world.config.attempts_dir)
            .unwrap()
            .count(),
        0
    );
}
