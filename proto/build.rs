//! Compiles the `.proto` files without a protoc on the machine.

use std::error::Error;
use std::path::PathBuf;

const FILES: [&str; 9] = [
    "common", "jobs", "nodes", "agent", "logs", "blobs", "enroll", "admin", "store",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=trainyard/v1");
    let files = FILES.map(|name| format!("trainyard/v1/{name}.proto"));
    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(
        out.join("descriptors.bin"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    // BTreeMap: maps are encoded in one order, so that a digest over an encoding means something.
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
