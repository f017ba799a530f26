//! Reads this machine's GPUs through the driver's own library, NVML. It owns the library's handle and the judgement
//! whether a GPU can be given to a job; it does not know what jobs are, nor who asks.
//!
//! All calls block, on a sick driver for a long time: callers run them on a blocking thread and do not hang their
//! session on them.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::PciInfo;
use nvml_wrapper::{Device, Nvml};
use tracing::{debug, info, warn};
use trainyard_common::inventory::Gpu;
use trainyard_common::limits::MAX_GPUS_PER_NODE;

/// The name under which drivers install NVML. The name without `.1` comes only with development packages.
pub const DEFAULT_LIBRARY: &str = "libnvidia-ml.so.1";

/// 64-bit words of a set of NUMA nodes: the kernel has at most 1024 of them.
const NUMA_WORDS: usize = 16;

/// `NVML_AFFINITY_SCOPE_NODE`.
const SCOPE_NODE: u32 = 0;

/// What a reading found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuProbe {
    /// Version of the driver.
    pub driver: Option<String>,
    /// GPUs in index order; unhealthy ones too, as long as it is known which ones they are.
    pub gpus: Vec<Gpu>,
    /// Why NVML could not be asked, as a sentence for people. On a machine without GPUs this is how it should be.
    pub absent_reason: Option<String>,
    /// What is wrong with single GPUs, in index order.
    pub problems: Vec<GpuProblem>,
}

/// What is wrong with a GPU, so that no job gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuProblem {
    /// Its place in the driver's list.
    pub index: u32,
    /// Its lasting identifier, if that is known. Without it the GPU is missing from [`GpuProbe::gpus`].
    pub uuid: Option<String>,
    /// The problem itself.
    pub kind: GpuProblemKind,
}

/// Kinds of problems of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum GpuProblemKind {
    /// A call that succeeds on any sound GPU did not.
    Unreadable {
        /// What was to be read.
        what: &'static str,
        /// What NVML said.
        error: String,
    },
    /// The GPU is divided into MIG instances, and cannot be given away as a whole.
    Divided,
}

impl fmt::Display for GpuProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpu {}", self.index)?;
        if let Some(uuid) = &self.uuid {
            write!(f, " ({uuid})")?;
        }
        match &self.kind {
            GpuProblemKind::Unreadable { what, error } => {
                write!(f, ": cannot read its {what}: {error}")
            }
            GpuProblemKind::Divided => {
                f.write_str(": it is divided (MIG), which is not supported: nvidia-smi -mig 0")
            }
        }
    }
}

/// A handle of NVML, kept because loading and starting it takes from milliseconds to seconds.
pub struct GpuReader {
    library: OsString,
    nvml: Option<Nvml>,
    /// Where the kernel shows PCI devices.
    pci_devices: PathBuf,
    /// GPUs as they were read last, by index, to name the ones that stop answering.
    known: BTreeMap<u32, Gpu>,
    /// What the last reading complained about, so that a state is logged once and not each time it is seen.
    told: (Option<String>, Vec<GpuProblem>),
}

impl fmt::Debug for GpuReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuReader")
            .field("library", &self.library)
            .field("loaded", &self.nvml.is_some())
            .field("known", &self.known)
            .finish_non_exhaustive()
    }
}

impl GpuReader {
    /// A reader of the NVML at `library`: a path, or a name such as [`DEFAULT_LIBRARY`] that the dynamic loader finds.
    /// Nothing is loaded yet. A library that is not there is no error: each [`read`](GpuReader::read) says so and tries
    /// again, because on a machine that just started the driver may come after the agent.
    #[must_use]
    pub fn open(library: impl AsRef<OsStr>) -> GpuReader {
        GpuReader {
            library: library.as_ref().to_owned(),
            nvml: None,
            pci_devices: PathBuf::from("/sys/bus/pci/devices"),
            known: BTreeMap::new(),
            told: (None, Vec::new()),
        }
    }

