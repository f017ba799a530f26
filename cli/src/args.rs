//! The command line as it is written. Meaning is given to it elsewhere.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use trainyard_common::ids::{JobId, TokenId, UserName};

/// The cluster runtime for machine-learning training.
#[derive(Debug, Parser)]
#[command(
    name = "yard",
    version,
    about,
    max_term_width = 110,
    after_help = "Try `yard demo`: a cluster of two nodes on this machine trains a small model.\n\
                  Exit codes of run and wait: the job's own; 124 time limit, 130 cancelled, 75 infrastructure gave up.\n\
                  Errors of yard itself: 64 usage, 65 invalid job, 66 not found, 69 unreachable, 77 refused."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Reads a whole number, and says which would do.
fn whole(least: u32, most: u32) -> impl Fn(&str) -> Result<u32, String> + Clone {
    move |text| {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse()
            .ok()
            .filter(|number| plain && (least..=most).contains(number))
            .ok_or_else(|| format!("{text:?} is not a whole number from {least} to {most}"))
    }
}

/// Reads an address to listen on.
fn address(text: &str) -> Result<std::net::SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not an address; write IP:PORT, such as 0.0.0.0:7443"))
}

/// For every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Use this context (see `yard login`) instead of the current one; `local` is the cluster of `yard up`
    #[arg(long, global = true, env = "YARD_CONTEXT", value_name = "NAME")]
    pub(crate) context: Option<String>,
    /// Where the local cluster and this machine's agent keep their data [default: ~/.local/share/trainyard]
    #[arg(long, global = true, env = "YARD_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Where contexts are kept [default: ~/.config/trainyard]
    #[arg(
        long,
        global = true,
        env = "YARD_CONFIG_DIR",
        value_name = "DIR",
        hide_short_help = true
    )]
    pub(crate) config_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Submit a job, follow its output and end with its exit code
    Run(RunArgs),
    /// Submit a job and print its id
    Submit(SubmitArgs),
    /// List jobs
    Jobs(JobsArgs),
    /// Show one job with its tasks and attempts
    Job(JobArgs),
    /// Show what a job's ranks wrote
    Logs(LogsArgs),
    /// Wait until a job is over and end with its exit code
    Wait(JobArgs),
    /// End jobs
    Cancel(CancelArgs),
    /// Fetch what a job wrote to YARD_OUTPUT_DIR
    Outputs(OutputsArgs),
    /// List nodes
    Nodes(JsonArgs),
    /// Show one node, remove it, or confirm that it is gone
    Node(NodeArgs),
    /// Give a node no new work
    Cordon(NodeNameArgs),
    /// Give a node new work again
    Uncordon(NodeNameArgs),
    /// Make, list and revoke join tokens
    Token(TokenArgs),
    /// Enrol this machine with a token and run its agent
    Join(JoinArgs),
    /// Enrol yourself with a token, so that this machine can submit to a cluster elsewhere
    Login(LoginArgs),
    /// Start a cluster on this machine
    Up(UpArgs),
    /// Stop the cluster of `yard up`
    Down(DownArgs),
    /// The coordinator's role itself, and its state
    Coordinator(CoordinatorArgs),
    /// The agent's role itself
    Agent(AgentArgs),
    /// Train a small model on a cluster of two nodes that exists just for this
    Demo(DemoArgs),
    /// Check this machine and its connection, and say what to fix
    Doctor(JsonArgs),
    /// Try the promises on this cluster: run small jobs, make trouble if asked to, and report what survived
    Selftest(SelftestArgs),
    /// Print a completion script for a shell
    Completion(CompletionArgs),
}

impl Command {
    /// Whether failures are to be told as JSON.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Self::Run(args) => args.job.json,
            Self::Submit(args) => args.job.json,
            Self::Jobs(args) => args.json,
            Self::Job(args) | Self::Wait(args) => args.json,
            Self::Logs(args) => args.json,
            Self::Cancel(args) => args.json,
            Self::Outputs(args) => args.json,
            Self::Nodes(args) | Self::Doctor(args) => args.json,
            Self::Node(args) => args.json,
            Self::Cordon(args) | Self::Uncordon(args) => args.json,
            Self::Token(args) => args.command.wants_json(),
            Self::Up(args) => args.json,
            Self::Selftest(args) => args.json,
            Self::Coordinator(args) => args.command.wants_json(),
            Self::Join(_)
            | Self::Login(_)
            | Self::Down(_)
            | Self::Agent(_)
            | Self::Demo(_)
            | Self::Completion(_) => false,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) job: JobFlags,
}

#[derive(Debug, Args)]
pub(crate) struct SubmitArgs {
    #[command(flatten)]
    pub(crate) job: JobFlags,
}

