//! The bounds of the system, each with its reason. A limit that a user can meet is named in the error that it causes.

use std::time::Duration;

/// Nodes of one gang. Far above any training run known in public (about 10,000 machines would be a record).
pub const MAX_NODES_PER_JOB: u32 = 10_000;
/// Processes per node: more than the logical CPUs of the largest machines on sale.
pub const MAX_PROCS_PER_NODE: u32 = 1024;
/// GPUs per node: the largest single-system-image machines have 16 to 64.
pub const MAX_GPUS_PER_NODE: u32 = 128;
/// CPUs per node in thousandths (4096 CPUs, Linux's usual NR_CPUS ceiling is 8192).
pub const MAX_CPU_MILLI_PER_NODE: u64 = 4_096_000;
/// Memory per node: 64 TiB, the largest x86 systems.
pub const MAX_MEMORY_PER_NODE: u64 = 64 << 40;
/// Tasks of one array. A task costs a row when it starts, so this bounds what one submit can make.
pub const MAX_TASKS_PER_JOB: u32 = 100_000;
/// Retries that a user may ask for.
pub const MAX_RETRIES: u32 = 100;
/// Arguments of a command together, in bytes: below Linux's ARG_MAX of 2 MiB less the environment.
pub const MAX_COMMAND_BYTES: usize = 512 << 10;
/// One argument or variable: Linux's MAX_ARG_STRLEN is 128 KiB with its terminator.
pub const MAX_ARGUMENT_BYTES: usize = (128 << 10) - 1;
/// Variables of a job's environment.
pub const MAX_ENV_VARIABLES: usize = 1024;
/// All variables together, in bytes.
pub const MAX_ENV_BYTES: usize = 256 << 10;
/// Labels of a job.
pub const MAX_LABELS: usize = 64;
/// Bytes of a label's value.
pub const MAX_LABEL_VALUE_BYTES: usize = 256;
/// Targets that a job may list.
pub const MAX_TARGETS: usize = 16;
/// Longest time limit: a year.
pub const MAX_TIME_LIMIT: Duration = Duration::from_secs(366 * 86_400);
/// Shortest time limit.
pub const MIN_TIME_LIMIT: Duration = Duration::from_secs(1);
/// Grace between SIGTERM and SIGKILL unless the job says otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(30);
/// Longest grace: a node that drains waits this long at most.
pub const MAX_GRACE: Duration = Duration::from_secs(3600);
/// Jobs in a non-terminal state in one cluster; memory follows live work, about 4 KiB each.
pub const MAX_LIVE_JOBS: usize = 200_000;
/// Jobs in a non-terminal state of one user.
pub const MAX_LIVE_JOBS_PER_USER: usize = 50_000;
/// Enrolled nodes of a cluster.
pub const MAX_NODES: usize = 20_000;
/// Join tokens that can still be used.
pub const MAX_TOKENS: usize = 10_000;
/// Shortest life of a join token: less than it takes to copy one to another machine is surely a slip.
pub const MIN_TOKEN_TTL: Duration = Duration::from_secs(10);
/// Longest life of a join token.
pub const MAX_TOKEN_TTL: Duration = Duration::from_secs(30 * 86_400);
/// Life of a join token unless its maker says otherwise.
pub const DEFAULT_TOKEN_TTL: Duration = Duration::from_secs(3600);
/// Uses of one join token.
pub const MAX_TOKEN_USES: u32 = 10_000;
/// Request ids are kept at least this long after their job was accepted (a day, plus slack for slow clients).
pub const REQUEST_ID_RETENTION: Duration = Duration::from_secs(26 * 3600);

