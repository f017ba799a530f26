//! How ranks are started, what they find, and what is kept of their output and exit.

use super::*;

#[tokio::test]
async fn exit_codes_and_signals_are_told_as_they_were() {
    for (script, exit, message) in [
        ("exit 7", ExitStatus::Code(7), "rank 0 exited with code 7"),
        (
            "kill -9 $$",
            ExitStatus::Signal(9),
            "rank 0 was ended by signal 9 (SIGKILL)",
        ),
        (
            "kill -15 $$",
            ExitStatus::Signal(15),
            "rank 0 was ended by signal 15 (SIGTERM)",
        ),
        (
            "kill -40 $$",
            ExitStatus::Signal(40),
            "rank 0 was ended by signal 40",
        ),
    ] {
        let mut world = World::new();
        let (_, ending) = world.run(sh(script)).await;
        assert_eq!(ending.cause, EndCause::RankFailed);
        assert_eq!(ending.message, message);
        assert_eq!(only_rank(&ending), (exit, true));
        assert!(ending.started && !ending.ranks[0].oom_killed);
    }
    let mut world = World::new();
    let (_, ending) = world.run(sh("exit 0")).await;
    assert_eq!(ending.cause, EndCause::Completed);
    assert_eq!(only_rank(&ending), (ExitStatus::Code(0), true));
}

#[tokio::test]
async fn output_is_kept_as_it_was_written() {
    let mut world = World::new();
    let script = r"printf 'a\0b\377\n\nno newline'; printf 'to stderr' >&2";
    let (attempt, _) = world.run(sh(script)).await;
    assert_eq!(
        world.output(attempt, 0, LogKind::Stdout),
        b"a\0b\xff\n\nno newline"
    );
    assert_eq!(world.output(attempt, 0, LogKind::Stderr), b"to stderr");
}

#[tokio::test]
async fn much_output_is_kept_whole() {
    let mut world = World::new();
    let (attempt, ending) = world.run(sh("seq 1 300000")).await;
    assert_eq!(ending.cause, EndCause::Completed);
    let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    assert!(world.stdout(attempt, 0) == expected);
}

#[tokio::test]
async fn each_rank_has_its_place_and_its_log() {
    let mut world = World::new();
    let mut two = sh("echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT; pwd; cat");
    two.procs_per_node = 2;
    two.nodes = 2;
    two.node_rank = 1;
    let (attempt, port) = world.ready(two).await;
    world.runtime.go(attempt, &go(port), None).await.unwrap();
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::Completed);
    let ranks: Vec<u32> = ending.ranks.iter().map(|end| end.rank).collect();
    assert_eq!(ranks, [2, 3]);
    let work = world.runtime.dir(attempt).work().canonicalize().unwrap();
    for local in 0..2 {
        let rank = 2 + local;
        assert_eq!(
            world.stdout(attempt, rank),
            format!("{rank} {local} 4 127.0.0.1 {port}\n{}\n", work.display())
        );
    }
}

#[tokio::test]
async fn a_program_that_cannot_be_executed_says_why() {
    for (program, why) in [
        ("no-such-program", "No such file or directory"),
        ("/etc", "Permission denied"),
        ("./script", "No such file or directory"),
    ] {
        let mut world = World::new();
        let mut two = spec(&[program]);
        two.procs_per_node = 2;
        let (attempt, port) = world.ready(two).await;
        let script = world.work(attempt, "script");
        std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        world.runtime.go(attempt, &go(port), None).await.unwrap();
        let ending = world.gone().await;
        assert_eq!(ending.cause, EndCause::CannotExecute);
        assert_eq!(ending.message, format!("cannot execute {program:?}: {why}"));
        assert!(!ending.started);
        let exits: Vec<ExitStatus> = ending.ranks.iter().map(|end| end.exit).collect();
        assert_eq!(exits, [ExitStatus::NotStarted; 2]);
    }
}

#[tokio::test]
async fn many_shims_hold_different_ports() {
    let mut world = World::new();
    let mut attempts = Vec::new();
    for number in 1..=20 {
        let attempt = world.accept(number, sh("exit 0")).await;
        world.runtime.spawn_shim(attempt).await.unwrap();
        attempts.push(attempt);
    }
    let mut ports = std::collections::BTreeSet::new();
    while ports.len() < attempts.len() {
        match world.next().await {
            ShimState::Ready { port } => assert!(ports.insert(port), "{port} was given twice"),
            other => panic!("not ready but {other:?}"),
        }
    }
    for port in &ports {
        assert!(TcpListener::bind(("0.0.0.0", *port)).is_err());
    }
    for attempt in attempts {
        world.stop(attempt, Duration::ZERO).await;
        world.gone().await;
    }
    for port in ports {
        drop(TcpListener::bind(("0.0.0.0", port)).unwrap());
    }
}

