//! Several hosts, as network namespaces on a bridge of their own: a gang across machines, and a network that fails.
//!
//! Needs root and iproute2.

use std::process::{Command, Stdio};

use trainyard_tests::{Cluster, Machine, Running, repository, skip, until};

/// Hosts `PREFIX1` to `PREFIXn` at 10.77.0.11 and up, on a bridge in a namespace of its own: nothing is added to the
/// machine's own network, and nothing can leave.
struct Network {
    prefix: String,
    hosts: u32,
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("ip can be started");
    assert!(status.success(), "ip {arguments}");
}

impl Network {
    /// Makes it, or says why not.
    fn new(hosts: u32) -> Result<Self, &'static str> {
        if !nix::unistd::geteuid().is_root() {
            return Err("it takes root to make network namespaces");
        }
        let found = Command::new("ip")
            .arg("-V")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !found.is_ok_and(|status| status.success()) {
            return Err("ip is missing (Debian's package iproute2)");
        }
        let network = Self {
            prefix: format!("ty{}x", std::process::id()),
            hosts,
        };
        let p = &network.prefix;
        ip(&format!("netns add {p}sw"));
        ip(&format!("-n {p}sw link add br0 type bridge"));
        ip(&format!("-n {p}sw link set br0 up"));
        for host in 1..=hosts {
            ip(&format!("netns add {p}{host}"));
            ip(&format!(
                "-n {p}sw link add v{host} type veth peer name eth0 netns {p}{host}"
            ));
            ip(&format!("-n {p}sw link set v{host} master br0 up"));
            ip(&format!("-n {p}{host} link set lo up"));
            ip(&format!(
                "-n {p}{host} addr add 10.77.0.1{host}/24 dev eth0"
            ));
            ip(&format!("-n {p}{host} link set eth0 up"));
        }
        Ok(network)
    }

    fn machine(&self, host: u32) -> Machine {
        Machine::in_namespace(&format!("{}{host}", self.prefix))
    }

    /// Pulls or plugs a host's cable.
    fn link(&self, host: u32, state: &str) {
        ip(&format!("-n {}sw link set v{host} {state}", self.prefix));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in (1..=self.hosts)
            .map(|host| host.to_string())
            .chain(["sw".to_owned()])
        {
            let _ = Command::new("ip")
                .args(["netns", "del", &format!("{}{name}", self.prefix)])
                .status();
        }
    }
}

/// Lets a machine join and waits until its node is ready.
fn join(head: &Cluster<'_>, machine: &Machine, name: &str) -> Running {
    let token = head
        .yard(&["token", "create", "--node"])
        .expect_code(0)
        .stdout;
    let agent = Running::start(machine.command(&[
        "join",
        token.trim(),
        "--name",
        name,
        "--run-as",
        "nobody",
    ]));
    until(&format!("{name} is ready"), || {
        let nodes = head.yard(&["nodes", "--json"]).expect_code(0).json();
        let nodes = nodes["nodes"].as_array().cloned().unwrap_or_default();
        nodes
            .iter()
            .any(|node| node["name"] == name && node["availability"] == "READY")
            .then_some(())
    });
    agent
}

#[test]
fn a_gang_trains_across_machines_and_a_short_partition_touches_nothing() {
    let network = match Network::new(3) {
        Ok(network) => network,
        Err(why) => return skip(why),
    };
    let machines = [1, 2, 3].map(|host| network.machine(host));
    let head = machines[0].up(&["--nodes", "0", "--listen", "10.77.0.11:7443"]);
    let _agents = [
        join(&head, &machines[1], "one"),
        join(&head, &machines[2], "two"),
    ];

    let show = "echo $RANK $MASTER_ADDR $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME $YARD_NODE_ADDRS";
    let shown = head
        .yard(&["run", "--nodes", "2", "--", "sh", "-c", show])
        .expect_code(0)
        .stdout;
    let mut lines: Vec<_> = shown.lines().collect();
    lines.sort_unstable();
    let addresses = lines[0].rsplit(' ').next().unwrap().to_owned();
    let mut each: Vec<_> = addresses.split(',').collect();
    let master = each[0];
    assert_eq!(
        lines,
        [0, 1].map(|rank| format!("[{rank}] {rank} {master} eth0 eth0 {addresses}"))
    );
    each.sort_unstable();
    assert_eq!(each, ["10.77.0.12", "10.77.0.13"]);

    let file = repository().join("examples/digits/job.yaml");
    let trained = head
        .yard(&["run", "-f", file.to_str().unwrap()])
        .expect_code(0);
    assert!(trained.stdout.contains("epoch=1 "), "{}", trained.stdout);

    // A job that needs no network runs on while its node is cut off, and its end comes in afterwards.
    let file = machines[1].dir("go");
    let script = format!(
        "echo began; until [ -e {} ]; do sleep 0.1; done; echo ended; exit 9",
        file.display()
    );
    let cpus = head.yard(&["node", "one", "--json"]).expect_code(0).json()["capacity"]["cpu_milli"]
        .as_u64()
        .unwrap();
    let _ = head.yard(&["cordon", "two"]).expect_code(0);
    let job = head.submit(&["--cpus", &format!("{cpus}m"), "--", "sh", "-c", &script]);
    let _ = head.until_state(&job, "RUNNING");
    network.link(2, "down");
    std::fs::write(&file, "").unwrap();
    // The coordinator notices the silence before the network is whole again.
    until("the node is unreachable", || {
        let node = head.yard(&["node", "one", "--json"]).expect_code(0).json();
        (node["availability"] == "UNREACHABLE").then_some(())
    });
    assert_eq!(head.job(&job)["state"], "RUNNING");
    network.link(2, "up");
    let _ = head.yard(&["wait", &job]).expect_code(9);
    assert_eq!(head.job(&job)["attempts"].as_array().unwrap().len(), 1);
    assert_eq!(
        head.yard(&["logs", &job]).expect_code(0).stdout,
        "began\nended\n"
    );
}