    /// Reads all GPUs.
    ///
    /// A GPU that has stopped answering is listed as unhealthy with what was known of it; one that never said who it is
    /// cannot be listed, and is only among the problems.
    pub fn read(&mut self) -> GpuProbe {
        let probe = self.load().and_then(|()| self.read_loaded());
        let probe = probe.unwrap_or_else(|reason| self.absent(reason));
        self.tell(&probe);
        probe
    }

    /// Loads and starts NVML unless that is done.
    fn load(&mut self) -> Result<(), String> {
        if self.nvml.is_none() {
            let started = Nvml::builder().lib_path(&self.library).init();
            self.nvml = Some(started.map_err(|error| self.load_error(&error))?);
        }
        Ok(())
    }

    fn load_error(&self, error: &NvmlError) -> String {
        let library = Path::new(&self.library).display();
        match error {
            NvmlError::LibloadingError(cause) => {
                format!("no NVML: {library} cannot be loaded: {cause}")
            }
            error => format!("no NVML: {library} does not start: {error}"),
        }
    }

    fn read_loaded(&mut self) -> Result<GpuProbe, String> {
        let Some(nvml) = &self.nvml else {
            return Err("no NVML: it is not loaded".to_owned());
        };
        let count = nvml.device_count();
        let count = count.map_err(|error| format!("no NVML: it cannot count the GPUs: {error}"))?;
        let mut probe = GpuProbe {
            driver: nvml.sys_driver_version().ok(),
            ..GpuProbe::default()
        };
        for index in 0..count.min(MAX_GPUS_PER_NODE) {
            let reading = Reading {
                nvml,
                index,
                pci_devices: &self.pci_devices,
                known: self.known.get(&index),
            };
            let (gpu, problem) = reading.take();
            probe.gpus.extend(gpu);
            probe.problems.extend(problem);
        }
        forget_moved(&mut probe);
        self.known = probe
            .gpus
            .iter()
            .map(|gpu| (gpu.index, gpu.clone()))
            .collect();
        Ok(probe)
    }

    /// What is left to say when NVML does not answer: the GPUs that were there are not usable. NVML is started anew the
    /// next time, since a driver that was replaced never answers to an old handle.
    fn absent(&mut self, reason: String) -> GpuProbe {
        self.nvml = None;
        for gpu in self.known.values_mut() {
            gpu.healthy = false;
        }
        GpuProbe {
            gpus: self.known.values().cloned().collect(),
            absent_reason: Some(reason),
            ..GpuProbe::default()
        }
    }

    /// Logs what changed since the last reading.
    fn tell(&mut self, probe: &GpuProbe) {
        let now = (probe.absent_reason.clone(), probe.problems.clone());
        if now == self.told {
            return;
        }
        match &probe.absent_reason {
            // Most machines without GPUs have no library; that is worth a line only to who looks for it.
            Some(reason) if self.known.is_empty() => debug!(%reason, "no gpus read"),
            Some(reason) => warn!(%reason, gpus = self.known.len(), "gpus became unusable"),
            None => {}
        }
        for problem in probe
            .problems
            .iter()
            .filter(|problem| !self.told.1.contains(problem))
        {
            let listed = problem.uuid.is_some();
            warn!(gpu = problem.index, listed, %problem, "gpu cannot be given to jobs");
        }
        if probe.problems.is_empty() && !self.told.1.is_empty() && probe.absent_reason.is_none() {
            info!(
                gpus = probe.gpus.len(),
                "all gpus can be given to jobs again"
            );
        }
        self.told = now;
    }
}

/// Takes away what was remembered of a silent GPU if the same GPU answers under another index now.
fn forget_moved(probe: &mut GpuProbe) {
    let answering: Vec<String> = probe
        .gpus
        .iter()
        .filter(|gpu| gpu.healthy)
        .map(|gpu| gpu.uuid.clone())
        .collect();
    probe
        .gpus
        .retain(|gpu| gpu.healthy || !answering.contains(&gpu.uuid));
}

/// The reading of one GPU.
struct Reading<'a> {
    nvml: &'a Nvml,
    index: u32,
    pci_devices: &'a Path,
    known: Option<&'a Gpu>,
}

