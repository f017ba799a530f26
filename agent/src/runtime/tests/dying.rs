//! The agent's process dies between any two steps of a start, and another one takes its place. The agent is this test
//! binary itself, called so that it runs nothing but [`agent_entry`].

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use trainyard_common::bundle::{BundlePhase, DesiredBundle, TaskRange, TaskSet};
use trainyard_common::ids::TaskIndex;

use super::super::carrier::{
    CarrierConfig, CarrierState, Carriers, RETURN_AFTER, Record, RecoveredCarrier, parse,
};
use super::super::failpoint::{POINTS, VARIABLE};
use super::*;

const ENTRY: &str = "runtime::tests::dying::agent_entry";
/// What the agent of a test does; its name is an argument that changes nothing otherwise.
const PLANS: [&str; 4] = ["plan-member", "plan-stop", "plan-bundle", "plan-end"];
const TASKS: u32 = 4;

/// Returns at once in an ordinary test run, and is an agent when it is called as one.
#[test]
fn agent_entry() {
    let arguments: Vec<String> = std::env::args().collect();
    let plan = PLANS
        .iter()
        .find(|plan| arguments.iter().any(|argument| argument == *plan));
    let (true, Some(plan)) = (arguments.iter().any(|argument| argument == ENTRY), plan) else {
        return;
    };
    let root = PathBuf::from(arguments.last().unwrap());
    let slow = arguments.iter().any(|argument| argument == SLOW_SHIM);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut place = Place::new(root, slow);
        match *plan {
            "plan-member" => {
                place.accept().await;
                drop(place.start_member().await);
            }
            "plan-stop" => {
                place.accept().await;
                drop(place.stop_member().await);
            }
            "plan-bundle" => {
                place.accept_bundle().await;
                place.carriers.spawn(&place.desired).unwrap();
                place.over().await;
            }
            _ => {
                place.accept_bundle().await;
                place.carriers.end(&place.desired, "no code");
                place.over().await;
            }
        }
    });
    std::process::exit(0);
}

/// What an agent has on a machine, without a coordinator.
struct Place {
    root: PathBuf,
    runtime: Runtime,
    events: mpsc::Receiver<RuntimeEvent>,
    carriers: Carriers,
    news: mpsc::Receiver<super::super::carrier::CarrierEvent>,
    attempt: AttemptRef,
    desired: DesiredBundle,
}

impl Place {
    fn new(root: PathBuf, slow: bool) -> Self {
        let mut command = shim_command(true);
        if slow {
            // So that the agent is dead, and another one at work, before the shim does anything.
            command.extend(["--skip", SLOW_SHIM].map(Into::into));
        }
        let (sender, events) = mpsc::channel(64);
        let runtime = Runtime::new(
            RuntimeConfig {
                attempts_dir: root.join("attempts"),
                shim_command: command.clone(),
                run_as: None,
                log_limit: MAX_LOG_BYTES_PER_RANK,
            },
            sender,
        );
        let (sender, news) = mpsc::channel(64);
        let carriers = Carriers::new(
            CarrierConfig {
                bundles_dir: root.join("bundles"),
                shim_command: command,
                run_as: None,
                log_limit: MAX_LOG_BYTES_PER_RANK,
                return_after: RETURN_AFTER,
            },
            sender,
        );
        let all = TaskRange {
            first: TaskIndex(0),
            last: TaskIndex(TASKS - 1),
        };
        Self {
            root,
            runtime,
            events,
            carriers,
            news,
            attempt: "j17.0.1".parse().unwrap(),
            desired: DesiredBundle {
                bundle: "j17.b3".parse().unwrap(),
                slots: 2,
                phase: BundlePhase::Close,
                tasks: TaskSet::from_iter([all]),
                recorded: 0,
                spec: None,
            },
        }
    }

    /// Says how often each task was started, and something into its log.
    fn script(&self) -> MemberSpec {
        let ran = self.root.join("ran");
        sh(&format!(
            "echo $YARD_TASK_INDEX >> {}; echo out $YARD_TASK_INDEX; exit 7",
            ran.display()
        ))
    }

    fn ran(&self, task: u32) -> usize {
        let text = std::fs::read_to_string(self.root.join("ran")).unwrap_or_default();
        text.lines()
            .filter(|line| *line == task.to_string())
            .count()
    }

    async fn accept(&self) {
        let member = DesiredMember {
            attempt: self.attempt,
            phase: DesiredPhase::Prepare,
            spec: self.script(),
        };
        self.runtime.accept(&member).await.unwrap();
    }

    async fn accept_bundle(&self) {
        let accepted = self.carriers.accept(self.desired.bundle, self.script());
        accepted.await.unwrap();
    }

    async fn start_member(&mut self) -> Ending {
        self.runtime.spawn_shim(self.attempt).await.unwrap();
        self.go_on().await
    }

