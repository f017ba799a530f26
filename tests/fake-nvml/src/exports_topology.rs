//! NVML's C functions about what a GPU is close to: processors, memory, and other GPUs.
#![expect(
    unsafe_code,
    reason = "exporting a C name is unsafe: no other library may define it"
)]

use std::ffi::{c_uint, c_ulong};

use crate::abi::{Code, DeviceHandle, Out, PciInfo};
use crate::exports::{device_functions, pci_info};
use crate::library::gpu_of;
use crate::parse::MAX_LINKS;
use crate::pci::Pci;
use crate::scenario::{Gpu, Link};

/// Where the switch at the far end of NVLinks sits, and its PCI id: one address for all links is enough to tell that
/// they meet.
const SWITCH: Pci = Pci {
    domain: 0,
    bus: 0x07,
    device: 0,
};
const SWITCH_ID: u32 = 0x22a3_10de;

device_functions! {
    nvmlDeviceGetNumaNodeId(node: Out<c_uint>) |_, gpu| {
        node.put(gpu.numa.ok_or(Code::NOT_SUPPORTED)?)
    };

    nvmlDeviceGetMemoryAffinity(length: c_uint, nodes: Out<c_ulong>, scope: c_uint) |_, gpu| {
        // NVML_AFFINITY_SCOPE_NODE and NVML_AFFINITY_SCOPE_SOCKET.
        if scope > 1 {
            return Err(Code::INVALID_ARGUMENT);
        }
        put_mask(&[gpu.numa.ok_or(Code::NOT_SUPPORTED)?], length, &nodes)
    };

    nvmlDeviceGetCpuAffinity(length: c_uint, cpus: Out<c_ulong>) |_, gpu| {
        if gpu.cpus.is_empty() {
            return Err(Code::NOT_SUPPORTED);
        }
        put_mask(&gpu.cpus, length, &cpus)
    };

    nvmlDeviceGetTopologyCommonAncestor(other: DeviceHandle, level: Out<c_uint>) |machine, gpu| {
        let other = gpu_of(machine, other)?;
        other.answers("nvmlDeviceGetTopologyCommonAncestor")?;
        level.put(machine.ancestor(gpu, other))
    };

    nvmlDeviceGetNvLinkState(link: c_uint, active: Out<c_uint>) |_, gpu| {
        active.put(link_of(gpu, link)?.up.into())
    };

    nvmlDeviceGetNvLinkRemotePciInfo_v2(link: c_uint, info: Out<PciInfo>) |machine, gpu| {
        let link = link_of(gpu, link)?;
        if !link.up {
            return Err(Code::NOT_SUPPORTED);
        }
        let peer = link.peer.and_then(|peer| machine.gpus.get(peer as usize));
        info.put(peer.map_or(pci_info(SWITCH, SWITCH_ID), |peer| pci_info(peer.pci, peer.pci_id)))
    };
}

/// Link `link` of a GPU; one that no GPU can have is an invalid argument, one that this GPU lacks is not supported.
fn link_of(gpu: &Gpu, link: c_uint) -> Result<Link, Code> {
    if link >= MAX_LINKS {
        return Err(Code::INVALID_ARGUMENT);
    }
    gpu.links.get(&link).copied().ok_or(Code::NOT_SUPPORTED)
}

/// Sets the bits of `members` in an array of `length` words.
fn put_mask(members: &[u32], length: c_uint, words: &Out<c_ulong>) -> Result<(), Code> {
    let needed = members
        .iter()
        .max()
        .map_or(0, |most| most / c_ulong::BITS + 1);
    if needed > length {
        return Err(Code::INSUFFICIENT_SIZE);
    }
    let mut mask = vec![0; needed as usize];
    for member in members {
        if let Some(word) = mask.get_mut((member / c_ulong::BITS) as usize) {
            *word |= 1 << (member % c_ulong::BITS);
        }
    }
    // The caller's words beyond the highest member are to be zero as well, however many it has room for; more than the
    // kernel's largest machine needs is a caller's mistake that is not followed.
    mask.resize(length.min(MAX_WORDS).max(needed) as usize, 0);
    words.put_all(length, &mask)
}

/// Words for 8192 processors of 64 to a word.
const MAX_WORDS: u32 = 128;
