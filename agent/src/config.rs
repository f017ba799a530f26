//! How an agent is configured: a TOML file, flags on top of it, and the rules across fields that hold before anything is
//! started. Nothing here reads the environment.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};
use serde::{Deserialize, Deserializer};
use trainyard_common::limits::MAX_LOG_BYTES_PER_RANK;
use trainyard_common::units::{parse_bytes, parse_cpus, parse_duration};

use trainyard_transport::restart::Restart;

use crate::probe::gpu::DEFAULT_LIBRARY;
use crate::runtime::RunAs;

/// Bytes of fetched blobs that are kept for later attempts: a few snapshots and checkpoints of ordinary size.
pub const DEFAULT_CACHE_LIMIT: u64 = 20 << 30;
/// Bytes of a configuration file that are read; real ones have a few hundred.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// An agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where credentials, attempts and fetched blobs are kept.
    pub data_dir: PathBuf,
    /// The machine's name at enrolment; none means its host name.
    pub name: Option<String>,
    /// The address at which other nodes reach this one; none means the one that the coordinator sees.
    pub advertise_address: Option<String>,
    /// Thousandths of CPUs that jobs may have; none means all. More than there is counts as all.
    pub cpu_milli: Option<u64>,
    /// Bytes of memory that jobs may have; none means all. More than there is counts as all.
    pub memory_bytes: Option<u64>,
    /// GPUs that jobs may have, by UUID or index; none means all healthy ones.
    pub gpus: Option<Vec<String>>,
    /// The user whose processes jobs are, if the agent runs as root.
    pub run_as: Option<String>,
    /// NVIDIA's management library: a path, or a name that the dynamic loader finds.
    pub nvml_library: String,
    /// Bytes of fetched blobs that are kept.
    pub cache_limit: u64,
    /// Bytes of output kept of one rank.
    pub log_limit: u64,
    /// End when no member is alive and the coordinator was not reached for so long; none means never.
    pub leave_when_orphaned: Option<Duration>,
    /// Part of an embedded cluster: whoever started it is who jobs run as, also root.
    pub embedded: bool,
    /// The program that becomes a shim, and its arguments.
    pub shim_command: Vec<OsString>,
    /// Who starts this process again if a self test kills it; not in the file. Default: nobody, so none may.
    pub restart: Restart,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file says something that is not understood.
    #[error("the configuration {path:?} is wrong: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        message: String,
    },
    /// The own executable is not known.
    #[error("cannot find out which program this is, to start shims with it")]
    Executable(#[source] std::io::Error),
    /// As root, jobs would run as root.
    #[error(
        "the agent runs as root and would start jobs as root: name the user to start them as, with `run_as = \"NAME\"` \
         in the configuration file or --run-as NAME"
    )]
    RootWithoutRunAs,
    /// Jobs must not run as root.
    #[error("run_as = {name:?} is root: name an unprivileged user")]
    RunAsRoot {
        /// The name given.
        name: String,
    },
    /// There is no such user.
    #[error("run_as = {name:?}: there is no such user on this machine")]
    UnknownUser {
        /// The name given.
        name: String,
    },
    /// Only root can start processes as somebody else.
    #[error(
        "run_as = {name:?} needs an agent that runs as root; leave it out to start jobs as the agent's user"
    )]
    RunAsWithoutRoot {
        /// The name given.
        name: String,
    },
    /// The user database cannot be read.
    #[error("cannot look up the user {name:?}")]
    Lookup {
        /// The name given.
        name: String,
        /// Why not.
        #[source]
        source: nix::Error,
    },
}

/// The file as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    data_dir: Option<PathBuf>,
    name: Option<String>,
    advertise_address: Option<String>,
    #[serde(default, deserialize_with = "cpus")]
    cpus: Option<u64>,
    #[serde(default, deserialize_with = "bytes")]
    memory: Option<u64>,
    gpus: Option<Vec<String>>,
    run_as: Option<String>,
    nvml_library: Option<String>,
    #[serde(default, deserialize_with = "bytes")]
    cache_limit: Option<u64>,
    #[serde(default, deserialize_with = "bytes")]
    log_limit: Option<u64>,
    #[serde(default, deserialize_with = "duration")]
    leave_when_orphaned: Option<Duration>,
}

impl Config {
    /// The defaults, with shims started by this very program (`<own executable> shim`).
    ///
    /// # Errors
    /// [`ConfigError::Executable`].
    pub fn new(data_dir: PathBuf) -> Result<Self, ConfigError> {
        let program = std::env::current_exe().map_err(ConfigError::Executable)?;
        Ok(Self {
            data_dir,
            name: None,
            advertise_address: None,
            cpu_milli: None,
            memory_bytes: None,
            gpus: None,
            run_as: None,
            nvml_library: DEFAULT_LIBRARY.to_owned(),
            cache_limit: DEFAULT_CACHE_LIMIT,
            log_limit: MAX_LOG_BYTES_PER_RANK,
            leave_when_orphaned: None,
            embedded: false,
            shim_command: vec![program.into(), "shim".into()],
            restart: Restart::Nobody("it is part of another process".to_owned()),
        })
    }