    /// As the core does: go when it is ready.
    async fn go_on(&mut self) -> Ending {
        loop {
            match self.next().await {
                ShimState::Ready { port } => {
                    let go = go(port);
                    self.runtime.go(self.attempt, &go, None).await.unwrap();
                }
                ShimState::Gone(ending) => return ending,
                ShimState::Accepted
                | ShimState::Running { .. }
                | ShimState::Stopping
                | ShimState::CleanupPending(_) => {}
            }
        }
    }

    async fn next(&mut self) -> ShimState {
        let event = timeout(PATIENCE, self.events.recv()).await;
        event.expect("an event").expect("the channel is open").state
    }

    async fn stop_member(&mut self) -> Ending {
        let stop = Stop {
            code: ReasonCode::PrepareFailed,
            grace: Duration::ZERO,
        };
        self.runtime.stop(self.attempt, &stop).await.unwrap();
        loop {
            if let ShimState::Gone(ending) = self.next().await {
                return ending;
            }
        }
    }

    async fn over(&mut self) {
        loop {
            let event = timeout(PATIENCE, self.news.recv()).await;
            let state = event.expect("news").expect("the channel is open").state;
            if let CarrierState::Over { .. } = state {
                return;
            }
        }
    }

    /// Finds what the agent before left and brings it to an end.
    async fn finish_member(&mut self) -> Ending {
        let recovered = self.runtime.recover().await.unwrap();
        match recovered.into_iter().next().map(|found| found.state) {
            // The coordinator says again what it wants.
            None => {
                self.accept().await;
                self.start_member().await
            }
            Some(ShimState::Accepted) => self.stop_member().await,
            Some(ShimState::Gone(ending)) => ending,
            Some(ShimState::Ready { port }) => {
                let go = go(port);
                self.runtime.go(self.attempt, &go, None).await.unwrap();
                self.go_on().await
            }
            Some(
                ShimState::Running { .. } | ShimState::Stopping | ShimState::CleanupPending(_),
            ) => self.go_on().await,
        }
    }

    async fn finish_bundle(&mut self, stop: bool) -> Vec<Record> {
        if stop {
            self.desired.phase = BundlePhase::Stop(Stop {
                code: ReasonCode::CancelRequested,
                grace: Duration::ZERO,
            });
        }
        let recovered = self.carriers.recover().await.unwrap();
        match recovered.first().map(|found| found.carrier) {
            None => {
                self.accept_bundle().await;
                self.carriers.spawn(&self.desired).unwrap();
            }
            Some(RecoveredCarrier::None) if stop => self.carriers.end(&self.desired, ""),
            Some(RecoveredCarrier::None) => self.carriers.spawn(&self.desired).unwrap(),
            Some(RecoveredCarrier::Started | RecoveredCarrier::Over { .. }) => {
                self.carriers.direct(&self.desired);
            }
        }
        self.over().await;
        let journal = self.carriers.dir(self.desired.bundle).journal();
        parse(&std::fs::read(journal).unwrap()).0
    }

    /// No process of this place is left, shims that wait included.
    async fn empty(&self) {
        let mark = self.root.to_str().unwrap().to_owned();
        until(|| {
            Process::all().into_iter().all(|process| {
                let line = std::fs::read(format!("/proc/{}/cmdline", process.pid));
                !String::from_utf8_lossy(&line.unwrap_or_default()).contains(&mark)
            })
        })
        .await;
    }
}

