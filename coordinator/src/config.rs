//! What an operator says about a coordinator: one TOML file, checked as a whole before anything is bound or written.
//!
//! Tests and `yard up` build [`Config`] directly; the same rules hold for it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use trainyard_common::ids::UserName;
use trainyard_common::limits;
use trainyard_common::units::{format_duration, parse_duration};
use trainyard_transport::endpoint::{DEFAULT_PORT, Endpoint};
use trainyard_transport::restart::Restart;
use trainyard_transport::token::MAX_ENDPOINTS;

/// Bytes of a configuration file that are read; a real one has a few hundred.
const MAX_FILE_BYTES: u64 = 64 << 10;
/// Shortest time that may be configured: below it a scheduling hiccup of the machine looks like a silence.
const MIN_TIME: Duration = Duration::from_millis(50);
/// Longest time that may be configured.
const MAX_TIME: Duration = Duration::from_secs(30 * 86_400);

/// Everything about one coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The state directory; made if it does not exist. One coordinator at a time.
    pub data_dir: PathBuf,
    /// Where to listen. Default `0.0.0.0:7443`; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Endpoints that are written into tokens and credentials, in the order to try. Default (empty): the listening
    /// address, or for an unspecified one every address of this machine but loopback, and its host name.
    pub advertise: Vec<Endpoint>,
    /// The local user who gets admin credentials in `<data_dir>/admin`. Default: `$USER`, or `admin`.
    pub admin: Option<UserName>,
    /// End when there was no live job and no request of a user for this long. Default: never.
    pub idle_exit: Option<Duration>,
    /// After how long silence means what.
    pub timing: Timing,
    /// Start with what is whole of a damaged state and give up the rest; not in the file. Default: refuse.
    pub accept_loss: bool,
    /// Who starts this process again if a self test kills it; not in the file. Default: nobody, so none may.
    pub restart: Restart,
}

/// Times that the coordinator decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How often agents are told to report that they live. Default 5 s.
    pub heartbeat_interval: Duration,
    /// Silence after which a node gets no new work. Default 30 s.
    pub unreachable_after: Duration,
    /// Silence after which a single-node attempt is given up. Default 15 min.
    pub lost_after: Duration,
    /// The same for gangs. Default 3 min.
    pub lost_after_gang: Duration,
    /// What is waited beyond a lease before an attempt with the policy `stop` is given up: for the kernel to end what it
    /// has killed. Default 30 s.
    pub lease_margin: Duration,
    /// Time in which an attempt must be ready on all its nodes. Default 15 min.
    pub prepare_timeout: Duration,
    /// How long the node of an agent that crashes again and again gets no new work; zero is not at all. Default 5 min.
    pub crash_pause: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_interval: limits::HEARTBEAT_INTERVAL,
            unreachable_after: limits::UNREACHABLE_AFTER,
            lost_after: limits::LOST_AFTER,
            lost_after_gang: limits::LOST_AFTER_GANG,
            lease_margin: limits::LEASE_MARGIN,
            prepare_timeout: limits::PREPARE_TIMEOUT,
            crash_pause: limits::CRASH_PAUSE,
        }
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not a configuration; the message names the line and the key.
    #[error("{} is not a coordinator's configuration: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        message: String,
    },
    /// A value is not allowed.
    #[error("configuration: {field}: {problem}")]
    Field {
        /// The key.
        field: &'static str,
        /// What is wrong, and what is allowed.
        problem: String,
    },
}

impl Config {
    /// The defaults for a state directory.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), DEFAULT_PORT),
            advertise: Vec::new(),
            admin: None,
            idle_exit: None,
            timing: Timing::default(),
            accept_loss: false,
            restart: Restart::Nobody("it is part of another process".to_owned()),
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// The file, the field and what is allowed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        if fs::metadata(path).map_err(failed)?.len() > MAX_FILE_BYTES {
            let problem = format!("it is larger than {} KiB", MAX_FILE_BYTES >> 10);
            return Err(failed(io::Error::other(problem)));
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        let file: File = toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        let config = file.into_config()?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every rule, also those between fields.
    ///
    /// # Errors
    /// The first broken one.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.data_dir.as_os_str().is_empty() {
            return Err(field("data_dir", "is empty; name a directory"));
        }
        if self.advertise.len() > MAX_ENDPOINTS {
            let given = self.advertise.len();
            return Err(field(
                "advertise",
                format!("{given} endpoints; at most {MAX_ENDPOINTS} fit into a token"),
            ));
        }
        if let Some(idle) = self.idle_exit {
            in_range("idle_exit", idle)?;
        }
        self.timing.validate()
    }
}

impl Timing {
    fn validate(&self) -> Result<(), ConfigError> {
        in_range("timing.heartbeat_interval", self.heartbeat_interval)?;
        in_range("timing.unreachable_after", self.unreachable_after)?;
        in_range("timing.lost_after", self.lost_after)?;
        in_range("timing.lost_after_gang", self.lost_after_gang)?;
        in_range("timing.lease_margin", self.lease_margin)?;
        in_range("timing.prepare_timeout", self.prepare_timeout)?;
        if !self.crash_pause.is_zero() {
            in_range("timing.crash_pause", self.crash_pause)?;
        }
        at_least(
            "timing.unreachable_after",
            self.unreachable_after,
            self.heartbeat_interval * 2,
            "twice timing.heartbeat_interval, or one late heartbeat makes a node unreachable",
        )?;
        let unreachable = self.unreachable_after;
        at_least(
            "timing.lost_after",
            self.lost_after,
            unreachable,
            "timing.unreachable_after",
        )?;
        at_least(
            "timing.lost_after_gang",
            self.lost_after_gang,
            unreachable,
            "timing.unreachable_after",
        )
    }
}

