//! A machine with an agent: its clock, power, disk and process table. What is here is the truth that everything else is
//! held against. It must not know what the coordinator believes.

use std::collections::{BTreeMap, BTreeSet};

use trainyard_agent_core::Uploaded;
use trainyard_common::ids::{AttemptRef, BundleRef, Incarnation, NodeId, Term};
use trainyard_common::inventory::{Cpu, Gpu, Inventory};
use trainyard_common::member::MemberSpec;
use trainyard_common::resources::Resources;

use super::agent::Agent;
use super::carrier::{BundleDir, Carrier};
use super::clock::{HostClock, Micros};
use super::coordinator::drifting;
use super::network::Line;
use super::rng::Rng;
use super::shim::{Shim, State};
use super::swarm::Swarm;

/// What a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Shim,
    Rank(u32),
    /// Started by a rank, and not waited for by anybody.
    Child,
}

/// A live process.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    /// Its number in the process table; the same ones come again after a reboot.
    pub(crate) pid: u32,
    pub(crate) attempt: AttemptRef,
    /// In which it runs, if it does.
    pub(crate) bundle: Option<BundleRef>,
    /// The job's name, which is a job's own in this world.
    pub(crate) job: String,
    pub(crate) role: Role,
    pub(crate) ignores_term: bool,
    /// How long it cannot die after SIGKILL.
    pub(crate) stuck_for: Micros,
    pub(crate) killed: bool,
}

/// What an agent keeps about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Kept {
    pub(crate) incarnation: Incarnation,
    pub(crate) term: Term,
}

/// A file that was written whole and synced, or damaged since.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum File<T> {
    #[default]
    Missing,
    Whole(T),
    Damaged,
}

impl<T> File<T> {
    pub(crate) fn read(&self) -> Option<&T> {
        match self {
            Self::Whole(value) => Some(value),
            Self::Missing | Self::Damaged => None,
        }
    }

    pub(crate) fn exists(&self) -> bool {
        !matches!(self, Self::Missing)
    }

    pub(crate) fn damage(&mut self) -> bool {
        let there = self.exists();
        if there {
            *self = Self::Damaged;
        }
        there
    }
}

/// An attempt's directory.
#[derive(Debug, Clone)]
pub(crate) struct Dir {
    pub(crate) member: File<MemberSpec>,
    /// The boot in which it was made.
    pub(crate) boot: u64,
    /// `shim.json`: a shim came up.
    pub(crate) shim: bool,
    pub(crate) go: bool,
    pub(crate) status: File<State>,
    pub(crate) upload: File<Uploaded>,
}

impl Disk {
    /// Whether a file of an attempt is damaged.
    pub(crate) fn is_damaged(&self) -> bool {
        let damaged = |dir: &Dir| dir.status == File::Damaged || dir.upload == File::Damaged;
        self.dirs.values().any(damaged)
    }
}

/// A machine's disk.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    pub(crate) agent: File<Kept>,
    pub(crate) dirs: BTreeMap<AttemptRef, Dir>,
    pub(crate) bundles: BTreeMap<BundleRef, BundleDir>,
}

/// A machine.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: String,
    /// Whom its certificate says it is.
    pub(crate) node: Option<NodeId>,
    pub(crate) clock: HostClock,
    pub(crate) inventory: Inventory,
    pub(crate) powered: bool,
    pub(crate) boot: u64,
    pub(crate) disk: Disk,
    pub(crate) disk_full: bool,
    pub(crate) processes: BTreeMap<u64, Process>,
    pub(crate) next_pid: u32,
    pub(crate) shims: BTreeMap<AttemptRef, Shim>,
    /// By number: several may have been started for one bundle.
    pub(crate) carriers: BTreeMap<u64, Carrier>,
    pub(crate) agent: Option<Agent>,
    /// Agents that die again within seconds, until then.
    pub(crate) crash_loop_until: Micros,
    pub(crate) paused_until: Micros,
    pub(crate) line: Line,
    /// Somebody made a copy of its disk and started it elsewhere, or it is that copy.
    pub(crate) doubled: bool,
    /// An operator declared it gone without looking: what lives on it then is nobody's any more.
    pub(crate) taken_for_gone: bool,
    /// It is a copy that an operator switched off for good.
    pub(crate) scrapped: bool,
    /// The coordinator refuses it until a person does something; why.
    pub(crate) refused: Option<String>,
    /// An operator is on the way.
    pub(crate) operator_called: bool,
    /// How often an operator had to see to its identity.
    pub(crate) repairs: u32,
}

impl Host {
    pub(crate) fn new(index: usize, rng: &mut Rng, swarm: &Swarm) -> Self {
        let gpus = rng.pick(&[0, 0, 1, 2, 4, 8]).unwrap_or(0);
        let cpus = rng.pick(&[2, 4, 8, 8, 16]).unwrap_or(4);
        let name = format!("m{index}");
        Self {
            inventory: inventory(&name, cpus, gpus),
            name,
            node: None,
            clock: drifting(rng, swarm),
            powered: true,
            boot: 1,
            disk: Disk::default(),
            disk_full: false,
            processes: BTreeMap::new(),
            next_pid: 300,
            shims: BTreeMap::new(),
            carriers: BTreeMap::new(),
            agent: None,
            crash_loop_until: 0,
            paused_until: 0,
            line: Line::default(),
            doubled: false,
            taken_for_gone: false,
            scrapped: false,
            refused: None,
            operator_called: false,
            repairs: 0,
        }
    }

    /// Makes another machine of it.
    pub(crate) fn shape(&mut self, cpus: u32, gpus: u32) {
        self.inventory = inventory(&self.name, cpus, gpus);
    }

    pub(crate) fn pid(&mut self) -> u32 {
        self.next_pid += 1;
        self.next_pid
    }

    /// Live processes of an attempt that are not its shim.
    pub(crate) fn living(&self, attempt: AttemptRef) -> impl Iterator<Item = (&u64, &Process)> {
        self.processes
            .iter()
            .filter(move |(_, process)| process.attempt == attempt && process.role != Role::Shim)
    }

    pub(crate) fn lives(&self, attempt: AttemptRef) -> bool {
        self.living(attempt).next().is_some()
    }

    /// Attempts of which a process lives here that is not a shim.
    pub(crate) fn attempts_alive(&self) -> BTreeSet<AttemptRef> {
        self.processes
            .values()
            .filter(|process| process.role != Role::Shim)
            .map(|process| process.attempt)
            .collect()
    }

    pub(crate) fn boot_id(&self) -> String {
        format!("{}-boot-{}", self.name, self.boot)
    }
}

fn inventory(name: &str, cpus: u32, gpus: u32) -> Inventory {
    let gpu = |index| Gpu {
        index,
        uuid: format!("GPU-{name}-{index}"),
        model: "NVIDIA H100 80GB HBM3".to_owned(),
        memory_bytes: 80 << 30,
        numa_node: Some(index / 4),
        healthy: true,
        ..Gpu::default()
    };
    Inventory {
        hostname: name.to_owned(),
        cpu: Cpu {
            threads: cpus,
            ..Cpu::default()
        },
        memory_bytes: 64 << 30,
        gpus: (0..gpus).map(gpu).collect(),
        capacity: Resources {
            cpu_milli: u64::from(cpus) * 1000,
            memory_bytes: 64 << 30,
            gpus,
        },
        ..Inventory::default()
    }
}