    /// Reads a configuration file. What it leaves out is as in [`Config::new`] with `data_dir`.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file and the field.
    pub fn load(path: &Path, data_dir: PathBuf) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::Parse {
                path: path.to_owned(),
                message: "it is larger than 1 MiB".to_owned(),
            });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        let file: File = toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        let base = Self::new(file.data_dir.unwrap_or(data_dir))?;
        Ok(Self {
            name: file.name,
            advertise_address: file.advertise_address,
            cpu_milli: file.cpus,
            memory_bytes: file.memory,
            gpus: file.gpus,
            run_as: file.run_as,
            nvml_library: file.nvml_library.unwrap_or(base.nvml_library),
            cache_limit: file.cache_limit.unwrap_or(base.cache_limit),
            // The coordinator takes no more.
            log_limit: file
                .log_limit
                .map_or(base.log_limit, |limit| limit.min(base.log_limit)),
            leave_when_orphaned: file.leave_when_orphaned,
            ..base
        })
    }

    /// As whom jobs run; nothing means as the agent's own user.
    ///
    /// # Errors
    /// What is wrong with `run_as`, with the remedy.
    pub fn run_as(&self) -> Result<Option<RunAs>, ConfigError> {
        check_run_as(
            self.run_as.as_deref(),
            Uid::effective().is_root(),
            self.embedded,
        )
    }
}

fn check_run_as(
    name: Option<&str>,
    root: bool,
    embedded: bool,
) -> Result<Option<RunAs>, ConfigError> {
    let Some(name) = name else {
        return match root && !embedded {
            true => Err(ConfigError::RootWithoutRunAs),
            false => Ok(None),
        };
    };
    let own = || name.to_owned();
    let user = User::from_name(name).map_err(|source| ConfigError::Lookup {
        name: own(),
        source,
    })?;
    let user = user.ok_or_else(|| ConfigError::UnknownUser { name: own() })?;
    if user.uid.is_root() {
        return Err(ConfigError::RunAsRoot { name: own() });
    }
    if !root {
        // Naming oneself changes nothing.
        return match user.uid == Uid::effective() {
            true => Ok(None),
            false => Err(ConfigError::RunAsWithoutRoot { name: own() }),
        };
    }
    Ok(Some(RunAs {
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        name: user.name,
        home: user.dir,
    }))
}

fn amount<'de, D, T, E>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    E: std::fmt::Display,
{
    let text = String::deserialize(deserializer)?;
    parse(&text).map(Some).map_err(serde::de::Error::custom)
}

fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    amount(deserializer, parse_cpus)
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    amount(deserializer, parse_bytes)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    amount(deserializer, parse_duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path, "/data".into())
    }

    #[test]
    fn a_file_is_read_with_units() {
        let config = load(
            "name = \"gpu-1\"\ncpus = \"7.5\"\nmemory = \"64GiB\"\ngpus = [\"0\", \"GPU-a\"]\nrun_as = \"yard\"\n\
             leave_when_orphaned = \"10m\"\nadvertise_address = \"10.0.0.7\"\ncache_limit = \"1GiB\"\n\
             log_limit = \"9TiB\"",
        )
        .unwrap();
        assert_eq!(config.cpu_milli, Some(7500));
        assert_eq!(config.memory_bytes, Some(64 << 30));
        assert_eq!(config.leave_when_orphaned, Some(Duration::from_secs(600)));
        assert_eq!(config.cache_limit, 1 << 30);
        assert_eq!(config.log_limit, MAX_LOG_BYTES_PER_RANK);
        assert_eq!(config.data_dir, Path::new("/data"));
        assert_eq!(config.shim_command[1], "shim");
        assert_eq!(load("").unwrap(), Config::new("/data".into()).unwrap());
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (text, named) in [
            ("cpu = \"4\"", "cpu"),
            ("memory = \"lots\"", "memory"),
            ("cpus = 4", "cpus"),
            ("embedded = true", "embedded"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(
                error.contains(named) && error.contains("agent.toml"),
                "{error}"
            );
        }
    }

    #[test]
    fn attack_jobs_never_run_as_root_by_default() {
        let check = check_run_as;
        assert!(matches!(
            check(None, true, false),
            Err(ConfigError::RootWithoutRunAs)
        ));
        let text = ConfigError::RootWithoutRunAs.to_string();
        assert!(text.contains("run_as = \"NAME\"") && text.contains("--run-as NAME"));
        assert!(matches!(
            check(Some("root"), true, true),
            Err(ConfigError::RunAsRoot { .. })
        ));
        let unknown = check(Some("no-such-user-here"), true, false);
        assert!(matches!(unknown, Err(ConfigError::UnknownUser { .. })));
        assert_eq!(check(None, true, true).unwrap(), None);
        assert_eq!(check(None, false, false).unwrap(), None);
        let nobody = check(Some("nobody"), true, false).unwrap().unwrap();
        assert_ne!(nobody.uid, 0);
        if Uid::effective().as_raw() != nobody.uid {
            let refused = check(Some("nobody"), false, false);
            assert!(matches!(refused, Err(ConfigError::RunAsWithoutRoot { .. })));
        }
    }
}
