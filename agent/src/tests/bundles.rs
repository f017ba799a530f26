//! Bundles, from the coordinator's wish to its record.

use std::collections::BTreeMap;

use trainyard_common::bundle::{
    BundlePhase, DesiredBundle, ObservedBundle, ObservedBundlePhase, TaskRange, TaskReport, TaskSet,
};
use trainyard_common::ids::{AttemptRef, BundleRef, TaskIndex};
use trainyard_common::member::Ending;
use trainyard_common::state::ExitStatus;

use super::script::*;
use super::*;

fn range(first: u32, last: u32) -> TaskRange {
    TaskRange {
        first: TaskIndex(first),
        last: TaskIndex(last),
    }
}

/// The coordinator's record of one bundle.
struct Book {
    desired: DesiredBundle,
    ended: BTreeMap<u32, Ending>,
    returned: TaskSet,
    started: Vec<u32>,
    over: Option<(u64, String)>,
}

impl Book {
    fn new(bundle: &str, script: &str, tasks: TaskRange) -> Self {
        let spec = Box::new(member("j1.0.1", script).spec);
        Self {
            desired: DesiredBundle {
                bundle: bundle.parse().unwrap(),
                slots: 2,
                phase: BundlePhase::Run,
                tasks: [tasks].into_iter().collect(),
                recorded: 0,
                spec: Some(spec),
            },
            ended: BTreeMap::new(),
            returned: TaskSet::default(),
            started: Vec::new(),
            over: None,
        }
    }

    /// Takes what is new of a message, as the coordinator does.
    fn take(&mut self, observed: ObservedBundle) {
        assert_eq!(observed.bundle, self.desired.bundle);
        assert!(
            observed.first <= self.desired.recorded,
            "a gap: {observed:?}"
        );
        for (number, report) in (observed.first..).zip(observed.reports) {
            if number < self.desired.recorded {
                continue;
            }
            self.desired.recorded += 1;
            match report {
                TaskReport::Started { task, .. } => self.started.push(task.0),
                TaskReport::Ended { task, ending, .. } => {
                    assert!(self.desired.tasks.remove(task), "task {task} ended twice");
                    self.ended.insert(task.0, *ending);
                }
                TaskReport::Returned(range) => {
                    for task in range.tasks() {
                        assert!(
                            self.desired.tasks.remove(task),
                            "task {task} came back twice"
                        );
                    }
                    self.returned.insert(range);
                }
            }
        }
        if let ObservedBundlePhase::Ended { total, message } = observed.phase {
            self.over = Some((total, message));
        }
    }

    fn is_complete(&self) -> bool {
        self.over
            .as_ref()
            .is_some_and(|(total, _)| *total == self.desired.recorded)
    }

    fn attempt(&self, task: u32) -> AttemptRef {
        let job = self.desired.bundle.job;
        format!("{job}.{task}.1").parse().unwrap()
    }

    async fn until(&mut self, peer: &mut script::Peer, wanted: impl Fn(&Self) -> bool) {
        while !wanted(self) {
            self.take(peer.bundle_report().await);
        }
    }

    async fn tell(&self, peer: &script::Peer) {
        let mut desired = self.desired.clone();
        desired.spec = None;
        peer.say(Ours::DesiredBundle((&desired).into())).await;
    }
}

async fn forget(peer: &script::Peer, bundle: BundleRef) {
    peer.say(Ours::ForgetBundle(bundle.into())).await;
}

