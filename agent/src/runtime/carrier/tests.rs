//! Carriers with real processes. The shim program is this test binary itself, called so that it runs nothing but the
//! entry of the runtime's tests.

mod damage;
mod ending;
mod lost;
mod measure;

use std::collections::BTreeMap;

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;
use trainyard_common::bundle::{BundlePhase, DesiredBundle, TaskRange, TaskSet};
use trainyard_common::ids::BundleRef;
use trainyard_common::limits::MAX_LOG_BYTES_PER_RANK;
use trainyard_common::logrecord::{LogKind, LogRecord};
use trainyard_common::member::{EndCause, MemberSpec, Stop};
use trainyard_common::state::{ExitStatus, ReasonCode};

use super::super::process::{Process, Signal};
use super::super::tests::{PATIENCE, sh, shim_command, spec, until};
use super::*;

/// One agent's carriers with their news, and one bundle.
struct World {
    scratch: TempDir,
    config: CarrierConfig,
    carriers: Carriers,
    events: mpsc::Receiver<CarrierEvent>,
    desired: DesiredBundle,
    /// Bytes of the journal that were told, and whether it is complete.
    told: (u64, bool),
}

fn range(first: u32, last: u32) -> TaskRange {
    TaskRange {
        first: TaskIndex(first),
        last: TaskIndex(last),
    }
}

impl World {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut CarrierConfig)) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let mut config = CarrierConfig {
            // Longer than an address of a socket may be.
            bundles_dir: scratch.path().join("d".repeat(120)).join("bundles"),
            shim_command: shim_command(true),
            run_as: None,
            log_limit: MAX_LOG_BYTES_PER_RANK,
            return_after: RETURN_AFTER,
        };
        change(&mut config);
        let (sender, events) = mpsc::channel(64);
        Self {
            carriers: Carriers::new(config.clone(), sender),
            scratch,
            config,
            events,
            desired: DesiredBundle {
                bundle: "j17.b3".parse().unwrap(),
                slots: 2,
                phase: BundlePhase::Run,
                tasks: TaskSet::default(),
                recorded: 0,
                spec: None,
            },
            told: (0, false),
        }
    }

    /// The agent process ends and another one takes its place.
    fn restart(&mut self) {
        let (sender, events) = mpsc::channel(64);
        self.carriers = Carriers::new(self.config.clone(), sender);
        self.events = events;
    }

    fn bundle(&self) -> BundleRef {
        self.desired.bundle
    }

    fn dir(&self) -> BundleDir {
        self.carriers.dir(self.bundle())
    }

    /// Accepts the bundle and starts its carrier with the first tasks.
    async fn start(&mut self, spec: MemberSpec, tasks: &[TaskRange]) {
        self.carriers.accept(self.bundle(), spec).await.unwrap();
        self.desired.tasks = tasks.iter().copied().collect();
        self.carriers.spawn(&self.desired).unwrap();
    }

    fn hand(&mut self, range: TaskRange) {
        self.desired.tasks.insert(range);
        self.carriers.direct(&self.desired);
    }

    fn close(&mut self) {
        self.desired.phase = BundlePhase::Close;
        self.carriers.direct(&self.desired);
    }

    fn stop(&mut self, grace: Duration) {
        let code = ReasonCode::CancelRequested;
        self.desired.phase = BundlePhase::Stop(Stop { code, grace });
        self.carriers.direct(&self.desired);
    }

    async fn next(&mut self) {
        let event = timeout(PATIENCE, self.events.recv()).await;
        self.told = match event.expect("news").expect("the channel is open").state {
            CarrierState::Running { journal } => (journal, false),
            CarrierState::Over { journal } => (journal, true),
        };
    }

    async fn over(&mut self) -> Vec<Record> {
        while !self.told.1 {
            self.next().await;
        }
        let records = self.records();
        let length = std::fs::metadata(self.dir().journal()).unwrap().len();
        assert_eq!(length, self.told.0);
        records
    }

    /// Waits for something in the journal.
    async fn recorded(&mut self, wanted: impl Fn(&[Record]) -> bool) -> Vec<Record> {
        loop {
            let records = self.records();
            if wanted(&records) {
                return records;
            }
            assert!(!self.told.1, "over: {records:?}");
            self.next().await;
        }
    }

    fn records(&self) -> Vec<Record> {
        parse(&std::fs::read(self.dir().journal()).unwrap()).0
    }

    /// Runs tasks from the start to the end of their bundle.
    async fn run(&mut self, spec: MemberSpec, tasks: &[TaskRange]) -> Vec<Record> {
        self.desired.phase = BundlePhase::Close;
        self.start(spec, tasks).await;
        self.over().await
    }

    fn output(&self, task: u32, kind: LogKind) -> String {
        let bytes = std::fs::read(self.dir().log(TaskIndex(task))).unwrap();
        let mut output = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (record, length) = LogRecord::decode(rest).unwrap().expect("a whole record");
            if record.kind == kind {
                output.extend_from_slice(record.data);
            }
            rest = &rest[length..];
        }
        String::from_utf8(output).unwrap()
    }

    fn stdout(&self, task: u32) -> String {
        self.output(task, LogKind::Stdout)
    }

    /// Everything that carries the bundle's mark.
    fn survivors(&self) -> Vec<Process> {
        let file = settle::read_file(&self.dir()).unwrap();
        processes::Marks::new(&file.key).all()
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.scratch.path().join(name)
    }

    /// Waits for a line in a file, and returns it.
    async fn appears(&self, name: &str) -> String {
        let path = self.file(name);
        until(|| std::fs::read_to_string(&path).is_ok_and(|text| text.ends_with('\n'))).await;
        std::fs::read_to_string(path).unwrap().trim().to_owned()
    }
}

