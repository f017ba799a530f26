//! What a record that cannot be read means for its attempt: nothing that lives is killed, and nothing is made up.

use std::os::unix::fs::FileExt;

use super::*;

/// Flips a bit in the middle of a file.
fn damage(path: &Path) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 1;
    file.write_all_at(&byte, at).unwrap();
}

/// As a shim from before would have written it.
fn forget_copy(dir: &AttemptDir) {
    let mut shim = dir.read_shim().unwrap().unwrap();
    shim.member = None;
    dir::write_json(&dir.shim(), &shim).unwrap();
}

fn waiting() -> MemberSpec {
    sh("while [ ! -e end ]; do sleep 0.01; done; echo over; exit 5")
}

#[tokio::test]
async fn a_living_member_is_taken_over_without_its_record() {
    for copy in [true, false] {
        let mut world = World::new();
        let attempt = world.running(waiting()).await;
        let dir = world.runtime.dir(attempt);
        for file in [dir.member(), dir.go(), dir.status()] {
            damage(&file);
        }
        if !copy {
            forget_copy(&dir);
        }
        world.restart();
        let recovered = world.runtime.recover().await.unwrap();
        assert_eq!(recovered[0].member.attempt, attempt);
        let spec = &recovered[0].member.spec;
        assert_eq!((spec == &waiting(), spec.supervised_ranks()), (copy, 0..1));
        std::fs::write(world.work(attempt, "end"), "").unwrap();
        let ending = world.gone().await;
        assert_eq!(only_rank(&ending), (ExitStatus::Code(5), true));
        assert_eq!(world.stdout(attempt, 0), "over\n");
    }
}

#[tokio::test]
async fn a_dead_member_without_its_record_is_unknown_and_leaves_nothing() {
    for files in [
        &["member.json"][..],
        &["status.json"],
        &["shim.json"],
        &["member.json", "shim.json"],
    ] {
        let mut world = World::new();
        let script = "setsid sh -c 'echo $$ > pid; exec sleep 100000' & exec sleep 100000";
        let attempt = world.running(sh(script)).await;
        let daemon = world.appears(attempt, "pid").await;
        let dir = world.runtime.dir(attempt);
        let key = client::read_member(&dir).unwrap().settings.key;
        let pid = world.shim(attempt).pid;
        world.restart();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        until(|| dir.is_unlocked().unwrap()).await;
        for file in files {
            damage(&dir.root().join(file));
        }
        let recovered = world.runtime.recover().await.unwrap();
        assert_eq!(recovered[0].state, ShimState::Stopping, "{files:?}");
        let ending = world.gone().await;
        assert_eq!(ending.cause, EndCause::SupervisorLost, "{files:?}");
        assert_eq!(
            only_rank(&ending),
            (ExitStatus::Unknown, false),
            "{files:?}"
        );
        if files != ["member.json"] {
            let text = format!("{}: record unreadable at byte ", files[0]);
            assert!(ending.message.contains(&text), "{files:?}: {ending:?}");
        }
        // With neither of the two nothing tells its processes from strangers'.
        if files.len() < 2 {
            assert!(!is_alive(&daemon), "{files:?}");
        }
        for process in Process::all() {
            let entry = format!("{}={key}", tree::KEY_VARIABLE);
            if process.environment_has(entry.as_bytes()) {
                process.signal(Signal::SIGKILL);
            }
        }
        // The verdict stays, and the directory can go.
        world.restart();
        let recovered = world.runtime.recover().await.unwrap();
        assert_eq!(recovered[0].state, ShimState::Gone(ending));
        world.runtime.remove(attempt).await.unwrap();
    }
}

#[tokio::test]
async fn an_ending_that_cannot_be_read_is_not_made_up() {
    let mut world = World::new();
    let (attempt, ending) = world.run(sh("exit 0")).await;
    assert_eq!(ending.cause, EndCause::Completed);
    let dir = world.runtime.dir(attempt);
    damage(&dir.status());
    world.restart();
    world.runtime.recover().await.unwrap();
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::SupervisorLost);
    assert_eq!(only_rank(&ending), (ExitStatus::Unknown, false));
    assert!(
        ending.message.contains("status.json: record unreadable"),
        "{ending:?}"
    );
}

#[tokio::test]
async fn a_member_that_never_had_a_shim_is_not_started_without_its_record() {
    let mut world = World::new();
    let attempt = world.accept(1, sh("exit 0")).await;
    damage(&world.runtime.dir(attempt).member());
    world.restart();
    let recovered = world.runtime.recover().await.unwrap();
    assert_eq!(recovered[0].state, ShimState::Stopping);
    let ending = world.gone().await;
    assert_eq!(ending.cause, EndCause::SupervisorLost);
    assert!(
        ending.started,
        "a power loss may have taken what told of a start"
    );
    assert!(
        ending.message.contains("member.json: record unreadable"),
        "{ending:?}"
    );
}
