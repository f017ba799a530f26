//! Where things lie on the user's machine.

use std::path::PathBuf;

use crate::args::Global;
use crate::failure::{EXIT_USAGE, Failure};

/// Where services of a system keep their data.
const SYSTEM_DATA: &str = "/var/lib/trainyard";

/// The places, each of which a flag or variable may move.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    /// The local cluster and whatever a machine keeps.
    pub(crate) data: PathBuf,
    /// Contexts of the user.
    pub(crate) config: PathBuf,
}

impl Paths {
    /// Finds the places.
    pub(crate) fn new(global: &Global) -> Result<Self, Failure> {
        Ok(Self {
            data: place(
                global.data_dir.as_ref(),
                "XDG_DATA_HOME",
                ".local/share",
                "--data-dir",
            )?,
            config: place(
                global.config_dir.as_ref(),
                "XDG_CONFIG_HOME",
                ".config",
                "YARD_CONFIG_DIR",
            )?,
        })
    }

    /// The local cluster: coordinator, nodes, process list.
    pub(crate) fn local(&self) -> PathBuf {
        self.data.join("local")
    }

    /// This machine's agent, when it joined a cluster elsewhere. Of root's it lies where the unprivileged user that jobs
    /// run as can reach its attempts, which root's home is not.
    pub(crate) fn agent(&self, global: &Global) -> PathBuf {
        if global.data_dir.is_none() && nix::unistd::geteuid().is_root() {
            PathBuf::from(SYSTEM_DATA).join("agent")
        } else {
            self.data.join("agent")
        }
    }

    /// The user's contexts.
    pub(crate) fn contexts(&self) -> PathBuf {
        self.config.join("contexts")
    }

    /// Names the context in use.
    pub(crate) fn current_context(&self) -> PathBuf {
        self.config.join("current")
    }
}

fn place(
    given: Option<&PathBuf>,
    variable: &str,
    under_home: &str,
    flag: &str,
) -> Result<PathBuf, Failure> {
    let found = match given {
        Some(path) => Some(path.clone()),
        None => absolute(variable)
            .or_else(|| absolute("HOME").map(|home| home.join(under_home)))
            .map(|base| base.join("trainyard")),
    };
    let found = found.ok_or_else(|| {
        Failure::new(
            EXIT_USAGE,
            "NO_HOME",
            format!("there is no home directory; set HOME, {variable} or {flag}"),
        )
    })?;
    std::path::absolute(&found).map_err(|error| Failure::path("find", &found, &error))
}

/// A variable that names an absolute directory; others are ignored, as the XDG specification wants.
fn absolute(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}
