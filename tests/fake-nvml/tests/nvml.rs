//! The fake, compiled as `cli/build.rs` compiles it, loaded and read by the crate that the agent reads the real NVML
//! with. It owns the C interface's side of the truth: layouts, codes, and that copies are independent.
#![expect(clippy::unwrap_used, reason = "a helper that fails ends its test")]
#![expect(
    unsafe_code,
    reason = "some answers can only be had by calling the C functions as C does"
)]

use std::ffi::c_ulong;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{
    Brand, EccCounter, MemoryError, MemoryLocation, TemperatureSensor, TopologyLevel,
};
use nvml_wrapper::enums::device::{DeviceArchitecture, UsedGpuMemory};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use tempfile::TempDir;
use trainyard_fake_nvml::{gpu_uuid, scenario, scenario_path, write_scenario};

/// NVML's codes, as numbers, so that a wrong table in the fake cannot agree with itself.
const UNINITIALIZED: u32 = 1;
const INVALID_ARGUMENT: u32 = 2;
const INSUFFICIENT_SIZE: u32 = 7;
const VERSION_MISMATCH: u32 = 25;

/// The library, compiled once for all tests of this process.
fn compiled() -> &'static Path {
    static COMPILED: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = COMPILED.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libnvidia-ml.so.1");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/lib.rs");
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let output = Command::new(rustc)
            .args([
                "--edition",
                "2024",
                "--crate-type",
                "cdylib",
                "--crate-name",
                "nvidia_ml",
            ])
            .args(["-D", "warnings", "-o"])
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

/// A copy of the library with a scenario of its own.
struct Copy {
    _dir: TempDir,
    library: PathBuf,
}

impl Copy {
    fn new(text: &str) -> Copy {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libnvidia-ml.so.1");
        std::fs::copy(compiled(), &library).unwrap();
        let copy = Copy { _dir: dir, library };
        copy.write(text);
        copy
    }

    fn write(&self, text: &str) {
        trainyard_fake_nvml::check(text).unwrap();
        write_scenario(&scenario_path(&self.library), text).unwrap();
    }

    fn try_open(&self) -> Result<Nvml, NvmlError> {
        Nvml::builder().lib_path(self.library.as_os_str()).init()
    }

    fn open(&self) -> Nvml {
        self.try_open().unwrap()
    }
}

#[test]
fn eight_h100s_are_what_the_specification_says() {
    let copy = Copy::new(&scenario("8xH100", "n1").unwrap());
    let nvml = copy.open();
    assert_eq!(nvml.sys_driver_version().unwrap(), "550.54.15");
    assert_eq!(nvml.sys_nvml_version().unwrap(), "12.550.54.15");
    assert_eq!(nvml.sys_cuda_driver_version().unwrap(), 12_040);
    assert_eq!(nvml.device_count().unwrap(), 8);
    let mut addresses = Vec::new();
    for index in 0..8 {
        let device = nvml.device_by_index(index).unwrap();
        assert_eq!(device.index().unwrap(), index);
        assert_eq!(device.minor_number().unwrap(), index);
        assert_eq!(device.name().unwrap(), "NVIDIA H100 80GB HBM3");
        assert_eq!(device.uuid().unwrap(), gpu_uuid("n1", index));
        assert_eq!(device.serial().unwrap().len(), 13);
        assert_eq!(device.brand().unwrap(), Brand::Nvidia);
        assert_eq!(device.architecture().unwrap(), DeviceArchitecture::Hopper);
        let capability = device.cuda_compute_capability().unwrap();
        assert_eq!((capability.major, capability.minor), (9, 0));
        let memory = device.memory_info().unwrap();
        assert_eq!(memory.total, 81_559 << 20);
        assert_eq!((memory.used, memory.free), (0, memory.total));
        assert_eq!(device.utilization_rates().unwrap().gpu, 0);
        assert_eq!(device.temperature(TemperatureSensor::Gpu).unwrap(), 35);
        assert_eq!(device.power_usage().unwrap(), 70_000);
        assert_eq!(device.enforced_power_limit().unwrap(), 700_000);
        assert_eq!(device.numa_node_id().unwrap(), index / 4);
        assert_eq!(device.memory_affinity(2, 0).unwrap(), [1 << (index / 4), 0]);
        assert!(device.is_ecc_enabled().unwrap().currently_enabled);
        assert_eq!(device.mig_mode().unwrap().current, 0);
        assert!(device.running_compute_processes().unwrap().is_empty());
        let pci = device.pci_info().unwrap();
        assert_eq!(pci.pci_device_id, 0x2330_10de);
        assert_eq!(
            pci.bus_id,
            format!("{:08X}:{:02X}:{:02X}.0", pci.domain, pci.bus, pci.device)
        );
        addresses.push(pci.bus_id);
        assert!(device.link_wrapper_for(17).is_active().unwrap());
    }
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 8);
}

