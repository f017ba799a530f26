//! What a machine has. Descriptive texts and numbers, taken over as they are.

use trainyard_common::inventory::{Cpu, Disk, Gpu, Interface, Inventory, NumaNode};

use super::InvalidField;
use super::scalar::{list, optional_text, required};
use crate::v1;

impl From<&Inventory> for v1::Inventory {
    fn from(inventory: &Inventory) -> Self {
        let Inventory {
            hostname,
            os,
            kernel,
            architecture,
            cpu,
            memory_bytes,
            numa,
            disks,
            interfaces,
            gpus,
            gpu_driver,
            capacity,
        } = inventory;
        Self {
            hostname: hostname.clone(),
            os: os.clone(),
            kernel: kernel.clone(),
            architecture: architecture.clone(),
            cpu: Some(cpu.into()),
            memory_bytes: *memory_bytes,
            numa: numa.iter().map(Into::into).collect(),
            disks: disks.iter().map(Into::into).collect(),
            interfaces: interfaces.iter().map(Into::into).collect(),
            gpus: gpus.iter().map(Into::into).collect(),
            gpu_driver: gpu_driver.clone().unwrap_or_default(),
            capacity: Some(capacity.into()),
        }
    }
}

impl TryFrom<v1::Inventory> for Inventory {
    type Error = InvalidField;

    fn try_from(message: v1::Inventory) -> Result<Self, InvalidField> {
        let v1::Inventory {
            hostname,
            os,
            kernel,
            architecture,
            cpu,
            memory_bytes,
            numa,
            disks,
            interfaces,
            gpus,
            gpu_driver,
            capacity,
        } = message;
        Ok(Self {
            hostname,
            os,
            kernel,
            architecture,
            cpu: required("cpu", cpu)?,
            memory_bytes,
            numa: list("numa", numa)?,
            disks: list("disks", disks)?,
            interfaces: list("interfaces", interfaces)?,
            gpus: list("gpus", gpus)?,
            gpu_driver: optional_text(gpu_driver),
            capacity: required("capacity", capacity)?,
        })
    }
}

impl From<&Cpu> for v1::Cpu {
    fn from(cpu: &Cpu) -> Self {
        let Cpu {
            model,
            sockets,
            cores,
            threads,
        } = cpu;
        Self {
            model: model.clone(),
            sockets: *sockets,
            cores: *cores,
            threads: *threads,
        }
    }
}

impl TryFrom<v1::Cpu> for Cpu {
    type Error = InvalidField;

    fn try_from(message: v1::Cpu) -> Result<Self, InvalidField> {
        let v1::Cpu {
            model,
            sockets,
            cores,
            threads,
        } = message;
        Ok(Self {
            model,
            sockets,
            cores,
            threads,
        })
    }
}

impl From<&NumaNode> for v1::NumaNode {
    fn from(numa: &NumaNode) -> Self {
        let NumaNode {
            id,
            cpus,
            memory_bytes,
        } = numa;
        Self {
            id: *id,
            cpus: cpus.clone(),
            memory_bytes: *memory_bytes,
        }
    }
}

impl TryFrom<v1::NumaNode> for NumaNode {
    type Error = InvalidField;

    fn try_from(message: v1::NumaNode) -> Result<Self, InvalidField> {
        let v1::NumaNode {
            id,
            cpus,
            memory_bytes,
        } = message;
        Ok(Self {
            id,
            cpus,
            memory_bytes,
        })
    }
}

impl From<&Disk> for v1::Disk {
    fn from(disk: &Disk) -> Self {
        let Disk {
            mount_point,
            device,
            file_system,
            total_bytes,
            available_bytes,
        } = disk;
        Self {
            mount_point: mount_point.clone(),
            device: device.clone(),
            file_system: file_system.clone(),
            total_bytes: *total_bytes,
            available_bytes: *available_bytes,
        }
    }
}

impl TryFrom<v1::Disk> for Disk {
    type Error = InvalidField;

    fn try_from(message: v1::Disk) -> Result<Self, InvalidField> {
        let v1::Disk {
            mount_point,
            device,
            file_system,
            total_bytes,
            available_bytes,
        } = message;
        Ok(Self {
            mount_point,
            device,
            file_system,
            total_bytes,
            available_bytes,
        })
    }
}

impl From<&Interface> for v1::Interface {
    fn from(interface: &Interface) -> Self {
        let Interface {
            name,
            addresses,
            loopback,
        } = interface;
        Self {
            name: name.clone(),
            addresses: addresses.clone(),
            loopback: *loopback,
        }
    }
}

impl TryFrom<v1::Interface> for Interface {
    type Error = InvalidField;

    fn try_from(message: v1::Interface) -> Result<Self, InvalidField> {
        let v1::Interface {
            name,
            addresses,
            loopback,
        } = message;
        Ok(Self {
            name,
            addresses,
            loopback,
        })
    }
}

impl From<&Gpu> for v1::Gpu {
    fn from(gpu: &Gpu) -> Self {
        let Gpu {
            index,
            uuid,
            model,
            memory_bytes,
            pci_address,
            numa_node,
            compute_capability,
            healthy,
        } = gpu;
        Self {
            index: *index,
            uuid: uuid.clone(),
            model: model.clone(),
            memory_bytes: *memory_bytes,
            pci_address: pci_address.clone(),
            numa_node: *numa_node,
            compute_capability: compute_capability.clone().unwrap_or_default(),
            healthy: *healthy,
        }
    }
}

impl TryFrom<v1::Gpu> for Gpu {
    type Error = InvalidField;

    fn try_from(message: v1::Gpu) -> Result<Self, InvalidField> {
        let v1::Gpu {
            index,
            uuid,
            model,
            memory_bytes,
            pci_address,
            numa_node,
            compute_capability,
            healthy,
        } = message;
        if uuid.is_empty() {
            // Allocations name GPUs by it: one without could be given out any number of times.
            return Err(InvalidField::missing("uuid"));
        }
        Ok(Self {
            index,
            uuid,
            model,
            memory_bytes,
            pci_address,
            numa_node,
            compute_capability: optional_text(compute_capability),
            healthy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_field_is_named() {
        let inventory = Inventory {
            gpus: vec![Gpu {
                uuid: "GPU-1".into(),
                ..Gpu::default()
            }],
            ..Inventory::default()
        };
        let whole = v1::Inventory::from(&inventory);
        assert_eq!(Inventory::try_from(whole.clone()), Ok(inventory));
        let field_of = |change: fn(&mut v1::Inventory)| {
            let mut message = whole.clone();
            change(&mut message);
            Inventory::try_from(message).expect_err("incomplete").field
        };
        assert_eq!(field_of(|m| m.cpu = None), "cpu");
        assert_eq!(field_of(|m| m.capacity = None), "capacity");
        assert_eq!(field_of(|m| m.gpus[0].uuid.clear()), "gpus[0].uuid");
    }
}
