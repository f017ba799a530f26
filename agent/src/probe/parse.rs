//! What the kernel's text files about a machine mean. Pure: opens nothing, so that machines can be tested that are not
//! at hand.

use std::collections::BTreeSet;

/// CPUs and NUMA nodes that a list may name; Linux's own limit for CPUs is 8192.
const MAX_LIST: usize = 8192;

/// What `/proc/cpuinfo` tells; none where this architecture does not tell it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct CpuInfo {
    pub(super) model: Option<String>,
    pub(super) sockets: Option<u32>,
    pub(super) cores: Option<u32>,
    pub(super) threads: u32,
}

/// Reads `/proc/cpuinfo` of x86 and of ARM.
pub(super) fn cpu_info(text: &str) -> CpuInfo {
    let mut info = CpuInfo::default();
    let mut sockets = BTreeSet::new();
    let mut cores = BTreeSet::new();
    let mut arm = ArmPart::default();
    // A block per logical CPU; the package comes before the core in it.
    let mut socket = "";
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match name.trim() {
            "processor" if value.parse::<u32>().is_ok() => info.threads += 1,
            "model name" | "Processor" | "cpu model" if info.model.is_none() => {
                info.model = Some(value.to_owned());
            }
            "physical id" => {
                socket = value;
                sockets.insert(value);
            }
            "core id" => {
                cores.insert((socket, value));
            }
            "CPU implementer" => arm.implementer = hex(value),
            "CPU part" => arm.part = hex(value),
            _ => {}
        }
    }
    let count = |length: usize| u32::try_from(length).ok().filter(|count| *count > 0);
    info.sockets = count(sockets.len());
    info.cores = count(cores.len());
    info.model = info.model.or_else(|| arm.name());
    info
}

/// How ARM processors name themselves: two numbers.
#[derive(Debug, Default)]
struct ArmPart {
    implementer: Option<u32>,
    part: Option<u32>,
}

impl ArmPart {
    /// The cores that servers and boards for training are built from; others by their numbers.
    fn name(&self) -> Option<String> {
        let implementer = self.implementer?;
        let part = self.part.unwrap_or_default();
        let known = match (implementer, part) {
            (0x41, 0xd03) => "ARM Cortex-A53",
            (0x41, 0xd08) => "ARM Cortex-A72",
            (0x41, 0xd0b) => "ARM Cortex-A76",
            (0x41, 0xd0c) => "ARM Neoverse-N1",
            (0x41, 0xd40) => "ARM Neoverse-V1",
            (0x41, 0xd42) => "ARM Cortex-A78AE",
            (0x41, 0xd49) => "ARM Neoverse-N2",
            (0x41, 0xd4f) => "ARM Neoverse-V2",
            (0x41, 0xd84) => "ARM Neoverse-V3",
            (0x48, 0xd01) => "HiSilicon Kunpeng-920",
            (0xc0, 0xac3) => "Ampere-1",
            (0xc0, 0xac4) => "Ampere-1a",
            _ => {
                return Some(format!(
                    "ARM implementer {implementer:#04x} part {part:#05x}"
                ));
            }
        };
        Some(known.to_owned())
    }
}

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
pub(super) fn mem_total(text: &str) -> Option<u64> {
    kib_line(text, |words| {
        (words.first() == Some(&"MemTotal:")).then_some(1)
    })
}

/// The same of a NUMA node's `meminfo`, whose lines begin with `Node 0`.
pub(super) fn node_mem_total(text: &str) -> Option<u64> {
    kib_line(text, |words| {
        (words.first() == Some(&"Node") && words.get(2) == Some(&"MemTotal:")).then_some(3)
    })
}

/// The amount at the place that `value` tells for the line that is meant.
fn kib_line(text: &str, value: impl Fn(&[&str]) -> Option<usize>) -> Option<u64> {
    text.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let kib: u64 = words.get(value(&words)?)?.parse().ok()?;
        kib.checked_mul(1024)
    })
}

/// The numbers of a list such as `0-3,8`.
pub(super) fn cpu_list(text: &str) -> Vec<u32> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            let room = MAX_LIST - numbers.len();
            numbers.extend((first..=last).take(room));
        }
    }
    numbers
}