#[test]
fn gpus_are_found_by_uuid_and_by_pci_address() {
    let copy = Copy::new(&scenario("4xL4", "n1").unwrap());
    let nvml = copy.open();
    let third = nvml.device_by_index(2).unwrap();
    let found = nvml.device_by_uuid(third.uuid().unwrap()).unwrap();
    assert_eq!(found.index().unwrap(), 2);
    let address = third.pci_info().unwrap().bus_id;
    assert_eq!(
        nvml.device_by_pci_bus_id(address.clone())
            .unwrap()
            .index()
            .unwrap(),
        2
    );
    let short = address.trim_start_matches("0000");
    assert_eq!(
        nvml.device_by_pci_bus_id(format!("0000{short}"))
            .unwrap()
            .index()
            .unwrap(),
        2
    );
    assert!(matches!(
        nvml.device_by_uuid("GPU-nobody"),
        Err(NvmlError::NotFound)
    ));
    assert!(matches!(
        nvml.device_by_pci_bus_id("FF:00.0"),
        Err(NvmlError::NotFound)
    ));
    assert!(matches!(
        nvml.device_by_pci_bus_id("here"),
        Err(NvmlError::InvalidArg)
    ));
    assert!(matches!(
        nvml.device_by_index(4),
        Err(NvmlError::InvalidArg)
    ));
}

#[test]
fn changes_of_the_scenario_are_seen_by_handles_that_are_already_out() {
    let text = scenario("2xA100", "n1").unwrap();
    let copy = Copy::new(&text);
    let nvml = copy.open();
    let device = nvml.device_by_index(1).unwrap();
    assert!(device.running_compute_processes().unwrap().is_empty());
    copy.write(&format!(
        "{text}process 1 pid 1234 memory_mib 512\nprocess 1 pid 77 memory_mib 1\n\
         gpu 1 util 93 memory_util 40 temp 71 used_mib 7 reserved_mib 100 ecc_uncorrected 3\n"
    ));
    let processes = device.running_compute_processes().unwrap();
    let read: Vec<(u32, u64)> = processes
        .iter()
        .map(|process| match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => (process.pid, bytes),
            UsedGpuMemory::Unavailable => panic!("memory is stated"),
        })
        .collect();
    assert_eq!(read, [(1234, 512 << 20), (77, 1 << 20)]);
    let memory = device.memory_info().unwrap();
    assert_eq!((memory.used, memory.reserved), (520 << 20, 100 << 20));
    assert_eq!(memory.used + memory.reserved + memory.free, memory.total);
    let rates = device.utilization_rates().unwrap();
    assert_eq!((rates.gpu, rates.memory), (93, 40));
    assert_eq!(device.temperature(TemperatureSensor::Gpu).unwrap(), 71);
    let errors = device
        .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
        .unwrap();
    assert_eq!(errors, 3);
    let in_memory = device
        .memory_error_counter(
            MemoryError::Uncorrected,
            EccCounter::Aggregate,
            MemoryLocation::Device,
        )
        .unwrap();
    assert_eq!(in_memory, 3);
    assert_eq!(
        nvml.device_by_index(0)
            .unwrap()
            .utilization_rates()
            .unwrap()
            .gpu,
        0
    );
}

