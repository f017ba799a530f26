//! The GPU models that the fake can play, and the scenario text for "eight of these". Pure: it must not know the file
//! that the text ends up in. What a line of the text means is the parser's matter.

use std::fmt::{self, Write};

use crate::MAX_GPUS;
use crate::pci::Pci;

/// A GPU product, as NVML shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// What a specification calls it, such as `A100-40GB`; compared without regard to case.
    pub key: &'static str,
    /// Product name as the driver reports it.
    pub name: &'static str,
    /// Memory in MiB as the driver reports it.
    pub memory_mib: u64,
    /// CUDA compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Architecture as the scenario file spells it.
    pub architecture: &'static str,
    /// Brand as the scenario file spells it.
    pub brand: &'static str,
    /// PCI device and vendor id.
    pub pci_id: u32,
    /// Power limit in milliwatts.
    pub power_limit_mw: u32,
    /// NVLinks of one GPU; 0 if it has none.
    pub nvlinks: u32,
    /// Whether the links go to a switch, and not straight to the other GPUs.
    pub switched: bool,
    /// Whether it can be divided (MIG).
    pub mig: bool,
    /// Whether its memory has ECC.
    pub ecc: bool,
}

/// A data-centre GPU on a board with NVSwitch; the table's other rows differ from it field by field.
const SXM: Model = Model {
    key: "H100",
    name: "NVIDIA H100 80GB HBM3",
    memory_mib: 81_559,
    compute_capability: (9, 0),
    architecture: "hopper",
    brand: "nvidia",
    pci_id: 0x2330_10de,
    power_limit_mw: 700_000,
    nvlinks: 18,
    switched: true,
    mig: true,
    ecc: true,
};

/// A GPU on a PCIe card without NVLink.
const CARD: Model = Model {
    nvlinks: 0,
    switched: false,
    mig: false,
    architecture: "ada",
    compute_capability: (8, 9),
    ..SXM
};

/// All models, newest kind first.
pub const MODELS: &[Model] = &[
    Model {
        key: "B200",
        name: "NVIDIA B200",
        memory_mib: 183_359,
        compute_capability: (10, 0),
        architecture: "blackwell",
        pci_id: 0x2901_10de,
        power_limit_mw: 1_000_000,
        ..SXM
    },
    Model {
        key: "H200",
        name: "NVIDIA H200",
        memory_mib: 143_771,
        pci_id: 0x2335_10de,
        ..SXM
    },
    SXM,
    Model {
        key: "A100",
        name: "NVIDIA A100-SXM4-80GB",
        memory_mib: 81_920,
        compute_capability: (8, 0),
        architecture: "ampere",
        pci_id: 0x20b2_10de,
        power_limit_mw: 400_000,
        nvlinks: 12,
        ..SXM
    },
    Model {
        key: "A100-40GB",
        name: "NVIDIA A100-SXM4-40GB",
        memory_mib: 40_960,
        compute_capability: (8, 0),
        architecture: "ampere",
        pci_id: 0x20b0_10de,
        power_limit_mw: 400_000,
        nvlinks: 12,
        ..SXM
    },
    Model {
        key: "L40S",
        name: "NVIDIA L40S",
        memory_mib: 46_068,
        pci_id: 0x26b9_10de,
        power_limit_mw: 350_000,
        ..CARD
    },
    Model {
        key: "L4",
        name: "NVIDIA L4",
        memory_mib: 23_034,
        pci_id: 0x27b8_10de,
        power_limit_mw: 72_000,
        ..CARD
    },
    Model {
        key: "A10",
        name: "NVIDIA A10",
        memory_mib: 23_028,
        compute_capability: (8, 6),
        architecture: "ampere",
        pci_id: 0x2236_10de,
        power_limit_mw: 150_000,
        ..CARD
    },
    Model {
        key: "V100",
        name: "Tesla V100-SXM2-16GB",
        memory_mib: 16_384,
        compute_capability: (7, 0),
        architecture: "volta",
        brand: "tesla",
        pci_id: 0x1db1_10de,
        power_limit_mw: 300_000,
        nvlinks: 6,
        switched: false,
        mig: false,
        ..SXM
    },
    Model {
        key: "T4",
        name: "Tesla T4",
        memory_mib: 15_360,
        compute_capability: (7, 5),
        architecture: "turing",
        brand: "tesla",
        pci_id: 0x1eb8_10de,
        power_limit_mw: 70_000,
        ..CARD
    },
    Model {
        key: "RTX4090",
        name: "NVIDIA GeForce RTX 4090",
        memory_mib: 24_564,
        brand: "geforce",
        pci_id: 0x2684_10de,
        power_limit_mw: 450_000,
        ecc: false,
        ..CARD
    },
];

