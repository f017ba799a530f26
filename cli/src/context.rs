//! Which cluster a command speaks to: a context that `yard login` made, the local cluster of `yard up`, or that of a
//! coordinator that runs here by itself.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use trainyard_common::ids::is_name;
use trainyard_transport::credentials::Credentials;
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::files;

use crate::args::Global;
use crate::failure::{EXIT_NOT_FOUND, EXIT_UNAVAILABLE, Failure};
use crate::local::LocalCluster;
use crate::paths::Paths;

/// The name that always means the cluster of `yard up`.
pub(crate) const LOCAL: &str = "local";

/// A cluster that commands can speak to.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Its name.
    pub(crate) name: String,
    /// What the user is there.
    pub(crate) credentials: Credentials,
    /// Where the coordinator is.
    pub(crate) endpoints: Vec<Endpoint>,
}

/// The context that the user means, if any is configured.
pub(crate) fn find(global: &Global, paths: &Paths) -> Result<Option<Context>, Failure> {
    match chosen(global, paths)? {
        Some(name) if name == LOCAL => local(paths),
        Some(name) => named(paths, &name).map(Some),
        None => local(paths),
    }
}

/// The same, or a failure that says what to do.
pub(crate) fn require(global: &Global, paths: &Paths) -> Result<Context, Failure> {
    if let Some(context) = find(global, paths)? {
        return Ok(context);
    }
    let (reason, message) = if LocalCluster::new(paths.local()).exists() {
        (
            "LOCAL_CLUSTER_DOWN",
            "the coordinator of the cluster on this machine is not running; running jobs are not affected; start it \
             again with `yard up`",
        )
    } else if LocalCluster::new(paths.data.clone()).exists() {
        (
            "LOCAL_CLUSTER_DOWN",
            "the coordinator of this machine is not running; running jobs are not affected; start it again with `yard \
             coordinator run`",
        )
    } else {
        (
            "NO_CLUSTER",
            "no cluster is running or configured; start one here with `yard up`, or enrol in another with \
             `yard login TOKEN`",
        )
    };
    Err(Failure::new(EXIT_UNAVAILABLE, reason, message))
}

/// Makes `name` the context that is used unless another is named.
pub(crate) fn make_current(paths: &Paths, name: &str) -> Result<(), Failure> {
    let path = paths.current_context();
    files::write_private(&path, format!("{name}\n").as_bytes())
        .map_err(|error| Failure::path("write", &path, &error))
}

/// Where a context is kept.
pub(crate) fn directory(paths: &Paths, name: &str) -> Result<PathBuf, Failure> {
    if is_name(name) && name != LOCAL {
        Ok(paths.contexts().join(name))
    } else {
        Err(Failure::usage(
            "--context",
            format!("{name:?} cannot name a context; use letters, digits, '-', '_' or '.'"),
        ))
    }
}

/// The name that a flag, a variable or an earlier login chose.
pub(crate) fn chosen(global: &Global, paths: &Paths) -> Result<Option<String>, Failure> {
    if let Some(name) = &global.context {
        return Ok(Some(name.clone()));
    }
    let path = paths.current_context();
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|name| !name.is_empty())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::path("read", &path, &error)),
    }
}

fn named(paths: &Paths, name: &str) -> Result<Context, Failure> {
    let dir = directory(paths, name)?;
    if !dir.is_dir() {
        let message =
            format!("there is no context {name:?}; make one with `yard login TOKEN --name {name}`");
        return Err(Failure::new(EXIT_NOT_FOUND, "NO_CONTEXT", message));
    }
    let credentials = load(&dir)?;
    let endpoints = credentials.endpoints.clone();
    Ok(Context {
        name: name.to_owned(),
        credentials,
        endpoints,
    })
}

/// The cluster of `yard up`, else the one of a `yard coordinator run` of this user with its state in the usual place.
fn local(paths: &Paths) -> Result<Option<Context>, Failure> {
    match LocalCluster::new(paths.local()).context()? {
        Some(context) => Ok(Some(context)),
        None => LocalCluster::new(paths.data.clone()).context(),
    }
}

fn load(dir: &Path) -> Result<Credentials, Failure> {
    Credentials::load(dir)
        .map_err(|error| Failure::chain(crate::failure::EXIT_IO, "CREDENTIALS", &error))
}