/// Runs an agent that ends at this place. Whether it came there.
fn agent_dies(root: &Path, plan: &str, point: &str, slow: bool) -> bool {
    let mut arguments = vec!["--exact", ENTRY, "--nocapture", "--test-threads=1"];
    arguments.extend(["--skip", plan]);
    if slow {
        arguments.extend(["--skip", SLOW_SHIM]);
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(arguments)
        .arg("--skip")
        .arg(root)
        .env(VARIABLE, point)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    status.signal() == Some(9)
}

fn check_member(place: &Place, ending: &Ending, what: &str) {
    let ran = place.ran(0);
    assert_eq!(usize::from(ending.started), ran, "{what}: {ending:?}");
    if ending.started {
        assert_eq!(only_rank(ending), (ExitStatus::Code(7), true), "{what}");
        let log = std::fs::read(place.runtime.dir(place.attempt).log(0)).unwrap();
        let (record, length) = LogRecord::decode(&log).unwrap().unwrap();
        assert_eq!(
            (record.data, length),
            (&b"out 0\n"[..], log.len()),
            "{what}"
        );
    }
}

#[tokio::test]
async fn an_agent_that_dies_anywhere_in_the_start_of_a_member_loses_and_doubles_nothing() {
    let mut reached = 0;
    for (plan, point, slow) in points(&["plan-member", "plan-stop"], &["bundle", "settle"]) {
        let what = format!("{plan} {point} slow {slow}");
        let scratch = tempfile::tempdir().unwrap();
        if !agent_dies(scratch.path(), plan, point, slow) {
            continue;
        }
        reached += 1;
        let mut place = Place::new(scratch.path().to_owned(), slow);
        let ending = place.finish_member().await;
        check_member(&place, &ending, &what);
        until_removed(&place).await;
        place.empty().await;
        check_member_ran(&place, &ending, &what);
    }
    assert!(reached >= 18, "{reached}");
}

/// A shim that was late must not have run it after all.
fn check_member_ran(place: &Place, ending: &Ending, what: &str) {
    assert_eq!(place.ran(0), usize::from(ending.started), "{what}");
}

async fn until_removed(place: &Place) {
    let wait = async {
        // A shim that was late may just be looking.
        while place.runtime.remove(place.attempt).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("it can be removed");
    assert!(!place.runtime.dir(place.attempt).root().exists());
}

#[tokio::test]
async fn an_agent_that_dies_anywhere_in_the_start_of_a_bundle_loses_and_doubles_nothing() {
    let mut reached = 0;
    for (plan, point, slow) in points(&["plan-bundle", "plan-end"], &["attempt", "member", "unst"])
    {
        for stop in [false, true] {
            let what = format!("{plan} {point} slow {slow} stop {stop}");
            let scratch = tempfile::tempdir().unwrap();
            if !agent_dies(scratch.path(), plan, point, slow) {
                continue;
            }
            reached += 1;
            let mut place = Place::new(scratch.path().to_owned(), slow);
            let records = place.finish_bundle(stop).await;
            check_bundle_ran(&place, &records, &what);
            check_logs(&place, &records, &what);
            until_bundle_removed(&place).await;
            place.empty().await;
            check_bundle_ran(&place, &records, &what);
        }
    }
    assert!(reached >= 28, "{reached}");
}

/// Each task has one end, and ran as often as that says.
fn check_bundle_ran(place: &Place, records: &[Record], what: &str) {
    for task in 0..TASKS {
        let index = TaskIndex(task);
        let ends: Vec<&Record> = records
            .iter()
            .filter(|record| match record {
                Record::Ended(end) => end.task == index,
                Record::Returned(range) => (range.first..=range.last).contains(&index),
                Record::Handed(_)
                | Record::Began(_)
                | Record::Started { .. }
                | Record::Skipped { .. }
                | Record::Over { .. } => false,
            })
            .collect();
        let [end] = &ends[..] else {
            panic!("{what}: task {task} has ends {ends:?} in {records:?}");
        };
        let began = matches!(end, Record::Ended(end) if end.started);
        assert_eq!(place.ran(task), usize::from(began), "{what}: {end:?}");
    }
}

fn check_logs(place: &Place, records: &[Record], what: &str) {
    let dir = place.carriers.dir(place.desired.bundle);
    for record in records {
        if let Record::Ended(end) = record
            && end.cause == EndCause::RankFailed
        {
            assert_eq!(end.exit, Some(ExitStatus::Code(7)), "{what}");
            let log = std::fs::read(dir.log(end.task)).unwrap();
            let (record, length) = LogRecord::decode(&log).unwrap().unwrap();
            let expected = format!("out {}\n", end.task);
            assert_eq!(
                (record.data, length),
                (expected.as_bytes(), log.len()),
                "{what}"
            );
        }
    }
}

async fn until_bundle_removed(place: &Place) {
    let bundle = place.desired.bundle;
    let wait = async {
        // A carrier that was late may just be looking.
        while place.carriers.remove(bundle).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("it can be removed");
    assert!(!place.carriers.dir(bundle).root().exists());
}

fn points<'a>(
    plans: &'a [&'a str],
    others: &'a [&'a str],
) -> impl Iterator<Item = (&'a str, &'static str, bool)> {
    plans.iter().flat_map(move |plan| {
        POINTS
            .iter()
            .filter(move |point| !others.iter().any(|other| point.starts_with(other)))
            .flat_map(move |point| [false, true].map(|slow| (*plan, *point, slow)))
    })
}

/// The one that was suspected: a carrier that came up after its agent's end, and a bundle that is to be ended.
#[tokio::test]
async fn a_carrier_that_nobody_told_anything_ends_when_its_bundle_does() {
    for why in ["", "no code"] {
        let scratch = tempfile::tempdir().unwrap();
        let mut place = Place::new(scratch.path().to_owned(), false);
        place.accept_bundle().await;
        let found = place.carriers.recover().await.unwrap();
        assert_eq!(found[0].carrier, RecoveredCarrier::None);
        let shim = place.carriers.dir(place.desired.bundle).shim();
        let (child, stream) = super::super::start::start_shim(&shim_command(true), &shim).unwrap();
        drop((child, stream));
        until(|| shim.shim().exists()).await;
        place.carriers.end(&place.desired, why);
        place.over().await;
        until(|| shim.is_unlocked().unwrap()).await;
        assert!((0..TASKS).all(|task| place.ran(task) == 0));
    }
}