/// What a job is; counts are per node.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Job")]
pub(crate) struct JobFlags {
    /// Read the job from a YAML file; flags given beside it count more
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// A name for people [default: the program's]
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    pub(crate) name: Option<String>,
    /// Workspace that the job belongs to
    #[arg(long, value_name = "NAME")]
    pub(crate) workspace: Option<String>,
    /// Where it may run, in order of preference: local, attached [default: every node]
    #[arg(short = 't', long, value_name = "TARGET", value_delimiter = ',')]
    pub(crate) target: Vec<String>,
    /// Nodes of the gang
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) nodes: Option<String>,
    /// Ranks on each node
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) procs_per_node: Option<String>,
    /// GPUs on each node
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) gpus: Option<String>,
    /// GPU model, such as H100 or A100-80GB
    #[arg(long, value_name = "MODEL")]
    pub(crate) gpu_type: Option<String>,
    /// Least memory of each GPU, such as 80GB
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) gpu_memory: Option<String>,
    /// CPUs on each node, such as 8, 0.5 or 500m [default: 1]
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) cpus: Option<String>,
    /// Memory on each node, such as 64GiB [default: not counted]
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) memory: Option<String>,
    /// How ranks are started: none, torch or torchrun
    #[arg(long, value_name = "LAUNCHER")]
    pub(crate) launcher: Option<String>,
    /// A variable for the ranks; NAME alone passes your own value on
    #[arg(short = 'e', long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Directory that each attempt gets a fresh copy of; .gitignore and .yardignore are respected
    /// [default: the current one for run, none for submit]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Send no directory
    #[arg(long, conflicts_with = "dir")]
    pub(crate) no_dir: bool,
    /// Longest run of one attempt, such as 90s, 2h or 1d12h [default: no limit]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub(crate) time_limit: Option<String>,
    /// Further attempts after failures that lie in the job
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) retries: Option<String>,
    /// Time between SIGTERM and SIGKILL when the job is ended [default: 30s]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub(crate) grace: Option<String>,
    /// One task for each index, at most MAX at a time
    #[arg(long, value_name = "FIRST-LAST[%MAX]", allow_hyphen_values = true)]
    pub(crate) array: Option<String>,
    /// When a node falls silent: replace the attempt after a while, wait until its end is confirmed, or have the node stop
    /// it
    ///
    /// replace (default): nothing is ended. A new attempt starts elsewhere when the node was silent for 15 min (3 min for
    /// more than one node), labelled as unconfirmed: the old one may still live, with directories of its own, and is
    /// stopped when its node is back.
    ///
    /// wait: nothing is ended and nothing replaced until the end of the old attempt is confirmed: its node is back or was
    /// rebooted, or an operator says `yard node confirm-lost`.
    ///
    /// stop: a node that has no word from the coordinator for that time ends the attempt's processes itself, and the new
    /// attempt starts only when that is certain. So two attempts never overlap. But an outage of the coordinator, or of
    /// the node's agent, of that length ends them, too.
    #[arg(long, value_name = "replace|wait|stop")]
    pub(crate) on_disconnect: Option<String>,
    /// A label for people and filters
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// Your own name for this request: the same one again gives the same job
    #[arg(long, value_name = "ID")]
    pub(crate) request_id: Option<String>,
    /// Accept although no nodes that are here now could hold it
    #[arg(long)]
    pub(crate) allow_infeasible: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The program and its arguments
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct JobsArgs {
    /// Also those that are over
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Most jobs to list
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100, allow_hyphen_values = true, value_parser = whole(1, 100_000))]
    pub(crate) limit: u32,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// The job
    #[arg(value_name = "ID")]
    pub(crate) job: JobId,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// The jobs
    #[arg(value_name = "ID", required = true)]
    pub(crate) jobs: Vec<JobId>,
    /// Do not wait until their processes are gone
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The job
    #[arg(value_name = "ID")]
    pub(crate) job: JobId,
    /// Go on until the job is over
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only this rank
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = whole(0, u32::MAX))]
    pub(crate) rank: Option<u32>,
    /// Only this task of an array
    #[arg(long, value_name = "INDEX", allow_hyphen_values = true, value_parser = whole(0, u32::MAX))]
    pub(crate) task: Option<u32>,
    /// Only this attempt
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = whole(1, u32::MAX))]
    pub(crate) attempt: Option<u32>,
    /// Only the last N lines of each rank
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = whole(0, u32::MAX))]
    pub(crate) tail: Option<u32>,
    /// Only what was written since a time (2026-11-24T08:00:00Z) or for a while (10m)
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Print one JSON object for each piece of output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct OutputsArgs {
    /// The job
    #[arg(value_name = "ID")]
    pub(crate) job: JobId,
    /// Where to put them [default: ./ID-outputs]
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    /// Fetch the checkpoint instead
    #[arg(long)]
    pub(crate) checkpoint: bool,
    /// Of this attempt [default: the newest that left any]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = whole(1, u32::MAX))]
    pub(crate) attempt: Option<u32>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    pub(crate) command: Option<NodeCommand>,
    /// The node, by id or name
    #[arg(value_name = "NODE", required = true)]
    pub(crate) node: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Take a node off the books; refused while anything may run on it
    Remove(NodeNameArgs),
    /// Vouch that a silent node is gone and that nothing on it lives
    ConfirmLost(NodeNameArgs),
}