/// How often an agent reports that it lives.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);
/// Silence after which a node gets no new work (six heartbeats).
pub const UNREACHABLE_AFTER: Duration = Duration::from_secs(30);
/// Silence after which a single-node attempt is given up under the policy `replace`.
pub const LOST_AFTER: Duration = Duration::from_secs(15 * 60);
/// The same for gangs: a rank cut off from its peers makes no progress anyhow.
pub const LOST_AFTER_GANG: Duration = Duration::from_secs(3 * 60);
/// How far each of two clocks may be from true time, in hundredths; a lease is waited for accordingly longer.
pub const CLOCK_DRIFT_PERCENT: u32 = 5;
/// What a coordinator waits beyond a lease, its drift and the grace: the kernel takes a while to end large processes, and
/// a machine under load is late with everything.
pub const LEASE_MARGIN: Duration = Duration::from_secs(30);
/// An attempt that is not ready on all nodes in this time is tried elsewhere. Covers fetching a large snapshot.
pub const PREPARE_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// Failures to prepare or nodes lost, in a row, before a job is given up as an infrastructure failure.
pub const MAX_INFRASTRUCTURE_FAILURES: u32 = 5;

/// Different nodes that may go down (lost or rebooted) with a task running there before it is not tried again.
pub const MAX_NODES_TAKEN_DOWN: usize = 3;
/// Attempts of a task, in a row, that may end within [`EARLY_END`] of their start before it is not tried again.
pub const MAX_EARLY_ENDS: u32 = 5;
/// An attempt that ends this soon after its start got nowhere.
pub const EARLY_END: Duration = Duration::from_secs(60);
/// An attempt that ran for so long shows that neither the task nor the cluster is broken; what was counted before it is
/// of no account.
pub const PROVEN_RUN: Duration = Duration::from_secs(3600);
/// Processes that outlive SIGKILL which are told of by name. One line on a screen holds about as many.
pub const MAX_LEFT_TOLD: usize = 8;
/// Characters of a process's name that are told; the kernel keeps 15 bytes, and more of its own threads.
pub const MAX_PROCESS_NAME: usize = 32;
/// Starts of an agent without a goodbye, within [`CRASH_WINDOW`], after which its node gets no new work.
pub const MAX_AGENT_CRASHES: usize = 3;
/// Time in which crashes of an agent are counted together.
pub const CRASH_WINDOW: Duration = Duration::from_secs(5 * 60);
/// How long the node of an agent that crashes again and again gets no new work.
pub const CRASH_PAUSE: Duration = Duration::from_secs(5 * 60);
/// Bytes of what an agent said before it crashed that are kept and told.
pub const MAX_LAST_WORDS: usize = 1 << 10;

/// A gRPC message from an anonymous caller (a token and a certificate request).
pub const MAX_ENROLL_MESSAGE: usize = 16 << 10;
/// Any other gRPC message. A job specification with the largest command and environment fits.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Encoded bytes after which a page of a desired or observed set is closed; one more member of the largest size
/// (about 1 MiB) still fits into a message.
pub const PAGE_BYTES: usize = 1 << 20;
/// Members that one agent reports or is given at once.
pub const MAX_MEMBERS_PER_NODE: usize = 10_000;
/// Rows of one answer to a list request.
pub const MAX_PAGE: u32 = 1000;
/// Bytes of one chunk of a blob or a log on the wire.
pub const CHUNK_BYTES: usize = 256 << 10;

/// Entries of a snapshot, an output or a checkpoint.
pub const MAX_TREE_ENTRIES: usize = 100_000;
/// Bytes of all files of a tree.
pub const MAX_TREE_BYTES: u64 = 1 << 40;
/// Bytes of a tree's manifest: 100,000 entries of ordinary paths take about 12 MiB.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// Bytes of one path in a tree: Linux's PATH_MAX.
pub const MAX_TREE_PATH_BYTES: usize = 4096;
/// Components of one path in a tree.
pub const MAX_TREE_DEPTH: usize = 128;
/// Bytes of one path component: Linux's NAME_MAX.
pub const MAX_NAME_BYTES: usize = 255;

/// Bytes of output kept of one rank; what follows is dropped with a marker that says how much.
pub const MAX_LOG_BYTES_PER_RANK: u64 = 1 << 30;
/// Bytes of one log record; a longer line is cut into several.
pub const MAX_LOG_RECORD: usize = 64 << 10;
