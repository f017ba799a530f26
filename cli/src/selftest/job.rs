//! The jobs of a self test: plain shell scripts that are witnesses of themselves, and how each must end.

use std::collections::BTreeMap;
use std::time::Duration;

use trainyard_common::spec::{Array, JobSpec};
use trainyard_common::state::JobState;

/// Time between two ticks of a rank.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// The label that all jobs of one self test bear.
pub(crate) const LABEL: &str = "selftest";
/// The variable that every process of one self test has.
pub(crate) const MARK: &str = "SELFTEST_MARK";
/// Small enough that the jobs fit beside others.
const CPU_MILLI: u64 = 50;
/// Between SIGTERM and SIGKILL, which the deaf ones wait for.
pub(crate) const GRACE: Duration = Duration::from_secs(2);
/// Whatever becomes of the self test, its jobs end.
const TIME_LIMIT: Duration = Duration::from_secs(2 * 3600);
/// What a first attempt ends with that is to be tried again.
pub(crate) const FIRST_CODE: u8 = 9;
/// What the bad rank of a gang ends with.
pub(crate) const BAD_CODE: u8 = 4;
/// Ticks of the bad rank; the others would have many more.
const BAD_TICKS: u32 = 8;

/// What each rank runs. Everything that it says of itself is in its own files before it goes on.
const SCRIPT: &str = r#"witness="$YARD_OUTPUT_DIR/witness-$RANK"
say() { read up rest < /proc/uptime; echo "$1 $up" >> "$witness"; }
if [ "$SELFTEST_DEAF" = 1 ]; then trap '' TERM; fi
code=$SELFTEST_CODE ticks=$SELFTEST_TICKS
if [ "$SELFTEST_FIRST_CODE" != 0 ] && [ "$YARD_ATTEMPT" = 1 ]; then code=$SELFTEST_FIRST_CODE; fi
if [ "$SELFTEST_BAD_RANK" = "$RANK" ]; then code=$SELFTEST_BAD_CODE ticks=$SELFTEST_BAD_TICKS; fi
say start
n=0
while [ $n -lt $SELFTEST_LINES ]; do n=$((n + 1)); echo "line $n"; done
i=0
while [ $i -lt $ticks ]; do
  sleep 0.1
  i=$((i + 1)) n=$((n + 1))
  say "tick $i"
  echo "line $n"
done
echo "$YARD_JOB_ID $YARD_TASK_INDEX $YARD_ATTEMPT $RANK" > "$YARD_OUTPUT_DIR/result-$RANK"
say "end $code"
exit "$code"
"#;

/// Looks for processes of the self test that are left on a node. Its own must not bear the mark.
const SWEEP: &str = r#"command -v grep > /dev/null || { echo "no grep"; exit 0; }
grep -lsF "$1" /proc/[0-9]*/environ | while read file; do
  pid=${file#/proc/}
  echo "left ${pid%/environ}"
done
echo swept
"#;

/// One kind of job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) name: &'static str,
    pub(crate) nodes: u32,
    pub(crate) procs: u32,
    /// Tasks of an array; 0 for a plain job.
    pub(crate) tasks: u32,
    /// How long each rank runs.
    pub(crate) ticks: u32,
    /// Lines that each rank writes at once at its start.
    pub(crate) lines: u32,
    pub(crate) code: u8,
    /// The first attempt fails, and the second one has `code`.
    pub(crate) again: bool,
    /// Ignores SIGTERM.
    pub(crate) deaf: bool,
    /// This rank fails early.
    pub(crate) bad_rank: Option<u32>,
    /// It is cancelled while it runs.
    pub(crate) cancelled: bool,
    /// It is to run through a fault.
    pub(crate) through: bool,
}

impl Job {
    /// One that succeeds.
    pub(crate) const fn new(name: &'static str, ticks: u32) -> Self {
        Self {
            name,
            nodes: 1,
            procs: 1,
            tasks: 0,
            ticks,
            lines: 5,
            code: 0,
            again: false,
            deaf: false,
            bad_rank: None,
            cancelled: false,
            through: false,
        }
    }

    /// How it must end.
    pub(crate) fn end(&self) -> JobState {
        match (self.cancelled, self.code, self.bad_rank) {
            (true, ..) => JobState::Cancelled,
            (false, 0, None) => JobState::Succeeded,
            (false, ..) => JobState::Failed,
        }
    }

    /// The exit code that must be told of it.
    pub(crate) fn exit(&self) -> Option<u8> {
        match (self.cancelled, self.bad_rank) {
            (true, _) => None,
            (false, Some(_)) => Some(BAD_CODE),
            (false, None) => Some(self.code),
        }
    }

    /// How often each task must have been tried.
    pub(crate) fn attempts(&self) -> u32 {
        1 + u32::from(self.again)
    }

    /// What the rank writes in its own file as its code.
    pub(crate) fn code_of(&self, attempt: u32, rank: u32) -> u8 {
        match (self.again && attempt == 1, self.bad_rank) {
            (true, _) => FIRST_CODE,
            (false, Some(bad)) if bad == rank => BAD_CODE,
            (false, _) => self.code,
        }
    }

