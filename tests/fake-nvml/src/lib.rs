//! A stand-in for `libnvidia-ml.so.1`: it speaks NVML's C interface and answers from a scenario file, so that a machine
//! without a GPU can play one with eight. Built as a shared library it is what an agent loads; built as a Rust library
//! it offers the functions below, which write and check scenario files.
//!
//! It must not depend on any crate: `cli/build.rs` compiles this file with a bare `rustc` and embeds the result. It
//! knows nothing of Trainyard. The file format is described in [`check`] and, with examples, in the crate's README.
//!
//! Nothing is process-global: each copy of the library that a process loads reads the file beside itself
//! ([`scenario_path`]), unless the environment variable named by [`SCENARIO_ENV`] names another one.

mod abi;
mod exports;
mod exports_health;
mod exports_topology;
mod library;
mod models;
mod parse;
mod pci;
mod scenario;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub use models::{MODELS, Model, SpecError, gpu_uuid, scenario};
pub use parse::{ScenarioError, check};

/// Environment variable that names the scenario file of every copy of the library in the process.
pub const SCENARIO_ENV: &str = "YARD_FAKE_NVML";

/// Most GPUs that a scenario may have; more than any machine on the market, few enough to be read in a moment.
pub const MAX_GPUS: u32 = 64;

/// Most bytes of a scenario file; a file of 64 GPUs with a thousand processes each stays below it.
pub const MAX_SCENARIO_BYTES: u64 = 4 << 20;

/// Where a copy of the library at `library` looks for its scenario: beside itself, with `.scenario` appended.
#[must_use]
pub fn scenario_path(library: &Path) -> PathBuf {
    let mut path = OsString::from(library);
    path.push(".scenario");
    PathBuf::from(path)
}

/// Replaces the scenario file at `path` in one step, so that a library that reads it meanwhile never sees half of it.
///
/// # Errors
/// Those of writing `path` with `.new` appended and renaming it.
pub fn write_scenario(path: &Path, text: &str) -> io::Result<()> {
    let mut new = OsString::from(path);
    new.push(".new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    drop(file);
    std::fs::rename(&new, path)
}