#[tokio::test]
async fn the_port_is_free_for_the_rank() {
    let mut world = World::new();
    let script = "import os, socket; s = socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT'])))";
    let (_, ending) = world.run(spec(&["python3", "-c", script])).await;
    assert_eq!(ending.cause, EndCause::Completed, "{ending:?}");
}

#[tokio::test]
async fn output_above_the_limit_is_counted() {
    let mut world = World::with(|config| config.log_limit = 10 << 10);
    let (attempt, ending) = world.run(sh("seq 100000 199999; echo done > done")).await;
    assert_eq!(ending.cause, EndCause::Completed);
    world.appears(attempt, "done").await;
    let kept = world.output(attempt, 0, LogKind::Stdout).len() as u64;
    assert!(kept < 10 << 10);
    assert_eq!(
        world.output(attempt, 0, LogKind::Dropped),
        dropped_data(700_000 - kept, "log limit of 10 KiB reached")
    );
    let size = std::fs::metadata(world.runtime.dir(attempt).log(0))
        .unwrap()
        .len();
    assert!(size < 10_340);
}

#[tokio::test]
async fn a_rank_inherits_nothing_of_ours() {
    let mut world = World::new();
    let script = "ls /proc/$$/fd
        umask > umask; ulimit -S -c > core; readlink /proc/$$/fd/0 > stdin
        cut -d ' ' -f 5 /proc/$$/stat > group; echo $$ > pid";
    let (attempt, ending) = world.run(spec(&["/bin/sh", "-c", script])).await;
    assert_eq!(ending.cause, EndCause::Completed);
    let read = |name: &str| std::fs::read_to_string(world.work(attempt, name)).unwrap();
    assert_eq!(world.stdout(attempt, 0), "0\n1\n2\n");
    assert_eq!(read("umask"), "0022\n");
    assert_eq!(read("core"), "0\n");
    assert_eq!(read("stdin"), "/dev/null\n");
    assert_eq!(read("group"), read("pid"));
    // A shell changes its signals while it starts others, so a program is asked that does not.
    let mut world = World::new();
    let asked = ["grep", "-E", "^Sig(Blk|Ign):", "/proc/self/status"];
    let (attempt, _) = world.run(spec(&asked)).await;
    let none = "0".repeat(16);
    assert_eq!(
        world.stdout(attempt, 0),
        format!("SigBlk:\t{none}\nSigIgn:\t{none}\n")
    );
}

#[tokio::test]
async fn a_mapped_user_owns_what_is_its_own_and_nothing_else() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let user = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let run_as = RunAs {
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        name: user.name.clone(),
        home: "/nonexistent".into(),
    };
    let mut world = World::with(|config| config.run_as = Some(run_as.clone()));
    for dir in [
        world.scratch.path(),
        world.config.attempts_dir.parent().unwrap(),
    ] {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711)).unwrap();
    }
    let script = "id -u; id -g; echo $HOME $USER; cat given/file; echo x > given/new
        echo x > $YARD_OUTPUT_DIR/out && echo x > $YARD_CHECKPOINT_FILE && echo x > $TMPDIR/x || exit 1
        cat ../member.json; ls ..; ls ../logs; echo x > ../go.json
        exit 0";
    let (attempt, port) = world.ready(sh(script)).await;
    let given = world.work(attempt, "given");
    std::fs::create_dir(&given).unwrap();
    std::fs::write(given.join("file"), "given\n").unwrap();
    std::fs::set_permissions(given.join("file"), std::fs::Permissions::from_mode(0o600)).unwrap();
    world.runtime.go(attempt, &go(port), None).await.unwrap();
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::Completed, "{ending:?}");
    let (uid, gid) = (run_as.uid, run_as.gid);
    assert_eq!(
        world.stdout(attempt, 0),
        format!("{uid}\n{gid}\n/nonexistent nobody\ngiven\n")
    );
    assert_eq!(std::fs::metadata(given.join("new")).unwrap().uid(), uid);
    world.runtime.remove(attempt).await.unwrap();
    assert!(!world.runtime.dir(attempt).root().exists());
}

