//! What each rank is started as: its arguments and its whole environment. Pure: knows files and processes only by name.
//!
//! Later layers win: the machine's own few variables, our defaults, the user's variables, and last what the job could
//! only break (`RANK` and its family, `MASTER_*`, `YARD_*`; a user's own `YARD_*` are left out).
//!
//! `CUDA_VISIBLE_DEVICES` is always set, to nothing for a member without GPUs: a job sees what it was given, on every
//! node alike. All ranks of a member see all of its GPUs, in the same order, because `LOCAL_RANK` indexes them.
//!
//! **torchrun.** `python3 -m torch.distributed.run` cannot be used as it is: torch 1.13 under Python 3.11 fails to read
//! its own defaults for redirection (`Std.from_str` walks an enum, and 3.11 leaves the zero member out of that walk), so
//! that only `-r 1 -t 1` or the like work, and these move the output into files and change its lines. The few lines of
//! [`TORCHRUN`] repair that one function if, and only if, it is broken, and then run the same `main`; newer versions
//! run unchanged. The user's command follows `--no_python` as it was written, so its interpreter and flags are its own.

use std::collections::BTreeMap;
use std::ffi::OsString;

use trainyard_common::ids::{AttemptRef, TaskIndex};
use trainyard_common::member::{Go, MemberSpec};
use trainyard_common::spec::Launcher;

use super::RunAs;
use super::dir::AttemptDir;
use super::tree::KEY_VARIABLE;

/// What ranks inherit of the agent's environment.
pub(crate) const INHERITED: [&str; 8] = [
    "HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "LC_ALL", "TZ",
];
/// Search path when the agent has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Which task of the job it is.
const TASK_VARIABLE: &str = "YARD_TASK_INDEX";
/// Runs torchrun's own `main`; see the module's text.
const TORCHRUN: &str = "\
import torch.distributed.elastic.multiprocessing.api as api
Std = getattr(api, 'Std', None)
if hasattr(Std, 'from_str'):
    try:
        broken = Std.from_str('0') is None
    except Exception:
        broken = False
    if broken:
        def from_str(cls, text):
            if ':' not in text:
                return cls(int(text))
            pairs = (pair.split(':') for pair in text.split(','))
            return {int(rank): cls(int(value)) for rank, value in pairs}
        Std.from_str = classmethod(from_str)
from torch.distributed.run import main
main()
";

/// One process that the shim starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RankPlan {
    pub(crate) rank: u32,
    pub(crate) argv: Vec<String>,
    pub(crate) env: BTreeMap<String, OsString>,
}

/// Everything that the plan follows from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) attempt: AttemptRef,
    pub(crate) spec: &'a MemberSpec,
    pub(crate) go: &'a Go,
    /// The network interface that reaches the other members, if known.
    pub(crate) interface: Option<&'a str>,
    pub(crate) dir: &'a AttemptDir,
    pub(crate) key: &'a str,
    pub(crate) run_as: Option<&'a RunAs>,
    /// The shim's environment; only [`INHERITED`] names are taken.
    pub(crate) inherited: &'a BTreeMap<String, OsString>,
    /// Whether there is a checkpoint to resume from.
    pub(crate) resume: bool,
}

/// The processes to start, in rank order.
pub(crate) fn plan(context: &Context<'_>) -> Vec<RankPlan> {
    let spec = context.spec;
    spec.supervised_ranks()
        .map(|rank| RankPlan {
            rank,
            argv: match spec.launcher {
                Launcher::None | Launcher::Torch => spec.command.clone(),
                Launcher::Torchrun => torchrun(spec, context.go),
            },
            env: environment(context, rank),
        })
        .collect()
}

/// Makes a plan that of another task of the same array, in the same directory and with the same port.
pub(crate) fn set_task(plan: &mut RankPlan, task: TaskIndex) {
    plan.env.extend([entry(TASK_VARIABLE, task.0.to_string())]);
}

