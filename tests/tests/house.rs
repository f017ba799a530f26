//! The rules of the house that a compiler does not check: which crate may depend on which, and the form of the tree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use trainyard_tests::repository;

/// A source file beyond this holds two ideas.
const MAX_LINES: usize = 900;

/// Who may depend on whom within the workspace. Development dependencies count, too.
const MAY_DEPEND: [(&str, &[&str]); 11] = [
    ("trainyard-common", &[]),
    ("trainyard-coordinator-core", &["trainyard-common"]),
    ("trainyard-agent-core", &["trainyard-common"]),
    ("trainyard-proto", &["trainyard-common"]),
    (
        "trainyard-transport",
        &["trainyard-common", "trainyard-proto"],
    ),
    ("trainyard-fake-nvml", &[]),
    ("trainyard-faulty-disk", &[]),
    (
        "trainyard-coordinator",
        &[
            "trainyard-common",
            "trainyard-coordinator-core",
            "trainyard-proto",
            "trainyard-transport",
        ],
    ),
    (
        "trainyard-agent",
        &[
            "trainyard-common",
            "trainyard-agent-core",
            "trainyard-proto",
            "trainyard-transport",
        ],
    ),
    (
        "trainyard",
        &[
            "trainyard-common",
            "trainyard-proto",
            "trainyard-transport",
            "trainyard-coordinator",
            "trainyard-agent",
            "trainyard-fake-nvml",
        ],
    ),
    (
        "trainyard-tests",
        &[
            "trainyard-common",
            "trainyard-coordinator-core",
            "trainyard-agent-core",
            "trainyard-proto",
        ],
    ),
];

/// What the pure crates and the shared vocabulary may use from outside.
const PURE_CRATES: [&str; 3] = [
    "trainyard-common",
    "trainyard-coordinator-core",
    "trainyard-agent-core",
];
const PURE_MAY_USE: [&str; 3] = ["thiserror", "serde", "proptest"];

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--locked",
            "--offline",
        ])
        .current_dir(repository())
        .output()
        .expect("cargo can be started");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field]
        .as_str()
        .unwrap_or_else(|| panic!("no {field} in {value}"))
}

#[test]
fn dependencies_point_in_one_direction() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let names: BTreeSet<_> = packages
        .iter()
        .map(|package| text(package, "name"))
        .collect();
    let known: BTreeSet<_> = MAY_DEPEND.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names, known,
        "a crate came or went: give it its place in the house"
    );
    for package in packages {
        let name = text(package, "name");
        let (_, allowed) = MAY_DEPEND
            .iter()
            .find(|(known, _)| *known == name)
            .expect("checked above");
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let on = text(dependency, "name");
            if names.contains(on) {
                assert!(allowed.contains(&on), "{name} must not depend on {on}");
            } else if PURE_CRATES.contains(&name) {
                assert!(
                    PURE_MAY_USE.contains(&on),
                    "{name} is pure and must not use {on}"
                );
            }
        }
    }
}

#[test]
fn every_crate_takes_lints_and_version_from_the_workspace() {
    for manifest in files(&repository(), "Cargo.toml") {
        let text = std::fs::read_to_string(&manifest).expect("readable");
        if text.contains("[workspace]") {
            continue;
        }
        assert!(
            text.contains("[lints]\nworkspace = true"),
            "{} has lints of its own",
            manifest.display()
        );
        assert!(
            text.contains("version.workspace = true"),
            "{} has a version of its own",
            manifest.display()
        );
    }
}

/// The crates through which the test of planted bugs turns the feature on, and what it may stand for in each.
const MUTATIONS: [(&str, &str); 2] = [
    ("trainyard-common", "[]"),
    ("trainyard-tests", "[\"trainyard-common/mutations\"]"),
];

#[test]
fn nothing_plants_bugs_by_default() {
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("packages") {
        let name = text(package, "name");
        let features = package["features"].as_object().expect("features");
        for (feature, turns_on) in features {
            let turns_on = turns_on.to_string();
            let planted = MUTATIONS.contains(&(name, turns_on.as_str()));
            let allowed = feature == "mutations" && planted;
            assert!(
                allowed || !(feature == "mutations" || turns_on.contains("mutations")),
                "the feature {feature} of {name} plants bugs"
            );
        }
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            assert!(
                !dependency["features"].to_string().contains("mutations"),
                "{name} plants bugs in {}",
                text(dependency, "name")
            );
        }
    }
}