fn ends(records: &[Record]) -> BTreeMap<u32, TaskEnd> {
    let mut ends = BTreeMap::new();
    for record in records {
        if let Record::Ended(end) = record {
            let twice = ends.insert(end.task.0, TaskEnd::clone(end));
            assert!(twice.is_none(), "task {} ended twice", end.task);
        }
    }
    ends
}

fn returned(records: &[Record]) -> TaskSet {
    let ranges = records.iter().filter_map(|record| match record {
        Record::Returned(range) => Some(*range),
        _ => None,
    });
    ranges.collect()
}

fn has_begun(task: u32) -> impl Fn(&[Record]) -> bool {
    move |records| records.contains(&Record::Began(TaskIndex(task)))
}

fn is_alive(pid: &str) -> bool {
    Process::find(pid.trim().parse().unwrap()).is_some_and(|process| !process.is_zombie)
}

#[tokio::test]
async fn tasks_run_in_order_and_each_ends_once() {
    let mut world = World::new();
    world
        .start(sh("exit $((YARD_TASK_INDEX % 3))"), &[range(0, 9)])
        .await;
    world.recorded(|records| ends(records).len() == 10).await;
    // Said again, and more.
    world.hand(range(0, 39));
    world.recorded(|records| ends(records).len() == 40).await;
    world.close();
    let records = world.over().await;
    let begun: Vec<u32> = records
        .iter()
        .filter_map(|record| match record {
            Record::Began(task) => Some(task.0),
            _ => None,
        })
        .collect();
    let mut sorted = begun.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..40).collect::<Vec<_>>());
    // Each of the two slots takes the next one, so what begins is not far from its place; a slot that the machine keeps
    // waiting may be overtaken more than once.
    assert!(
        begun
            .iter()
            .zip(0..)
            .all(|(task, place)| task.abs_diff(place) <= 8),
        "{begun:?}"
    );
    let ends = ends(&records);
    for (task, end) in &ends {
        let code = (task % 3) as u8;
        assert_eq!(end.exit, Some(ExitStatus::Code(code)));
        assert!(
            end.started && end.unprompted && end.started_at.is_some(),
            "{end:?}"
        );
        let (cause, message) = match code {
            0 => (
                EndCause::Completed,
                "all ranks exited with code 0".to_owned(),
            ),
            _ => (
                EndCause::RankFailed,
                format!("rank 0 exited with code {code}"),
            ),
        };
        assert_eq!((end.cause, &end.message), (cause, &message));
        assert_eq!((end.log, end.outputs), (0, false));
    }
    assert_eq!(ends.len(), 40);
    let message = String::new();
    assert_eq!(records.last(), Some(&Record::Over { message }));
    // Nothing was written, so there are no files; and the shim is gone.
    assert_eq!(std::fs::read_dir(world.dir().logs()).unwrap().count(), 0);
    assert!(world.dir().shim().is_unlocked().unwrap());
    world.carriers.remove(world.bundle()).await.unwrap();
    assert!(!world.dir().root().exists());
}

