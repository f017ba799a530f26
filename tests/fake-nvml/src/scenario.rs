//! The machine that a scenario describes: plain data. It must not know the file's syntax nor NVML's C types.

use std::collections::BTreeMap;

use crate::abi::Code;
use crate::pci::Pci;

/// A machine with its driver and GPUs.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Driver version.
    pub(crate) driver: String,
    /// Version of the NVML library.
    pub(crate) nvml: String,
    /// CUDA version of the driver: major * 1000 + minor * 10.
    pub(crate) cuda: i32,
    /// What initialisation answers instead of success.
    pub(crate) init_error: Option<Code>,
    /// GPUs; a GPU's place is its index.
    pub(crate) gpus: Vec<Gpu>,
    /// Critical errors in the order of the file: index of the GPU, Xid.
    pub(crate) xids: Vec<(u32, u64)>,
    /// Functions of NVML that fail, and how.
    pub(crate) failures: BTreeMap<String, Code>,
    /// Stated closeness of two GPUs, smaller index first, as NVML's topology level.
    pub(crate) topology: BTreeMap<(u32, u32), u32>,
}

impl Machine {
    /// A machine with a driver and no GPU.
    pub(crate) const fn empty() -> Machine {
        Machine {
            driver: String::new(),
            nvml: String::new(),
            cuda: 12_040,
            init_error: None,
            gpus: Vec::new(),
            xids: Vec::new(),
            failures: BTreeMap::new(),
            topology: BTreeMap::new(),
        }
    }

    /// How close two GPUs are, as NVML's topology level: stated, or derived from their NUMA nodes.
    pub(crate) fn ancestor(&self, one: &Gpu, other: &Gpu) -> u32 {
        let pair = (one.index.min(other.index), one.index.max(other.index));
        match self.topology.get(&pair) {
            _ if one.index == other.index => level::INTERNAL,
            Some(stated) => *stated,
            None if one.numa == other.numa => level::NODE,
            None => level::SYSTEM,
        }
    }
}

/// `nvmlGpuTopologyLevel_t`.
pub(crate) mod level {
    pub(crate) const INTERNAL: u32 = 0;
    pub(crate) const SINGLE: u32 = 10;
    pub(crate) const MULTIPLE: u32 = 20;
    pub(crate) const HOSTBRIDGE: u32 = 30;
    pub(crate) const NODE: u32 = 40;
    pub(crate) const SYSTEM: u32 = 50;
}

/// One GPU and what NVML says of it.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) serial: String,
    /// The N of `/dev/nvidiaN`.
    pub(crate) minor: u32,
    pub(crate) memory_mib: u64,
    /// Memory that the driver keeps for itself.
    pub(crate) reserved_mib: u64,
    /// Memory in use beside that of the processes.
    pub(crate) used_mib: u64,
    pub(crate) pci: Pci,
    /// PCI device and vendor id.
    pub(crate) pci_id: u32,
    /// Percent of time in which a kernel ran.
    pub(crate) util: u32,
    /// Percent of time in which memory was read or written.
    pub(crate) memory_util: u32,
    /// Degrees Celsius.
    pub(crate) temp: u32,
    pub(crate) power_mw: u32,
    pub(crate) power_limit_mw: u32,
    pub(crate) numa: Option<u32>,
    /// Close logical CPUs; none stated means that the driver does not say.
    pub(crate) cpus: Vec<u32>,
    pub(crate) cuda_capability: (u32, u32),
    /// `nvmlDeviceArchitecture_t`.
    pub(crate) architecture: u32,
    /// `nvmlBrandType_t`.
    pub(crate) brand: u32,
    /// Links by number.
    pub(crate) links: BTreeMap<u32, Link>,
    pub(crate) ecc: Feature,
    pub(crate) mig: Feature,
    pub(crate) ecc_corrected: u64,
    pub(crate) ecc_uncorrected: u64,
    pub(crate) remapped: RemappedRows,
    pub(crate) lost: Lost,
    /// Functions of NVML that fail for this GPU alone, and how.
    pub(crate) failures: BTreeMap<String, Code>,
    pub(crate) processes: Vec<Process>,
}

impl Gpu {
    /// A middling GPU, for what a scenario leaves out.
    pub(crate) fn new(index: u32) -> Gpu {
        Gpu {
            index,
            name: "NVIDIA Fake GPU".to_owned(),
            uuid: crate::gpu_uuid("fake", index),
            serial: format!("{:013}", 1_320_000_000_000 + u64::from(index)),
            minor: index,
            memory_mib: 16_384,
            reserved_mib: 0,
            used_mib: 0,
            pci: Pci::of_index(index),
            pci_id: 0x20b2_10de,
            util: 0,
            memory_util: 0,
            temp: 35,
            power_mw: 50_000,
            power_limit_mw: 400_000,
            numa: None,
            cpus: Vec::new(),
            cuda_capability: (8, 0),
            architecture: 7,
            brand: 14,
            links: BTreeMap::new(),
            ecc: Feature::On,
            mig: Feature::None,
            ecc_corrected: 0,
            ecc_uncorrected: 0,
            remapped: RemappedRows::default(),
            lost: Lost::No,
            failures: BTreeMap::new(),
            processes: Vec::new(),
        }
    }

    /// Whether the function `name` may answer for this GPU.
    pub(crate) fn answers(&self, name: &str) -> Result<(), Code> {
        // What a driver keeps of a GPU once it has been attached, and can tell without asking the GPU.
        const CACHED: &[&str] = &[
            "nvmlDeviceGetHandleByIndex_v2",
            "nvmlDeviceGetHandleByUUID",
            "nvmlDeviceGetHandleByPciBusId_v2",
            "nvmlDeviceGetIndex",
            "nvmlDeviceGetMinorNumber",
            "nvmlDeviceGetName",
            "nvmlDeviceGetUUID",
            "nvmlDeviceGetPciInfo_v3",
        ];
        if let Some(code) = self.failures.get(name) {
            return Err(*code);
        }
        match self.lost {
            Lost::No => Ok(()),
            Lost::Attached if CACHED.contains(&name) => Ok(()),
            Lost::Attached | Lost::Fully => Err(Code::GPU_IS_LOST),
        }
    }

    /// Bytes of memory that are not free, without what the driver keeps.
    pub(crate) fn used_bytes(&self) -> u64 {
        let processes = self.processes.iter().map(|process| process.memory_mib);
        mib(processes.fold(self.used_mib, u64::saturating_add))
    }
}

/// Bytes of so many MiB.
pub(crate) fn mib(amount: u64) -> u64 {
    amount.saturating_mul(1 << 20)
}

/// Whether a GPU fell off the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// It is there.
    No,
    /// It was lost after NVML had attached it: its identity can still be read.
    Attached,
    /// Nothing of it can be read, not even a handle.
    Fully,
}

/// A feature that a GPU may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Feature {
    /// The GPU does not have it.
    None,
    Off,
    On,
}

/// An NVLink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) up: bool,
    /// GPU at its other end; otherwise a switch.
    pub(crate) peer: Option<u32>,
}

/// Rows of GPU memory that were replaced by spare ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RemappedRows {
    pub(crate) corrected: u32,
    pub(crate) uncorrected: u32,
    /// A reset is needed before more can be replaced.
    pub(crate) pending: bool,
    /// No spare row was left.
    pub(crate) failed: bool,
}

/// A process that computes on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) memory_mib: u64,
}
