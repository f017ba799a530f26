//! Compiles the NVML stand-in into a library that the binary carries, so that `yard up --fake-gpus` needs no other file.
//!
//! The library is loaded by path like the real one, so it must be a file of its own; cargo cannot yet hand one package
//! the dynamic library of another, hence the direct call of the compiler.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

const SOURCE: &str = "../tests/fake-nvml/src";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={SOURCE}");
    let variable = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
    let library = PathBuf::from(variable("OUT_DIR")?).join("libnvidia-ml.so.1");
    let mut compiler = Command::new(variable("RUSTC")?);
    compiler.args([
        "--edition",
        "2024",
        "--crate-type",
        "cdylib",
        "--crate-name",
        "nvidia_ml",
    ]);
    compiler.args([
        "-C",
        "opt-level=s",
        "-C",
        "strip=symbols",
        "--target",
        &variable("TARGET")?,
    ]);
    if let Ok(linker) = std::env::var("RUSTC_LINKER") {
        compiler.args(["-C", &format!("linker={linker}")]);
    }
    let status = compiler
        .arg("-o")
        .arg(&library)
        .arg(format!("{SOURCE}/lib.rs"))
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err("cannot compile the NVML stand-in".into())
    }
}
