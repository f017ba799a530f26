//! What this machine has and what of it jobs may use: the host's and the GPUs' probes put together.

pub mod gpu;
pub mod host;
mod parse;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use trainyard_common::inventory::{Gpu, Inventory};
use trainyard_common::resources::Resources;

use self::gpu::GpuReader;
use crate::config::Config;

/// Reads the machine whenever a session begins. It blocks, for seconds if a driver hangs.
#[derive(Debug)]
pub(crate) struct Probe {
    gpus: Mutex<GpuReader>,
    limits: Limits,
}

/// What the configuration lets jobs have.
#[derive(Debug, Default)]
struct Limits {
    cpu_milli: Option<u64>,
    memory_bytes: Option<u64>,
    gpus: Option<Vec<String>>,
}

impl Probe {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            gpus: Mutex::new(GpuReader::open(&config.nvml_library)),
            limits: Limits {
                cpu_milli: config.cpu_milli,
                memory_bytes: config.memory_bytes,
                gpus: config.gpus.clone(),
            },
        }
    }

    /// Everything about the machine, with its capacity. `dir` is the agent's data directory.
    pub(crate) fn read(&self, dir: &Path) -> Inventory {
        let mut inventory = host::read(dir);
        let found = self
            .gpus
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read();
        inventory.gpus = found.gpus;
        inventory.gpu_driver = found.driver;
        self.limits.apply(&mut inventory);
        inventory
    }
}

impl Limits {
    /// Sets the capacity, and takes the GPUs that jobs may not have out of it.
    fn apply(&self, inventory: &mut Inventory) {
        if let Some(allowed) = &self.gpus {
            for gpu in &mut inventory.gpus {
                gpu.healthy &= allowed.iter().any(|name| names(name, gpu));
            }
            for name in allowed {
                if !inventory.gpus.iter().any(|gpu| names(name, gpu)) {
                    tracing::warn!(gpu = name, "a configured GPU is not on this machine");
                }
            }
        }
        let cpu_milli = u64::from(inventory.cpu.threads) * 1000;
        let memory_bytes = inventory.memory_bytes;
        inventory.capacity = Resources {
            cpu_milli: self
                .cpu_milli
                .map_or(cpu_milli, |limit| limit.min(cpu_milli)),
            memory_bytes: self
                .memory_bytes
                .map_or(memory_bytes, |limit| limit.min(memory_bytes)),
            gpus: u32::try_from(usable_gpus(inventory).len()).unwrap_or(u32::MAX),
        };
    }
}

/// The UUIDs of the GPUs that can be given to jobs.
pub(crate) fn usable_gpus(inventory: &Inventory) -> BTreeSet<String> {
    let healthy = inventory.gpus.iter().filter(|gpu| gpu.healthy);
    healthy.map(|gpu| gpu.uuid.clone()).collect()
}

fn names(name: &str, gpu: &Gpu) -> bool {
    name == gpu.uuid || name.parse() == Ok(gpu.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Inventory {
        let gpu = |index: u32, healthy| Gpu {
            index,
            uuid: format!("GPU-{index}"),
            healthy,
            ..Gpu::default()
        };
        let mut inventory = Inventory {
            memory_bytes: 1000,
            gpus: vec![gpu(0, true), gpu(1, false), gpu(2, true)],
            ..Inventory::default()
        };
        inventory.cpu.threads = 8;
        inventory
    }

    #[test]
    fn capacity_is_what_is_there_unless_the_configuration_says_less() {
        let mut inventory = machine();
        Limits::default().apply(&mut inventory);
        let all = Resources {
            cpu_milli: 8000,
            memory_bytes: 1000,
            gpus: 2,
        };
        assert_eq!(inventory.capacity, all);
        let mut inventory = machine();
        let limits = Limits {
            cpu_milli: Some(500),
            memory_bytes: Some(5000),
            gpus: Some(vec!["GPU-2".to_owned(), "1".to_owned()]),
        };
        limits.apply(&mut inventory);
        let less = Resources {
            cpu_milli: 500,
            memory_bytes: 1000,
            gpus: 1,
        };
        assert_eq!(inventory.capacity, less);
        assert_eq!(usable_gpus(&inventory), ["GPU-2".to_owned()].into());
    }
}