/// Why a specification such as `8xH100` was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpecError {
    /// A part is not of the form `NxMODEL`.
    Form {
        /// The part as it was written.
        part: String,
    },
    /// A part's number is not from 1 to [`MAX_GPUS`].
    Count {
        /// The part as it was written.
        part: String,
    },
    /// All parts together ask for more than [`MAX_GPUS`].
    Total {
        /// GPUs asked for.
        total: u32,
    },
    /// No model is called that.
    Model {
        /// The model as it was written.
        model: String,
    },
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SpecError::Form { part } => {
                write!(
                    f,
                    "{part:?} is not of the form NxMODEL, such as 8xH100 or 4xA100,4xL4"
                )
            }
            SpecError::Count { part } => {
                write!(f, "number of GPUs in {part:?} must be from 1 to {MAX_GPUS}")
            }
            SpecError::Total { total } => {
                write!(
                    f,
                    "{total} GPUs on one machine are too many, at most {MAX_GPUS}"
                )
            }
            SpecError::Model { model } => {
                let known: Vec<&str> = MODELS.iter().map(|known| known.key).collect();
                write!(f, "no GPU model {model:?}; known are {}", known.join(", "))
            }
        }
    }
}

impl std::error::Error for SpecError {}

/// The scenario text of a machine with the GPUs of `spec`, `NxMODEL[,NxMODEL…]` with 1 to [`MAX_GPUS`] GPUs in all.
/// `seed` names the machine: the same seed always gives the same UUIDs, another seed gives others.
///
/// # Errors
/// [`SpecError`] says which part is wrong, and which models are known.
pub fn scenario(spec: &str, seed: &str) -> Result<String, SpecError> {
    let models = parse_spec(spec)?;
    let mut text = String::from("driver 550.54.15\nnvml 12.550.54.15\ncuda 12040\n");
    for (index, model) in (0u32..).zip(&models) {
        push_gpu(&mut text, index, model, seed, models.len());
    }
    for (index, model) in (0u32..).zip(&models) {
        push_direct_links(&mut text, index, model, &models);
    }
    Ok(text)
}

fn parse_spec(spec: &str) -> Result<Vec<&'static Model>, SpecError> {
    let mut models = Vec::new();
    let mut total = 0u32;
    for part in spec.split(',').map(str::trim) {
        let form = || SpecError::Form {
            part: part.to_owned(),
        };
        let (count, key) = part.split_once(['x', 'X']).ok_or_else(form)?;
        if count.is_empty() || key.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) {
            return Err(form());
        }
        let model = MODELS
            .iter()
            .find(|model| model.key.eq_ignore_ascii_case(key));
        let model = model.ok_or_else(|| SpecError::Model {
            model: key.to_owned(),
        })?;
        let count = count
            .parse()
            .ok()
            .filter(|count| (1..=MAX_GPUS).contains(count));
        let count = count.ok_or_else(|| SpecError::Count {
            part: part.to_owned(),
        })?;
        total = total.saturating_add(count);
        if total <= MAX_GPUS {
            models.extend((0..count).map(|_| model));
        }
    }
    if total > MAX_GPUS {
        return Err(SpecError::Total { total });
    }
    Ok(models)
}

fn push_gpu(text: &mut String, index: u32, model: &Model, seed: &str, count: usize) {
    // Machines with four GPUs or more have two sockets, each with half of them.
    let numa = u32::from(count >= 4 && index as usize >= count / 2);
    let (major, minor) = model.compute_capability;
    let switched = if model.switched { model.nvlinks } else { 0 };
    let idle_mw = model.power_limit_mw / 10;
    let feature = |present: bool, state: &'static str| if present { state } else { "none" };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "gpu {index} name \"{}\" uuid {} serial {} memory_mib {} pci {} pci_id {:08x} numa {numa} \
         cuda_capability {major}.{minor} architecture {} brand {} nvlinks {switched} ecc {} mig {} \
         power_limit_mw {} power_mw {idle_mw} util 0 temp 35",
        model.name,
        gpu_uuid(seed, index),
        1_320_000_000_000 + mix(seed, index, 2) % 1_000_000_000,
        model.memory_mib,
        Pci::of_index(index),
        model.pci_id,
        model.architecture,
        model.brand,
        feature(model.ecc, "on"),
        feature(model.mig, "off"),
        model.power_limit_mw,
    );
}

