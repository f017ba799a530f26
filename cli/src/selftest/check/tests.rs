//! Each way in which a cluster could lie must be seen, and an honest one must not be accused.

use trainyard_common::ids::{AttemptNumber, Digest, TaskIndex};
use trainyard_common::member::RankEnd;
use trainyard_common::record::{MemberRecord, TaskCounts};
use trainyard_common::resources::Resources;
use trainyard_common::state::{AttemptState, MemberPhase, Reason, ReasonCode};
use trainyard_common::time::Timestamp;

use super::super::book::Book;
use super::super::job::Job;
use super::*;

/// What a job looks like that ended as it must, with one rank on one node.
struct World {
    book: Book,
    evidence: Vec<Evidence>,
    outcomes: Vec<Outcome>,
    census: Vec<JobRecord>,
}

fn record(entry: &Entry) -> JobRecord {
    JobRecord {
        id: entry.id,
        owner: "ann".parse().unwrap(),
        request_id: entry.request_id.parse().unwrap(),
        request_digest: Digest([0; 32]),
        spec: entry.spec.clone(),
        state: entry.job.end(),
        reason: Reason::new(ReasonCode::Completed, "done"),
        tasks: TaskCounts::default(),
        next_fresh: TaskIndex(0),
        submitted_at: Timestamp(0),
        started_at: Some(Timestamp(1)),
        ended_at: Some(Timestamp(9)),
        cancel: None,
        exit: entry.job.exit().map(ExitStatus::Code),
        bundles: 0,
    }
}

fn attempt(entry: &Entry, number: u32) -> AttemptRecord {
    let rank_end = |rank: u32| RankEnd {
        rank,
        exit: match entry.job.cancelled {
            true => ExitStatus::Signal(9),
            false => ExitStatus::Code(entry.job.code_of(number, rank)),
        },
        at: Timestamp(8),
        oom_killed: false,
        unprompted: false,
    };
    let member: MemberRecord = member(NodeId(1), vec![rank_end(0)]);
    AttemptRecord {
        id: AttemptRef {
            job: entry.id,
            task: TaskIndex(0),
            attempt: AttemptNumber(number),
        },
        owner: "ann".parse().unwrap(),
        workspace: entry.spec.workspace.clone(),
        state: AttemptState::Ended,
        reason: Reason::new(ReasonCode::Completed, "done"),
        outcome: None,
        exit: None,
        failed_rank: None,
        members: vec![member],
        resume_from: Vec::new(),
        lease: None,
        placed_at: Timestamp(0),
        ready_at: Some(Timestamp(1)),
        started_at: Some(Timestamp(1)),
        ended_at: Some(Timestamp(9)),
    }
}

fn witness(entry: &Entry, number: u32) -> (Witness, Output) {
    let ticks = 4;
    let witness = Witness {
        starts: 1,
        ticks,
        out_of_order: false,
        longest_gap: Duration::from_millis(110),
        end: (!entry.job.cancelled).then(|| entry.job.code_of(number, 0)),
    };
    let lines = entry.job.lines + ticks;
    let text = (1..=lines).map(|line| format!("line {line}\n")).collect();
    (witness, Output { text, dropped: 0 })
}

impl World {
    fn new(jobs: &[Job]) -> Self {
        let mut world = Self {
            book: Book::default(),
            evidence: Vec::new(),
            outcomes: Vec::new(),
            census: Vec::new(),
        };
        world.book.repeated = 1;
        for (index, job) in jobs.iter().enumerate() {
            world.add(index, *job);
        }
        world
    }