#[test]
fn a_lost_gpu_answers_nothing_or_only_who_it_was() {
    let text = scenario("3xH100", "n1").unwrap();
    let copy = Copy::new(&text);
    let nvml = copy.open();
    let device = nvml.device_by_index(1).unwrap();
    let attached = nvml.device_by_index(2).unwrap();
    copy.write(&format!("{text}gpu 1 lost\ngpu 2 lost_attached\n"));
    assert_eq!(nvml.device_count().unwrap(), 3);
    assert!(matches!(device.uuid(), Err(NvmlError::GpuLost)));
    assert!(matches!(nvml.device_by_index(1), Err(NvmlError::GpuLost)));
    assert!(matches!(
        nvml.device_by_uuid(gpu_uuid("n1", 1)),
        Err(NvmlError::GpuLost)
    ));
    assert_eq!(attached.uuid().unwrap(), gpu_uuid("n1", 2));
    assert!(matches!(attached.memory_info(), Err(NvmlError::GpuLost)));
    assert!(matches!(
        attached.temperature(TemperatureSensor::Gpu),
        Err(NvmlError::GpuLost)
    ));
    assert_eq!(nvml.device_by_index(2).unwrap().index().unwrap(), 2);
    copy.write(&text);
    assert_eq!(device.uuid().unwrap(), gpu_uuid("n1", 1));
}

#[test]
fn two_copies_in_one_process_are_two_machines() {
    let one = Copy::new(&scenario("8xH100", "n1").unwrap());
    let other = Copy::new(&scenario("2xT4", "n2").unwrap());
    let (first, second) = (one.open(), other.open());
    assert_eq!(
        (
            first.device_count().unwrap(),
            second.device_count().unwrap()
        ),
        (8, 2)
    );
    assert_eq!(
        first.device_by_index(0).unwrap().uuid().unwrap(),
        gpu_uuid("n1", 0)
    );
    let t4 = second.device_by_index(0).unwrap();
    assert_eq!(t4.uuid().unwrap(), gpu_uuid("n2", 0));
    assert_eq!(t4.name().unwrap(), "Tesla T4");
    first.shutdown().unwrap();
    assert_eq!(t4.temperature(TemperatureSensor::Gpu).unwrap(), 35);
    // Loaded again after it was closed, the first is itself again.
    assert_eq!(one.open().device_count().unwrap(), 8);
}

#[test]
fn start_and_end_are_counted() {
    let copy = Copy::new(&scenario("1xH100", "n1").unwrap());
    let nvml = copy.open();
    let second = copy.open();
    drop(second);
    assert_eq!(nvml.device_count().unwrap(), 1);
    let lib = nvml.lib();
    // SAFETY: functions of a loaded library with valid arguments.
    unsafe {
        let mut count = 0;
        assert_eq!(lib.nvmlShutdown(), 0);
        assert_eq!(lib.nvmlShutdown(), UNINITIALIZED);
        assert_eq!(lib.nvmlDeviceGetCount_v2(&raw mut count), UNINITIALIZED);
        assert_eq!(lib.nvmlInitWithFlags(0), 0);
        assert_eq!(lib.nvmlDeviceGetCount_v2(&raw mut count), 0);
    }
}

#[test]
fn without_a_scenario_or_by_its_word_the_driver_does_not_start() {
    let copy = Copy::new("init_error LIB_RM_VERSION_MISMATCH\n");
    assert!(matches!(
        copy.try_open(),
        Err(NvmlError::LibRmVersionMismatch)
    ));
    std::fs::remove_file(scenario_path(&copy.library)).unwrap();
    let bare = Copy {
        _dir: tempfile::tempdir().unwrap(),
        library: compiled().to_owned(),
    };
    assert!(matches!(bare.try_open(), Err(NvmlError::DriverNotLoaded)));
}

#[test]
fn a_damaged_scenario_leaves_the_last_good_one() {
    let text = scenario("2xH100", "n1").unwrap();
    let copy = Copy::new(&text);
    let nvml = copy.open();
    assert_eq!(nvml.device_count().unwrap(), 2);
    let path = scenario_path(&copy.library);
    std::fs::write(&path, "gpu 0 nonsense 1\n").unwrap();
    assert_eq!(nvml.device_count().unwrap(), 2);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(nvml.device_count().unwrap(), 2);
    copy.write("gpu 0\nfail any nvmlDeviceGetCount_v2 UNKNOWN\n");
    assert!(matches!(nvml.device_count(), Err(NvmlError::Unknown)));
    copy.write("gpu 0\n");
    assert_eq!(nvml.device_count().unwrap(), 1);
}

