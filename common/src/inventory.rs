//! What a machine has, as its agent found it. Descriptive: the scheduler uses [`Inventory::capacity`], people read the
//! rest.

use serde::{Deserialize, Serialize};

use crate::resources::Resources;

/// Everything an agent reports about its machine at the start of a session.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Inventory {
    /// The machine's host name.
    pub hostname: String,
    /// Operating system, such as `Debian GNU/Linux 12 (bookworm)`.
    pub os: String,
    /// Kernel release, such as `6.1.0-18-amd64`.
    pub kernel: String,
    /// Processor architecture, such as `x86_64`.
    pub architecture: String,
    /// Processors.
    pub cpu: Cpu,
    /// Memory in bytes that the machine has.
    pub memory_bytes: u64,
    /// NUMA nodes in number order.
    pub numa: Vec<NumaNode>,
    /// Mounted disks that hold data.
    pub disks: Vec<Disk>,
    /// Network interfaces with an address, loopback last.
    pub interfaces: Vec<Interface>,
    /// GPUs in index order.
    pub gpus: Vec<Gpu>,
    /// Version of the GPU driver, if there is one.
    pub gpu_driver: Option<String>,
    /// What jobs may use of this machine; at most what it has, less if its configuration says so.
    pub capacity: Resources,
}

/// The processors of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cpu {
    /// Model name as the processor tells it.
    pub model: String,
    /// Physical packages.
    pub sockets: u32,
    /// Physical cores in all packages.
    pub cores: u32,
    /// Logical CPUs that this machine's agent may use.
    pub threads: u32,
}

/// A NUMA node of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NumaNode {
    /// Its number.
    pub id: u32,
    /// Its logical CPUs in the kernel's list form, such as `0-15,32-47`.
    pub cpus: String,
    /// Its memory in bytes.
    pub memory_bytes: u64,
}

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Disk {
    /// Where it is mounted.
    pub mount_point: String,
    /// Device or source.
    pub device: String,
    /// File system type.
    pub file_system: String,
    /// Size in bytes.
    pub total_bytes: u64,
    /// Bytes that an unprivileged process may still use.
    pub available_bytes: u64,
}

/// A network interface with its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Interface {
    /// Name, such as `eth0`.
    pub name: String,
    /// IP addresses without prefix length, IPv4 first.
    pub addresses: Vec<String>,
    /// Whether this is the loopback interface.
    pub loopback: bool,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Gpu {
    /// Place in the driver's list; may change at a reboot.
    pub index: u32,
    /// The driver's lasting identifier, such as `GPU-0bd5…`; allocations name this.
    pub uuid: String,
    /// Product name, such as `NVIDIA H100 80GB HBM3`.
    pub model: String,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// PCI address, such as `00000000:18:00.0`.
    pub pci_address: String,
    /// NUMA node that it is attached to, if known.
    pub numa_node: Option<u32>,
    /// CUDA compute capability, such as `9.0`.
    pub compute_capability: Option<String>,
    /// Whether it can be given to a job.
    pub healthy: bool,
}

impl Inventory {
    /// The interface that carries `address`, if one does.
    #[must_use]
    pub fn interface_of(&self, address: &str) -> Option<&Interface> {
        self.interfaces
            .iter()
            .find(|interface| interface.addresses.iter().any(|own| own == address))
    }
}