#[derive(Debug, Args)]
pub(crate) struct NodeNameArgs {
    /// The node, by id or name
    #[arg(value_name = "NODE")]
    pub(crate) node: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    pub(crate) command: TokenCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token that enrols a machine (--node) or a user (--user NAME)
    Create(TokenCreateArgs),
    /// List tokens
    List(JsonArgs),
    /// Make a token useless; what it enrolled stays enrolled
    Revoke(TokenRevokeArgs),
}

impl TokenCommand {
    fn wants_json(&self) -> bool {
        match self {
            Self::Create(args) => args.json,
            Self::List(args) => args.json,
            Self::Revoke(args) => args.json,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct TokenCreateArgs {
    /// For a machine: `yard join TOKEN`
    #[arg(long, required_unless_present = "user", conflicts_with = "user")]
    pub(crate) node: bool,
    /// For a user of this name: `yard login TOKEN`
    #[arg(long, value_name = "NAME")]
    pub(crate) user: Option<UserName>,
    /// What the user may do: viewer, user, operator or admin [default: user]
    #[arg(long, value_name = "ROLE", requires = "user", conflicts_with = "node")]
    pub(crate) role: Option<String>,
    /// How often it can be used
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        allow_hyphen_values = true
    )]
    pub(crate) uses: String,
    /// How long it can be used
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "1h",
        allow_hyphen_values = true
    )]
    pub(crate) ttl: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TokenRevokeArgs {
    /// The token's id, as `yard token list` shows it
    #[arg(value_name = "ID")]
    pub(crate) token: TokenId,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How a token is given: as an argument (single-use ones), a file, or standard input.
#[derive(Debug, Clone, Args)]
pub(crate) struct TokenSource {
    /// The token, or `-` to read it from standard input; one that can be used again is refused here
    #[arg(value_name = "TOKEN", required_unless_present = "token_file")]
    pub(crate) token: Option<String>,
    /// Read the token from a file
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub(crate) token_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    #[command(flatten)]
    pub(crate) source: TokenSource,
    /// The node's name [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Enrol, but do not run the agent now (`yard agent run` does)
    #[arg(long)]
    pub(crate) no_run: bool,
    #[command(flatten)]
    pub(crate) agent: AgentFlags,
}

#[derive(Debug, Args)]
pub(crate) struct LoginArgs {
    #[command(flatten)]
    pub(crate) source: TokenSource,
    /// Name of the context [default: the user's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    /// Agents to run; 0 for a head alone, which other machines join [default: those that it had, or 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = whole(0, 64))]
    pub(crate) nodes: Option<u32>,
    /// The unprivileged user that jobs run as here; needed when root lets other machines and users in
    #[arg(long, value_name = "USER")]
    pub(crate) run_as: Option<String>,
    /// Address to listen on; give 0.0.0.0:7443 to let other machines join [default: 127.0.0.1:7443 or a free port]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Endpoints to write into tokens [default: what can be found out]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Vec<String>,
    /// CPUs of each node [default: this machine's, divided by the nodes]
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) cpus: Option<String>,
    /// Memory of each node [default: likewise]
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) memory: Option<String>,
    /// Give each node GPUs that are not there, to try things out: 8xH100 or 2xA100,1xL4
    #[arg(long, value_name = "NxMODEL")]
    pub(crate) fake_gpus: Option<String>,
    /// Leave by itself after so long without jobs and requests [default: stay]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub(crate) idle_exit: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Cancel the jobs that are not over
    #[arg(long)]
    pub(crate) force: bool,
    /// Also delete everything that the cluster ever kept: jobs, logs, outputs, identities
    #[arg(long)]
    pub(crate) delete: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    #[command(subcommand)]
    pub(crate) command: CoordinatorCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CoordinatorCommand {
    /// Run a coordinator in the foreground
    Run(CoordinatorRunArgs),
    /// Copy a coordinator's state, also while it runs
    Backup(BackupArgs),
    /// Make a new state directory from a backup
    Restore(RestoreArgs),
    /// Read a coordinator's whole state and say what is damaged
    Check(CheckArgs),
}