fn field(field: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Field {
        field,
        problem: problem.into(),
    }
}

fn in_range(name: &'static str, value: Duration) -> Result<(), ConfigError> {
    if (MIN_TIME..=MAX_TIME).contains(&value) {
        return Ok(());
    }
    let (value, most) = (format_duration(value), format_duration(MAX_TIME));
    Err(field(
        name,
        format!("{value} is outside {} ms to {most}", MIN_TIME.as_millis()),
    ))
}

fn at_least(
    name: &'static str,
    value: Duration,
    least: Duration,
    what: &str,
) -> Result<(), ConfigError> {
    if value >= least {
        return Ok(());
    }
    let (value, least) = (format_duration(value), format_duration(least));
    Err(field(
        name,
        format!("{value} is below {least}, which is {what}"),
    ))
}

/// The file's form: durations as text (`30s`, `15m`), everything but `data_dir` optional.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    data_dir: PathBuf,
    listen: Option<SocketAddr>,
    #[serde(default)]
    advertise: Vec<Endpoint>,
    admin: Option<UserName>,
    idle_exit: Option<String>,
    #[serde(default)]
    timing: FileTiming,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTiming {
    heartbeat_interval: Option<String>,
    unreachable_after: Option<String>,
    lost_after: Option<String>,
    lost_after_gang: Option<String>,
    lease_margin: Option<String>,
    prepare_timeout: Option<String>,
    crash_pause: Option<String>,
}

impl File {
    fn into_config(self) -> Result<Config, ConfigError> {
        let default = Config::new(self.data_dir);
        let idle_exit = self
            .idle_exit
            .map(|text| duration("idle_exit", &text))
            .transpose()?;
        Ok(Config {
            listen: self.listen.unwrap_or(default.listen),
            advertise: self.advertise,
            admin: self.admin,
            idle_exit,
            timing: self.timing.into_timing()?,
            ..default
        })
    }
}

impl FileTiming {
    fn into_timing(self) -> Result<Timing, ConfigError> {
        let default = Timing::default();
        let read = |name, text: Option<String>, default| match text {
            Some(text) => duration(name, &text),
            None => Ok(default),
        };
        Ok(Timing {
            heartbeat_interval: read(
                "timing.heartbeat_interval",
                self.heartbeat_interval,
                default.heartbeat_interval,
            )?,
            unreachable_after: read(
                "timing.unreachable_after",
                self.unreachable_after,
                default.unreachable_after,
            )?,
            lost_after: read("timing.lost_after", self.lost_after, default.lost_after)?,
            lost_after_gang: read(
                "timing.lost_after_gang",
                self.lost_after_gang,
                default.lost_after_gang,
            )?,
            lease_margin: read(
                "timing.lease_margin",
                self.lease_margin,
                default.lease_margin,
            )?,
            prepare_timeout: read(
                "timing.prepare_timeout",
                self.prepare_timeout,
                default.prepare_timeout,
            )?,
            crash_pause: read("timing.crash_pause", self.crash_pause, default.crash_pause)?,
        })
    }
}

fn duration(name: &'static str, text: &str) -> Result<Duration, ConfigError> {
    parse_duration(text).map_err(|invalid| field(name, invalid.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.toml");
        fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn a_file_overrides_the_defaults() {
        let config = load(
            "data_dir = '/var/lib/trainyard'\nlisten = '127.0.0.1:0'\nadvertise = ['head.example.org']\n\
             admin = 'anna'\nidle_exit = '10m'\n[timing]\nlost_after = '1h'\ncrash_pause = '0s'\n",
        )
        .unwrap();
        let expected = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: vec!["head.example.org:7443".parse().unwrap()],
            admin: Some("anna".parse().unwrap()),
            idle_exit: Some(Duration::from_secs(600)),
            timing: Timing {
                lost_after: Duration::from_secs(3600),
                crash_pause: Duration::ZERO,
                ..Timing::default()
            },
            ..Config::new("/var/lib/trainyard")
        };
        assert_eq!(config, expected);
        assert_eq!(load("data_dir = 'x'").unwrap(), Config::new("x"));
    }

    #[test]
    fn errors_name_the_field() {
        for (text, named) in [
            ("", "data_dir"),
            ("data_dir = ''", "data_dir"),
            ("data_dir = 'x'\nlissen = '1'", "lissen"),
            ("data_dir = 'x'\nlisten = 'head:1'", "listen"),
            ("data_dir = 'x'\nadvertise = ['http://a']", "advertise"),
            ("data_dir = 'x'\nadmin = 'a b'", "admin"),
            ("data_dir = 'x'\nidle_exit = 'soon'", "idle_exit"),
            ("data_dir = 'x'\nidle_exit = '0s'", "idle_exit"),
            ("data_dir = 'x'\n[timing]\nheartbeat = '1s'", "heartbeat"),
            (
                "data_dir = 'x'\n[timing]\nunreachable_after = '6s'",
                "timing.unreachable_after",
            ),
            (
                "data_dir = 'x'\n[timing]\nlost_after_gang = '10s'",
                "timing.lost_after_gang",
            ),
            (
                "data_dir = 'x'\n[timing]\nprepare_timeout = '1000d'",
                "timing.prepare_timeout",
            ),
            (
                "data_dir = 'x'\n[timing]\ncrash_pause = '31d'",
                "timing.crash_pause",
            ),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text:?}: {error}");
        }
    }
}