    fn add(&mut self, index: usize, job: Job) {
        let mut entry = Entry {
            job,
            part: 0,
            request_id: format!("r{index}"),
            spec: job.spec("id"),
            id: trainyard_common::ids::JobId(1 + index as u64),
            last: None,
            end: None,
            changed: None,
            cancelled: job.cancelled.then(tokio::time::Instant::now),
            cancel_took: job.cancelled.then(|| Duration::from_secs(2)),
            at_fault: true,
        };
        let record = record(&entry);
        entry.end = Some(record.clone());
        let mut evidence = Evidence::default();
        let attempts: Vec<_> = (1..=job.attempts()).map(|it| attempt(&entry, it)).collect();
        for attempt in &attempts {
            let (witness, output) = witness(&entry, attempt.id.attempt.0);
            let AttemptRef {
                job,
                task,
                attempt: number,
            } = attempt.id;
            let result = format!("{job} {task} {number} 0\n");
            evidence.witnesses.insert((attempt.id, 0), witness);
            evidence.output.insert((attempt.id, 0), output);
            evidence.results.insert((attempt.id, 0), result);
        }
        evidence.detail = Some(JobDetail {
            job: record.clone(),
            tasks: Vec::new(),
            attempts,
        });
        self.book.entries.push(entry);
        self.evidence.push(evidence);
        self.census.push(record);
    }

    fn rows(&self) -> Vec<Row> {
        let case = Case {
            book: &self.book,
            evidence: &self.evidence,
            outcomes: &self.outcomes,
            census: &self.census,
        };
        case.judge()
    }

    /// The promises that are broken.
    fn broken(&self) -> Vec<&'static str> {
        let rows = self.rows();
        let broken = rows.iter().filter(|row| row.verdict == Verdict::Broken);
        broken.map(|row| row.key).collect()
    }

    fn detail(&mut self, index: usize) -> &mut JobDetail {
        self.evidence[index].detail.as_mut().unwrap()
    }

    fn first_witness(&mut self, index: usize) -> &mut Witness {
        self.evidence[index].witnesses.values_mut().next().unwrap()
    }
}

fn member(node: NodeId, ranks: Vec<RankEnd>) -> MemberRecord {
    let json = serde_json::json!({
        "node": node, "resources": Resources::default(), "gpu_uuids": [], "phase": MemberPhase::Ended,
        "address": "", "port": null, "ranks": ranks, "outputs": null, "checkpoint": null, "warning": "",
        "cleanup": "",
    });
    serde_json::from_value(json).unwrap()
}

fn ok() -> Job {
    Job::new("ok", 4)
}

fn again() -> Job {
    Job {
        again: true,
        ..ok()
    }
}

fn deaf() -> Job {
    Job {
        deaf: true,
        cancelled: true,
        ..ok()
    }
}

fn fails() -> Job {
    Job { code: 3, ..ok() }
}

fn honest() -> World {
    World::new(&[ok(), again(), deaf(), fails()])
}

#[test]
fn an_honest_cluster_is_not_accused() {
    let mut world = honest();
    assert_eq!(world.broken(), Vec::<&str>::new());
    world.outcomes.push(outcome(Some(Duration::from_secs(1))));
    assert_eq!(world.broken(), Vec::<&str>::new());
    let rows = world.rows();
    let kept = rows
        .iter()
        .filter(|row| row.verdict == Verdict::Kept)
        .count();
    assert_eq!(
        kept,
        rows.len() - 1,
        "all but the gangs, of which there was none"
    );
}

fn outcome(over_after: Option<Duration>) -> Outcome {
    Outcome {
        part: 0,
        name: "kill-agent",
        node: Some(NodeId(1)),
        node_text: "n1".to_owned(),
        beyond_lost: false,
        not_made: None,
        over_after,
        refused: Duration::ZERO,
    }
}

#[test]
fn lost_and_doubled_jobs_are_seen() {
    let mut world = honest();
    world.evidence[0].detail = None;
    assert_eq!(world.broken(), ["acknowledged"]);
    let mut world = honest();
    let mut second = world.census[0].clone();
    second.id.0 += 70;
    world.census.push(second);
    assert_eq!(world.broken(), ["one_job"]);
    let mut world = honest();
    world.book.wrong_answers.push("x".to_owned());
    assert_eq!(world.broken(), ["one_job"]);
}