impl Reading<'_> {
    /// The GPU, if it is known which one it is, and what is wrong with it.
    fn take(&self) -> (Option<Gpu>, Option<GpuProblem>) {
        let device = match self.nvml.device_by_index(self.index) {
            Ok(device) => device,
            Err(error) => return self.silent("handle", &error),
        };
        let uuid = match device.uuid() {
            Ok(uuid) => uuid,
            Err(error) => return self.silent("uuid", &error),
        };
        // What was known counts only if it is still the same GPU.
        let known = self.known.filter(|known| known.uuid == uuid);
        let mut gpu = known.cloned().unwrap_or_default();
        gpu.index = self.index;
        gpu.uuid.clone_from(&uuid);
        let kind = self.fill(&device, &mut gpu).err();
        gpu.healthy = kind.is_none();
        let problem = kind.map(|kind| GpuProblem {
            index: self.index,
            uuid: Some(uuid),
            kind,
        });
        (Some(gpu), problem)
    }

    /// A GPU that does not say who it is: the one that was there, or none.
    fn silent(&self, what: &'static str, error: &NvmlError) -> (Option<Gpu>, Option<GpuProblem>) {
        let gpu = self.known.map(|known| Gpu {
            healthy: false,
            ..known.clone()
        });
        let kind = GpuProblemKind::Unreadable {
            what,
            error: error.to_string(),
        };
        let uuid = gpu.as_ref().map(|gpu| gpu.uuid.clone());
        (
            gpu,
            Some(GpuProblem {
                index: self.index,
                uuid,
                kind,
            }),
        )
    }

    /// Reads the facts of a GPU, as many as there are. The memory's size is asked of the GPU itself each time, so that a
    /// GPU that is gone is noticed here even if the driver still remembers its name.
    fn fill(&self, device: &Device<'_>, gpu: &mut Gpu) -> Result<(), GpuProblemKind> {
        let needed = |what: &'static str| {
            move |error: NvmlError| GpuProblemKind::Unreadable {
                what,
                error: error.to_string(),
            }
        };
        gpu.model = device.name().map_err(needed("name"))?;
        let pci = device.pci_info().map_err(needed("PCI address"))?;
        gpu.pci_address.clone_from(&pci.bus_id);
        gpu.memory_bytes = device.memory_info().map_err(needed("memory"))?.total;
        gpu.compute_capability = device
            .cuda_compute_capability()
            .ok()
            .map(|version| format!("{}.{}", version.major, version.minor));
        gpu.numa_node = numa_node(device).or_else(|| numa_node_by_kernel(self.pci_devices, &pci));
        // A GPU without the feature answers with an error.
        match device.mig_mode() {
            Ok(mode) if mode.current != 0 => Err(GpuProblemKind::Divided),
            _ => Ok(()),
        }
    }
}

/// The NUMA node whose memory is nearest to a GPU, as the driver says. (`nvmlDeviceGetNumaNodeId` is something else: the
/// node that a GPU's own memory is on machines where it is one.)
fn numa_node(device: &Device<'_>) -> Option<u32> {
    let words = device.memory_affinity(NUMA_WORDS, SCOPE_NODE).ok()?;
    let mut nodes = (0u32..).zip(&words).filter(|(_, word)| **word != 0);
    let (place, word) = nodes.next()?;
    // Near to several nodes is near to none in particular.
    let single = word.is_power_of_two() && nodes.next().is_none();
    single.then(|| place * u64::BITS + word.trailing_zeros())
}

