//! A network of hosts, as namespaces on a bridge of their own, and everything that can be done to its cables. Nothing is
//! added to the machine's own network, nothing can leave, and all of it is gone when this is dropped.
//!
//! Host 1 is the coordinator's, the last one is the users', those between are agents'.

use std::fs::File;
use std::process::{Command, Stdio};

/// The coordinator's host.
pub(crate) const HEAD: u32 = 1;

/// Hosts `PREFIX1` to `PREFIXn` at 10.77.0.11 and up.
#[derive(Debug)]
pub(crate) struct Network {
    prefix: String,
    hosts: u32,
}

/// Says why there can be no network here, if so.
pub(crate) fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it takes root to make network namespaces");
    }
    for (program, why) in [
        ("ip", "ip is missing (Debian's package iproute2)"),
        (
            "iptables",
            "iptables is missing (Debian's package iptables)",
        ),
        (
            "nsenter",
            "nsenter is missing (Debian's package util-linux)",
        ),
        ("python3", "python3 is missing, which the jobs train with"),
    ] {
        let found = Command::new(program)
            .arg("-V")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !found.is_ok_and(|status| status.success()) {
            return Some(why);
        }
    }
    None
}

fn run(words: &[&str]) -> bool {
    Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn must(line: &str) {
    let words: Vec<_> = line.split(' ').collect();
    assert!(run(&words), "failed: {line}");
}

impl Network {
    /// Makes it.
    pub(crate) fn new(prefix: &str, hosts: u32) -> Self {
        // Made first, so that a failure on the way takes down what is there.
        let network = Self {
            prefix: prefix.to_owned(),
            hosts,
        };
        let p = prefix;
        must(&format!("ip netns add {p}sw"));
        must(&format!("ip -n {p}sw link add br0 type bridge"));
        must(&format!("ip -n {p}sw link set br0 up"));
        for host in 1..=hosts {
            let address = address(host);
            must(&format!("ip netns add {p}{host}"));
            must(&format!(
                "ip -n {p}sw link add v{host} type veth peer name eth0 netns {p}{host}"
            ));
            must(&format!("ip -n {p}sw link set v{host} master br0 up"));
            must(&format!("ip -n {p}{host} link set lo up"));
            must(&format!("ip -n {p}{host} addr add {address}/24 dev eth0"));
            must(&format!("ip -n {p}{host} link set eth0 up"));
        }
        network
    }

    /// A command that runs on a host. Not through `ip netns exec`, which would hide the cgroup file systems.
    pub(crate) fn command(&self, host: u32, program: &std::path::Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}{host}", self.prefix))
            .arg(program);
        command
    }

    /// Moves the calling thread, and those that it will start, to a host.
    pub(crate) fn enter(&self, host: u32) -> std::io::Result<()> {
        let namespace = File::open(format!("/run/netns/{}{host}", self.prefix))?;
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(())
    }

    /// Pulls or plugs a host's cable.
    pub(crate) fn cable(&self, host: u32, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        must(&format!("ip -n {}sw link set v{host} {state}", self.prefix));
    }

    /// Lets `host` hear nothing from `from`, or hear it again.
    pub(crate) fn deaf(&self, host: u32, from: u32, begin: bool) {
        let rule = format!("INPUT -s {} -j DROP", address(from));
        self.rule(host, "filter", begin, &rule);
    }

    /// Loses so many of a hundred packets of a host in each direction, or none again.
    pub(crate) fn loss(&self, host: u32, percent: u64, begin: bool) {
        for chain in ["INPUT", "OUTPUT"] {
            let rule =
                format!("{chain} -m statistic --mode random --probability 0.{percent:02} -j DROP");
            self.rule(host, "filter", begin, &rule);
        }
    }

    /// Sends a host's connections to one port of the coordinator to another one.
    pub(crate) fn detour(&self, host: u32, port: u16, to: u16) {
        let head = address(HEAD);
        let rule =
            format!("OUTPUT -p tcp -d {head} --dport {port} -j DNAT --to-destination {head}:{to}");
        self.rule(host, "nat", true, &rule);
    }

    fn rule(&self, host: u32, table: &str, begin: bool, rule: &str) {
        let (name, action) = (
            format!("{}{host}", self.prefix),
            if begin { "-I" } else { "-D" },
        );
        must(&format!(
            "ip netns exec {name} iptables -w 10 -t {table} {action} {rule}"
        ));
    }

    /// Plugs every cable and takes away every rule that drops.
    pub(crate) fn heal(&self) {
        for host in 1..=self.hosts {
            self.cable(host, true);
            must(&format!(
                "ip netns exec {}{host} iptables -w 10 -F",
                self.prefix
            ));
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let hosts = (1..=self.hosts).map(|host| host.to_string());
        for name in hosts.chain(["sw".to_owned()]) {
            run(&["ip", "netns", "del", &format!("{}{name}", self.prefix)]);
        }
    }
}

/// A host's address.
pub(crate) fn address(host: u32) -> String {
    format!("10.77.0.1{host}")
}