#[test]
fn every_source_file_says_what_it_owns_and_holds_one_idea() {
    let mut faults = Vec::new();
    for file in files(&repository(), ".rs") {
        let text = std::fs::read_to_string(&file).expect("readable");
        if !text.starts_with("//!") {
            faults.push(format!("{} does not open with //!", file.display()));
        }
        let lines = text.lines().count();
        if lines > MAX_LINES {
            faults.push(format!("{} has {lines} lines", file.display()));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_dependency_has_its_line_in_the_decisions_and_every_line_its_dependency() {
    let page = std::fs::read_to_string(repository().join("docs/decisions/dependencies.md"))
        .expect("the page is there");
    // The first column of the table's rows: | `a`, `b` | for what | … |
    let told: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|row| row.split(" | ").next())
        .flat_map(|names| names.split(", "))
        .map(|name| name.trim_matches('`'))
        .collect();
    let names = workspace_dependencies();
    let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    let (missing, left): (Vec<_>, Vec<_>) = (
        names.difference(&told).collect(),
        told.difference(&names).collect(),
    );
    assert!(
        missing.is_empty() && left.is_empty(),
        "docs/decisions/dependencies.md says nothing of {missing:?}, and of {left:?}, which is gone"
    );
}

/// Dependencies of the workspace from outside, as the root manifest lists them.
fn workspace_dependencies() -> BTreeSet<String> {
    let manifest = std::fs::read_to_string(repository().join("Cargo.toml")).expect("readable");
    let section = manifest
        .split("[workspace.dependencies]")
        .nth(1)
        .expect("a section")
        .split("\n[")
        .next()
        .expect("its text");
    section
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name.trim().to_owned())
        .filter(|name| !name.starts_with("trainyard"))
        .collect()
}

/// Named by generated code only.
const GENERATED_CODE_USES: [&str; 1] = ["tonic-prost"];

#[test]
fn no_dependency_is_left_over() {
    let metadata = metadata();
    let mut unused = workspace_dependencies();
    let mut faults = Vec::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let manifest = PathBuf::from(text(package, "manifest_path"));
        let dir = manifest.parent().expect("it lies in a folder");
        let sources = sources(dir);
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let on = text(dependency, "name");
            unused.remove(on);
            let used = sources.contains(&on.replace('-', "_"));
            if !used && !GENERATED_CODE_USES.contains(&on) {
                faults.push(format!("{} does not use {on}", text(package, "name")));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(unused.is_empty(), "no crate depends on {unused:?}");
}

/// The text of a package's own sources, without those of packages that lie in it.
fn sources(package: &Path) -> String {
    let is_other = |file: &Path| {
        file.ancestors()
            .skip(1)
            .take_while(|dir| *dir != package)
            .any(|dir| dir.join("Cargo.toml").exists())
    };
    files(package, ".rs")
        .iter()
        .filter(|file| !is_other(file))
        .map(|file| std::fs::read_to_string(file).expect("readable"))
        .collect()
}

#[test]
fn only_one_provider_of_cryptography_is_linked() {
    for unwanted in ["ring", "openssl-sys", "native-tls"] {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let tree = Command::new(cargo)
            .args([
                "tree",
                "--workspace",
                "--locked",
                "--offline",
                "--edges",
                "normal,build",
                "--prefix",
                "none",
            ])
            .current_dir(repository())
            .output()
            .expect("cargo can be started");
        assert!(
            tree.status.success(),
            "{}",
            String::from_utf8_lossy(&tree.stderr)
        );
        let text = String::from_utf8_lossy(&tree.stdout);
        let found = text
            .lines()
            .any(|line| line.split(' ').next() == Some(unwanted));
        assert!(
            !found,
            "{unwanted} came in; see docs/decisions/dependencies.md"
        );
    }
}

/// Files below `dir` whose name ends so, without build output and hidden folders.
fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("readable") {
        let path = entry.expect("readable").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
            .to_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(files(&path, ending));
            }
        } else if name.ends_with(ending) {
            found.push(path);
        }
    }
    found
}