/// Links of models without a switch go round the other GPUs of the same model.
fn push_direct_links(text: &mut String, index: u32, model: &Model, models: &[&Model]) {
    if model.switched || model.nvlinks == 0 {
        return;
    }
    let peers: Vec<u32> = (0u32..)
        .zip(models)
        .filter(|(peer, other)| *peer != index && other.key == model.key)
        .map(|(peer, _)| peer)
        .collect();
    for (link, peer) in (0..model.nvlinks).zip(peers.iter().cycle()) {
        let _ = writeln!(text, "nvlink {index} {link} to {peer}");
    }
}

/// The UUID of GPU `index` on the machine that `seed` names, in the form of real ones.
#[must_use]
pub fn gpu_uuid(seed: &str, index: u32) -> String {
    let (high, low) = (mix(seed, index, 0), mix(seed, index, 1));
    format!(
        "GPU-{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// 64 bits from a seed, an index and a lane: FNV-1a, then the finisher of SplitMix64, because FNV alone leaves inputs
/// that differ in their last byte alike.
fn mix(seed: &str, index: u32, lane: u8) -> u64 {
    let bytes = seed.bytes().chain([0, lane]).chain(index.to_le_bytes());
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::parse::parse;

    #[test]
    fn every_model_makes_a_scenario_that_reads_back() {
        for model in MODELS {
            for count in [1, 2, 8, 64] {
                let spec = format!("{count}x{}", model.key.to_lowercase());
                let machine = parse(&scenario(&spec, "n1").unwrap()).unwrap();
                assert_eq!(machine.gpus.len(), count);
                for gpu in &machine.gpus {
                    assert_eq!(gpu.name, model.name);
                    assert_eq!(gpu.memory_mib, model.memory_mib);
                    let (major, minor) = model.compute_capability;
                    assert_eq!(gpu.cuda_capability, (major, minor));
                    assert_eq!(gpu.pci_id, model.pci_id);
                }
            }
        }
    }

    #[test]
    fn parts_keep_their_order_and_split_over_two_sockets() {
        let machine = parse(&scenario("2xH100, 2XL4", "n1").unwrap()).unwrap();
        let names: Vec<&str> = machine.gpus.iter().map(|gpu| gpu.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "NVIDIA H100 80GB HBM3",
                "NVIDIA H100 80GB HBM3",
                "NVIDIA L4",
                "NVIDIA L4"
            ]
        );
        let numa: Vec<Option<u32>> = machine.gpus.iter().map(|gpu| gpu.numa).collect();
        assert_eq!(numa, [Some(0), Some(0), Some(1), Some(1)]);
    }

    #[test]
    fn uuids_are_stable_distinct_and_well_formed() {
        assert_eq!(gpu_uuid("n1", 0), gpu_uuid("n1", 0));
        let mut seen = BTreeSet::new();
        for node in 0..500 {
            for index in 0..8 {
                let uuid = gpu_uuid(&format!("cluster/n{node}"), index);
                let lengths: Vec<usize> = uuid.split('-').map(str::len).collect();
                assert_eq!(lengths, [3, 8, 4, 4, 4, 12], "{uuid}");
                assert!(seen.insert(uuid));
            }
        }
        // A seed that ends in a digit and an index must not run into each other.
        assert_ne!(gpu_uuid("n1", 1), gpu_uuid("n11", 1));
    }

    #[test]
    fn wrong_specifications_are_told_apart() {
        let form = |part: &str| SpecError::Form {
            part: part.to_owned(),
        };
        let count = |part: &str| SpecError::Count {
            part: part.to_owned(),
        };
        for (spec, error) in [
            ("", form("")),
            ("H100", form("H100")),
            ("8x", form("8x")),
            ("xH100", form("xH100")),
            ("-1xH100", form("-1xH100")),
            ("8xH100,", form("")),
            ("0xH100", count("0xH100")),
            ("65xH100", count("65xH100")),
            ("99999999999xH100", count("99999999999xH100")),
            ("64xH100,1xL4", SpecError::Total { total: 65 }),
            (
                "8xH1000",
                SpecError::Model {
                    model: "H1000".to_owned(),
                },
            ),
        ] {
            assert_eq!(scenario(spec, "n1"), Err(error), "{spec}");
        }
        let text = scenario("8xH1000", "n1").unwrap_err().to_string();
        for model in MODELS {
            assert!(text.contains(model.key), "{text}");
        }
    }
}