#[test]
fn features_that_a_gpu_lacks_are_not_supported() {
    let copy = Copy::new(&format!(
        "{}fail 0 nvmlDeviceGetTemperature NO_PERMISSION\ngpu 0 cpus 0-1,65\n",
        scenario("2xRTX4090", "n1").unwrap()
    ));
    let nvml = copy.open();
    let device = nvml.device_by_index(0).unwrap();
    assert_eq!(device.brand().unwrap(), Brand::GeForce);
    assert!(matches!(
        device.is_ecc_enabled(),
        Err(NvmlError::NotSupported)
    ));
    assert!(matches!(device.mig_mode(), Err(NvmlError::NotSupported)));
    assert!(matches!(
        device.link_wrapper_for(0).is_active(),
        Err(NvmlError::NotSupported)
    ));
    assert!(matches!(
        device.link_wrapper_for(18).is_active(),
        Err(NvmlError::InvalidArg)
    ));
    assert!(matches!(
        device.temperature(TemperatureSensor::Gpu),
        Err(NvmlError::NoPermission)
    ));
    let words: Vec<c_ulong> = device.cpu_affinity(4).unwrap();
    assert_eq!(words, [3, 2, 0, 0]);
    assert!(matches!(
        device.cpu_affinity(1),
        Err(NvmlError::InsufficientSize(_))
    ));
    let other = nvml.device_by_index(1).unwrap();
    assert!(matches!(
        other.cpu_affinity(4),
        Err(NvmlError::NotSupported)
    ));
}

#[test]
fn topology_follows_sockets_statements_and_links() {
    let copy = Copy::new(&format!(
        "{}topology 0 1 single\nnvlink 0 2 down\n",
        scenario("4xV100", "n1").unwrap()
    ));
    let nvml = copy.open();
    let gpus: Vec<_> = (0..4)
        .map(|index| nvml.device_by_index(index).unwrap())
        .collect();
    let level = |one: usize, other: usize| {
        let other = nvml.device_by_index(u32::try_from(other).unwrap()).unwrap();
        gpus[one].topology_common_ancestor(other).unwrap()
    };
    assert_eq!(level(0, 0), TopologyLevel::Internal);
    assert_eq!(level(1, 0), TopologyLevel::Single);
    assert_eq!(level(2, 3), TopologyLevel::Node);
    assert_eq!(level(1, 2), TopologyLevel::System);
    let remote = |link: u32| gpus[0].link_wrapper_for(link).remote_pci_info();
    assert_eq!(
        remote(0).unwrap().bus_id,
        gpus[1].pci_info().unwrap().bus_id
    );
    assert_eq!(
        remote(4).unwrap().bus_id,
        gpus[2].pci_info().unwrap().bus_id
    );
    assert!(!gpus[0].link_wrapper_for(2).is_active().unwrap());
    assert!(matches!(remote(2), Err(NvmlError::NotSupported)));
}

#[test]
fn critical_errors_reach_each_event_set_once() {
    let text = scenario("2xH100", "n1").unwrap();
    // An error of before the set was made is not an event.
    let text = format!("{text}xid 1 13\n");
    let copy = Copy::new(&text);
    let nvml = copy.open();
    let register = || {
        let set = nvml.create_event_set().unwrap();
        let device = nvml.device_by_index(1).unwrap();
        device
            .register_events(EventTypes::CRITICAL_XID_ERROR, set)
            .map_err(|e| e.error)
            .unwrap()
    };
    let (set, other) = (register(), register());
    assert!(matches!(set.wait(0), Err(NvmlError::Timeout)));
    std::thread::scope(|scope| {
        scope.spawn(|| copy.write(&format!("{text}xid 0 48\nxid 1 79\nxid 1 94\n")));
        for expected in [79, 94] {
            let event = set.wait(60_000).unwrap();
            assert_eq!(event.device.index().unwrap(), 1);
            assert_eq!(event.event_data, Some(XidError::Value(expected)));
        }
    });
    let start = Instant::now();
    assert!(matches!(set.wait(20), Err(NvmlError::Timeout)));
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert_eq!(other.wait(0).unwrap().event_data, Some(XidError::Value(79)));
    set.release_events().unwrap();
}

