//! NVML's C functions: start and end, the system, finding GPUs, and what a GPU is and does. Each function only checks its
//! arguments and copies; what a machine has is the scenario's matter. Health and topology have files of their own.
#![expect(
    unsafe_code,
    reason = "exporting a C name is unsafe: no other library may define it"
)]

use std::ffi::{c_char, c_int, c_uint};

use crate::abi::{
    Code, DeviceHandle, Memory, MemoryV2, NO_INSTANCE, Out, PciInfo, ProcessInfo, Text,
    Utilization, char_array,
};
use crate::library::{guarded, library, on_machine};
use crate::pci::Pci;
use crate::scenario::{Gpu, Machine, mib};

/// Defines exported functions that ask something of a GPU. A macro, so that the exported name and the name that the
/// scenario's `fail` and `lost` go by cannot differ.
macro_rules! device_functions {
    ($($name:ident($($argument:ident: $kind:ty),*) |$machine:pat_param, $gpu:pat_param| $body:expr;)*) => {$(
        // SAFETY: NVML's own name; a process that loads the real library beside this one does so with local symbols.
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $name(
            device: $crate::abi::DeviceHandle,
            $($argument: $kind),*
        ) -> $crate::abi::Code {
            $crate::library::on_gpu(stringify!($name), device, |$machine, $gpu| $body)
        }
    )*};
}
pub(crate) use device_functions;

/// Defines other exported functions.
macro_rules! functions {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty $body:block)*) => {$(
        // SAFETY: as for the functions of a GPU.
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $name($($argument: $kind),*) -> $result $body
    )*};
}
pub(crate) use functions;

functions! {
    nvmlInit_v2() -> Code {
        guarded(|| library().initialise())
    }

    nvmlInitWithFlags(_flags: c_uint) -> Code {
        guarded(|| library().initialise())
    }

    nvmlShutdown() -> Code {
        guarded(|| library().shut_down())
    }

    nvmlErrorString(code: Code) -> *const c_char {
        code.sentence().as_ptr()
    }

    nvmlSystemGetDriverVersion(version: Out<c_char>, length: c_uint) -> Code {
        on_machine("nvmlSystemGetDriverVersion", |machine| version.put_text(length, &machine.driver))
    }

    nvmlSystemGetNVMLVersion(version: Out<c_char>, length: c_uint) -> Code {
        guarded(|| version.put_text(length, library().nvml_version()))
    }

    nvmlSystemGetCudaDriverVersion_v2(version: Out<c_int>) -> Code {
        on_machine("nvmlSystemGetCudaDriverVersion_v2", |machine| version.put(machine.cuda))
    }

    nvmlDeviceGetCount_v2(count: Out<c_uint>) -> Code {
        // At most MAX_GPUS.
        on_machine("nvmlDeviceGetCount_v2", |machine| count.put(machine.gpus.len() as c_uint))
    }

    nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: Out<DeviceHandle>) -> Code {
        on_machine("nvmlDeviceGetHandleByIndex_v2", |machine| {
            let found = machine.gpus.get(index as usize).ok_or(Code::INVALID_ARGUMENT);
            put_handle("nvmlDeviceGetHandleByIndex_v2", found, &device)
        })
    }

    nvmlDeviceGetHandleByUUID(uuid: Text, device: Out<DeviceHandle>) -> Code {
        on_machine("nvmlDeviceGetHandleByUUID", |machine| {
            let uuid = uuid.read()?;
            let found = find(machine, |gpu| gpu.uuid == uuid);
            put_handle("nvmlDeviceGetHandleByUUID", found, &device)
        })
    }

    nvmlDeviceGetHandleByPciBusId_v2(bus_id: Text, device: Out<DeviceHandle>) -> Code {
        on_machine("nvmlDeviceGetHandleByPciBusId_v2", |machine| {
            let pci = Pci::parse(&bus_id.read()?).ok_or(Code::INVALID_ARGUMENT)?;
            let found = find(machine, |gpu| gpu.pci == pci);
            put_handle("nvmlDeviceGetHandleByPciBusId_v2", found, &device)
        })
    }
}

fn find(machine: &Machine, wanted: impl Fn(&Gpu) -> bool) -> Result<&Gpu, Code> {
    machine
        .gpus
        .iter()
        .find(|gpu| wanted(gpu))
        .ok_or(Code::NOT_FOUND)
}

/// Gives out the handle of a GPU that was found, if the function `name` may answer for it.
fn put_handle(
    name: &str,
    found: Result<&Gpu, Code>,
    device: &Out<DeviceHandle>,
) -> Result<(), Code> {
    if device.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    let gpu = found?;
    gpu.answers(name)?;
    device.put(DeviceHandle::of(gpu.index))
}