#[tokio::test]
async fn output_and_outputs_are_kept_of_those_that_have_some() {
    let mut world = World::new();
    let script = "case $YARD_TASK_INDEX in
        1) echo out; echo err >&2;;
        2) echo two > $YARD_OUTPUT_DIR/result; mkdir $YARD_CHECKPOINT_DIR/a; echo x > left; echo x > $TMPDIR/x;;
        3) seq 1 200000;;
        esac; ls -A $YARD_OUTPUT_DIR $YARD_CHECKPOINT_DIR $TMPDIR . | grep -v : | grep . > /dev/null && [ $YARD_TASK_INDEX != 2 ] && exit 9
        exit 0";
    world.desired.slots = 1;
    let records = world.run(sh(script), &[range(0, 6)]).await;
    let ends = ends(&records);
    assert!(
        ends.values().all(|end| end.cause == EndCause::Completed),
        "{ends:?}"
    );
    let logs: Vec<bool> = ends.values().map(|end| end.log > 0).collect();
    assert_eq!(logs, [false, true, false, true, false, false, false]);
    for (task, end) in &ends {
        let length = std::fs::metadata(world.dir().log(TaskIndex(*task))).map_or(0, |m| m.len());
        assert_eq!(end.log, length);
        assert_eq!(end.outputs, *task == 2);
    }
    assert_eq!(
        (world.stdout(1), world.output(1, LogKind::Stderr)),
        ("out\n".into(), "err\n".into())
    );
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(world.stdout(3), expected);
    let kept = world.dir().task(TaskIndex(2));
    assert_eq!(
        std::fs::read(kept.outputs().join("result")).unwrap(),
        b"two\n"
    );
    assert!(kept.checkpoint().join("a").is_dir());
    assert_eq!(std::fs::read_dir(world.dir().tasks()).unwrap().count(), 1);
}

#[tokio::test]
async fn output_that_no_log_tells_of_is_told_of_at_the_end() {
    let mut world = World::new();
    world.desired.slots = 1;
    let script = format!(
        "echo $YARD_TASK_INDEX; until [ -e {} ]; do sleep 0.01; done",
        world.file("go").display()
    );
    world.start(sh(&script), &[range(0, 1)]).await;
    world.recorded(has_begun(0)).await;
    // Nothing can be written into it.
    std::fs::create_dir(world.dir().log(TaskIndex(1))).unwrap();
    std::fs::write(world.file("go"), "").unwrap();
    world.close();
    let ends = ends(&world.over().await);
    assert_eq!((ends[&0].log > 0, ends[&0].warning.as_str()), (true, ""));
    assert_eq!(
        (ends[&1].log, ends[&1].warning.as_str()),
        (
            0,
            "2 bytes of output of rank 0 were dropped: log disk failed"
        )
    );
}