#[test]
fn wrong_arguments_of_c_callers_get_nvmls_codes() {
    let copy = Copy::new(&format!(
        "{}process 0 pid 1 memory_mib 1\nprocess 0 pid 2 memory_mib 1\n",
        scenario("1xH100", "n1").unwrap()
    ));
    let nvml = copy.open();
    let lib = nvml.lib();
    let null = std::ptr::null_mut::<u32>();
    // SAFETY: functions of a loaded library; the invalid arguments are null or numbers, which the fake promises to
    // refuse, and all others are valid.
    unsafe {
        let device = nvml.device_by_index(0).unwrap().handle();
        assert_eq!(lib.nvmlDeviceGetCount_v2(null), INVALID_ARGUMENT);
        assert_eq!(
            lib.nvmlDeviceGetHandleByIndex_v2(0, std::ptr::null_mut()),
            INVALID_ARGUMENT
        );
        let mut found = device;
        assert_eq!(
            lib.nvmlDeviceGetHandleByUUID(std::ptr::null(), &raw mut found),
            INVALID_ARGUMENT
        );
        assert_eq!(lib.nvmlDeviceGetIndex(device, null), INVALID_ARGUMENT);
        assert_eq!(
            lib.nvmlDeviceGetTemperature(device, 9, &mut 0),
            INVALID_ARGUMENT
        );
        for bad in [0usize, 1, 0x4750_0001, usize::MAX] {
            let handle = std::ptr::without_provenance_mut(bad);
            assert_eq!(
                lib.nvmlDeviceGetIndex(handle, &mut 0),
                INVALID_ARGUMENT,
                "{bad:#x}"
            );
        }
        let mut short = [0; 8];
        let code = lib.nvmlDeviceGetUUID(device, short.as_mut_ptr(), 8);
        assert_eq!(code, INSUFFICIENT_SIZE);
        assert_eq!(
            lib.nvmlDeviceGetUUID(device, std::ptr::null_mut(), 96),
            INVALID_ARGUMENT
        );

        let mut memory = std::mem::zeroed();
        let code = lib.nvmlDeviceGetMemoryInfo_v2(device, &raw mut memory);
        assert_eq!(code, VERSION_MISMATCH);
        let mut memory = std::mem::zeroed();
        assert_eq!(lib.nvmlDeviceGetMemoryInfo(device, &raw mut memory), 0);
        assert_eq!((memory.total, memory.used), (81_559 << 20, 2 << 20));

        let mut count = 0;
        let list = |count: &mut u32, infos| {
            lib.nvmlDeviceGetComputeRunningProcesses_v3(device, count, infos)
        };
        let none = std::ptr::null_mut();
        assert_eq!(list(&mut count, none), INSUFFICIENT_SIZE);
        assert_eq!(count, 2);
        assert_eq!(list(&mut count, none), INVALID_ARGUMENT);
        let mut infos = [std::mem::zeroed(), std::mem::zeroed()];
        count = 1;
        let code = list(&mut count, infos.as_mut_ptr());
        assert_eq!((code, count), (INSUFFICIENT_SIZE, 2));
        assert_eq!(infos[0].pid, 0);
        assert_eq!(list(&mut count, infos.as_mut_ptr()), 0);
        assert_eq!((infos[0].pid, infos[1].pid), (1, 2));

        let mut rows = [9u32; 4];
        let [a, b, c, d] = &mut rows;
        assert_eq!(lib.nvmlDeviceGetRemappedRows(device, a, b, c, d), 0);
        assert_eq!(rows, [0; 4]);
        assert_eq!(
            lib.nvmlEventSetFree(std::ptr::without_provenance_mut(0x4556_0001)),
            INVALID_ARGUMENT
        );
        let text = std::ffi::CStr::from_ptr(lib.nvmlErrorString(15));
        assert_eq!(text, c"GPU is lost");
    }
}
