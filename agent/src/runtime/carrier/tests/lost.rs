//! What is left when a carrier or an agent dies.

use super::*;

fn carrier_pid(world: &World) -> nix::unistd::Pid {
    let carrier = world.dir().shim().read_shim().unwrap().unwrap();
    nix::unistd::Pid::from_raw(carrier.pid)
}

#[tokio::test]
async fn a_killed_carrier_takes_its_tasks_with_it_and_nothing_is_made_up() {
    let mut world = World::new();
    let at = world.scratch.path().display().to_string();
    let script = format!(
        "[ $YARD_TASK_INDEX = 0 ] && exit 0
        (env -i /usr/bin/setsid /bin/sh -c 'echo $$ > {at}/b'$YARD_TASK_INDEX'; exec /bin/sleep 100000' &)
        sh -c 'echo $$ > {at}/a'$YARD_TASK_INDEX'; exec sleep 100000'; exit 0"
    );
    world.start(sh(&script), &[range(0, 9)]).await;
    let mut pids = Vec::new();
    for name in ["a1", "b1", "a2", "b2"] {
        pids.push(world.appears(name).await);
    }
    nix::sys::signal::kill(carrier_pid(&world), Signal::SIGKILL).unwrap();
    let records = world.over().await;
    assert!(pids.iter().all(|pid| !is_alive(pid)));
    assert!(world.survivors().is_empty());
    let ends = ends(&records);
    assert_eq!(ends.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(ends[&0].cause, EndCause::Completed);
    for task in [1, 2] {
        let end = &ends[&task];
        assert_eq!(
            (end.cause, end.exit),
            (EndCause::SupervisorLost, Some(ExitStatus::Unknown))
        );
        assert!(end.started && !end.unprompted);
    }
    assert_eq!(returned(&records).ranges(), [range(3, 9)]);
    let message = "the shim was killed".to_owned();
    assert_eq!(records.last(), Some(&Record::Over { message }));
    // A second carrier does nothing.
    let (program, arguments) = world.config.shim_command.split_first().unwrap();
    let second = std::process::Command::new(program)
        .args(arguments)
        .arg(world.dir().root())
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("was carried before"), "{said}");
    assert_eq!(world.records(), records);
}

#[tokio::test]
async fn an_agent_that_is_replaced_finds_its_carrier() {
    let mut world = World::new();
    let gate = world.file("gate");
    let script = format!("while [ ! -e {} ]; do sleep 0.02; done", gate.display());
    world.start(sh(&script), &[range(0, 3)]).await;
    world.recorded(has_begun(1)).await;
    let carrier = carrier_pid(&world);
    world.restart();
    let found = world.carriers.recover().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].bundle, found[0].carrier),
        (world.bundle(), RecoveredCarrier::Started)
    );
    assert_eq!(found[0].spec, sh(&script));
    world.hand(range(4, 5));
    std::fs::write(gate, "").unwrap();
    world.recorded(|records| ends(records).len() == 6).await;
    assert_eq!(carrier_pid(&world), carrier);
    world.close();
    let records = world.over().await;
    assert!(
        ends(&records)
            .values()
            .all(|end| end.cause == EndCause::Completed)
    );

    world.restart();
    let found = world.carriers.recover().await.unwrap();
    let journal = world.told.0;
    assert_eq!(found[0].carrier, RecoveredCarrier::Over { journal });
}

#[tokio::test]
async fn a_carrier_that_died_while_nobody_looked_is_settled() {
    let mut world = World::new();
    world
        .start(spec(&["sleep", "100000"]), &[range(0, 3)])
        .await;
    world.recorded(has_begun(1)).await;
    let carrier = carrier_pid(&world);
    world.restart();
    nix::sys::signal::kill(carrier, Signal::SIGKILL).unwrap();
    // The end of the journal is torn as well.
    until(|| world.dir().shim().is_unlocked().unwrap()).await;
    let journal = world.dir().journal();
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes.extend_from_slice(b"0badc0de {\"ended\":{");
    std::fs::write(&journal, bytes).unwrap();
    world.carriers.recover().await.unwrap();
    world.hand(range(4, 6));
    let records = world.over().await;
    let ends = ends(&records);
    assert_eq!(ends.len(), 2);
    assert!(
        ends.values()
            .all(|end| end.cause == EndCause::SupervisorLost)
    );
    assert_eq!(returned(&records).ranges(), [range(2, 6)]);
    assert!(world.survivors().is_empty());
}

#[tokio::test]
async fn a_bundle_that_cannot_start_gives_everything_back() {
    let mut world = World::with(|config| {
        config.shim_command = ["/bin/sh", "-c", "echo no luck >&2; exit 1", "sh"]
            .map(Into::into)
            .into();
    });
    world.start(sh("exit 0"), &[range(0, 3)]).await;
    let records = world.over().await;
    assert_eq!(returned(&records).ranges(), [range(0, 3)]);
    let message = "the shim ended before it was ready: no luck".to_owned();
    assert_eq!(records.last(), Some(&Record::Over { message }));

    let mut world = World::with(|config| config.shim_command = vec!["/nowhere/yard".into()]);
    world
        .carriers
        .accept(world.bundle(), sh("exit 0"))
        .await
        .unwrap();
    let again = world.carriers.accept(world.bundle(), sh("exit 0")).await;
    assert!(matches!(again, Err(CarrierError::AlreadyAccepted(_))));
    assert!(world.carriers.spawn(&world.desired).is_err());
    world.desired.tasks.insert(range(0, 1));
    world.carriers.end(&world.desired, "no code");
    let records = world.over().await;
    assert_eq!(returned(&records).ranges(), [range(0, 1)]);
    let message = "no code".to_owned();
    assert_eq!(records.last(), Some(&Record::Over { message }));
}

#[tokio::test]
async fn an_own_fault_is_not_a_boot_ago() {
    let mut world = World::new();
    world
        .start(spec(&["sleep", "100000"]), &[range(0, 3)])
        .await;
    world.recorded(has_begun(1)).await;
    nix::sys::signal::kill(carrier_pid(&world), Signal::SIGKILL).unwrap();
    world.restart();
    until(|| world.dir().shim().is_unlocked().unwrap()).await;
    until(|| world.survivors().is_empty()).await;
    // As if the machine had been rebooted meanwhile.
    let mut file = settle::read_file(&world.dir()).unwrap();
    file.boot_id = "another".to_owned();
    write_json(&world.dir().file(), &file).unwrap();
    world.desired.recorded = 7;
    world.desired.tasks.insert(range(5, 5));
    world.carriers.direct(&world.desired.clone());
    let records = world.over().await;
    let ends = ends(&records);
    assert_eq!(ends.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 5]);
    assert!(
        ends.values()
            .all(|end| end.cause == EndCause::NodeRebooted && end.started)
    );
    assert!(records.contains(&Record::Skipped { to: 7 }));
    assert!(returned(&records).is_empty());
}