fn torchrun(spec: &MemberSpec, go: &Go) -> Vec<String> {
    let program = spec.command.first().map_or("", String::as_str);
    let name = program.rsplit('/').next().unwrap_or(program);
    let python = if name.starts_with("python") {
        program
    } else {
        "python3"
    };
    let mut argv = vec![
        python.to_owned(),
        "-c".to_owned(),
        TORCHRUN.to_owned(),
        format!("--nnodes={}", spec.nodes),
        format!("--nproc_per_node={}", spec.procs_per_node),
        format!("--node_rank={}", spec.node_rank),
        format!("--master_addr={}", go.master_addr),
        format!("--master_port={}", go.master_port),
        "--no_python".to_owned(),
    ];
    argv.extend(spec.command.iter().cloned());
    argv
}

fn environment(context: &Context<'_>, rank: u32) -> BTreeMap<String, OsString> {
    let mut env = machine(context);
    env.extend(defaults(context));
    for (name, value) in &context.spec.env {
        if !name.starts_with("YARD_") {
            env.insert(name.clone(), value.into());
        }
    }
    env.extend(place(context, rank));
    env.extend(paths(context));
    env
}

fn machine(context: &Context<'_>) -> BTreeMap<String, OsString> {
    let mut env: BTreeMap<String, OsString> = INHERITED
        .iter()
        .filter_map(|name| {
            let value = context.inherited.get(*name)?;
            Some(((*name).to_owned(), value.clone()))
        })
        .collect();
    env.entry("PATH".to_owned())
        .or_insert_with(|| DEFAULT_PATH.into());
    env.entry("LANG".to_owned())
        .or_insert_with(|| "C.UTF-8".into());
    env.entry("HOME".to_owned()).or_insert_with(|| "/".into());
    if let Some(user) = context.run_as {
        env.insert("HOME".to_owned(), user.home.clone().into());
        env.insert("USER".to_owned(), user.name.clone().into());
        env.insert("LOGNAME".to_owned(), user.name.clone().into());
        env.insert("SHELL".to_owned(), "/bin/sh".into());
    }
    env
}

/// What the user may set differently.
fn defaults(context: &Context<'_>) -> Vec<(String, OsString)> {
    let spec = context.spec;
    let cpus = spec.resources.cpu_milli / 1000 / u64::from(spec.procs_per_node.max(1));
    let mut env = vec![
        entry("OMP_NUM_THREADS", cpus.max(1).to_string()),
        entry("PYTHONUNBUFFERED", "1"),
        entry("TMPDIR", context.dir.tmp()),
        entry("CUDA_VISIBLE_DEVICES", spec.gpu_uuids.join(",")),
    ];
    if let Some(interface) = context.interface {
        env.push(entry("NCCL_SOCKET_IFNAME", interface));
        env.push(entry("GLOO_SOCKET_IFNAME", interface));
    }
    env
}

/// Who the rank is and where the first one listens.
fn place(context: &Context<'_>, rank: u32) -> Vec<(String, OsString)> {
    let spec = context.spec;
    let local_rank = rank - spec.first_rank();
    vec![
        entry("RANK", rank.to_string()),
        entry("LOCAL_RANK", local_rank.to_string()),
        entry("WORLD_SIZE", spec.world_size().to_string()),
        entry("LOCAL_WORLD_SIZE", spec.procs_per_node.to_string()),
        entry("NODE_RANK", spec.node_rank.to_string()),
        entry("GROUP_RANK", spec.node_rank.to_string()),
        entry("MASTER_ADDR", &context.go.master_addr),
        entry("MASTER_PORT", context.go.master_port.to_string()),
    ]
}