device_functions! {
    nvmlDeviceGetIndex(index: Out<c_uint>) |_, gpu| index.put(gpu.index);

    nvmlDeviceGetMinorNumber(minor: Out<c_uint>) |_, gpu| minor.put(gpu.minor);

    nvmlDeviceGetName(name: Out<c_char>, length: c_uint) |_, gpu| name.put_text(length, &gpu.name);

    nvmlDeviceGetUUID(uuid: Out<c_char>, length: c_uint) |_, gpu| uuid.put_text(length, &gpu.uuid);

    nvmlDeviceGetSerial(serial: Out<c_char>, length: c_uint) |_, gpu| {
        serial.put_text(length, &gpu.serial)
    };

    nvmlDeviceGetBrand(brand: Out<c_uint>) |_, gpu| brand.put(gpu.brand);

    nvmlDeviceGetArchitecture(architecture: Out<c_uint>) |_, gpu| {
        architecture.put(gpu.architecture)
    };

    nvmlDeviceGetCudaComputeCapability(major: Out<c_int>, minor: Out<c_int>) |_, gpu| {
        // The parser lets neither above 999.
        major.put(gpu.cuda_capability.0 as c_int)?;
        minor.put(gpu.cuda_capability.1 as c_int)
    };

    nvmlDeviceGetPciInfo_v3(info: Out<PciInfo>) |_, gpu| info.put(pci_info(gpu.pci, gpu.pci_id));

    nvmlDeviceGetMemoryInfo(memory: Out<Memory>) |_, gpu| {
        let sizes = Sizes::of(gpu);
        // The first version of the struct counts the driver's own memory as used.
        let used = sizes.used + sizes.reserved;
        memory.put(Memory { total: sizes.total, free: sizes.free, used })
    };

    nvmlDeviceGetMemoryInfo_v2(memory: Out<MemoryV2>) |_, gpu| {
        let version = memory.get()?.version;
        if version != MemoryV2::VERSION {
            return Err(Code::ARGUMENT_VERSION_MISMATCH);
        }
        let Sizes { total, reserved, used, free } = Sizes::of(gpu);
        memory.put(MemoryV2 { version, total, reserved, free, used })
    };

    nvmlDeviceGetUtilizationRates(rates: Out<Utilization>) |_, gpu| {
        rates.put(Utilization { gpu: gpu.util, memory: gpu.memory_util })
    };

    nvmlDeviceGetTemperature(sensor: c_uint, temperature: Out<c_uint>) |_, gpu| {
        // There is one kind of sensor, NVML_TEMPERATURE_GPU.
        if sensor != 0 {
            return Err(Code::INVALID_ARGUMENT);
        }
        temperature.put(gpu.temp)
    };

    nvmlDeviceGetPowerUsage(milliwatts: Out<c_uint>) |_, gpu| milliwatts.put(gpu.power_mw);

    nvmlDeviceGetEnforcedPowerLimit(milliwatts: Out<c_uint>) |_, gpu| {
        milliwatts.put(gpu.power_limit_mw)
    };

    nvmlDeviceGetComputeMode(mode: Out<c_uint>) |_, _| {
        // NVML_COMPUTEMODE_DEFAULT: any number of processes.
        mode.put(0)
    };

    nvmlDeviceGetComputeRunningProcesses_v3(count: Out<c_uint>, infos: Out<ProcessInfo>) |_, gpu| {
        let processes: Vec<ProcessInfo> = gpu
            .processes
            .iter()
            .map(|process| ProcessInfo {
                pid: process.pid,
                used_gpu_memory: mib(process.memory_mib),
                gpu_instance_id: NO_INSTANCE,
                compute_instance_id: NO_INSTANCE,
            })
            .collect();
        put_processes(&processes, &count, &infos)
    };

    nvmlDeviceGetGraphicsRunningProcesses_v3(count: Out<c_uint>, infos: Out<ProcessInfo>) |_, _| {
        put_processes(&[], &count, &infos)
    };
}

/// Bytes of a GPU's memory; they add up to `total`.
struct Sizes {
    total: u64,
    reserved: u64,
    used: u64,
    free: u64,
}

impl Sizes {
    fn of(gpu: &Gpu) -> Sizes {
        let total = mib(gpu.memory_mib);
        let reserved = mib(gpu.reserved_mib).min(total);
        let used = gpu.used_bytes().min(total - reserved);
        Sizes {
            total,
            reserved,
            used,
            free: total - reserved - used,
        }
    }
}

/// NVML's protocol for lists: the caller says how many fit, and hears how many there are.
fn put_processes(
    processes: &[ProcessInfo],
    count: &Out<c_uint>,
    infos: &Out<ProcessInfo>,
) -> Result<(), Code> {
    let capacity = count.get()?;
    // Bounded by the size of the file, far below what 32 bits hold.
    let length = processes.len() as c_uint;
    if capacity > 0 && infos.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    count.put(length)?;
    if length > capacity {
        return Err(Code::INSUFFICIENT_SIZE);
    }
    if length == 0 {
        return Ok(());
    }
    infos.put_all(capacity, processes)
}

/// NVML's struct for a PCI address.
pub(crate) fn pci_info(pci: Pci, pci_id: u32) -> PciInfo {
    PciInfo {
        bus_id_legacy: char_array(&pci.legacy()),
        domain: pci.domain,
        bus: pci.bus,
        device: pci.device,
        pci_device_id: pci_id,
        pci_sub_system_id: pci_id,
        bus_id: char_array(&pci.to_string()),
    }
}