/// Only where PyTorch is installed for the system's Python.
#[tokio::test]
async fn torchrun_starts_the_ranks_of_two_members() {
    const PYTHON: &str = "/usr/bin/python3";
    let has_torch = std::process::Command::new(PYTHON)
        .args(["-c", "import torch.distributed.run"])
        .stderr(std::process::Stdio::null())
        .status();
    if !has_torch.is_ok_and(|status| status.success()) {
        return;
    }
    let script = "import os, sys
names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK'.split()
sys.stdout.write(' '.join([os.environ[name] for name in names] + sys.argv[1:]) + '\\n')
sys.exit(int(os.environ['RANK']) == 3)";
    let mut world = World::new();
    let mut attempts = Vec::new();
    for node_rank in 0..2 {
        let mut member = spec(&[PYTHON, "-c", script, "--lr", "1"]);
        member.launcher = Launcher::Torchrun;
        member.nodes = 2;
        member.node_rank = node_rank;
        member.procs_per_node = 2;
        let attempt = world.accept(1 + node_rank, member).await;
        world.runtime.spawn_shim(attempt).await.unwrap();
        let ShimState::Ready { port } = world.next().await else {
            panic!("not ready");
        };
        attempts.push((attempt, port));
    }
    let port = attempts[0].1;
    for (attempt, _) in &attempts {
        world.runtime.go(*attempt, &go(port), None).await.unwrap();
    }
    let mut endings = BTreeMap::new();
    while endings.len() < 2 {
        let event = timeout(PATIENCE, world.events.recv())
            .await
            .unwrap()
            .unwrap();
        if let ShimState::Gone(ending) = event.state {
            endings.insert(event.attempt, ending);
        }
    }
    // The one with the failing rank fails; what torchrun says of the other one is torchrun's business.
    let failed = &endings[&attempts[1].0];
    assert_eq!(failed.cause, EndCause::RankFailed);
    assert_eq!(only_rank(failed), (ExitStatus::Code(1), true));
    let mut lines = Vec::new();
    for (node_rank, (attempt, _)) in (0_u32..).zip(&attempts) {
        let output = world.stdout(*attempt, 2 * node_rank);
        lines.extend(output.lines().map(str::to_owned));
        assert!(
            std::fs::read_dir(world.runtime.dir(*attempt).work())
                .unwrap()
                .next()
                .is_none()
        );
    }
    lines.sort();
    assert_eq!(
        lines,
        [
            "0 0 4 2 0 --lr 1",
            "1 1 4 2 0 --lr 1",
            "2 0 4 2 1 --lr 1",
            "3 1 4 2 1 --lr 1"
        ]
    );
}

#[tokio::test]
async fn a_full_disk_costs_output_and_nothing_else() {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let mut world = World::with(|config| config.attempts_dir = disk.path().join("attempts"));
    let (attempt, ending) = world.run(sh("seq 100000 899999; exit 6")).await;
    assert_eq!(only_rank(&ending), (ExitStatus::Code(6), true));
    let kept = world.output(attempt, 0, LogKind::Stdout);
    assert!(!kept.is_empty());
    // What was kept is the beginning, whole. A marker for the rest is there if its few bytes found a place, or the ending
    // tells.
    let expected: String = (100_000..900_000).map(|n| format!("{n}\n")).collect();
    assert!(expected.as_bytes().starts_with(&kept));
    let markers = world.output(attempt, 0, LogKind::Dropped);
    let rest = expected.len() - kept.len();
    let warning = format!("{rest} bytes of output of rank 0 were dropped: log disk full");
    assert_ne!(
        markers.is_empty(),
        ending.warning.is_empty(),
        "{}",
        ending.warning
    );
    assert!(ending.warning.is_empty() || ending.warning == warning);
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    assert_eq!(recovered[0].state, ShimState::Gone(ending));
}