#[test]
fn wrong_ends_are_seen() {
    let mut world = honest();
    world.detail(3).job.state = JobState::Succeeded;
    assert_eq!(world.broken(), ["exits"]);
    let mut world = honest();
    world.detail(3).job.exit = Some(ExitStatus::Code(4));
    assert_eq!(world.broken(), ["exits"]);
    let mut world = honest();
    // Success of a rank that wrote nothing of its end.
    world.first_witness(0).end = None;
    assert!(world.broken().contains(&"exits"));
    let mut world = honest();
    world.detail(0).job.state = JobState::Running;
    assert_eq!(world.broken(), ["ended"]);
    let mut world = honest();
    world.book.entries[0].changed = Some("x".to_owned());
    assert_eq!(world.broken(), ["final"]);
    let mut world = honest();
    world.first_witness(2).end = Some(0);
    assert!(world.broken().contains(&"cancelled"));
}

#[test]
fn attempts_without_need_and_double_starts_are_seen() {
    let mut world = honest();
    world.outcomes.push(outcome(Some(Duration::from_secs(1))));
    let extra = attempt(&world.book.entries[0], 2);
    world.detail(0).attempts.push(extra);
    let broken = world.broken();
    assert!(
        broken.contains(&"uninterrupted") && broken.contains(&"kill_agent"),
        "{broken:?}"
    );
    world.outcomes[0].beyond_lost = true;
    world.outcomes[0].name = "partition";
    assert!(!world.broken().contains(&"uninterrupted"));
    let mut world = honest();
    world.first_witness(0).starts = 2;
    assert_eq!(world.broken(), ["started_once"]);
    let mut world = honest();
    world.detail(1).attempts.truncate(1);
    assert_eq!(world.broken(), ["retries"]);
}

#[test]
fn what_is_missing_of_output_is_seen() {
    let spoil = |change: &dyn Fn(&mut Output)| {
        let mut world = honest();
        change(world.evidence[0].output.values_mut().next().unwrap());
        world.broken()
    };
    assert_eq!(spoil(&|output| output.dropped = 1), ["logs"]);
    assert_eq!(spoil(&|output| output.text.truncate(7)), ["logs"]);
    assert_eq!(
        spoil(&|output| output.text = output.text.replace("line 2", "line 3")),
        ["logs"]
    );
    assert_eq!(spoil(&|output| output.text.push_str("line 10\n")), ["logs"]);
    let mut world = honest();
    world.evidence[0].results.clear();
    assert_eq!(world.broken(), ["outputs"]);
    let mut world = honest();
    world.evidence[0].witnesses.clear();
    assert_eq!(world.broken(), ["outputs"]);
}

#[test]
fn a_fault_that_hurts_is_seen_and_one_that_was_not_made_is_not_counted() {
    let mut world = honest();
    world.outcomes.push(outcome(Some(Duration::from_secs(1))));
    world.first_witness(0).longest_gap = Duration::from_secs(6);
    assert_eq!(world.broken(), ["kill_agent"]);
    let mut world = honest();
    world.outcomes.push(outcome(None));
    assert_eq!(world.broken(), ["kill_agent"]);
    world.outcomes[0].not_made = Some("full".to_owned());
    assert_eq!(world.broken(), Vec::<&str>::new());
    let last = world.rows().pop().unwrap();
    assert_eq!(last.verdict, Verdict::NotTried);
}

#[test]
fn a_gang_of_which_a_rank_lives_on_is_seen() {
    let gang = Job {
        procs: 2,
        bad_rank: Some(1),
        ..ok()
    };
    let mut world = World::new(&[gang]);
    let end = |rank, at| RankEnd {
        rank,
        exit: match rank {
            1 => ExitStatus::Code(super::super::job::BAD_CODE),
            _ => ExitStatus::Signal(15),
        },
        at: Timestamp(at),
        oom_killed: false,
        unprompted: false,
    };
    world.first_witness(0).end = None;
    world.detail(0).attempts[0].members[0].ranks = vec![end(0, 9), end(1, 8)];
    let gangs = |world: &World| world.broken().contains(&"gangs");
    assert!(!gangs(&world));
    world.detail(0).attempts[0].members[0].ranks = vec![end(1, 8)];
    assert!(gangs(&world));
    world.detail(0).attempts[0].members[0].ranks = vec![end(0, 60_000), end(1, 8)];
    assert!(gangs(&world));
}