/// The NUMA node of a PCI device as the kernel says; -1 there means that it knows none.
fn numa_node_by_kernel(pci_devices: &Path, pci: &PciInfo) -> Option<u32> {
    // A node number and a line end; the bound is for what is not the file that it should be.
    const MAX_BYTES: u64 = 32;
    let address = format!("{:04x}:{:02x}:{:02x}.0", pci.domain, pci.bus, pci.device);
    let file = File::open(pci_devices.join(address).join("numa_node")).ok()?;
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::OnceLock;

    use tempfile::TempDir;

    use super::*;

    /// The stand-in for NVML, compiled once for all tests of this process.
    fn compiled() -> &'static Path {
        static COMPILED: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
        let (_, path) = COMPILED.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("libnvidia-ml.so.1");
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fake-nvml/src/lib.rs");
            let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
            let output = Command::new(rustc)
                .args([
                    "--edition",
                    "2024",
                    "--crate-type",
                    "cdylib",
                    "--crate-name",
                    "nvidia_ml",
                    "-o",
                ])
                .arg(&path)
                .arg(source)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            (dir, path)
        });
        path
    }

    /// A machine with a copy of the library and a scenario of its own.
    struct Machine {
        dir: TempDir,
        library: PathBuf,
    }

    impl Machine {
        fn new(scenario: &str) -> Machine {
            let dir = tempfile::tempdir().unwrap();
            let library = dir.path().join("libnvidia-ml.so.1");
            std::fs::copy(compiled(), &library).unwrap();
            let machine = Machine { dir, library };
            machine.becomes(scenario);
            machine
        }

        fn becomes(&self, scenario: &str) {
            let new = self.dir.path().join("new");
            std::fs::write(&new, scenario).unwrap();
            std::fs::rename(&new, self.library.with_extension("1.scenario")).unwrap();
        }

        fn reader(&self) -> GpuReader {
            let mut reader = GpuReader::open(&self.library);
            // The scenario's PCI addresses may be those of something real here.
            reader.pci_devices = self.dir.path().join("devices");
            reader
        }
    }

    const TWO: &str = "driver 550.54.15\n\
        gpu 0 name \"NVIDIA H100 80GB HBM3\" uuid GPU-a memory_mib 81559 pci 00000000:18:00.0 numa 1 cuda_capability 9.0\n\
        gpu 1 name \"NVIDIA L4\" uuid GPU-b memory_mib 23034 pci 00000000:2A:00.0 cuda_capability 8.9\n";

    fn health(probe: &GpuProbe) -> Vec<(u32, &str, bool)> {
        probe
            .gpus
            .iter()
            .map(|gpu| (gpu.index, gpu.uuid.as_str(), gpu.healthy))
            .collect()
    }

    #[test]
    fn facts_of_sound_gpus_are_read() {
        let machine = Machine::new(TWO);
        let probe = machine.reader().read();
        let expected = Gpu {
            index: 0,
            uuid: "GPU-a".to_owned(),
            model: "NVIDIA H100 80GB HBM3".to_owned(),
            memory_bytes: 81_559 << 20,
            pci_address: "00000000:18:00.0".to_owned(),
            numa_node: Some(1),
            compute_capability: Some("9.0".to_owned()),
            healthy: true,
        };
        assert_eq!(probe.driver.as_deref(), Some("550.54.15"));
        assert_eq!(probe.gpus.len(), 2);
        assert_eq!(probe.gpus.first(), Some(&expected));
        assert_eq!((probe.absent_reason, probe.problems), (None, Vec::new()));
    }

    #[test]
    fn a_silent_driver_leaves_the_numa_node_to_the_kernel() {
        let machine = Machine::new(TWO);
        let device = machine.dir.path().join("devices/0000:2a:00.0");
        std::fs::create_dir_all(&device).unwrap();
        let mut reader = machine.reader();
        for (text, expected) in [("3\n", Some(3)), ("-1\n", None), ("", None)] {
            std::fs::write(device.join("numa_node"), text).unwrap();
            let numa: Vec<Option<u32>> =
                reader.read().gpus.iter().map(|gpu| gpu.numa_node).collect();
            assert_eq!(numa, [Some(1), expected], "{text:?}");
        }
    }

    #[test]
    fn no_library_is_no_gpus_and_a_reason() {
        let probe = GpuReader::open("/nowhere/libnvidia-ml.so.1").read();
        assert!(probe.gpus.is_empty());
        let reason = probe.absent_reason.unwrap();
        assert!(
            reason.starts_with("no NVML: /nowhere/libnvidia-ml.so.1 cannot be loaded"),
            "{reason}"
        );
    }

    #[test]
    fn a_driver_that_starts_late_is_found_and_one_that_goes_takes_its_gpus() {
        let machine = Machine::new("init_error DRIVER_NOT_LOADED\n");
        let mut reader = machine.reader();
        let reason = reader.read().absent_reason.unwrap();
        assert!(
            reason.ends_with("does not start: NVIDIA driver is not loaded"),
            "{reason}"
        );
        machine.becomes(TWO);
        assert_eq!(
            health(&reader.read()),
            [(0, "GPU-a", true), (1, "GPU-b", true)]
        );
        let gone = "fail any nvmlDeviceGetCount_v2 UNKNOWN\ninit_error DRIVER_NOT_LOADED\n";
        machine.becomes(&format!("{TWO}{gone}"));
        let reason = reader.read().absent_reason.unwrap();
        assert!(
            reason.starts_with("no NVML: it cannot count the GPUs"),
            "{reason}"
        );
        let probe = reader.read();
        assert_eq!(health(&probe), [(0, "GPU-a", false), (1, "GPU-b", false)]);
        assert!(probe.absent_reason.is_some());
        machine.becomes(TWO);
        assert_eq!(
            health(&reader.read()),
            [(0, "GPU-a", true), (1, "GPU-b", true)]
        );
    }

    #[test]
    fn a_gpu_that_was_lost_before_it_was_known_is_only_a_problem() {
        let machine = Machine::new(&format!("{TWO}gpu 0 lost\n"));
        let probe = machine.reader().read();
        assert_eq!(health(&probe), [(1, "GPU-b", true)]);
        let [problem] = probe.problems.as_slice() else {
            panic!("one problem")
        };
        assert_eq!((problem.index, &problem.uuid), (0, &None));
        assert!(
            problem
                .to_string()
                .starts_with("gpu 0: cannot read its handle: device fell off the bus")
        );
    }

    #[test]
    fn a_gpu_that_is_lost_later_stays_listed_until_it_is_back() {
        let machine = Machine::new(TWO);
        let mut reader = machine.reader();
        let before = reader.read();
        for word in ["lost", "lost_attached"] {
            machine.becomes(&format!("{TWO}gpu 1 {word}\n"));
            for _ in 0..2 {
                let probe = reader.read();
                assert_eq!(
                    health(&probe),
                    [(0, "GPU-a", true), (1, "GPU-b", false)],
                    "{word}"
                );
                assert_eq!(
                    probe.gpus.last().map(|gpu| gpu.memory_bytes),
                    Some(23_034 << 20)
                );
                let [problem] = probe.problems.as_slice() else {
                    panic!("one problem")
                };
                assert_eq!(problem.uuid.as_deref(), Some("GPU-b"));
            }
        }
        machine.becomes(TWO);
        assert_eq!(reader.read(), before);
    }

    #[test]
    fn a_gpu_that_moved_to_another_index_is_not_listed_twice() {
        let machine = Machine::new(TWO);
        let mut reader = machine.reader();
        reader.read();
        machine.becomes("gpu 0 uuid GPU-b\ngpu 1 uuid GPU-a lost\n");
        assert_eq!(health(&reader.read()), [(0, "GPU-b", true)]);
    }

    #[test]
    fn divided_and_half_readable_gpus_are_listed_but_not_healthy() {
        let machine = Machine::new(&format!(
            "{TWO}gpu 0 mig on\nfail 1 nvmlDeviceGetMemoryInfo_v2 UNKNOWN\n"
        ));
        let probe = machine.reader().read();
        assert_eq!(health(&probe), [(0, "GPU-a", false), (1, "GPU-b", false)]);
        let [divided, unreadable] = probe.problems.as_slice() else {
            panic!("two problems")
        };
        assert_eq!(divided.kind, GpuProblemKind::Divided);
        let text = unreadable.to_string();
        assert_eq!(
            text,
            "gpu 1 (GPU-b): cannot read its memory: an internal driver error occurred"
        );
    }
}