#[tokio::test]
async fn a_bundle_brings_code_in_and_results_out() {
    let mut world = World::joined().await;
    let code = tempfile::tempdir().unwrap();
    std::fs::write(code.path().join("task.sh"), "echo task $1").unwrap();
    let script = "[ $YARD_TASK_INDEX = 3 ] || exit $YARD_TASK_INDEX
        sh task.sh $YARD_TASK_INDEX; echo 3 > $YARD_OUTPUT_DIR/result";
    let mut book = Book::new("j1.b1", script, range(0, 5));
    book.desired.spec.as_mut().unwrap().snapshot = Some(world.head.keep(code.path()));
    let agent = world.start();
    let mut peer = world.session().await;
    assert_eq!(peer.observed_bundles, []);
    peer.welcome(CALM, &[]).await;
    peer.say(Ours::DesiredBundle((&book.desired).into())).await;
    book.until(&mut peer, |book| book.ended.len() == 6).await;
    for (task, ending) in &book.ended {
        let code = if *task == 3 { 0 } else { *task as u8 };
        assert_eq!(ending.ranks[0].exit, ExitStatus::Code(code), "{ending:?}");
        assert_eq!((ending.started, ending.checkpoint), (true, None));
        assert_eq!(ending.outputs.is_some(), *task == 3);
    }
    // An end is reported only when all is there.
    assert_eq!(
        world.head.file(book.ended[&3].outputs.unwrap(), "result"),
        b"3\n"
    );
    assert_eq!(
        world.head.output(book.attempt(3)),
        ("task 3\n".to_owned(), true)
    );
    assert_eq!(world.head.logs.lock().unwrap().len(), 1);
    let dir = world.dir().join("bundles/j1.b1");
    assert!(dir.join("tasks/3").exists());

    book.desired.tasks.insert(range(6, 9));
    book.tell(&peer).await;
    book.until(&mut peer, |book| book.ended.len() == 10).await;
    // What is on record is not kept.
    eventually("the files of a task to go", || {
        !dir.join("tasks/3").exists() && !dir.join("logs/3.log").exists()
    })
    .await;
    book.desired.phase = BundlePhase::Close;
    book.tell(&peer).await;
    book.until(&mut peer, Book::is_complete).await;
    assert_eq!(book.over, Some((10, String::new())));
    forget(&peer, book.desired.bundle).await;
    eventually("the directory to go", || !dir.exists()).await;
    agent.stop().await;
    assert!(peer.goodbye().await);
}