fn paths(context: &Context<'_>) -> Vec<(String, OsString)> {
    let AttemptRef { job, task, attempt } = context.attempt;
    let dir = context.dir;
    let mut env = vec![
        entry("YARD_JOB_ID", job.to_string()),
        entry("YARD_JOB_NAME", &context.spec.job_name),
        entry(TASK_VARIABLE, task.0.to_string()),
        entry("YARD_ATTEMPT", attempt.0.to_string()),
        entry("YARD_NODE_ADDRS", context.go.node_addrs.join(",")),
        entry("YARD_OUTPUT_DIR", dir.outputs()),
        entry("YARD_CHECKPOINT_DIR", dir.checkpoint()),
        entry("YARD_CHECKPOINT_FILE", dir.checkpoint().join("checkpoint")),
        entry("YARD_TMP_DIR", dir.tmp()),
        entry(KEY_VARIABLE, context.key),
    ];
    if context.resume {
        env.push(entry("YARD_RESUME_FROM", dir.resume()));
    }
    env
}

fn entry(name: &str, value: impl Into<OsString>) -> (String, OsString) {
    (name.to_owned(), value.into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use trainyard_common::resources::Resources;

    use super::super::tests::spec;
    use super::*;

    struct Case {
        spec: MemberSpec,
        interface: Option<&'static str>,
        run_as: Option<RunAs>,
        resume: bool,
        inherited: BTreeMap<String, OsString>,
    }

    impl Case {
        fn new() -> Self {
            let mut spec = spec(&["python3", "-u", "train.py", "--lr", "1"]);
            spec.node_rank = 1;
            spec.nodes = 2;
            spec.procs_per_node = 2;
            spec.resources = Resources {
                cpu_milli: 7500,
                memory_bytes: 0,
                gpus: 2,
            };
            spec.gpu_uuids = vec!["GPU-a".to_owned(), "GPU-b".to_owned()];
            Self {
                spec,
                interface: None,
                run_as: None,
                resume: false,
                inherited: BTreeMap::from([
                    ("PATH".to_owned(), "/bin".into()),
                    ("SECRET".to_owned(), "x".into()),
                    ("LD_PRELOAD".to_owned(), "x".into()),
                ]),
            }
        }

        fn plan(&self) -> Vec<RankPlan> {
            self.plan_of("j17.3.2")
        }

        fn plan_of(&self, attempt: &str) -> Vec<RankPlan> {
            let attempt = attempt.parse().unwrap();
            plan(&Context {
                attempt,
                spec: &self.spec,
                go: &Go {
                    master_addr: "10.0.0.1".to_owned(),
                    master_port: 23_456,
                    node_addrs: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
                },
                interface: self.interface,
                dir: &AttemptDir::new(Path::new("/d"), attempt),
                key: "k",
                run_as: self.run_as.as_ref(),
                inherited: &self.inherited,
                resume: self.resume,
            })
        }
    }

    fn text(plan: &RankPlan) -> String {
        plan.env
            .iter()
            .map(|(name, value)| format!("{name}={}\n", value.to_str().unwrap()))
            .collect()
    }

    #[test]
    fn every_variable_of_a_rank() {
        let plans = Case::new().plan();
        assert_eq!(plans.len(), 2);
        assert_eq!(plans[1].rank, 3);
        assert_eq!(plans[1].argv, ["python3", "-u", "train.py", "--lr", "1"]);
        assert_eq!(
            text(&plans[1]),
            "\
CUDA_VISIBLE_DEVICES=GPU-a,GPU-b
GROUP_RANK=1
HOME=/
LANG=C.UTF-8
LOCAL_RANK=1
LOCAL_WORLD_SIZE=2
MASTER_ADDR=10.0.0.1
MASTER_PORT=23456
NODE_RANK=1
OMP_NUM_THREADS=3
PATH=/bin
PYTHONUNBUFFERED=1
RANK=3
TMPDIR=/d/j17.3.2/tmp
WORLD_SIZE=4
YARD_ATTEMPT=2
YARD_ATTEMPT_KEY=k
YARD_CHECKPOINT_DIR=/d/j17.3.2/checkpoint
YARD_CHECKPOINT_FILE=/d/j17.3.2/checkpoint/checkpoint
YARD_JOB_ID=j17
YARD_JOB_NAME=job
YARD_NODE_ADDRS=10.0.0.1,10.0.0.2
YARD_OUTPUT_DIR=/d/j17.3.2/outputs
YARD_TASK_INDEX=3
YARD_TMP_DIR=/d/j17.3.2/tmp
"
        );
    }

    #[test]
    fn tasks_of_an_array_differ_in_their_index_alone() {
        let case = Case::new();
        let mut plan = case.plan_of("j17.3.1").remove(0);
        set_task(&mut plan, TaskIndex(9));
        let mut other = case.plan_of("j17.9.1").remove(0);
        // Which directories they have is not the attempt's business in a bundle.
        for plan in [&mut plan, &mut other] {
            plan.env
                .retain(|_, value| !value.to_str().unwrap().starts_with("/d/"));
        }
        assert_eq!(plan, other);
    }

    #[test]
    fn the_user_may_change_what_is_a_default_and_nothing_else() {
        let mut case = Case::new();
        case.interface = Some("eth0");
        case.resume = true;
        for (name, value) in [
            ("OMP_NUM_THREADS", "9"),
            ("NCCL_SOCKET_IFNAME", "ib0"),
            ("PATH", "/opt/bin"),
            ("RANK", "99"),
            ("MASTER_PORT", "1"),
            ("YARD_ATTEMPT", "99"),
            ("YARD_OTHER", "x"),
            ("MINE", "y"),
        ] {
            case.spec.env.insert(name.to_owned(), value.to_owned());
        }
        let env = case.plan().remove(0).env;
        let of = |name: &str| env.get(name).map(|value| value.to_str().unwrap());
        assert_eq!(of("OMP_NUM_THREADS"), Some("9"));
        assert_eq!(of("NCCL_SOCKET_IFNAME"), Some("ib0"));
        assert_eq!(of("GLOO_SOCKET_IFNAME"), Some("eth0"));
        assert_eq!(of("PATH"), Some("/opt/bin"));
        assert_eq!(of("MINE"), Some("y"));
        assert_eq!(of("RANK"), Some("2"));
        assert_eq!(of("MASTER_PORT"), Some("23456"));
        assert_eq!(of("YARD_ATTEMPT"), Some("2"));
        assert_eq!(of("YARD_OTHER"), None);
        assert_eq!(of("YARD_RESUME_FROM"), Some("/d/j17.3.2/resume"));
    }

    #[test]
    fn a_mapped_user_has_its_own_home_and_no_gpus_means_none() {
        let mut case = Case::new();
        case.spec.gpu_uuids.clear();
        case.spec.resources.cpu_milli = 0;
        case.inherited.insert("HOME".to_owned(), "/root".into());
        case.run_as = Some(RunAs {
            uid: 1000,
            gid: 1000,
            name: "ann".to_owned(),
            home: "/home/ann".into(),
        });
        let env = case.plan().remove(0).env;
        assert_eq!(env["HOME"], "/home/ann");
        assert_eq!(env["USER"], "ann");
        assert_eq!(env["CUDA_VISIBLE_DEVICES"], "");
        assert_eq!(env["OMP_NUM_THREADS"], "1");
    }

    #[test]
    fn torchrun_is_one_process_per_member() {
        let mut case = Case::new();
        case.spec.launcher = Launcher::Torchrun;
        let plans = case.plan();
        assert_eq!(plans.len(), 1);
        assert_eq!(plans[0].rank, 2);
        let argv: Vec<&str> = plans[0].argv.iter().map(String::as_str).collect();
        assert_eq!(argv[..2], ["python3", "-c"]);
        assert_eq!(
            argv[3..],
            [
                "--nnodes=2",
                "--nproc_per_node=2",
                "--node_rank=1",
                "--master_addr=10.0.0.1",
                "--master_port=23456",
                "--no_python",
                "python3",
                "-u",
                "train.py",
                "--lr",
                "1",
            ]
        );
        case.spec.command = vec!["/opt/v/bin/python3.12".to_owned(), "x.py".to_owned()];
        assert_eq!(case.plan()[0].argv[0], "/opt/v/bin/python3.12");
        case.spec.command = vec!["./train.sh".to_owned()];
        assert_eq!(case.plan()[0].argv[0], "python3");
    }
}
