//! NVML's C functions about a GPU's health: ECC, replaced rows, MIG, and the events that tell of critical errors.
#![expect(
    unsafe_code,
    reason = "exporting a C name is unsafe: no other library may define it"
)]

use std::ffi::{c_uint, c_ulonglong};
use std::time::{Duration, Instant};

use crate::abi::{Code, DeviceHandle, EventData, NO_INSTANCE, Out, SetHandle};
use crate::exports::{device_functions, functions};
use crate::library::{gpu_of, guarded, library};
use crate::scenario::{Feature, Gpu};

/// `nvmlEventTypeXidCriticalError`, the one kind of event that a scenario can cause.
const XID: c_ulonglong = 8;

/// How often a waiting caller's scenario is read again: soon for a test, rarely for a processor.
const EVENT_POLL: Duration = Duration::from_millis(5);

device_functions! {
    nvmlDeviceGetEccMode(current: Out<c_uint>, pending: Out<c_uint>) |_, gpu| {
        put_feature(gpu.ecc, &current, &pending)
    };

    nvmlDeviceGetMigMode(current: Out<c_uint>, pending: Out<c_uint>) |_, gpu| {
        put_feature(gpu.mig, &current, &pending)
    };

    nvmlDeviceGetTotalEccErrors(kind: c_uint, counter: c_uint, count: Out<c_ulonglong>) |_, gpu| {
        count.put(ecc_errors(gpu, kind, counter)?)
    };

    nvmlDeviceGetMemoryErrorCounter(
        kind: c_uint, counter: c_uint, location: c_uint, count: Out<c_ulonglong>
    ) |_, gpu| {
        let errors = ecc_errors(gpu, kind, counter)?;
        match location {
            // NVML_MEMORY_LOCATION_DRAM has them all.
            2 => count.put(errors),
            0 | 1 | 3..=7 => count.put(0),
            _ => Err(Code::INVALID_ARGUMENT),
        }
    };

    nvmlDeviceGetRemappedRows(
        corrected: Out<c_uint>, uncorrected: Out<c_uint>, pending: Out<c_uint>, failed: Out<c_uint>
    ) |_, gpu| {
        corrected.put(gpu.remapped.corrected)?;
        uncorrected.put(gpu.remapped.uncorrected)?;
        pending.put(gpu.remapped.pending.into())?;
        failed.put(gpu.remapped.failed.into())
    };

    nvmlDeviceGetSupportedEventTypes(types: Out<c_ulonglong>) |_, _| types.put(XID);
}

/// Writes a feature's present and pending state, which are the same here.
fn put_feature(feature: Feature, current: &Out<c_uint>, pending: &Out<c_uint>) -> Result<(), Code> {
    let state = match feature {
        Feature::None => return Err(Code::NOT_SUPPORTED),
        Feature::Off => 0,
        Feature::On => 1,
    };
    current.put(state)?;
    pending.put(state)
}

/// Errors of `kind`; since the last reset (`counter` 0) there were as many as ever (`counter` 1).
fn ecc_errors(gpu: &Gpu, kind: c_uint, counter: c_uint) -> Result<u64, Code> {
    let errors = match kind {
        0 => gpu.ecc_corrected,
        1 => gpu.ecc_uncorrected,
        _ => return Err(Code::INVALID_ARGUMENT),
    };
    match (counter, gpu.ecc) {
        (2.., _) => Err(Code::INVALID_ARGUMENT),
        (_, Feature::None | Feature::Off) => Err(Code::NOT_SUPPORTED),
        (_, Feature::On) => Ok(errors),
    }
}

functions! {
    nvmlEventSetCreate(set: Out<SetHandle>) -> Code {
        guarded(|| {
            if set.is_null() {
                return Err(Code::INVALID_ARGUMENT);
            }
            let handle = library().create_set()?;
            set.put(handle)
        })
    }

    nvmlEventSetFree(set: SetHandle) -> Code {
        guarded(|| library().free_set(set))
    }

    nvmlDeviceRegisterEvents(device: DeviceHandle, types: c_ulonglong, set: SetHandle) -> Code {
        guarded(|| {
            let mut library = library();
            let (machine, set) = library.set(set)?;
            let gpu = gpu_of(machine, device)?;
            gpu.answers("nvmlDeviceRegisterEvents")?;
            if types & !XID != 0 {
                return Err(Code::NOT_SUPPORTED);
            }
            *set.types.entry(gpu.index).or_default() |= types;
            Ok(())
        })
    }

    nvmlEventSetWait_v2(set: SetHandle, data: Out<EventData>, timeout_ms: c_uint) -> Code {
        guarded(|| {
            if data.is_null() {
                return Err(Code::INVALID_ARGUMENT);
            }
            data.put(wait_for_event(set, Duration::from_millis(timeout_ms.into()))?)
        })
    }
}

/// Waits until the scenario has a critical error that the set listens to and has not delivered.
#[expect(
    clippy::disallowed_methods,
    reason = "the C call blocks by contract, and a file gives no signal when it changes"
)]
fn wait_for_event(set: SetHandle, timeout: Duration) -> Result<EventData, Code> {
    let start = Instant::now();
    loop {
        // The lock is not held while sleeping, so that other threads' calls go on.
        if let Some(event) = next_event(set)? {
            return Ok(event);
        }
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(Code::TIMEOUT);
        }
        std::thread::sleep(left.min(EVENT_POLL));
    }
}

fn next_event(set: SetHandle) -> Result<Option<EventData>, Code> {
    let mut library = library();
    let (machine, set) = library.set(set)?;
    // A shorter list than before is a new scenario: its errors are to come.
    if set.seen > machine.xids.len() {
        set.seen = 0;
    }
    while let Some((index, code)) = machine.xids.get(set.seen) {
        set.seen += 1;
        if set.types.get(index).is_some_and(|types| types & XID != 0) {
            return Ok(Some(EventData {
                device: DeviceHandle::of(*index),
                event_type: XID,
                event_data: *code,
                gpu_instance_id: NO_INSTANCE,
                compute_instance_id: NO_INSTANCE,
            }));
        }
    }
    Ok(None)
}