#[tokio::test]
async fn a_bundle_outlives_its_agent_and_each_report_counts_once() {
    let mut world = World::joined().await;
    let gate = world.scratch.path().join("gate");
    let script = format!(
        "[ $YARD_TASK_INDEX -lt 10 ] && exit 0
        echo one; while [ ! -e {} ]; do sleep 0.02; done; echo two",
        gate.display()
    );
    let mut book = Book::new("j2.b1", &script, range(0, 11));
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome_with(CALM, &[], std::slice::from_ref(&book.desired))
        .await;
    book.until(&mut peer, |book| book.started.len() == 2).await;
    assert_eq!(book.ended.len(), 10);
    agent.stop().await;
    assert!(peer.goodbye().await);

    // The coordinator lost the last of what it was told.
    let all = book.desired.recorded;
    let mut book = Book {
        desired: DesiredBundle {
            recorded: 5,
            tasks: [range(5, 11)].into_iter().collect(),
            ..book.desired.clone()
        },
        ..Book::new("j2.b1", &script, range(0, 0))
    };
    let agent = world.start();
    let mut peer = world.session().await;
    assert_eq!(peer.observed_bundles.len(), 1);
    assert!(peer.observed_bundles[0].reports.is_empty());
    book.take(peer.observed_bundles[0].clone());
    peer.welcome_with(CALM, &[], std::slice::from_ref(&book.desired))
        .await;
    while book.desired.recorded < all {
        let observed = peer.bundle_report().await;
        // Which tasks the first five reports were about is not fixed, so the sets are.
        for report in &observed.reports {
            if let TaskReport::Ended { task, .. } = report {
                book.desired.tasks.insert(TaskRange {
                    first: *task,
                    last: *task,
                });
            }
        }
        book.take(observed);
    }
    // Now a new session with the same agent.
    drop(peer);
    let mut peer = world.session().await;
    std::fs::write(&gate, "").unwrap();
    book.desired.phase = BundlePhase::Close;
    book.desired.tasks = [range(10, 11)].into_iter().collect();
    peer.welcome_with(CALM, &[], std::slice::from_ref(&book.desired))
        .await;
    book.until(&mut peer, Book::is_complete).await;
    assert_eq!(book.over, Some((14, String::new())));
    for task in [10, 11] {
        assert_eq!(book.ended[&task].cause, EndCause::Completed);
        assert_eq!(
            world.head.output(book.attempt(task)),
            ("one\ntwo\n".to_owned(), true)
        );
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_bundle_without_code_or_room_gives_all_back() {
    let mut world = World::joined().await;
    let agent = world.start();
    let mut peer = world.session().await;
    peer.welcome(CALM, &[]).await;
    let mut book = Book::new("j3.b1", "exit 0", range(0, 5));
    book.desired.spec.as_mut().unwrap().snapshot = Some(Digest([1; 32]));
    peer.say(Ours::DesiredBundle((&book.desired).into())).await;
    book.until(&mut peer, Book::is_complete).await;
    assert_eq!(book.returned.ranges(), [range(0, 5)]);
    let (total, message) = book.over.clone().unwrap();
    assert_eq!(total, 1);
    assert!(message.starts_with("cannot fetch code"), "{message}");
    // More came meanwhile.
    book.desired.tasks.insert(range(6, 7));
    book.tell(&peer).await;
    book.until(&mut peer, |book| book.desired.tasks.is_empty())
        .await;
    book.until(&mut peer, Book::is_complete).await;
    assert_eq!(book.returned.ranges(), [range(0, 7)]);
    forget(&peer, book.desired.bundle).await;

    let mut book = Book::new("j4.b1", "exit 0", range(0, 5));
    book.desired.slots = 5;
    book.desired.spec.as_mut().unwrap().resources.cpu_milli = 1_000_000_000;
    peer.say(Ours::DesiredBundle((&book.desired).into())).await;
    book.until(&mut peer, Book::is_complete).await;
    assert_eq!(book.returned.ranges(), [range(0, 5)]);
    book.desired.tasks.insert(range(6, 7));
    book.tell(&peer).await;
    book.until(&mut peer, |book| book.desired.tasks.is_empty())
        .await;
    book.until(&mut peer, Book::is_complete).await;
    assert!(!world.dir().join("bundles/j4.b1").exists());
    // What was here once, as far as the coordinator knows, may have run.
    let mut book = Book::new("j5.b1", "exit 0", range(4, 5));
    book.desired.recorded = 4;
    peer.say(Ours::DesiredBundle((&book.desired).into())).await;
    book.until(&mut peer, Book::is_complete).await;
    let exits: Vec<ExitStatus> = book.ended.values().map(|end| end.ranks[0].exit).collect();
    assert_eq!(exits, [ExitStatus::Unknown; 2]);
    agent.stop().await;
}

/// Processor time of this process so far, in microseconds.
#[expect(unsafe_code, reason = "a measure in a test")]
fn own_cpu() -> f64 {
    use nix::libc;
    // SAFETY: zero is a value of this structure, and the kernel writes one of the same.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let micros = |time: libc::timeval| time.tv_sec as f64 * 1e6 + time.tv_usec as f64;
    micros(usage.ru_utime) + micros(usage.ru_stime)
}

/// For people: run it by name, in release. Agent and coordinator's script are one process here, so both are in the figure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measure, not a test"]
async fn what_a_task_costs_the_agent() {
    const TASKS: u32 = 10_000;
    const AHEAD: u32 = 500;
    for (number, script) in [(1, "/bin/true"), (2, "/bin/echo")] {
        let mut world = World::joined().await;
        let mut book = Book::new(&format!("j{number}.b1"), "", range(0, AHEAD - 1));
        book.desired.spec.as_mut().unwrap().command = vec![script.to_owned()];
        let agent = world.start();
        let mut peer = world.session().await;
        peer.welcome_with(CALM, &[], std::slice::from_ref(&book.desired))
            .await;
        let (cpu, start) = (own_cpu(), std::time::Instant::now());
        let (mut next, mut messages) = (AHEAD, 0);
        while book.ended.len() < TASKS as usize {
            book.take(peer.bundle_report().await);
            messages += 1;
            assert!(book.returned.is_empty());
            if book.desired.tasks.count() < AHEAD / 2 && next < TASKS {
                let last = TASKS.min(next + AHEAD / 2) - 1;
                book.desired.tasks.insert(range(next, last));
                next = last + 1;
                book.tell(&peer).await;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{script}: {:.0} tasks/s in {messages} messages, {:.1} us of agent and script for each task",
            f64::from(TASKS) / seconds,
            (own_cpu() - cpu) / f64::from(TASKS)
        );
        agent.stop().await;
    }
}