/// The distribution's name for people.
pub(super) fn os_name(text: &str) -> String {
    let value = |wanted: &str| {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            let value = value.trim().trim_matches(['"', '\'']);
            (name.trim() == wanted && !value.is_empty()).then(|| value.to_owned())
        })
    };
    value("PRETTY_NAME")
        .or_else(|| value("NAME"))
        .unwrap_or_else(|| "Linux".to_owned())
}

/// Whole CPUs of a `cpu.max`, rounded up; none without a limit.
pub(super) fn cpu_max(text: &str) -> Option<u32> {
    let mut words = text.split_whitespace();
    let quota: u64 = words.next()?.parse().ok()?;
    let period: u64 = words.next()?.parse().ok().filter(|period| *period > 0)?;
    u32::try_from(quota.div_ceil(period))
        .ok()
        .filter(|cpus| *cpus > 0)
}

/// Where the cgroup file system of version 2 is mounted.
pub(super) fn cgroup2_mount(mountinfo: &str) -> Option<String> {
    mounts(mountinfo)
        .find(|mount| mount.kind == "cgroup2")
        .map(|mount| mount.mount_point)
}

/// Our own place in it.
pub(super) fn cgroup2_path(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// The device's numbers.
    pub(super) device: (u64, u64),
    pub(super) mount_point: String,
    pub(super) kind: String,
    pub(super) source: String,
}

/// All mounts, in the order in which they were made.
pub(super) fn mounts(mountinfo: &str) -> impl Iterator<Item = Mount> {
    mountinfo.lines().filter_map(|line| {
        // The number of fields before the hyphen varies.
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let mut right = right.split(' ');
        let (major, minor) = left.get(2)?.split_once(':')?;
        Some(Mount {
            device: (major.parse().ok()?, minor.parse().ok()?),
            mount_point: unescape(left.get(4)?),
            kind: right.next()?.to_owned(),
            source: unescape(right.next()?),
        })
    })
}

/// Blanks and the like in names are written as three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match octal {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The mounts that hold data: on a block device or from a server, each of them once, and the one of device `own`
/// whatever it is.
pub(super) fn real_disks(
    mounts: impl Iterator<Item = Mount>,
    own: Option<(u64, u64)>,
) -> Vec<Mount> {
    let mut found: Vec<Mount> = Vec::new();
    for mount in mounts {
        let real = is_block(&mount) || is_remote(&mount.kind) || own == Some(mount.device);
        if !real {
            continue;
        }
        match found.iter_mut().find(|other| other.device == mount.device) {
            // A bind mount of a part of it has a longer path.
            Some(other) if mount.mount_point.len() < other.mount_point.len() => *other = mount,
            Some(_) => {}
            None => found.push(mount),
        }
    }
    found.sort_by(|a, b| a.mount_point.cmp(&b.mount_point));
    found
}

/// Loop devices and the kinds that are always full hold images of programs.
fn is_block(mount: &Mount) -> bool {
    let image = matches!(mount.kind.as_str(), "squashfs" | "iso9660" | "erofs");
    let pool = matches!(mount.kind.as_str(), "zfs" | "btrfs" | "bcachefs");
    !image && (pool || (mount.source.starts_with('/') && mount.device.0 != 0))
}

