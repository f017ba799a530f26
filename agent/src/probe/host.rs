//! What the machine has apart from GPUs: processors, memory, NUMA nodes, disks, network. This file asks the kernel;
//! what its answers mean is in `parse.rs`. What cannot be read is left out: a node with an unknown model name can
//! still run jobs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::stat::stat;
use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;
use nix::unistd::Pid;
use trainyard_common::inventory::{Cpu, Disk, Interface, Inventory, NumaNode};
use trainyard_common::resources::Resources;

use super::parse;

/// Mounts that are looked at: an ordinary machine has under a hundred, one with many containers some thousands.
const MAX_MOUNTS: usize = 10_000;
/// Levels of cgroups above our own whose limits count.
const MAX_CGROUP_DEPTH: usize = 64;

/// Reads the machine. The file system that `data_dir` lies on is among the disks whatever its kind. GPUs are not read
/// here; the capacity is all of the processors and memory. Blocks, for long if a file system hangs.
#[must_use]
pub fn read(data_dir: &Path) -> Inventory {
    let names = uname().ok();
    let name = |part: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        names
            .as_ref()
            .map(|names| part(names).to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let cpu = cpu();
    let memory_bytes = parse::mem_total(&text("/proc/meminfo")).unwrap_or_default();
    Inventory {
        hostname: name(|names| names.nodename()),
        os: parse::os_name(&text("/etc/os-release")),
        kernel: name(|names| names.release()),
        architecture: name(|names| names.machine()),
        memory_bytes,
        numa: numa_nodes(),
        disks: disks(data_dir),
        interfaces: interfaces(),
        gpus: Vec::new(),
        gpu_driver: None,
        capacity: Resources {
            cpu_milli: u64::from(cpu.threads) * 1000,
            memory_bytes,
            gpus: 0,
        },
        cpu,
    }
}

fn text(path: impl AsRef<Path>) -> String {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn cpu() -> Cpu {
    let found = parse::cpu_info(&text("/proc/cpuinfo"));
    let allowed = allowed_cpus();
    let threads = allowed.unwrap_or(found.threads).max(1);
    let threads = cgroup_quota().map_or(threads, |quota| threads.min(quota));
    // Some architectures tell the place of a processor only elsewhere.
    let (sockets, cores) = match (found.sockets, found.cores) {
        (Some(sockets), Some(cores)) => (sockets, cores),
        _ => topology().unwrap_or((1, found.threads.max(threads))),
    };
    Cpu {
        model: found.model.unwrap_or_else(device_model),
        sockets,
        cores,
        threads,
    }
}

/// Logical CPUs that this process may run on.
fn allowed_cpus() -> Option<u32> {
    let set = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let allowed = (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .count();
    u32::try_from(allowed).ok().filter(|allowed| *allowed > 0)
}

/// Sockets and cores of the processors that are switched on.
fn topology() -> Option<(u32, u32)> {
    let online = parse::cpu_list(&text("/sys/devices/system/cpu/online"));
    let mut sockets = BTreeSet::new();
    let mut cores = BTreeSet::new();
    for cpu in online {
        let dir = format!("/sys/devices/system/cpu/cpu{cpu}/topology");
        let number = |name: &str| text(format!("{dir}/{name}")).trim().parse::<i64>().ok();
        let socket = number("physical_package_id")?;
        sockets.insert(socket);
        cores.insert((socket, number("core_id")?));
    }
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    (!cores.is_empty()).then(|| (count(sockets.len()), count(cores.len())))
}

/// What boards with a device tree call themselves.
fn device_model() -> String {
    let model = text("/proc/device-tree/model");
    let model = model.trim_matches(['\0', '\n', ' ']);
    if model.is_empty() {
        "unknown".to_owned()
    } else {
        model.to_owned()
    }
}

/// Whole CPUs that the cgroups around this process let it use, rounded up, so that a container sees its own share.
fn cgroup_quota() -> Option<u32> {
    let mount = parse::cgroup2_mount(&text("/proc/self/mountinfo"))?;
    let own = text("/proc/self/cgroup");
    let own = parse::cgroup2_path(&own)?;
    let mut place = PathBuf::from(&mount).join(own.trim_start_matches('/'));
    let mut lowest = None;
    for _ in 0..MAX_CGROUP_DEPTH {
        let quota = parse::cpu_max(&text(place.join("cpu.max")));
        lowest = lowest.into_iter().chain(quota).min();
        if place == Path::new(&mount) || !place.pop() {
            break;
        }
    }
    lowest
}

fn numa_nodes() -> Vec<NumaNode> {
    let root = Path::new("/sys/devices/system/node");
    parse::cpu_list(&text(root.join("online")))
        .into_iter()
        .map(|id| {
            let dir = root.join(format!("node{id}"));
            NumaNode {
                id,
                cpus: text(dir.join("cpulist")).trim().to_owned(),
                memory_bytes: parse::node_mem_total(&text(dir.join("meminfo"))).unwrap_or_default(),
            }
        })
        .collect()
}

fn disks(data_dir: &Path) -> Vec<Disk> {
    let mounts = text("/proc/self/mountinfo");
    let all = parse::mounts(&mounts).take(MAX_MOUNTS);
    let own = std::fs::canonicalize(data_dir)
        .ok()
        .and_then(|path| stat(&path).ok())
        .map(|stat| {
            (
                nix::sys::stat::major(stat.st_dev),
                nix::sys::stat::minor(stat.st_dev),
            )
        });
    parse::real_disks(all, own)
        .into_iter()
        .filter_map(|mount| {
            let size = statvfs(Path::new(&mount.mount_point)).ok()?;
            // The widths of these differ between architectures.
            #[expect(clippy::useless_conversion, reason = "narrower than 64 bits elsewhere")]
            let (unit, total, available): (u64, u64, u64) = (
                size.fragment_size().into(),
                size.blocks().into(),
                size.blocks_available().into(),
            );
            Some(Disk {
                mount_point: mount.mount_point,
                device: mount.source,
                file_system: mount.kind,
                total_bytes: total.saturating_mul(unit),
                available_bytes: available.saturating_mul(unit),
            })
        })
        .filter(|disk| disk.total_bytes > 0)
        .collect()
}

fn interfaces() -> Vec<Interface> {
    let Ok(found) = getifaddrs() else {
        return Vec::new();
    };
    // Loopback last, then by name; of each interface IPv4 first.
    let mut by_name: BTreeMap<(bool, String), BTreeSet<IpAddr>> = BTreeMap::new();
    for entry in found {
        if !entry.flags.contains(InterfaceFlags::IFF_UP) {
            continue;
        }
        let Some(address) = entry.address else {
            continue;
        };
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())));
        if let Some(ip) = ip {
            let loopback = entry.flags.contains(InterfaceFlags::IFF_LOOPBACK);
            let key = (loopback, entry.interface_name);
            by_name.entry(key).or_default().insert(ip);
        }
    }
    by_name
        .into_iter()
        .map(|((loopback, name), addresses)| Interface {
            name,
            addresses: addresses.iter().map(IpAddr::to_string).collect(),
            loopback,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let inventory = read(dir.path());
        let cpu = &inventory.cpu;
        assert!(!inventory.hostname.is_empty() && !inventory.os.is_empty());
        assert_eq!(inventory.architecture, std::env::consts::ARCH);
        assert!(cpu.sockets >= 1 && cpu.cores >= cpu.sockets && cpu.threads >= 1);
        assert!(!cpu.model.is_empty());
        assert!(inventory.memory_bytes > 64 << 20);
        assert_eq!(inventory.capacity.cpu_milli, u64::from(cpu.threads) * 1000);
        assert_eq!(inventory.capacity.memory_bytes, inventory.memory_bytes);
        for disk in &inventory.disks {
            assert!(disk.available_bytes <= disk.total_bytes, "{disk:?}");
        }
        let own = std::fs::canonicalize(dir.path()).unwrap();
        assert!(
            inventory
                .disks
                .iter()
                .any(|disk| own.starts_with(&disk.mount_point)),
            "{:?}",
            inventory.disks
        );
        let last = inventory.interfaces.last();
        assert!(last.is_none_or(|last| last.loopback || inventory.interfaces.len() == 1));
    }
}
