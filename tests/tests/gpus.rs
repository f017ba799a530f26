//! GPUs without a GPU: inventory through the NVML stand-in, binding by UUID.

use std::collections::BTreeSet;

use trainyard_tests::Machine;

#[test]
fn fake_gpus_are_found_shown_and_bound_by_uuid() {
    let machine = Machine::new();
    let cluster = machine.up(&["--fake-gpus", "8xH100"]);
    let nodes = cluster.yard(&["nodes", "--json"]).expect_code(0).json();
    let gpus = nodes["nodes"][0]["inventory"]["gpus"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(gpus.len(), 8);
    let known: BTreeSet<_> = gpus
        .iter()
        .map(|gpu| gpu["uuid"].as_str().unwrap().to_owned())
        .collect();
    assert!(
        gpus.iter()
            .all(|gpu| gpu["model"].as_str().unwrap().contains("H100"))
    );
    assert!(
        gpus.iter()
            .all(|gpu| gpu["memory_bytes"].as_u64().unwrap() > 79 << 30
                && !gpu["pci_address"].as_str().unwrap().is_empty())
    );
    let shown = cluster.yard(&["node", "n1"]).expect_code(0).stdout;
    assert!(
        shown.contains("H100") && known.iter().all(|uuid| shown.contains(uuid)),
        "{shown}"
    );
    // Two jobs at once see different GPUs, and together not more than there are.
    let script =
        "echo $CUDA_VISIBLE_DEVICES; until [ $(ls $MEET | wc -l) = 2 ]; do sleep 0.05; done";
    let meet = machine.dir("meet");
    std::fs::create_dir(&meet).unwrap();
    let env = format!("MEET={}", meet.display());
    let script = format!("touch $MEET/$YARD_JOB_ID; {script}");
    let jobs = [0, 1].map(|_| {
        cluster.submit(&[
            "--gpus",
            "4",
            "--gpu-type",
            "h100",
            "--env",
            &env,
            "--",
            "sh",
            "-c",
            &script,
        ])
    });
    let mut bound = BTreeSet::new();
    for job in &jobs {
        let _ = cluster.yard(&["wait", job]).expect_code(0);
        let seen = cluster.yard(&["logs", job]).expect_code(0).stdout;
        bound.extend(seen.trim().split(',').map(str::to_owned));
    }
    assert_eq!(bound, known);
    let refused = cluster
        .yard(&["submit", "--gpus", "9", "--", "true"])
        .expect_code(65);
    assert!(refused.stderr.contains('8'), "{}", refused.stderr);
    let other = cluster
        .yard(&["submit", "--gpus", "1", "--gpu-type", "A100", "--", "true"])
        .expect_code(65);
    assert!(other.stderr.contains("A100"), "{}", other.stderr);
}

#[test]
fn a_bad_gpu_specification_starts_nothing() {
    let machine = Machine::new();
    let refused = machine
        .yard(&["up", "--fake-gpus", "8xTurbo"])
        .expect_code(64);
    assert!(
        refused.stderr.contains("H100"),
        "the known models are named: {}",
        refused.stderr
    );
    let _ = machine.yard(&["jobs"]).expect_code(69);
}