    /// The specification, as part of the self test `id`.
    pub(crate) fn spec(&self, id: &str) -> JobSpec {
        let command = ["sh", "-c", SCRIPT].map(str::to_owned).to_vec();
        let mut spec = bare(&format!("selftest-{}", self.name), command, id);
        spec.nodes = self.nodes;
        spec.procs_per_node = self.procs;
        spec.retries = u32::from(self.again);
        spec.grace = GRACE;
        spec.array = (self.tasks > 0).then(|| Array {
            first: 0,
            last: self.tasks - 1,
            max_running: None,
        });
        let first_code = if self.again { FIRST_CODE } else { 0 };
        let bad_rank = self.bad_rank.map(|rank| rank.to_string());
        spec.env = [
            (MARK, id.to_owned()),
            ("SELFTEST_TICKS", self.ticks.to_string()),
            ("SELFTEST_LINES", self.lines.to_string()),
            ("SELFTEST_CODE", self.code.to_string()),
            ("SELFTEST_FIRST_CODE", first_code.to_string()),
            ("SELFTEST_DEAF", u8::from(self.deaf).to_string()),
            ("SELFTEST_BAD_RANK", bad_rank.unwrap_or_default()),
            ("SELFTEST_BAD_CODE", BAD_CODE.to_string()),
            ("SELFTEST_BAD_TICKS", BAD_TICKS.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        spec
    }
}

fn bare(name: &str, command: Vec<String>, id: &str) -> JobSpec {
    let mut spec = JobSpec::new(name, command);
    spec.resources_per_node.cpu_milli = CPU_MILLI;
    spec.time_limit = Some(TIME_LIMIT);
    spec.labels = BTreeMap::from([(LABEL.to_owned(), id.to_owned())]);
    spec
}

/// A look at so many nodes for what is left of the self test `id`.
pub(crate) fn sweep(id: &str, nodes: u32) -> JobSpec {
    let mark = format!("{MARK}={id}");
    let command = ["sh", "-c", SWEEP, "sh", &mark].map(str::to_owned).to_vec();
    let mut spec = bare("selftest-sweep", command, id);
    spec.nodes = nodes;
    spec
}

/// The jobs without any fault. `count` short ones beside one of each special kind.
pub(crate) fn plain(count: u32, nodes: u32) -> Vec<Job> {
    let two = nodes.clamp(1, 2);
    let mut jobs = short(count);
    jobs.extend([
        Job {
            tasks: 8,
            ..Job::new("array", 5)
        },
        Job {
            lines: 3000,
            ..Job::new("lines", 2)
        },
        Job {
            nodes: two,
            procs: 3 - two,
            ..Job::new("gang", 15)
        },
        Job {
            nodes: two,
            procs: 3 - two,
            bad_rank: Some(1),
            ..Job::new("bad-gang", 600)
        },
        deaf(),
    ]);
    jobs
}

/// The jobs of one fault: a gang over `nodes`, and single ones, that run for `length`, and others that begin and end at any
/// time around it.
pub(crate) fn through(count: u32, nodes: u32, length: Duration) -> Vec<Job> {
    let ticks = u32::try_from(length.as_millis() / TICK.as_millis()).unwrap_or(u32::MAX);
    let long = |name| Job {
        through: true,
        ..Job::new(name, ticks)
    };
    let mut jobs = vec![
        Job {
            nodes,
            ..long("through-gang")
        },
        long("through"),
        long("through"),
        Job {
            tasks: 4,
            ..long("through-array")
        },
        Job {
            through: true,
            ..deaf()
        },
    ];
    jobs.extend(short(count));
    jobs
}

/// Ignores SIGTERM and is cancelled.
fn deaf() -> Job {
    Job {
        deaf: true,
        cancelled: true,
        ..Job::new("deaf", 36_000)
    }
}

/// Short ones of all kinds, which end one after the other.
fn short(count: u32) -> Vec<Job> {
    let kind = |number: u32| {
        let ticks = 5 + number % 40;
        match number % 4 {
            0 | 2 => Job::new("ok", ticks),
            1 => Job {
                code: 3,
                ..Job::new("exit-3", ticks)
            },
            _ => Job {
                again: true,
                ..Job::new("retry", ticks)
            },
        }
    };
    (0..count).map(kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_is_one_that_a_coordinator_accepts() {
        let all =
            plain(9, 3)
                .into_iter()
                .chain(plain(1, 1))
                .chain(through(9, 3, Duration::from_secs(8)));
        for job in all {
            let spec = job.spec("0123abcd");
            spec.validate()
                .unwrap_or_else(|bad| panic!("{job:?}: {bad}"));
            assert_eq!(spec.world_size() > 1, job.nodes * job.procs > 1);
        }
        sweep("0123abcd", 2).validate().unwrap();
    }

    #[test]
    fn a_gang_has_two_ranks_also_on_one_node() {
        for nodes in [1, 2, 5] {
            let gangs = plain(0, nodes);
            let bad = gangs.iter().find(|job| job.bad_rank.is_some()).unwrap();
            assert_eq!(bad.nodes * bad.procs, 2);
            assert_eq!((bad.end(), bad.exit()), (JobState::Failed, Some(BAD_CODE)));
        }
    }

    #[test]
    fn what_a_rank_must_say_follows_from_the_kind() {
        let kinds = short(4);
        let retry = kinds.iter().find(|job| job.again).unwrap();
        assert_eq!(retry.attempts(), 2);
        assert_eq!((retry.code_of(1, 0), retry.code_of(2, 0)), (FIRST_CODE, 0));
        assert_eq!(retry.end(), JobState::Succeeded);
        assert_eq!((deaf().end(), deaf().exit()), (JobState::Cancelled, None));
    }
}