#[tokio::test]
async fn output_on_a_disk_that_is_full_all_the_time_is_told_of_at_the_end() {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let mut world = World::with(|config| config.attempts_dir = disk.path().join("attempts"));
    let script = "until [ -e start ]; do sleep 0.01; done; echo lost; exit 6";
    let attempt = world.running(sh(script)).await;
    disk.fill();
    // A name takes no space there.
    std::fs::File::create(world.work(attempt, "start")).unwrap();
    let ending = world.gone().await;
    assert_eq!(only_rank(&ending), (ExitStatus::Code(6), true));
    assert_eq!(world.output(attempt, 0, LogKind::Dropped), b"");
    assert_eq!(
        ending.warning,
        "5 bytes of output of rank 0 were dropped: log disk full"
    );
}

#[tokio::test]
async fn a_rank_without_memory_is_told_from_one_that_was_killed() {
    // The limit is set the way that is possible where memory cgroups are of version 1.
    let name = dir::random_hex(4).unwrap();
    let group = PathBuf::from(format!("/sys/fs/cgroup/memory/yard-test-{name}"));
    if std::fs::create_dir(&group).is_err() {
        return;
    }
    let limited = std::fs::write(group.join("memory.limit_in_bytes"), "100M").is_ok();
    let mut world = World::with(|config| {
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.display());
        let mut command: Vec<OsString> = ["/bin/sh", "-c", &enter, "sh"].map(Into::into).into();
        command.extend(shim_command(true));
        config.shim_command = command;
    });
    if limited {
        let (_, ending) = world
            .run(spec(&["python3", "-c", "x = b'x' * (1 << 30)"]))
            .await;
        assert_eq!(only_rank(&ending), (ExitStatus::Signal(9), true));
        assert!(ending.ranks[0].oom_killed);
        assert_eq!(
            ending.message,
            "rank 0 was killed by the kernel for want of memory"
        );
    }
    // The spare shim is in it too, and leaves with its agent.
    drop(world);
    until(|| std::fs::remove_dir(&group).is_ok()).await;
}

#[tokio::test]
async fn a_rank_is_born_in_the_cgroup_of_its_attempt() {
    let mut world = World::new();
    let (attempt, ending) = world.run(sh("cat /proc/self/cgroup")).await;
    assert_eq!(ending.cause, EndCause::Completed, "{ending:?}");
    let cgroup = world.shim(attempt).cgroup;
    let inside = world
        .stdout(attempt, 0)
        .contains(&format!("trainyard-{attempt}-"));
    // Where the machine lets us make none, the shim has none either.
    assert_eq!(inside, cgroup.is_some());
}

#[tokio::test]
async fn a_spare_shim_takes_the_next_member_and_leaves_with_the_agent() {
    let mut world = World::new();
    world.run(sh("exit 0")).await;
    let shims = world.runtime.inner.shims.clone();
    until(|| shims.spare().is_some()).await;
    let spare = shims.spare().unwrap();
    let attempt = world.accept(2, sh("echo here; exit 3")).await;
    world.runtime.spawn_shim(attempt).await.unwrap();
    let ShimState::Ready { port } = world.next().await else {
        panic!("not ready");
    };
    world.runtime.go(attempt, &go(port), None).await.unwrap();
    let ending = world.gone().await;
    assert_eq!(only_rank(&ending).0, ExitStatus::Code(3));
    assert_eq!(world.stdout(attempt, 0), "here\n");
    assert_eq!(world.shim(attempt).pid, spare);
    assert!(world.runtime.dir(attempt).shim_log().exists());
    until(|| shims.spare().is_some()).await;
    let spare = shims.spare().unwrap();
    // The process that has the other end of its connection ends.
    drop(shims.take());
    until(|| Process::find(spare).is_none_or(|process| process.is_zombie)).await;
}

#[tokio::test]
async fn a_spare_shim_that_died_is_not_missed() {
    let mut world = World::new();
    world.run(sh("exit 0")).await;
    let shims = world.runtime.inner.shims.clone();
    until(|| shims.spare().is_some()).await;
    let spare = shims.spare().unwrap();
    kill(Pid::from_raw(spare), nix::sys::signal::Signal::SIGKILL).unwrap();
    until(|| Process::find(spare).is_none_or(|process| process.is_zombie)).await;
    let attempt = world.accept(2, sh("exit 4")).await;
    world.runtime.spawn_shim(attempt).await.unwrap();
    let ShimState::Ready { port } = world.next().await else {
        panic!("not ready");
    };
    world.runtime.go(attempt, &go(port), None).await.unwrap();
    assert_eq!(only_rank(&world.gone().await).0, ExitStatus::Code(4));
    assert_ne!(world.shim(attempt).pid, spare);
}
