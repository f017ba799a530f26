//! Amounts of what a node has and a member is given. Integers only: milli-CPUs, bytes, whole GPUs.

use serde::{Deserialize, Serialize};

/// CPUs, memory and GPUs, of a node or of one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a logical CPU.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Whole GPUs.
    pub gpus: u32,
}

impl Resources {
    /// Whether `self` is at most `free` in each kind.
    #[must_use]
    pub fn fits(&self, free: &Self) -> bool {
        self.cpu_milli <= free.cpu_milli
            && self.memory_bytes <= free.memory_bytes
            && self.gpus <= free.gpus
    }

    /// What is left of `self` after taking `other`, or nothing if there is not enough of some kind.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Option<Self> {
        Some(Self {
            cpu_milli: self.cpu_milli.checked_sub(other.cpu_milli)?,
            memory_bytes: self.memory_bytes.checked_sub(other.memory_bytes)?,
            gpus: self.gpus.checked_sub(other.gpus)?,
        })
    }

    /// The sum, at most the largest representable amounts.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            gpus: self.gpus.saturating_add(other.gpus),
        }
    }
}