fn is_remote(kind: &str) -> bool {
    const REMOTE: [&str; 18] = [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "ceph",
        "lustre",
        "gpfs",
        "beegfs",
        "glusterfs",
        "9p",
        "virtiofs",
        "wekafs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "fuse.juicefs",
        "fuse.ceph",
        "fuse.s3fs",
        "fuse.gcsfuse",
    ];
    REMOTE.contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two packages of two cores with two threads each; both packages number their cores from 0.
    fn epyc() -> String {
        let mut text = String::new();
        for processor in 0..8 {
            let (socket, core) = (processor / 2 % 2, processor % 2);
            text += &format!(
                "processor\t: {processor}\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7763 64-Core Processor\n\
                 physical id\t: {socket}\nsiblings\t: 4\ncore id\t\t: {core}\ncpu cores\t: 2\nbogomips\t: 4890.81\n\
                 power management: ts ttp\n\n"
            );
        }
        text
    }

    #[test]
    fn a_machine_with_two_sockets() {
        assert_eq!(
            cpu_info(&epyc()),
            CpuInfo {
                model: Some("AMD EPYC 7763 64-Core Processor".to_owned()),
                sockets: Some(2),
                cores: Some(4),
                threads: 8,
            }
        );
    }

    #[test]
    fn an_arm_machine_tells_less() {
        let block = "BogoMIPS\t: 2000.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\n\
                     CPU variant\t: 0x0\nCPU part\t: 0xd4f\nCPU revision\t: 0\n\n";
        let text = format!("processor\t: 0\n{block}processor\t: 1\n{block}");
        assert_eq!(
            cpu_info(&text),
            CpuInfo {
                model: Some("ARM Neoverse-V2".to_owned()),
                sockets: None,
                cores: None,
                threads: 2,
            }
        );
        let other = cpu_info("processor : 0\nCPU implementer : 0x99\nCPU part : 0x1\n");
        assert_eq!(
            other.model.as_deref(),
            Some("ARM implementer 0x99 part 0x001")
        );
        let old = cpu_info("Processor\t: ARMv7 Processor rev 4 (v7l)\nprocessor\t: 0\n");
        assert_eq!(
            (old.model.as_deref(), old.threads),
            (Some("ARMv7 Processor rev 4 (v7l)"), 1)
        );
    }

    #[test]
    fn memory_is_found_in_both_forms() {
        let text = "MemTotal:       24683656 kB\nMemFree:  1 kB\n";
        assert_eq!(mem_total(text), Some(24_683_656 << 10));
        let node = "Node 1 MemTotal:        8087328 kB\nNode 1 MemFree: 5 kB\n";
        assert_eq!(node_mem_total(node), Some(8_087_328 << 10));
        assert_eq!(mem_total("MemTotal: many kB"), None);
        assert_eq!(mem_total(&format!("MemTotal: {} kB", u64::MAX)), None);
    }

    #[test]
    fn lists_of_numbers() {
        assert_eq!(cpu_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(cpu_list("0"), [0]);
        assert!(cpu_list("").is_empty());
        assert_eq!(cpu_list("0-4294967295").len(), MAX_LIST);
    }

    #[test]
    fn quotas_are_rounded_up() {
        assert_eq!(cpu_max("max 100000\n"), None);
        assert_eq!(cpu_max("150000 100000\n"), Some(2));
        assert_eq!(cpu_max("20000 100000\n"), Some(1));
        assert_eq!(cpu_max("1 0"), None);
        assert_eq!(cpu_max(""), None);
    }

    #[test]
    fn names_of_systems() {
        let text = "NAME=\"Debian GNU/Linux\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n";
        assert_eq!(os_name(text), "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(os_name("NAME=Void\n"), "Void");
        assert_eq!(os_name(""), "Linux");
    }

    const MOUNTS: &str = r"22 27 0:21 / /proc rw,relatime - proc proc rw
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24683656k
50 27 259:2 /home /home/ann rw shared:5 - ext4 /dev/nvme0n1p2 rw
27 1 259:2 / / rw,relatime shared:1 master:2 - ext4 /dev/nvme0n1p2 rw,discard
41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw
60 27 7:1 / /snap/core/1 ro - squashfs /dev/loop1 ro
61 27 9:0 / /data\040one rw - xfs /dev/md0 rw
62 27 0:60 / /shared rw - nfs4 10.0.0.5:/export rw
63 27 0:61 / /var/lib/docker/overlay2/x/merged rw - overlay overlay rw
64 27 0:62 / /tank rw - zfs tank/home rw
torn line
65 27 0:63 / /broken";

    #[test]
    fn disks_are_what_holds_data() {
        let disks = real_disks(mounts(MOUNTS), None);
        let found: Vec<(&str, &str, &str)> = disks
            .iter()
            .map(|disk| (&*disk.mount_point, &*disk.kind, &*disk.source))
            .collect();
        assert_eq!(
            found,
            [
                ("/", "ext4", "/dev/nvme0n1p2"),
                ("/data one", "xfs", "/dev/md0"),
                ("/shared", "nfs4", "10.0.0.5:/export"),
                ("/tank", "zfs", "tank/home"),
            ]
        );
        let with_own = real_disks(mounts(MOUNTS), Some((0, 61)));
        assert!(with_own.iter().any(|disk| disk.kind == "overlay"));
        assert_eq!(cgroup2_mount(MOUNTS).as_deref(), Some("/sys/fs/cgroup"));
        assert_eq!(
            cgroup2_path("1:cpu:/\n0::/user.slice\n"),
            Some("/user.slice")
        );
    }
}