#[tokio::test]
async fn a_task_finds_what_a_member_of_one_rank_finds() {
    let mut world = World::new();
    let mut spec = sh("env | sort; umask; ulimit -S -c; readlink /proc/$$/fd/0
        ls /proc/$$/fd; cut -d ' ' -f 5,6 /proc/$$/stat; echo $$ $$
        exec grep -E '^Sig(Blk|Ign):' /proc/self/status");
    spec.env.insert("MINE".to_owned(), "1".to_owned());
    world.run(spec, &[range(4, 4)]).await;
    let text = world.stdout(4);
    let env: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .collect();
    let slot = world.dir().slot(0, TaskIndex(4));
    let [outputs, checkpoint, tmp] = [slot.outputs(), slot.checkpoint(), slot.tmp()];
    for (name, value) in [
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_WORLD_SIZE", "1"),
        ("NODE_RANK", "0"),
        ("GROUP_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("YARD_NODE_ADDRS", "127.0.0.1"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("OMP_NUM_THREADS", "1"),
        ("YARD_JOB_ID", "j17"),
        ("YARD_JOB_NAME", "job"),
        ("YARD_TASK_INDEX", "4"),
        ("YARD_ATTEMPT", "1"),
        ("YARD_OUTPUT_DIR", outputs.to_str().unwrap()),
        ("YARD_CHECKPOINT_DIR", checkpoint.to_str().unwrap()),
        ("TMPDIR", tmp.to_str().unwrap()),
        ("MINE", "1"),
        ("PWD", slot.work().to_str().unwrap()),
    ] {
        assert_eq!(env.get(name), Some(&value), "{name}");
    }
    assert!(env["MASTER_PORT"].parse::<u16>().unwrap() >= 1024);
    assert!(!env.contains_key("YARD_RESUME_FROM"));
    let rest: Vec<&str> = text.lines().filter(|line| !line.contains('=')).collect();
    assert_eq!(rest[..3], ["0022", "0", "/dev/null"]);
    assert_eq!(rest[3..6], ["0", "1", "2"]);
    // It leads a session of its own.
    assert_eq!(rest[6], rest[7]);
    let none = "0".repeat(16);
    assert_eq!(
        rest[8..],
        [format!("SigBlk:\t{none}"), format!("SigIgn:\t{none}")]
    );
}

#[tokio::test]
async fn a_program_that_is_not_there_is_said_as_for_a_member() {
    for (command, message) in [
        (
            &["/nowhere/program"][..],
            "cannot execute \"/nowhere/program\": No such file or directory",
        ),
        (
            &["no-such-program-anywhere"],
            "cannot execute \"no-such-program-anywhere\": No such file or directory",
        ),
        (
            &["/etc/passwd"],
            "cannot execute \"/etc/passwd\": Permission denied",
        ),
    ] {
        let mut world = World::new();
        let records = world.run(spec(command), &[range(0, 2)]).await;
        let ends = ends(&records);
        assert_eq!(ends.len(), 3);
        for end in ends.values() {
            assert_eq!(
                (end.cause, end.message.as_str()),
                (EndCause::CannotExecute, message)
            );
            assert_eq!(
                (end.started, end.exit),
                (false, Some(ExitStatus::NotStarted))
            );
            assert_eq!(end.started_at, None);
        }
    }
}

#[tokio::test]
async fn a_program_is_looked_for_in_the_path() {
    let mut world = World::new();
    let dir = world.file("bin");
    std::fs::create_dir(&dir).unwrap();
    let script = dir.join("mine");
    std::fs::write(&script, "echo found $1\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut spec = spec(&["mine", "it"]);
    spec.env.insert(
        "PATH".to_owned(),
        format!("/nowhere:{}:/bin", dir.display()),
    );
    world.run(spec, &[range(0, 0)]).await;
    assert_eq!(world.stdout(0), "found it\n");
}

#[tokio::test]
async fn a_task_that_runs_for_long_is_told_of_and_its_output_can_be_read() {
    let mut world = World::new();
    let gate = world.file("gate");
    let script = format!(
        "echo early; while [ ! -e {} ]; do sleep 0.02; done; echo late",
        gate.display()
    );
    world.start(sh(&script), &[range(7, 7)]).await;
    let is_started = |records: &[Record]| {
        records
            .iter()
            .any(|record| matches!(record, Record::Started { task, .. } if task.0 == 7))
    };
    world.recorded(is_started).await;
    until(|| world.dir().log(TaskIndex(7)).exists()).await;
    until(|| world.stdout(7) == "early\n").await;
    std::fs::write(gate, "").unwrap();
    world.close();
    let records = world.over().await;
    assert_eq!(world.stdout(7), "early\nlate\n");
    let started = records
        .iter()
        .filter(|record| matches!(record, Record::Started { .. }));
    assert_eq!(started.count(), 1);
}

#[tokio::test]
async fn what_waits_too_long_is_given_back() {
    let mut world = World::with(|config| config.return_after = Duration::from_millis(300));
    let gate = world.file("gate");
    let script = format!("while [ ! -e {} ]; do sleep 0.02; done", gate.display());
    world.start(sh(&script), &[range(0, 9)]).await;
    let records = world
        .recorded(|records| returned(records).count() == 8)
        .await;
    assert_eq!(returned(&records).ranges(), [range(2, 9)]);
    // What was given back is not taken again; what is new is.
    world.hand(range(10, 11));
    std::fs::write(gate, "").unwrap();
    world.recorded(|records| ends(records).len() == 4).await;
    world.close();
    let records = world.over().await;
    let ended: Vec<u32> = ends(&records).into_keys().collect();
    assert_eq!(ended, [0, 1, 10, 11]);
}

#[tokio::test]
async fn a_snapshot_is_copied_for_each_task() {
    let mut world = World::new();
    let mut spec = sh("cat sub/data; echo mine > sub/data");
    spec.snapshot = Some(trainyard_common::ids::Digest([1; 32]));
    world.carriers.accept(world.bundle(), spec).await.unwrap();
    let sub = world.dir().template().work().join("sub");
    std::fs::create_dir_all(&sub).unwrap();
    std::fs::write(sub.join("data"), "given\n").unwrap();
    world.desired.tasks = [range(0, 4)].into_iter().collect();
    world.desired.phase = BundlePhase::Close;
    world.carriers.spawn(&world.desired).unwrap();
    let records = world.over().await;
    assert_eq!(ends(&records).len(), 5);
    assert!((0..5).all(|task| world.stdout(task) == "given\n"));
    let trash = || std::fs::read_dir(world.dir().trash()).unwrap().count();
    // What is left of it when the carrier ends goes with the bundle.
    assert!(trash() <= 5);
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
        world.config.bundles_dir.parent().unwrap(),
    ] {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    }
    let mut spec = sh("id -u; id -g; echo $HOME $USER; cat sub/data; echo mine > sub/data
        echo x > $YARD_OUTPUT_DIR/out && echo x > $TMPDIR/x || exit 1
        cat ../../../bundle.json ../../../journal; ls ../../..; ls ../../../logs; mv ../tmp ../other; rmdir ../checkpoint
        grep -E '^(Groups|CapEff):' /proc/self/status
        exit 0");
    spec.snapshot = Some(trainyard_common::ids::Digest([1; 32]));
    world.carriers.accept(world.bundle(), spec).await.unwrap();
    let sub = world.dir().template().work().join("sub");
    std::fs::create_dir_all(&sub).unwrap();
    std::fs::write(sub.join("data"), "given\n").unwrap();
    std::fs::set_permissions(
        sub.join("data"),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )
    .unwrap();
    world.desired.tasks = [range(0, 3)].into_iter().collect();
    world.desired.phase = BundlePhase::Close;
    world.carriers.spawn(&world.desired).unwrap();
    let records = world.over().await;
    let (uid, gid) = (run_as.uid, run_as.gid);
    for (task, end) in ends(&records) {
        assert_eq!(end.cause, EndCause::Completed, "{end:?}");
        assert!(end.outputs);
        let text = world.stdout(task);
        let expected = format!("{uid}\n{gid}\n/nonexistent nobody\ngiven\n");
        let rest = text.strip_prefix(&expected);
        let rest = rest.unwrap_or_else(|| panic!("{text}"));
        assert!(rest.contains("CapEff:\t0000000000000000\n"), "{rest}");
        assert_eq!(rest.lines().count(), 2, "{rest}");
        // It could not take its directory away.
        assert!(world.dir().task(TaskIndex(task)).checkpoint().is_dir());
    }
    world.carriers.remove(world.bundle()).await.unwrap();
}