impl CoordinatorCommand {
    fn wants_json(&self) -> bool {
        match self {
            Self::Run(_) => false,
            Self::Backup(args) => args.json,
            Self::Restore(args) => args.json,
            Self::Check(args) => args.json,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// The state to copy [default: that of `yard up`, or DATA_DIR/coordinator]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Where to put the backup: a new directory, or one that exists, in which it gets a name with the time
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The backup
    #[arg(long, value_name = "DIR")]
    pub(crate) from: PathBuf,
    /// The state directory to make; new or empty [default: DATA_DIR/coordinator]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The state to read [default: that of `yard up`, or DATA_DIR/coordinator]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CoordinatorRunArgs {
    /// Read its configuration from a TOML file; flags given beside it count more
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where it keeps its state [default: DATA_DIR/coordinator]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Address to listen on [default: 0.0.0.0:7443]
    // A coordinator that is started again is told where it was before, behind what it was told first.
    #[arg(long, value_name = "ADDRESS", value_parser = address, overrides_with = "listen")]
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Start on a damaged state with what is whole of it and give up the rest; says what that is
    #[arg(long)]
    pub(crate) accept_loss: bool,
    /// Endpoints to write into tokens [default: what can be found out]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Vec<String>,
    /// Leave after so long without jobs and requests
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub(crate) idle_exit: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    #[command(subcommand)]
    pub(crate) command: AgentCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Run this machine's agent in the foreground; `yard join` has enrolled it before
    Run(AgentRunArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AgentRunArgs {
    /// Read its configuration from a TOML file; flags given beside it count more
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) agent: AgentFlags,
    /// Leave when nothing runs and the coordinator was gone for so long
    #[arg(long, value_name = "DURATION", hide = true)]
    pub(crate) leave_when_orphaned: Option<String>,
    /// Part of a cluster of this user on this machine: jobs run as this user, whoever that is
    #[arg(long, hide = true)]
    pub(crate) embedded: bool,
}

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct AgentFlags {
    /// Where it keeps its state [default: DATA_DIR/agent, for root /var/lib/trainyard/agent]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Address at which other nodes reach this one [default: that of its connection to the coordinator]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) advertise_address: Option<String>,
    /// CPUs that jobs may use [default: all]
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) cpus: Option<String>,
    /// Memory that jobs may use [default: all]
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) memory: Option<String>,
    /// The unprivileged user that jobs run as; needed when the agent runs as root
    #[arg(long, value_name = "USER")]
    pub(crate) run_as: Option<String>,
    /// The library that GPUs are read through
    #[arg(long, value_name = "FILE")]
    pub(crate) nvml_library: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Passes over the training data
    #[arg(long, value_name = "N", default_value_t = 6, allow_hyphen_values = true, value_parser = whole(1, 1000))]
    pub(crate) epochs: u32,
    /// Where to put what the job wrote
    #[arg(long, value_name = "DIR", default_value = "yard-demo-outputs")]
    pub(crate) to: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Jobs of others go on through all of it; submits are refused while the coordinator is away. Several faults \
                  happen one after the other. Making trouble takes the role admin.\n\
                  Exit codes: 0 every promise that was tried was kept; 1 one was broken; others as usual."
)]
pub(crate) struct SelftestArgs {
    /// End the coordinator with SIGKILL while jobs run; it is started again
    #[arg(long)]
    pub(crate) kill_coordinator: bool,
    /// End the agent of a node with SIGKILL while jobs run there; it is started again
    /// [default: the node with the least work of others]
    #[arg(long, value_name = "NODE", num_args = 0..=1, default_missing_value = "")]
    pub(crate) kill_agent: Option<String>,
    /// Cut a node off for a while in which nothing may be given up [default: likewise]
    #[arg(long, value_name = "NODE", num_args = 0..=1, default_missing_value = "")]
    pub(crate) partition: Option<String>,
    /// How long the node is cut off
    #[arg(
        long = "for",
        value_name = "DURATION",
        default_value = "20s",
        allow_hyphen_values = true
    )]
    pub(crate) length: String,
    /// Also for so long that attempts on the node are given up, whoever's they are
    #[arg(long, requires = "partition")]
    pub(crate) beyond_lost: bool,
    /// Short jobs to submit, for each fault again
    #[arg(long, value_name = "N", default_value_t = 12, allow_hyphen_values = true, value_parser = whole(1, 1000))]
    pub(crate) jobs: u32,
    /// Keep what was fetched of the jobs, in ./yard-selftest-ID; after a broken promise it is kept in any case
    #[arg(long)]
    pub(crate) keep: bool,
    /// Do not ask before trouble is made
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}
